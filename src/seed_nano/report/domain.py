"""The domain of nano's systems: a head that tells scenes from other pictures by the vision encoder, and the known
words.

    python -m seed_nano.report.domain pretrained/nano pretrained/nano-x pretrained/nano-lavit

Distances from the training scenes alone do not do: Mahalanobis and residual distances of pooled features let most
texts, gradients and photographs pass, as the encoder maps everything near to some scene. So the head learns from
scenes and from pictures made here that are none. Its threshold is the score that 0.5 % of held-out scenes exceed.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor, nn

from seed_multimodal.configured import picture_half
from seed_multimodal.disk import read_json_object, replace_text
from seed_multimodal.entry import DONE, log_line, run_program, whole_number
from seed_multimodal.systems.domain import DomainHead, load_domain
from seed_multimodal.training.loop import train
from seed_multimodal.training.loop_settings import StageSettings
from seed_multimodal.training.stage import StageTask
from seed_multimodal.weights import save_state_dict
from seed_nano.world.scene import MIDDLE, Slot, paint, render
from seed_nano.world.splits import scene_at
from seed_nano.world.things import BACKGROUNDS, NAMES, STYLES
from seed_nano.world.wide import render_wide, wide_at
from seed_nano.world.words import write_known_words

NAME, FILE, WORDS = "nano's scenes", "domain.safetensors", "known_words.json"
SIZES = (64, 128, 256, 400)
SHARE = 0.995  # of held-out scenes that count as scenes
STEPS, BATCH = 2000, 256


def write_domain(folder: Path, number: int = 5000, seed: int = 0, log: Callable[[str], None] = log_line) -> None:
    """Write the domain's files of a system, and name them in its `system.json`.

    Args:
        number: of training scenes; there are twice as many pictures that are none, and two thirds as many held out.
    """
    half = picture_half(str(folder))
    layer = _middle(half.tower)

    def tokens(pictures: Iterator[Image.Image], most: int) -> Tensor:
        batches = iter(lambda: list(islice(pictures, min(64, most))), [])
        return torch.cat([half.tokens_of(batch, layer).half() for batch in islice(batches, -(-most // 64))]).float()

    others = tokens(_others(seed), 2 * number)
    head = fit(tokens(_scenes(seed, "train"), number), others, min(STEPS, number), seed)
    save_state_dict({name: value.half() for name, value in head.state_dict().items()}, folder / FILE,
                    {"name": NAME, "layer": layer})
    saved = load_domain(folder / FILE, 0.0)
    assert saved is not None
    threshold = float(saved.head(tokens(_plain_scenes(seed, "val"), 2 * number // 3)).quantile(SHARE))
    flagged = float((saved.head(others) > threshold).float().mean())
    write_known_words(folder / WORDS)
    learned = {"domain": FILE, "domain_threshold": round(threshold, 3), "known_words": WORDS}
    settings = learned | read_json_object(folder / "system.json") | learned
    replace_text(folder / "system.json", json.dumps(settings, indent=1))
    log(f"{folder}: threshold {threshold:.3f}, which {flagged:.1%} of the other pictures exceed")


def fit(scenes: Tensor, others: Tensor, steps: int = STEPS, seed: int = 0) -> DomainHead:
    """A head that tells tokens of scenes from those of other pictures, [N, T, W] each."""
    task = DomainTask(scenes, others, StageSettings(
        steps=steps, batch_size=BATCH, lr=3e-3, warmup=0, lr_scheduler_type="linear", min_lr_ratio=0, weight_decay=0.1,
        clip=0, precision="fp32", seed=seed, log_every=500, save_seconds=3600, curves=False))
    with TemporaryDirectory() as folder:
        train(task, task.settings, folder)
    return task.head.eval()


class DomainTask(StageTask):
    """Training of the head: noisy tokens of as many scenes as other pictures."""

    def __init__(self, scenes: Tensor, others: Tensor, settings: StageSettings) -> None:
        torch.manual_seed(settings.seed)
        self.kinds, both = (scenes, others), torch.cat([scenes, others])
        self.head = DomainHead(*scenes.shape[1:])
        self.head.mean, self.head.scale = both.mean((0, 1)), both.std((0, 1)) + 1e-4
        super().__init__("domain", self.head, settings)

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        each = self.settings.batch_size // 2
        rows = torch.cat([kind[torch.randint(len(kind), (each,))] for kind in self.kinds])
        scores = model(rows + 0.1 * self.head.scale * torch.randn_like(rows))
        return F.binary_cross_entropy_with_logits(scores, torch.tensor([0.0, 1.0]).repeat_interleave(each)), {}


def _middle(tower: nn.Module) -> str:
    """The block in the middle of an encoder: pictures that the last one maps near to scenes are still apart there."""
    name, blocks = next((name, one) for name, one in tower.named_modules() if isinstance(one, nn.ModuleList))
    return f"{name}.{len(blocks) // 2}"


# ---- scenes


def _plain_scenes(seed: int, split: str) -> Iterator[Image.Image]:
    for index in count():
        yield Image.fromarray(render(scene_at(seed, index, split), SIZES[index % len(SIZES)]))


def _scenes(seed: int, split: str) -> Iterator[Image.Image]:
    """Scenes as people bring them: also wide ones, single drawings that fill the picture, cut edges, JPEGs."""
    shake = random.Random(seed)
    for index, scene in enumerate(_plain_scenes(seed, split)):
        size = shake.choice(SIZES[:3])
        if index % 6 == 4:
            scene = Image.fromarray(render_wide(wide_at(seed, index, split), size))
        elif index % 6 == 5:
            place = Slot(shake.choice(NAMES), MIDDLE, MIDDLE, shake.uniform(0.6, 1))
            scene = Image.fromarray(paint(shake.choice(STYLES), shake.choice(("white", *BACKGROUNDS)), [place], size))
        elif index % 6 == 3:
            left, top, right, bottom = (int(scene.width * shake.uniform(0, 0.12)) for _ in range(4))
            scene = scene.crop((left, top * (index % 4 == 1), scene.width - right, scene.height - bottom))
        yield _jpeg(scene, shake) if shake.random() < 0.2 else scene


def _jpeg(picture: Image.Image, shake: random.Random) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=shake.randint(40, 95))
    return Image.open(file).convert("RGB")


# ---- pictures that are no scenes


def _others(seed: int) -> Iterator[Image.Image]:
    """Textures, gradients and plain colours, shapes that cover each other, lines of letters, scenes mixed or in pieces,
    and backgrounds without a thing."""
    rng, shake = np.random.default_rng(seed), random.Random(seed)
    scenes = _plain_scenes(seed + 1, "train")
    empty = [Image.fromarray(paint(STYLES[0], name, [], 128)) for name in BACKGROUNDS]
    while True:
        yield _texture(rng)
        yield _gradient(rng)
        for _ in range(2):
            yield _shapes(rng)
            yield _letters(rng, int(rng.choice((64, 128, 256))))
        yield _mixed(rng, *(next(scenes).resize((64, 64)) for _ in range(2)))
        picture = shake.choice(empty)
        yield _jpeg(picture, shake) if rng.random() < 0.5 else picture


def _texture(rng: Any, side: int = 64) -> Image.Image:
    """Noise whose power falls with frequency, as in photographs."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1 / side
    power = frequency ** -rng.uniform(0, 3)
    layers = np.fft.irfft2(power * np.exp(2j * np.pi * rng.random((4, *power.shape))), (side, side))
    layers /= layers.std(axis=(1, 2), keepdims=True)
    colours = np.moveaxis(layers[:3] * rng.uniform(0, 1) + layers[3:], 0, -1)
    return _image(rng.uniform(30, 225, 3) + colours * rng.uniform(3, 60))


