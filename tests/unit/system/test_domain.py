"""Pictures unlike those of the training are said to be so: by shipped systems, and by none without a domain."""

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
from seed_multimodal.configured import picture_half
from seed_multimodal.errors import CheckpointError
from seed_multimodal.system.domain import load_domain
from seed_multimodal.systems.open_system import open_system
from seed_multimodal.systems.picture_half import PictureHalf
from seed_nano.report.domain import fit
from seed_nano.world.scene import empty_pictures, render
from seed_nano.world.splits import scene_at
from seed_nano.world.wide import render_wide, wide_at

ROOT = Path(__file__).parents[3]
SHIPPED = ("nano", "nano-x", "nano-lavit")
SAID = "does not look like nano's scenes; for photographs use the original weights."


@cache
def half(name: str) -> PictureHalf:
    return picture_half(str(ROOT / "pretrained" / name), device="cpu")


def photograph() -> Image.Image:
    """Blurred noise of several scales in one light."""
    rng, side = np.random.default_rng(3), 256
    layers = [np.asarray(Image.fromarray(rng.normal(0, 900 / cells, (cells, cells)).astype(np.float32)).resize(
        (side, side), Image.Resampling.BICUBIC)) for cells in (6, 12, 25, 50)]
    light = np.linspace(60, 170, side)[:, None, None] * (1, 0.93, 0.8)
    picture = Image.fromarray(np.clip(sum(layers)[..., None] / 2 + light, 0, 255).astype(np.uint8))
    return picture.filter(ImageFilter.GaussianBlur(1))


def text(seed: int) -> Image.Image:
    """A page of words of one size."""
    rng = random.Random(seed)
    size = rng.choice((12, 14, 16, 20))
    page = Image.new("RGB", (256, 256), "white")
    for y in range(8, 240, round(size * 1.4)):
        words = " ".join(rng.choice(__doc__.split()) for _ in range(6))
        ImageDraw.Draw(page).text((10, y), words[:480 // size], "black", ImageFont.load_default(size=size))
    return page


def strangers() -> dict[str, Image.Image]:
    level = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    noise = np.random.default_rng(1).integers(0, 256, (256, 256, 3), np.uint8)
    return {"grey gradient": Image.fromarray(level), "coloured gradient": Image.fromarray(np.stack(
        [level, level.T, np.full_like(level, 128)], 2)), "noise": Image.fromarray(noise),
        "photograph": photograph(), "white": Image.new("RGB", (200, 200), "white"), "black": Image.new("RGB", (64, 64)),
        "nothing in a meadow": Image.fromarray(empty_pictures(256)[6])}


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("stranger", strangers())
def test_note_of_pictures_unlike_scenes(name: str, stranger: str) -> None:
    assert half(name).note([strangers()[stranger]]) == f"This {SAID}"


@pytest.mark.parametrize("name", SHIPPED)
def test_note_of_pages_of_text(name: str) -> None:
    """Most of them: one in twelve looks like scenes to nano's tower."""
    assert sum(half(name).note([text(seed)]) == f"This {SAID}" for seed in range(12)) >= 10


@pytest.mark.parametrize("name", SHIPPED)
def test_note_of_scenes(name: str) -> None:
    for picture in sorted((ROOT / "images").glob("*.*g")):
        assert half(name).note([picture]) == "", picture
    for size in (64, 128, 256, 400):
        scenes = [Image.fromarray(render(scene_at(77, index, "val"), size)) for index in range(40)]
        assert half(name).note(scenes).count(",") < 2, size
    wide = [Image.fromarray(render_wide(wide_at(77, index, "val"), 256)) for index in range(20)]
    assert half(name).note(wide) == ""


def test_notes_beside_answers(tmp_path: Path) -> None:
    said: list[str] = []
    white, fox = Image.new("RGB", (64, 64), "white"), ROOT / "images" / "fox.png"
    for name in SHIPPED:
        system = open_system(ROOT / "pretrained" / name, device="cpu", log=said.append)
        said.clear()
        system.describe(white)
        system.ask(fox, "Is there a zebra?")
        system.edit(white, "Put it at night.") if name == "nano" else None  # type: ignore[func-returns-value]
        unknown = "This system does not know 'zebra': it learned 150 things, up to four of each."
        assert said == [f"This {SAID}", unknown] + [f"This {SAID}"] * (name == "nano")
        said.clear()
        answer = system.chat([{"role": "user", "content": [white, "Is there a zebra?"]}])  # type: ignore[attr-defined]
        assert answer.note == f"{unknown} This {SAID}" and not said
        *_, last = system.chat([{"role": "user", "content": [white]}], stream=True)  # type: ignore[attr-defined]
        assert last["answer"].note == f"This {SAID}"
    assert isinstance(system, seed_multimodal.Lavit)


def test_note_without_a_domain(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "pretrained/nano", tmp_path / "own", ignore=shutil.ignore_patterns("report", "judge"))
    settings = json.loads((tmp_path / "own/system.json").read_text())
    (tmp_path / "own/system.json").write_text(json.dumps({**settings, "domain": None, "known_words": None}))
    system = seed_multimodal.SeedLlama.from_pretrained(tmp_path / "own", device="cpu", log=None)
    white = Image.new("RGB", (64, 64), "white")
    assert system.chat([{"role": "user", "content": [white, "Is there a zebra?"]}]).note == ""


def test_fit_tells_tokens_apart() -> None:
    shake = torch.Generator().manual_seed(0)
    scenes, others = torch.randn(300, 4, 6, generator=shake), torch.randn(300, 4, 6, generator=shake) + 1
    head = fit(scenes, others, 100)
    assert float((head(others) > head(scenes).quantile(0.995)).float().mean()) > 0.9


def test_load_domain_of_another_file() -> None:
    other = ROOT / "pretrained/nano/judge/model.safetensors"
    with pytest.raises(CheckpointError, match="holds no domain of a system"):
        load_domain(other, 0.0)
    assert load_domain(None, 0.0) is None
