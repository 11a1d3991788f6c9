"""SEED-X behind the server and the page: images travel as images, boxes are shown on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import served
from random_images import noise
from recorded_engine import RecordedEngine
from served import read

from seed_multimodal.images.io import image_to_base64
from seed_multimodal.language.messages import Message
from seed_multimodal.models.seed_x.pipeline import SeedX
from seed_multimodal.models.seed_x.processing import Box
from seed_multimodal.serving.app import create_app
from seed_multimodal.serving.chat_session import chatbot_messages, image_with_boxes

ASKED = {"temperature": 0, "max_new_tokens": 12, "seed": 1}
NO_CODES = "Images of SEED-X have no codes; give the image itself."


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


@pytest.fixture(scope="module")
def client(tiny_x: SeedX):
    return create_app(tiny_x).test_client()


def ask(client: Any, text: str, *images: Any, **more: Any) -> dict[str, Any]:
    return served.ask(client, text, *images, **{**ASKED, **more})


def chat(client: Any, *images: Any) -> dict[str, Any]:
    """The message of an answer to a question about images."""
    content = [
        {"type": "image_url", "image_url": {"url": image_to_base64(image)}} for image in images
    ]
    messages = [user(*content, {"type": "text", "text": "Where is it?"})]
    return client.post("/v1/chat/completions", json={"messages": messages}).json["choices"][0][
        "message"
    ]


def test_generate_answers_as_the_library(client, tiny_x: SeedX):
    """Three turns, images both ways; a drawn image is sent again as an image."""
    image = noise(0)
    response = ask(client, "[INST] <image>What is it? [/INST]\n", image)
    messages: list[Any] = [user(image, "What is it?")]
    expected = tiny_x.chat(messages, max_new_tokens=12)
    assert response == {
        "status": 200,
        "text": str(expected),
        "images": [],
        "images_ids": [None],
        "error_msg": response["error_msg"],
    }

    text = f"[INST] <image>What is it? [/INST]\n{response['text']}\n[INST] Make it red. [/INST]\n"
    drawing = ask(client, text, image, force_boi=True)
    messages += [{"role": "assistant", "content": str(expected)}, user("Make it red.")]
    picture = tiny_x.chat(messages, force_image=True, max_new_tokens=12, seed=1)
    assert np.array_equal(read(drawing["images"][0]), picture.images[0])
    assert drawing["images_ids"] == [None, None] and drawing["text"] == str(picture)

    text += f"{drawing['text']}\n[INST] And blue? [/INST]\n"
    second = ask(client, text, image, drawing["images"][0], force_boi=True)
    wanted = tiny_x.chat(
        [*messages, {"role": "assistant", "content": picture}, user("And blue?")],
        force_image=True,
        max_new_tokens=12,
        seed=1,
    )
    assert np.array_equal(read(second["images"][0]), wanted.images[0]) and second["text"] == str(
        wanted
    )


def test_generate_continues_any_other_text(client, tiny_x: SeedX):
    response = ask(client, "Question: <image>What is this?\nAnswer:", noise(1))
    message = Message("raw", ("Question: ", noise(1), "What is this?\nAnswer:"))
    expected = tiny_x.generate_answers([[message]], "chat", tiny_x.settings(max_new_tokens=12))[
        0
    ].answer
    assert response["status"] == 200 and response["text"] == str(expected)
    assert ask(client, "[INST] never closed")["status"] == 200
    assert len(ask(client, "a fish<image>", [0, 1, 2, 3], force_boi=True)["images"]) == 1


@pytest.mark.parametrize(
    ("text", "images", "sentence"),
    [
        ("[INST] <image>? [/INST]\n", [[3, 2, 1, 0]], NO_CODES),
        ("[INST] <image>? [/INST]\n", [[0, 1, 2, 3, 4]], NO_CODES),
        (
            "[INST] <image><image>? [/INST]\n",
            [noise(0)],
            "'text' holds 2 <image> placeholders, but 'images' has 1 entries",
        ),
        ("[INST] " + "word " * 2000 + " [/INST]\n", [], "context ends at 512"),
        (
            "[INST] The <box_start><loc-1><loc-2><box_end>? [/INST]\n",
            [],
            "A box is not four locations",
        ),
        (
            "[INST] The <box_start><loc-1><loc-2><loc-3><loc-16><box_end>? [/INST]\n",
            [],
            "A box is not four locations below 16",
        ),
    ],
)
def test_generate_refuses_with_a_sentence(client, text, images, sentence):
    response = ask(client, text, *images)
    assert (
        response["status"] == 400
        and sentence in response["error"]
        and "\n" not in response["error"]
    )


def test_generate_leaves_out_an_image_that_broke_off(client):
    response = ask(client, "[INST] Draw. [/INST]\nHere <image>\n[INST] And? [/INST]\n", [0, 1])
    assert response["status"] == 200 and response["images_ids"][0] == [0, 1]
    assert "An image broke off after 2 of 4 codes and was left out." in response["error_msg"]


class Answering(SeedX):
    """A SEED-X whose answer is given."""

    def __init__(self, system: SeedX, ids: list[int]) -> None:
        vars(self).update(vars(system))
        self.engine = RecordedEngine(system.tokenizer, ids)


def test_chat_lists_the_boxes_of_an_answer(tiny_x: SeedX, tmp_path):
    """As shares of the last image; the page draws them on it, and sends them back as words."""
    image_vocabulary = tiny_x.tokenizer.vocabulary
    answer = [*tiny_x.tokenizer.encode("a cat"), *Box(8, 4, 4, 2).ids(image_vocabulary), 2]
    client = create_app(Answering(tiny_x, answer)).test_client()
    response = chat(client, noise(0), noise(1))
    assert (
        response["boxes"] == [{"image": 1, "box": [0.375, 0.1875, 0.625, 0.3125]}]
        and response["notes"] == []
    )
    assert chat(client)["boxes"] == []
    text = ask(client, "[INST] Where is it? [/INST]\n")["text"]
    assert text == response["content"].strip()

    noise(1).save(tmp_path / "last.png")
    drawing = image_with_boxes(
        [{"content": [{"path": str(tmp_path / "last.png")}]}], response["boxes"]
    )
    answer_v1 = {"role": "assistant", "content": [{"type": "text", "text": text}]}
    assert chatbot_messages([answer_v1])[0]["content"] == ["a cat"]
    assert drawing.getpixel((18, 5)) == drawing.getpixel((29, 9)) == (0, 255, 0)
    assert drawing.getpixel((24, 7)) == noise(1).getpixel((24, 7))

    turns = [
        Message("user", ("Where is it?",)),
        Message("assistant", (text,)),
        Message("user", ("Thanks",)),
    ]
    ids = tiny_x.build_prompts([turns], "chat")[0].ids
    box = list(Box(8, 4, 4, 2).ids(image_vocabulary))
    assert any(list(ids[start : start + 6]) == box for start in range(len(ids)))


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("<box_start><loc-1><loc-2><loc-3><box_end>", "A box is not four locations"),
        ("<box_start><loc-1><loc-2><loc-3>", "A box is not four locations"),
        ("</img> a cat", "Image words without an opening <img>."),
        ("<img><img_00000><img_00001>", "An image broke off after 2 of 4 codes."),
    ],
)
def test_answers_report_what_is_malformed(tiny_x: SeedX, answer, sentence):
    client = create_app(Answering(tiny_x, tiny_x.tokenizer.encode(answer))).test_client()
    response = chat(client, noise(0))
    assert (
        response["boxes"] == [] and len(response["notes"]) == 1 and sentence in response["notes"][0]
    )
    response = ask(client, "[INST] <image>? [/INST]\n", noise(0))
    assert response["status"] == 200 and response["text"].count("<image>") == len(
        response["images"]
    )
