"""What the recorded flows (tests/golden, conversation) do not reach: refusals and that they leave no trace."""

from __future__ import annotations

import copy

import pytest

from seed_multimodal.errors import ConfigError, RequestError
from seed_multimodal.language.conversation import Dialogue, markdown, new_conversation

ANSWER = {"text": "Here: <image>", "images": ["cGl4ZWxz"], "images_ids": [[1, 2]], "error_msg": []}


def test_templates_are_independent() -> None:
    first = new_conversation("conv_seed_vicuna")
    first.append("USER", {"text": "hi", "images": [], "images_ids": []})
    assert new_conversation("conv_seed_vicuna").messages == []
    with pytest.raises(ConfigError, match="conv_seed_llama2"):
        new_conversation("conv_other")
    with pytest.raises(RequestError, match="USER or ASSISTANT"):
        first.append("SYSTEM", {"text": "", "images": [], "images_ids": []})


def test_typed_placeholders_are_refused_without_a_trace() -> None:
    dialogue = Dialogue()
    dialogue.add_text("look ")
    with pytest.raises(RequestError, match="<image>"):
        dialogue.add_text("at <image>")
    assert dialogue.conversation.to_pairs() == [["look ", None]]


def test_an_answer_that_does_not_fit_leaves_the_conversation_as_it_was() -> None:
    dialogue = Dialogue()
    dialogue.add_text("draw")
    before = copy.deepcopy((dialogue.conversation.messages, dialogue.pending))
    for wrong in ({**ANSWER, "images_ids": []}, {**ANSWER, "text": "no flag"}):
        with pytest.raises(RequestError):
            dialogue.receive(wrong, lambda text: "a.png")
    assert (dialogue.conversation.messages, dialogue.pending) == before
    dialogue.receive(ANSWER, lambda text: "a.png")
    assert dialogue.conversation.to_pairs() == [["draw", "Here: ![](file=a.png)"]]


def test_markdown_of_broken_pictures() -> None:
    assert markdown({"text": "a<image>b<image>", "images": ["", "x.png"]}) == "a<corrupt_image>b![](file=x.png)"
    with pytest.raises(RequestError, match="1 <image> placeholders for 0 pictures"):
        markdown({"text": "<image>", "images": []})


def test_known_codes_are_kept() -> None:
    dialogue = Dialogue("conv_seed_llama2")
    dialogue.add_image("a.png")
    body = dialogue.request(lambda path: f"bytes of {path}", force_boi=False)
    assert body == {"text": "[INST] <image> [/INST]\n", "images": ["bytes of a.png"], "force_boi": False}
    dialogue.receive({"text": "A cat.", "images": [], "images_ids": [[7]], "error_msg": []}, str)
    dialogue.add_text("Sure?")
    body = dialogue.request(lambda path: "never asked")
    assert body is not None and body["images"] == [[7]]
    dialogue.conversation.update_image_ids([[8]])
    assert dialogue.conversation.messages[0]["message"]["images_ids"] == [[7]]
