"""Images unlike those of the training get a note: by the shipped systems, and by none without a domain."""

from __future__ import annotations

import json
import random
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import seed_multimodal
from seed_multimodal.errors import CheckpointError
from seed_multimodal.system.base import MultimodalSystem
from seed_multimodal.system.images import ImageCodec, load_domain, open_images
from seed_nano.report.domain import fit
from seed_nano.world.scene import empty_pictures, render
from seed_nano.world.splits import scene_at
from seed_nano.world.wide import render_wide, wide_at

ROOT = Path(__file__).parents[3]
SHIPPED = ("nano", "nano-x", "nano-lavit")
NOTE = "This does not look like nano's scenes; for photographs use the original weights."
UNKNOWN = "This system does not know 'zebra': it learned 150 things, up to four of each."
WHITE = Image.new("RGB", (64, 64), "white")


@cache
def half(name: str) -> ImageCodec:
    return open_images(ROOT / "pretrained" / name, device="cpu")


def photograph() -> Image.Image:
    """Blurred noise of several scales in one light."""
    rng, side = np.random.default_rng(3), 256
    layers = [np.asarray(Image.fromarray(rng.normal(0, 900 / cells, (cells, cells)).astype(np.float32)).resize(
        (side, side), Image.Resampling.BICUBIC)) for cells in (6, 12, 25, 50)]
    light = np.linspace(60, 170, side)[:, None, None] * (1, 0.93, 0.8)
    image = Image.fromarray(np.clip(sum(layers)[..., None] / 2 + light, 0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(1))


def page(seed: int) -> Image.Image:
    """Words of one size."""
    rng = random.Random(seed)
    size, image = rng.choice((12, 14, 16, 20)), Image.new("RGB", (256, 256), "white")
    for y in range(8, 240, round(size * 1.4)):
        words = " ".join(rng.choice(__doc__.split()) for _ in range(6))
        ImageDraw.Draw(image).text((10, y), words[:480 // size], "black", ImageFont.load_default(size=size))
    return image


def strangers() -> dict[str, Image.Image]:
    level = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    noise = np.random.default_rng(1).integers(0, 256, (256, 256, 3), np.uint8)
    return {"grey gradient": Image.fromarray(level), "noise": Image.fromarray(noise), "photograph": photograph(),
            "coloured gradient": Image.fromarray(np.stack([level, level.T, np.full_like(level, 128)], 2)),
            "white": Image.new("RGB", (200, 200), "white"), "black": Image.new("RGB", (64, 64)),
            "nothing in a meadow": Image.fromarray(empty_pictures(256)[6])}


@pytest.mark.parametrize("name", SHIPPED)
def test_note_tells_scenes_from_other_images(name: str) -> None:
    assert {kind: half(name).note([image]) for kind, image in strangers().items()} == dict.fromkeys(strangers(), NOTE)
    assert sum(half(name).note([page(seed)]) == NOTE for seed in range(12)) >= 10
    for file in sorted((ROOT / "images").glob("*.*g")):
        assert half(name).note([file]) == "", file
    for size in (64, 128, 256, 400):
        scenes = [Image.fromarray(render(scene_at(77, index, "val"), size)) for index in range(40)]
        assert half(name).note(scenes).count(",") < 2, size
    assert half(name).note([Image.fromarray(render_wide(wide_at(77, index, "val"), 256)) for index in range(20)]) == ""


@pytest.mark.parametrize("name", SHIPPED)
def test_notes_beside_answers(name: str) -> None:
    logged: list[str] = []
    system = MultimodalSystem.from_pretrained(ROOT / "pretrained" / name, device="cpu", log=logged.append)
    logged.clear()
    system.describe(WHITE)
    system.ask(ROOT / "images" / "fox.png", "Is there a zebra?")
    assert logged == [NOTE, UNKNOWN]
    logged.clear()
    answer = system.chat([{"role": "user", "content": [WHITE, "Is there a zebra?"]}])  # type: ignore[attr-defined]
    assert answer.note == f"{UNKNOWN} {NOTE}" and not logged
    *_, last = system.chat([{"role": "user", "content": [WHITE]}], stream=True)  # type: ignore[attr-defined]
    assert last["answer"].note == NOTE


def test_note_without_a_domain(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "pretrained/nano", tmp_path / "own", ignore=shutil.ignore_patterns("report", "judge"))
    settings = json.loads((tmp_path / "own/system.json").read_text())
    (tmp_path / "own/system.json").write_text(json.dumps({**settings, "domain": None, "known_words": None}))
    system = seed_multimodal.SeedLlama.from_pretrained(tmp_path / "own", device="cpu", log=None)
    assert system.chat([{"role": "user", "content": [WHITE, "Is there a zebra?"]}]).note == ""
    with pytest.raises(CheckpointError, match="holds no domain of a system"):
        load_domain(ROOT / "pretrained/nano/judge/model.safetensors", 0.0)


def test_fit_tells_tokens_apart() -> None:
    shake = torch.Generator().manual_seed(0)
    scenes, others = torch.randn(300, 4, 6, generator=shake), torch.randn(300, 4, 6, generator=shake) + 1
    head = fit(scenes, others, 100)
    assert float((head(others) > head(scenes).quantile(0.995)).float().mean()) > 0.9
