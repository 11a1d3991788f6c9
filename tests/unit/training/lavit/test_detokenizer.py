"""LaVIT's pixel decoders: codes of images (contract:
test_pixel_decoders.py)."""

import torch
from llm_runs import task_of
from tensors import normal
from tiny.lavit import TOKENIZER, small_tokenizer, write_tokenizer_of
from tiny.training import lavit_config, write_lavit_parts

from seed_multimodal.models.lavit.modeling import DynamicCodes
from seed_multimodal.recipes.lavit.train_pixels import LavitPixelTask


def test_codes_depend_on_the_image_and_the_seed_only():
    # Not on the batch; another seed or selection rule gives other codes.
    pixels = normal(3, 5, 3, 16, 16)
    tokenizer = small_tokenizer()
    network = DynamicCodes(tokenizer, "draw", 0)
    codes = network.encode(pixels)
    counts = (codes >= 0).sum(1)
    assert 1 <= counts.min() < counts.max()
    assert torch.equal(network.encode(pixels.flip(0)).flip(0), codes)
    for selection, seed in (("draw", 2), ("threshold", 0)):
        assert not torch.equal(DynamicCodes(tokenizer, selection, seed).encode(pixels), codes)


def test_codes_are_of_the_vision_encoders_preprocessing(tmp_path):
    # Else a decoder learns other codes than those it gets when it draws.
    tokenizer = write_tokenizer_of("siglip2", tmp_path, TOKENIZER)
    model = {"tokenizer": str(tmp_path / "tokenizer"), "selection": "threshold"}
    parts = write_lavit_parts(tmp_path / "parts")
    task = task_of(LavitPixelTask, lavit_config(parts, tmp_path / "run", model=model))
    task.prepare()
    pixels = task.step_batches.at(0)[0]["encoder_image"]
    expected = tokenizer.encode(
        tokenizer.config.vit.preprocessing.normalise(pixels), mode="threshold"
    )
    for row, expected_row in zip(task.encoders.conditions(pixels), expected, strict=True):
        assert row[row >= 0].tolist() == expected_row.tolist()
