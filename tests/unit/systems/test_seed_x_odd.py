"""What can be wrong with a request to SEED-X, or with its answer: one sentence each, and the rest goes on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from seed_multimodal.errors import ConfigError, GenerationError, RequestError
from seed_multimodal.language.seed_x import Box
from seed_multimodal.systems.chat import read_messages
from seed_multimodal.systems.seed_x import SeedX


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 48, 3), dtype=np.uint8))


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


# ---- requests


@pytest.mark.parametrize(("text", "sentence"), [
    ("What is <box_start><loc-1><loc-2><loc-3><box_end>?", "A box has 3 numbers instead of 4: '<loc-1>"),
    ("What is <box_start><loc-1><loc-2><loc-3><loc-99><box_end>?", "A box lies outside the grid of 16 places"),
    ("What is <box_start><loc-1><loc-2><loc-3><loc-4>?", "A box is not closed"),
    ("What is <box_start>a cat<box_end>?", "A box holds other words than locations"),
    ("What is <box_end>?", "<box_end> stands without <box_start>."),
    ("What is at <loc-77>?", "<loc-77> lies outside the grid of 16 places."),
    ("<image> and <image>?", "The text holds 2 <image> placeholders for 1 pictures."),
])
def test_requests(tiny_x: SeedX, text: str, sentence: str) -> None:
    for ask in (lambda: tiny_x.ask(picture(), text), lambda: tiny_x.chat([user(picture(), text)]),
                lambda: tiny_x.edit(picture(), text)):
        with pytest.raises(RequestError) as caught:
            ask()
        assert str(caught.value).startswith(sentence.rstrip(".")) and "\n" not in str(caught.value)


def test_boxes_in_texts_are_words(tiny_x: SeedX) -> None:
    """A user's, and those of an earlier answer, which are written with blanks between the words."""
    words = tiny_x.tokenizer.vocabulary
    box = list(Box(8, 4, 4, 2).ids(words))
    question = "What is <box_start><loc-8><loc-4><loc-4><loc-2><box_end>?"
    encode = tiny_x.tokenizer.encode_parts
    asked = tiny_x.to_request([("user", [question])]).ids
    assert asked == [1, *encode(["[INST] What is"]), *box, *encode(["? [/INST]\n"])]
    said = f"a cat {tiny_x.tokenizer.decode(box)}"
    assert said == "a cat <box_start> <loc-8> <loc-4> <loc-4> <loc-2> <box_end>"
    again = tiny_x.to_request([("user", [question]), ("assistant", [said]), ("user", ["Sure?"])]).ids
    assert again[:len(asked) + 2 + len(encode(["a cat"]))] != asked and again[:len(asked)] == asked
    assert again[len(asked):len(asked) + len(encode(["a cat"])) + 6] == [*encode(["a cat"]), *box]
    broken = tiny_x.to_request([("user", ["Hi"]), ("assistant", ["<box_start> <loc-8>"]), ("user", ["Go on."])]).ids
    assert [words.boxes, words.locations + 8] == [id for id in broken if id >= words.locations]  # as it was written


def test_no_room_for_a_picture(tiny_x: SeedX) -> None:
    with pytest.raises(ConfigError, match="A picture needs 5 new tokens: max_new_tokens 4 is too small"):
        tiny_x.chat([user("Draw.")], force_image=True, max_new_tokens=4)
    with pytest.raises(GenerationError, match="context ends at 512"):
        tiny_x.ask(picture(), "word " * 600)


def test_pictures_drawn_again(tiny_x: SeedX) -> None:
    assert tiny_x.reconstruct([]) == []
    for embeddings in ("4", 4.0, True):
        with pytest.raises(ConfigError, match="^embeddings must be a whole number"):
            tiny_x.reconstruct(picture(), embeddings=embeddings)
    wide = Image.new("RGB", (64, 16))
    kept = tiny_x.edit(wide, "Make it red.")
    usual = tiny_x.edit(wide, "Make it red.", height=None, width=None, num_inference_steps=None)
    assert kept.size == (32, 8) == usual.size and np.array_equal(kept, usual)


