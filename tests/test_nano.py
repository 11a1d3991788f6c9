"""The shipped weights: size, formats, and that they do the job: see, rebuild, draw, edit, chat."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seed_multimodal import SeedLlama, open_image
from seed_multimodal.data.nano.scene import render
from seed_multimodal.data.nano.splits import scene_at

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "pretrained" / "nano"
DEMO = ("cat.jpg", "fox.png", "castle.png", "banana.png", "whale.png")


@pytest.fixture(scope="module")
def seed() -> SeedLlama:
    return SeedLlama.from_pretrained(NANO)


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BOX), dtype=np.float32) / 255


def test_weights_are_safetensors_and_at_most_40_mb() -> None:
    files = list(NANO.rglob("*.safetensors"))
    assert len(files) >= 7 and sum(file.stat().st_size for file in files) <= 40e6
    assert not [file for file in NANO.rglob("*") if file.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl")]


def test_rebuilt_pictures_are_nearest_to_their_originals(seed: SeedLlama) -> None:
    originals = [open_image(ROOT / "images" / name) for name in DEMO]
    codes = seed.tokenize(originals)
    assert codes.shape == (len(DEMO), 32) and codes.dtype == torch.int64
    rebuilt = seed.reconstruct(codes, seed=0)
    distance = np.array([[np.square(_pixels(a) - _pixels(b)).mean() for b in originals] for a in rebuilt])
    assert distance.argmin(1).tolist() == list(range(len(DEMO)))


def test_the_same_seed_draws_the_same_picture(seed: SeedLlama) -> None:
    first, again = (seed.draw("a fluent drawing of a red apple", seed=3) for _ in range(2))
    assert first.size == (64, 64) and np.array_equal(np.asarray(first), np.asarray(again))


def test_pictures_come_out_of_their_first_codes(seed: SeedLlama) -> None:
    """The more codes, the nearer to the whole picture, on average."""
    counts = (4, 8, 16, 32)
    scenes = [Image.fromarray(render(scene_at(5, number, "val"))) for number in range(12)]
    codes = seed.tokenize(scenes)
    ladder = [seed.reconstruct(codes, codes=count, num_inference_steps=4, batch_size=16) for count in counts]
    distance = [np.mean([np.square(_pixels(a) - _pixels(b)).mean() for a, b in zip(step, ladder[-1], strict=True)])
                for step in ladder]
    assert distance[0] > distance[1] > distance[2] > distance[3] == 0
    embeddings = [seed.pictures.model.decode(codes, first=count) for count in counts]
    likeness = [float(torch.cosine_similarity(step, embeddings[-1]).mean()) for step in embeddings]
    assert likeness == sorted(likeness) and likeness[0] < likeness[2]


def test_red_apple_is_red_and_the_edit_is_a_picture(seed: SeedLlama) -> None:
    red, green, blue = _pixels(seed.draw("a fluent drawing of a red apple", seed=0)).reshape(-1, 3).mean(0)
    assert red > green and red > blue
    assert seed.edit(open_image(ROOT / "images/fox.png"), "Make it in noto style.").size == (64, 64)


def test_description_has_the_form_of_a_caption(seed: SeedLlama) -> None:
    words = seed.describe(open_image(ROOT / "images/cat.jpg")).split()
    assert {"twemoji", "noto", "fluent"} & set(words) and len(words) < 40


def test_stock_pipeline_class_runs_the_decoder() -> None:
    from diffusers import StableUnCLIPImg2ImgPipeline

    folder = NANO / "seed_tokenizer" / "diffusion_model"
    pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(folder, tokenizer=None, text_encoder=None)
    pipeline.set_progress_bar_config(disable=True)
    size = pipeline.unet.config.cross_attention_dim
    picture = pipeline(
        image_embeds=torch.zeros(1, pipeline.image_normalizer.mean.shape[1]), prompt_embeds=torch.zeros(1, 1, size),
        negative_prompt_embeds=torch.zeros(1, 1, size), num_inference_steps=2).images[0]
    assert picture.size == (64, 64)


def test_report_card_is_there_and_complete() -> None:
    report = json.loads((NANO / "report" / "report.json").read_text(encoding="utf-8"))
    for split in ("val", "test_combo", "test_concept"):
        assert {"codes", "reconstruction", "drawing", "caption", "qa", "edit"} <= set(report["splits"][split])
    assert report["splits"]["val"]["codes"]["usage"] >= 0.5
    card = (NANO / "README.md").read_text(encoding="utf-8")
    assert "Command:" in card and "Hardware:" in card and "Twemoji" in card
