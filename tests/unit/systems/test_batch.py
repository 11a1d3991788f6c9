"""Batch methods of the systems: each result is that of the single method."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from seed_multimodal.errors import ConfigError, GenerationError

IMAGES = [Image.fromarray(np.random.default_rng(seed).integers(0, 255, size, dtype=np.uint8))
          for seed, size in enumerate([(40, 50, 3), (20, 20, 3), (30, 48, 3)])]
QUESTIONS = ["What is it?", "What is the colour of this thing here?", "Is it?"]
SAMPLED = {"do_sample": True, "temperature": 2.0, "top_p": 1.0}


@pytest.fixture(params=["tiny", "tiny_x", "tiny_lavit"])
def system(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["tiny", "tiny_x"])
def talking(request):
    return request.getfixturevalue(request.param)


def near(image: Image.Image, other: Image.Image) -> bool:
    return image.size == other.size and np.abs(np.asarray(image, int) - np.asarray(other, int)).max() <= 1


def test_describe_all_and_ask_all_equal_single_calls(system):
    assert system.describe_all(IMAGES, batch_size=2) == [system.describe(image) for image in IMAGES]
    alone = [system.ask(image, question) for image, question in zip(IMAGES, QUESTIONS, strict=True)]
    assert system.ask_all(IMAGES, QUESTIONS, batch_size=2) == alone
    assert system.ask_all(IMAGES, "Is it?") == [system.ask(image, "Is it?") for image in IMAGES]
    assert system.describe_all([]) == []


def test_draw_all_equals_single_drawings_with_consecutive_seeds(talking):
    texts = ["a red apple", "a green and quite long bar"]
    drawn = talking.draw_all(texts, seed=[3, 7], number=2, batch_size=3)
    alone = [talking.draw(texts[place // 2], seed=seed) for place, seed in enumerate((3, 4, 7, 8))]
    assert all(map(near, drawn, alone))


def test_draw_all_samples_with_the_seed_of_each_drawing(talking):
    drawn = talking.draw_all(["a red apple", "a fish"], seed=[0, 5], number=2, **SAMPLED)
    alone = [talking.draw(text, seed=seed, **SAMPLED)
             for text, seed in (("a red apple", 0), ("a red apple", 1), ("a fish", 5), ("a fish", 6))]
    assert all(map(near, drawn, alone))


def test_edit_all_equals_single_edits(system):
    edited = system.edit_all(IMAGES[:2], "Make it red.", seed=2)
    assert all(map(near, edited, [system.edit(image, "Make it red.", seed=2) for image in IMAGES[:2]]))


def test_draw_all_without_a_whole_image_raises(tiny):
    with pytest.raises(GenerationError, match="holds no whole picture: A picture"):
        tiny.draw_all(["a", "b"], constrain=False, do_sample=True, temperature=5.0, top_p=1.0, top_k=0)
    with pytest.raises(ConfigError, match="num_beam"):
        tiny.draw_all(["a"], num_beam=2)


def test_encode_all_gives_codes_or_features(tiny, tiny_x, tiny_lavit):
    assert tiny.encode_all(IMAGES, batch_size=2).tolist() == tiny.tokenize(IMAGES).tolist()
    read = tiny_x.pictures.read(IMAGES)
    assert [len(one) for one in tiny_x.encode_all(IMAGES)] == [len(one.features) for one in read]
    assert [one.tolist() for one in tiny_lavit.encode_all(IMAGES)] == [
        one.tolist() for one in tiny_lavit.pictures.tokenize(IMAGES)]


def test_detect_all_equals_single_detections(tiny_x):
    phrases = ["the cat", "a red car"]
    found = tiny_x.detect_all(IMAGES[:2], phrases, max_new_tokens=8)
    assert [(one.text, one.boxes) for one in found] == [
        (one.text, one.boxes) for one in (tiny_x.detect(image, phrase, max_new_tokens=8)
                                          for image, phrase in zip(IMAGES, phrases, strict=False))]