# ---- answers


@pytest.mark.parametrize(("answer", "sentence"), [
    ("a cat </img> there", "Image words without an opening <img>."),
    ("<img><img_00000><img_00001>", "A picture broke off after 2 of 4 codes."),
    ("<img><img_00000><img_00001></img>", "A picture has 2 codes instead of 4."),
    ("<img><img_00001><img_00000><img_00002><img_00003></img>", "The words of a picture are not in their order."),
    ("<img><img_00000>cat<img_00002><img_00003></img>", "A picture holds words that are no image codes."),
    ("<patch><img_00000></patch>", "Image words without an opening <img>."),
])
def test_pictures_that_are_none(tiny_x: SeedX, monkeypatch, answer: str, sentence: str) -> None:
    monkeypatch.setattr(tiny_x.speaker, "answer", lambda *_, **__: tiny_x.tokenizer.encode(answer))
    said = tiny_x.chat([user(picture(), "What?")])
    assert sentence in said.problems and said.images == []
    again = tiny_x.to_request(read_messages([user("What?"), {"role": "assistant", "content": said}, user("And?")]))
    assert tiny_x.tokenizer.vocabulary.eoi_id not in again.ids  # it is no part of the next prompt
    with pytest.raises(GenerationError, match="^The model's answer holds no whole picture"):
        tiny_x.draw("a fish")
    with pytest.raises(GenerationError, match="^The model's answer holds no whole picture"):
        tiny_x.edit(picture(), "Make it red.")


def test_whatever_the_model_says_is_read(tiny_x: SeedX) -> None:
    """Unconstrained, random weights write image words and boxes anywhere: each answer is parts and sentences, and a
    stream of it says the same."""
    broken = 0
    for seed in range(4):
        options = {"temperature": 3.0, "top_p": 1.0, "top_k": 0, "seed": seed, "constrain": False, "max_new_tokens": 40}
        answer = tiny_x.chat([user(picture(), "What?")], **options)
        broken += len(answer.problems)
        assert all(problem.endswith(".") for problem in answer.problems)
        last = list(tiny_x.chat([user(picture(), "What?")], stream=True, **options))[-1]["answer"]
        assert list(last.ids) == list(answer.ids) and last.problems == answer.problems
        assert all(problem.endswith(".") for problem in tiny_x.detect(picture(), "the cat", **options).problems)
    assert broken > 0


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"height": 20, "width": 32}, "The height must be a multiple of 8 pixels, not 20"),
    ({"height": 32}, "Give height and width both, or neither"),
    ({"height": 10**9, "width": 10**9}, "height must be at most 16384, not 1000000000"),
    ({"num_inference_steps": 0}, "num_inference_steps must be at least 1"),
    ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
    ({"image_guidance_scale": "x"}, "image_guidance_scale must be"),
    ({"ratio": "wide"}, "ratio"),
    ({"scheduler": "NoScheduler"}, "NoScheduler"),
])
def test_wrong_drawings_are_refused_before_the_model_writes(tiny_x: SeedX, monkeypatch, settings: dict[str, Any],
                                                            sentence: str) -> None:
    monkeypatch.setattr(tiny_x.speaker, "answer", lambda *_, **__: pytest.fail("The model wrote."))
    monkeypatch.setattr(tiny_x.speaker, "events", lambda *_, **__: pytest.fail("The model wrote."))
    for draw in (lambda: tiny_x.draw("a fish", **settings), lambda: tiny_x.edit(picture(), "Make it red.", **settings),
                 lambda: tiny_x.chat([user("Hi")], **settings),
                 lambda: tiny_x.chat([user("Hi")], stream=True, **settings)):
        with pytest.raises(ConfigError, match=sentence):
            draw()
