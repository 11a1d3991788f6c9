"""The domain of nano's systems: a head on the vision encoder that tells scenes from other pictures; the known words.

    python -m seed_nano.report.domain pretrained/nano pretrained/nano-x pretrained/nano-lavit

Mahalanobis and residual distances from the training scenes let most texts, gradients and photographs pass, as the
encoder maps everything near to some scene. So the head learns from scenes and from pictures made here that are none.
"""

from __future__ import annotations

import argparse
import json
import random
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor, nn
from torchvision.transforms import v2

from seed_multimodal.disk import read_json_object, replace_text
from seed_multimodal.entry import DONE, log_line, run_program, whole_number
from seed_multimodal.system.images import Domain, load_domain, open_images
from seed_multimodal.training.config import StageConfig
from seed_multimodal.training.task import StageTask
from seed_multimodal.training.trainer import train
from seed_multimodal.weights import save_state_dict
from seed_nano.world.scene import MIDDLE, Slot, paint
from seed_nano.world.splits import scene_at
from seed_nano.world.things import BACKGROUNDS, NAMES, STYLES, write_known_words
from seed_nano.world.wide import any_view, wide_at

NAME, FILE, WORDS = "nano's scenes", "domain.safetensors", "known_words.json"
SHARE = 0.995  # of held-out scenes that count as scenes: the threshold
STEPS, BATCH = 2000, 256
SIZES = (64, 128, 256, 400)


def write_domain(folder: Path, number: int = 5000, seed: int = 0) -> None:
    """Write the domain's files of a system, and name them in its `system.json`.

    Args:
        number: of training scenes; there are twice as many pictures that are none, and two thirds as many held out.
    """
    codec = open_images(str(folder), log=print)
    # the block in the middle: pictures that the last one maps near to scenes are still apart there
    blocks = next((name, one) for name, one in codec.encoder.named_modules()
                  if isinstance(one, nn.ModuleList | nn.Sequential) and all(key.isdigit() for key in one._modules))
    layer = f"{blocks[0]}.{len(blocks[1]) // 2}"
    torch.manual_seed(seed)

    def tokens(pictures: Iterator[Image.Image], most: int) -> Tensor:
        batches = iter(lambda: list(islice(pictures, min(64, most))), [])
        parts = [codec.vision_tokens(batch, layer).half() for batch in islice(batches, -(-most // 64))]
        return torch.cat(parts).float()

    others = tokens(_others(seed), 2 * number)
    head = fit(tokens(_scenes(seed, "train"), number), others, min(STEPS, number), seed)
    save_state_dict({name: value.half() for name, value in head.state_dict().items()}, folder / FILE,
                    {"name": NAME, "layer": layer})
    saved = load_domain(folder / FILE, 0.0)
    assert saved is not None
    threshold = float(saved(tokens(_scenes(seed, "val", plain=True), 2 * number // 3)).quantile(SHARE))
    flagged = float((saved(others) > threshold).float().mean())
    write_known_words(folder / WORDS)
    learned = {"domain": FILE, "domain_threshold": round(threshold, 3), "known_words": WORDS}
    replace_text(folder / "system.json", json.dumps(read_json_object(folder / "system.json") | learned, indent=1))
    log_line(f"{folder}: threshold {threshold:.3f}, which {flagged:.1%} of the other pictures exceed")


def fit(scenes: Tensor, others: Tensor, steps: int = STEPS, seed: int = 0) -> Domain:
    """A head that tells tokens of scenes from those of other pictures, [N, T, W] each."""
    task = DomainTask(scenes, others, StageConfig(
        max_steps=steps, batch_size=BATCH, learning_rate=3e-3, warmup_steps=0, lr_scheduler_type="linear",
        min_lr_ratio=0, weight_decay=0.1, max_grad_norm=0, precision="fp32", seed=seed, logging_steps=500,
        save_seconds=3600, curves=False))
    with TemporaryDirectory() as folder:
        train(task, task.settings, folder)
    return task.head.eval()


class DomainTask(StageTask):
    """Training of the head: noisy tokens of as many scenes as other pictures."""

    def __init__(self, scenes: Tensor, others: Tensor, settings: StageConfig) -> None:
        torch.manual_seed(settings.seed)
        self.kinds, both = (scenes, others), torch.cat([scenes, others])
        self.head = Domain(*scenes.shape[1:])
        self.head.mean, self.head.scale = both.mean((0, 1)), both.std((0, 1)) + 1e-4
        super().__init__("domain", self.head, settings)

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        each = self.settings.batch_size // 2
        rows = torch.cat([kind[torch.randint(len(kind), (each,))] for kind in self.kinds])
        scores = model(rows + 0.1 * self.head.scale * torch.randn_like(rows))
        return F.binary_cross_entropy_with_logits(scores, torch.tensor([0.0, 1.0]).repeat_interleave(each)), {}


def _scenes(seed: int, split: str, plain: bool = False) -> Iterator[Image.Image]:
    """Scenes as people bring them: in several sizes and frames, wide, single drawings that fill the picture, JPEGs; or
    `plain` ones, in several sizes."""
    compressed = v2.RandomApply([v2.JPEG((40, 95))], 0 if plain else 0.2)
    for index in count():
        rng, kind = random.Random(f"domain {seed} {split} {index}"), 0 if plain else index % 6
        view = any_view((wide_at if kind == 4 else scene_at)(seed, index, split), rng, not plain)
        view = replace(view, size=rng.choice(SIZES))
        single = [Slot(rng.choice(NAMES), MIDDLE, MIDDLE, rng.uniform(0.6, 1))]
        background = rng.choice(("white", *BACKGROUNDS))
        pixels = paint(rng.choice(STYLES), background, single, view.size) if kind == 5 else view()
        yield compressed(Image.fromarray(pixels))


def _others(seed: int) -> Iterator[Image.Image]:
    """Textures, gradients and plain colours, shapes, lines of letters, mixed scenes, empty backgrounds."""
    rng, scenes = np.random.default_rng(seed), _scenes(seed + 1, "train")
    compressed = v2.RandomApply([v2.JPEG((40, 95))], 0.5)
    empty = [Image.fromarray(paint(STYLES[0], name, [], 128)) for name in BACKGROUNDS]
    while True:
        yield _texture(rng)
        yield _gradient(rng)
        for _ in range(2):
            yield _shapes(rng)
            yield _letters(rng, int(rng.choice((64, 128, 256))))
        scene, other = (next(scenes).resize((64, 64)) for _ in range(2))
        yield Image.blend(scene, other, 0.5) if rng.random() < 0.5 else Image.blend(
            scene, _texture(rng), rng.uniform(0.2, 0.7))
        yield compressed(empty[rng.integers(len(empty))])


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
