"""SEED's decoders (contract: ../test_pixel_decoders.py)."""

import contextlib

import torch
from llm_runs import task_of
from PIL import Image
from tiny.training import seed_decoder_config, write_seed_decoder_parts

from seed_multimodal.models.seed.modeling import Seed2Tokenizer
from seed_multimodal.models.seed.train_detokenizer import SeedDecoderTask


def test_images_are_resized_as_by_the_tokenizer(tmp_path):
    # Else a decoder learns other codes than those it gets when it draws.
    parts = write_seed_decoder_parts(tmp_path / "parts")
    config = seed_decoder_config(parts, tmp_path / "run")
    with contextlib.closing(task_of(SeedDecoderTask, config)) as task:
        task.prepare()
        tokenizer = Seed2Tokenizer.from_pretrained(parts / "tokenizer")
        preprocessing = tokenizer.visual_encoder.preprocessing
        image = Image.effect_noise((40, 40), 90).convert("RGB")
        pixels = task.view.encoder_image(image, (16, 16))
    assert torch.equal(pixels, preprocessing.read(image))
