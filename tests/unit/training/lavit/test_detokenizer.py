"""LaVIT's pixel decoders: codes of images (contract:
test_pixel_decoders.py)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from llm_runs import task_of
from tiny import spread
from tiny.lavit import TOKENIZER, small_tokenizer
from tiny.training import lavit_config, write_lavit_parts
from tiny.vision import write_vision

from seed_multimodal.models.lavit.checkpoints import save_dynamic_tokenizer
from seed_multimodal.models.lavit.modeling import DynamicTokenizer
from seed_multimodal.models.lavit.train_pixels import LavitPixelTask, image_codes
from seed_multimodal.models.seed.checkpoints import load_vision
from seed_multimodal.nn.vision.hub import HubVisionConfig


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    return write_lavit_parts(tmp_path_factory.mktemp("lavit_pixels"))


def test_image_codes_depend_on_the_image_and_the_seed_only():
    # Not on the batch; another seed or selection rule gives other codes.
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=generator)
    tokenizer = small_tokenizer()
    codes = image_codes(tokenizer, pixels)
    counts = (codes >= 0).sum(1)
    assert 1 <= counts.min() < counts.max()
    assert torch.equal(image_codes(tokenizer, pixels.flip(0)).flip(0), codes)
    assert not torch.equal(image_codes(tokenizer, pixels, seed=1), codes)
    assert not torch.equal(image_codes(tokenizer, pixels, "threshold"), codes)


def test_codes_are_of_the_vision_encoders_preprocessing(parts: Path, tmp_path):
    # Else a decoder learns other codes than those it gets when it draws.
    write_vision("siglip2", tmp_path / "vision")
    vit = HubVisionConfig(path=str(tmp_path / "vision"))
    torch.manual_seed(0)
    tokenizer = spread(DynamicTokenizer(dataclasses.replace(TOKENIZER, vit=vit, vit_head=0))).eval()
    load_vision(tokenizer.encoder, tmp_path / "vision", None)
    save_dynamic_tokenizer(tokenizer, tmp_path / "tokenizer")
    model = {"tokenizer": str(tmp_path / "tokenizer"), "selection": "threshold"}
    task = task_of(LavitPixelTask, lavit_config(parts, tmp_path / "run", model=model))
    task.prepare()
    pixels = task.batches.at(0)[0]["encoder_image"]
    expected = tokenizer.encode(vit.preprocessing.normalise(pixels), mode="threshold")
    for row, expected_row in zip(task.encoders.conditions(pixels), expected, strict=True):
        assert row[row >= 0].tolist() == expected_row.tolist()
