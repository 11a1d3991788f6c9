"""What the recorded flows (tests/golden, conversation) do not reach: errors, and that they leave no trace."""

from __future__ import annotations

import copy

import pytest

from seed_multimodal.errors import ConfigError, RequestError
from seed_multimodal.serving.dialogue import Dialogue, new_conversation

ANSWER = {"text": "Here: <image>", "images": ["cGl4ZWxz"], "images_ids": [[1, 2]], "error_msg": []}


def test_new_conversation_is_independent() -> None:
    new_conversation("conv_seed_vicuna").append("USER", {"text": "hi", "images": [], "images_ids": []})
    assert new_conversation("conv_seed_vicuna").messages == []
    with pytest.raises(ConfigError, match="conv_seed_llama2"):
        new_conversation("conv_other")


def test_receive_refuses_an_answer_that_does_not_fit() -> None:
    dialogue = Dialogue()
    dialogue.add_text("draw")
    before = copy.deepcopy((dialogue.conversation.messages, dialogue.pending))
    for wrong in ({**ANSWER, "images_ids": []}, {**ANSWER, "text": "no placeholder"}):
        with pytest.raises(RequestError):
            dialogue.receive(wrong, lambda text: "a.png")
    assert (dialogue.conversation.messages, dialogue.pending) == before


def test_request_sends_known_codes() -> None:
    dialogue = Dialogue("conv_seed_llama2")
    dialogue.add_image("a.png")
    body = dialogue.request(lambda path: f"bytes of {path}", force_boi=False)
    assert body == {"text": "[INST] <image> [/INST]\n", "images": ["bytes of a.png"], "force_boi": False}
    dialogue.receive({"text": "A cat.", "images": [], "images_ids": [[7]], "error_msg": []}, str)
    dialogue.add_text("Sure?")
    assert dialogue.request(lambda path: "never asked")["images"] == [[7]]
    dialogue.conversation.update_image_ids([[8]])
    assert dialogue.conversation.messages[0]["message"]["images_ids"] == [[7]]