def _gradient(rng: Any, side: int = 64) -> Image.Image:
    """One colour, or one that turns into another."""
    first, last = rng.integers(0, 256, (2, 3))
    y, x = np.mgrid[:side, :side] / side - 0.5
    turn = rng.uniform(0, 2 * np.pi)
    way = x * np.cos(turn) + y * np.sin(turn) if rng.random() < 0.7 else np.hypot(x, y)
    way = (way - way.min()) / np.ptp(way) * rng.choice((0, 0.3, 1))
    return _image(first + (last - first) * way[..., None])


def _shapes(rng: Any) -> Image.Image:
    """Shapes of all sizes that cover each other, smooth or rough, as things in photographs do."""
    picture, rough = _texture(rng), rng.random()
    for size in sorted(np.minimum(64, 3 + 6 * rng.pareto(1.5, rng.integers(1, 20))), reverse=True):
        x, y = rng.uniform(-size / 2, 64, 2)
        mask = Image.new("L", picture.size)
        shape = getattr(ImageDraw.Draw(mask), rng.choice(("rectangle", "ellipse")))
        shape((x, y, x + size * rng.uniform(0.3, 2), y + size * rng.uniform(0.3, 2)), fill=255)
        picture.paste(_texture(rng) if rng.random() < rough else _gradient(rng), mask=mask)
    return picture.filter(ImageFilter.GaussianBlur(int(rng.choice((0, 1, 3)))))


def _letters(rng: Any, side: int) -> Image.Image:
    """Lines of letters."""
    ink, paper = [(0, 0, 0), (255, 255, 255)] if rng.random() < 0.6 else map(tuple, rng.integers(0, 256, (2, 3)))
    picture = Image.new("RGB", (side, side), paper)
    height, margin = max(4, int(side / rng.uniform(2, 6) ** 2)), int(rng.integers(0, side // 6))
    font = ImageFont.load_default(size=height)
    for y in np.arange(rng.integers(0, side // 3), side, height * rng.uniform(1.2, 2)):
        letters = rng.choice(list(string.ascii_letters + string.ascii_lowercase * 2 + " " * 24), 2 * side // height)
        ImageDraw.Draw(picture).text((margin, y), "".join(letters), ink, font)
    return picture


def _mixed(rng: Any, scene: Image.Image, other: Image.Image) -> Image.Image:
    """A scene with another one or a texture over it, or its pieces in another order."""
    kind = rng.integers(3)
    if kind < 2:
        return Image.blend(other, scene, 0.5) if kind else Image.blend(_texture(rng), scene, rng.uniform(0.3, 0.8))
    pieces = np.asarray(scene).reshape(4, 16, 4, 16, 3).transpose(0, 2, 1, 3, 4).reshape(16, 16, 16, 3)
    pieces = pieces[rng.permutation(16)].reshape(4, 4, 16, 16, 3).transpose(0, 2, 1, 3, 4)
    return _image(pieces.reshape(64, 64, 3))


def _image(pixels: Any) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m seed_nano.report.domain",
                                     description="write a system's domain: what it says of other pictures and words")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="systems that scenes trained")
    parser.add_argument("--number", type=whole_number(1), default=5000, metavar="N", help="training scenes (5000)")

    def work(options: argparse.Namespace) -> int:
        for folder in options.folders:
            write_domain(folder, options.number)
        return DONE

    return run_program(parser, work, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
