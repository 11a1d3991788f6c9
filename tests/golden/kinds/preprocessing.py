"""Kind `preprocessing`: pixels, caption texts and the keep rule of the input side.

Checked: every picture transform of `tensors.safetensors` (within 2e-2, about one grey level and a half), `captions`,
`filter_like_qwen`, `stage_training_image_transform`, and of `transform_type_errors` that unknown types are refused.
Not covered: `preprocess_decode` and `id_extraction` (they belong to pre-tokenisation); `image_tokenizer` (the released
class draws fixed latents when it is built; ours draws them per call from a generator); that the released "clip" module
refuses "blip" and the other way round (one `get_transform` serves both here).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from runner import assert_close, assert_same, read_json, read_tensors

from seed_multimodal.data.filters import ImageTextFilter
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.augment import RATIO, TrainTransform
from seed_multimodal.images.transforms import TYPES, ImageTransform, get_transform, seed_image_processor
from seed_multimodal.language.words import caption_text, question_text

KIND = "preprocessing"
PIXEL_TOLERANCE = 2e-2
CAPTION_PROMPT = "a photo of "  # the prompt of every `…_prompt_…` column


def check(folder: Path) -> None:
    check_pixels(read_tensors(folder / "tensors.safetensors"))
    cases = read_json(folder / "cases.json")
    check_captions(cases.get("captions", []))
    for case in cases.get("filter_like_qwen", []):
        rule = ImageTextFilter(**_thresholds(case.get("kwargs", {})))
        assert_same(rule.keeps(case["item"], case["metadata"]), case["keep"], f"filter on {case}")
    if "stage_training_image_transform" in cases:
        assert_same(steps_of(TrainTransform()), cases["stage_training_image_transform"], "training transform")
    for name in cases.get("transform_type_errors", {}):
        type_name = name.rsplit(".", 1)[-1]
        if type_name not in TYPES:
            with pytest.raises(ConfigError, match=type_name):
                get_transform(type_name)


def steps_of(transform: TrainTransform) -> list[str]:
    """The steps in order, in the words of the original configuration."""
    scale = f"({transform.min_scale:.7g}, {transform.max_scale:.1f})"
    return [f"RandomResizedCrop scale={scale} ratio=({RATIO[0]:.7g}, {RATIO[1]:.7g})", "RandomHorizontalFlip",
            "ToTensor", "Normalize"]


def check_pixels(tensors: dict[str, Any]) -> None:
    images = sorted(key.removesuffix(".pixels") for key in tensors if key.endswith(".pixels"))
    assert images, "the fixture holds no pictures"
    for name in images:
        picture = Image.fromarray(tensors[f"{name}.pixels"].numpy())
        for key, expected in tensors.items():
            if key.startswith(f"{name}.") and not key.endswith(".pixels"):
                transform = transform_named(key.removeprefix(f"{name}."), expected.shape[-1])
                assert_close(transform(picture), expected, PIXEL_TOLERANCE, what=key)


def transform_named(name: str, size: int) -> ImageTransform:
    match = re.fullmatch(r"seed_(clip|blip)_(keep_ratio|squash)", name)
    if match:
        return get_transform(match[1], keep_ratio=match[2] == "keep_ratio", image_size=size)
    assert name in ("seed_image_tokenizer", "lavis_blip_image_eval", "lavit_image"), f"unknown transform {name}"
    return seed_image_processor(size)


def check_captions(cases: list[dict[str, str]]) -> None:
    for case in cases:
        for column, expected in case.items():
            if column == "text":
                continue
            words = re.search(r"_(\d+)_words", column)
            limit = int(words[1]) if words else 50
            if column.startswith("blip_caption"):
                prompt = CAPTION_PROMPT if "_prompt" in column else ""
                actual = caption_text(case["text"], prompt=prompt, max_words=limit)
            else:
                assert column.startswith("blip_question"), f"unknown caption processor {column}"
                actual = question_text(case["text"], max_words=limit)
            assert_same(actual, expected, f"{column} of {case['text']!r}")


def _thresholds(kwargs: dict[str, Any]) -> dict[str, Any]:
    names = {"similarity_thr": "similarity", "min_resolution": "min_resolution", "min_aspect_ratio": "min_aspect"}
    return {names[key]: value for key, value in kwargs.items()}
