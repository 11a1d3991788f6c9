"""The image codec of SEED-LLaMA: numbers of codes."""

from __future__ import annotations

import pytest
from repository import ROOT

from seed_multimodal.errors import CodesError
from seed_multimodal.models.seed.pipeline import SeedImageCodec
from seed_multimodal.pipelines.images import open_images


@pytest.fixture(scope="module")
def codec() -> SeedImageCodec:
    return open_images(ROOT / "pretrained" / "nano", device="cpu")


def test_draw_needs_as_many_codes_as_each_image_uses(codec: SeedImageCodec):
    codes = codec.encode([ROOT / "images" / "fox.png"])[0]
    images = codec.draw([codes[:16], codes], seeds=[0, 0], codes=[16, 32], num_inference_steps=1)
    assert len(images) == 2
    with pytest.raises(CodesError, match=r"Image 1 must be a row of 32 codes, got \[16\]"):
        codec.draw([codes[:16], codes[:16]], seeds=[0, 0], codes=[16, 32])
