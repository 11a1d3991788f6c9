"""The shipped weights: size, formats, and that they do the job: see, rebuild, draw, edit, chat."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from repository import NANO, ROOT

from seed_multimodal import SeedLlama, open_image
from seed_multimodal.nn.vision.clip import load_clip_vision

DEMO = ("cat.jpg", "fox.png", "castle.png", "banana.png", "whale.png")


@pytest.fixture(scope="module")
def seed() -> SeedLlama:
    return SeedLlama.from_pretrained(NANO)


def _pixels(image: Image.Image) -> np.ndarray:
    return (
        np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BOX), dtype=np.float32)
        / 255
    )


def test_weights_are_safetensors_and_at_most_40_mb():
    files = list(NANO.rglob("*.safetensors"))
    assert len(files) >= 7 and sum(file.stat().st_size for file in files) <= 40e6
    assert not [
        file for file in NANO.rglob("*") if file.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl")
    ]


@pytest.mark.slow
def test_rebuilt_images_are_nearest_to_their_originals(seed: SeedLlama):
    originals = [open_image(ROOT / "images" / name).image for name in DEMO]
    codes = seed.tokenize(originals)
    assert codes.shape == (len(DEMO), 32) and codes.dtype == torch.int64
    rebuilt = seed.reconstruct(codes, seed=0)
    distance = np.array(
        [[np.square(_pixels(a) - _pixels(b)).mean() for b in originals] for a in rebuilt]
    )
    assert distance.argmin(1).tolist() == list(range(len(DEMO)))


@pytest.mark.nightly
def test_stock_pipeline_class_runs_the_decoder():
    from diffusers import StableUnCLIPImg2ImgPipeline

    folder = NANO / "seed_tokenizer" / "diffusion_model"
    pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(
        folder,
        tokenizer=None,
        text_encoder=None,
        image_encoder=load_clip_vision(folder / "image_encoder", log=None),
    )
    pipeline.set_progress_bar_config(disable=True)
    size = pipeline.unet.config.cross_attention_dim
    picture = pipeline(
        image_embeds=torch.zeros(1, pipeline.image_normalizer.mean.shape[1]),
        prompt_embeds=torch.zeros(1, 1, size),
        negative_prompt_embeds=torch.zeros(1, 1, size),
        num_inference_steps=2,
    ).images[0]
    assert picture.size == (64, 64)
