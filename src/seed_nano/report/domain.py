"""The domain of nano's systems: a head that tells scenes from other pictures by the vision tower, and the known words.

    python -m seed_nano.report.domain pretrained/nano pretrained/nano-x pretrained/nano-lavit

Distances from the training scenes alone do not do: Mahalanobis and residual distances of pooled features let most
texts, gradients and photographs pass, as the tower maps everything near to some scene. So the head learns from scenes
and from pictures made here that are none. Its threshold is the score that 0.5 % of held-out scenes exceed.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import string
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
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
_TEXTURES = 200
_LETTERS = string.ascii_letters + string.ascii_lowercase * 2 + " " * 24


def write_domains(folders: Sequence[Path], number: int = 5000, seed: int = 0, log: Callable[[str], None] = log_line
                  ) -> None:
    """Write the domain's files of systems, and name them in their `system.json`.

    Args:
        number: of training scenes; there are twice as many pictures that are none, and two thirds as many held out.
    """
    halves = [picture_half(str(folder)) for folder in folders]
    layers = [_middle(half.tower) for half in halves]
    kinds = {"scenes": islice(_scenes(seed, "train"), number), "others": islice(_others(seed), 2 * number),
             "held out": islice(_plain_scenes(seed, "val"), 2 * number // 3)}
    tokens: list[dict[str, Tensor]] = [{} for _ in halves]
    for kind, pictures in kinds.items():
        found: list[list[Tensor]] = [[] for _ in halves]
        while batch := list(islice(pictures, 64)):
            for half, rows, layer in zip(halves, found, layers, strict=True):
                rows.append(half.tokens_of(batch, layer).half())
        for each, rows in zip(tokens, found, strict=True):
            each[kind] = torch.cat(rows).float()
        log(f"{kind}: {len(tokens[0][kind])} pictures")
    for folder, own, layer in zip(folders, tokens, layers, strict=True):
        head = fit(own["scenes"], own["others"], min(STEPS, number), seed)
        state = {name: value.half() for name, value in head.state_dict().items()}
        save_state_dict(state, folder / FILE, {"name": NAME, "layer": layer})
        saved = load_domain(folder / FILE, 0.0)
        assert saved is not None
        threshold = float(saved.head(own["held out"]).quantile(SHARE))
        flagged = float((saved.head(own["others"]) > threshold).float().mean())
        write_known_words(folder / WORDS)
        learned = {"domain": FILE, "domain_threshold": round(threshold, 3), "known_words": WORDS}
        settings = learned | read_json_object(folder / "system.json") | learned
        replace_text(folder / "system.json", json.dumps(settings, indent=1))
        log(f"{folder}: threshold {threshold:.3f}, which {flagged:.1%} of the other pictures exceed")


def fit(scenes: Tensor, others: Tensor, steps: int = STEPS, seed: int = 0) -> DomainHead:
    """A head that tells tokens of scenes from those of other pictures, [N, T, W] each."""
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        head = DomainHead(*scenes.shape[1:])
    both = torch.cat([scenes, others])
    head.mean, head.scale = both.mean((0, 1)), both.std((0, 1)) + 1e-4
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=0.1)
    labels = torch.tensor([0.0, 1.0]).repeat_interleave(BATCH // 2)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        rows = torch.cat([part[torch.randint(len(part), (BATCH // 2,), generator=rng)] for part in (scenes, others)])
        noise = 0.1 * head.scale * torch.randn(rows.shape, generator=rng)
        loss = F.binary_cross_entropy_with_logits(head(rows + noise), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return head.eval()


def _middle(tower: nn.Module) -> str:
    """The block in the middle of a tower: pictures that the last one maps near to scenes are still apart there."""
    name, blocks = next((name, one) for name, one in tower.named_modules() if isinstance(one, nn.ModuleList))
    return f"{name}.{len(blocks) // 2}"


# ---- scenes


def _plain_scenes(seed: int, split: str) -> Iterator[Image.Image]:
    index = 0
    while True:
        yield Image.fromarray(render(scene_at(seed, index, split), SIZES[index % len(SIZES)]))
        index += 1


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
    """Textures, gradients and plain colours, shapes that cover each other, lines of strokes, scenes mixed or in pieces,
    and backgrounds without a thing."""
    rng, shake = np.random.default_rng(seed), random.Random(seed)
    scenes = _plain_scenes(seed + 1, "train")
    sides = 64, 128
    fills = {side: [[Image.fromarray(make(rng, side)) for _ in range(_TEXTURES)] for make in (_gradient, _texture)]
             for side in sides}
    empty = [paint(STYLES[0], name, [], 128) for name in BACKGROUNDS]
    while True:
        yield Image.fromarray(_texture(rng, 64))
        yield Image.fromarray(_gradient(rng, 64))
        for _ in range(2):
            yield _shapes(rng, fills[int(rng.choice(sides))])
            yield _strokes(rng, int(rng.choice((64, 128, 256))))
        yield Image.fromarray(_mixed(rng, *(np.asarray(next(scenes).resize((64, 64))) for _ in range(2))))
        picture = Image.fromarray(empty[rng.integers(len(empty))])
        yield _jpeg(picture, shake) if rng.random() < 0.5 else picture


def _texture(rng: Any, side: int) -> np.ndarray:
    """Noise whose power falls with frequency, as in photographs: uint8 [side, side, 3]."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1 / side
    power = frequency ** -rng.uniform(0, 3)
    layers = np.fft.irfft2(power * np.exp(2j * np.pi * rng.random((4, *power.shape))), (side, side))
    layers /= layers.std(axis=(1, 2), keepdims=True)
    colours = np.moveaxis(layers[:3] * rng.uniform(0, 1) + layers[3:], 0, -1)
    return np.clip(rng.uniform(30, 225, 3) + colours * rng.uniform(3, 60), 0, 255).astype(np.uint8)


def _gradient(rng: Any, side: int) -> np.ndarray:
    """One colour, or one that turns into another."""
    first, last = rng.integers(0, 256, (2, 3))
    y, x = np.mgrid[:side, :side] / side - 0.5
    turn = rng.uniform(0, 2 * np.pi)
    way = x * np.cos(turn) + y * np.sin(turn) if rng.random() < 0.7 else np.hypot(x, y)
    way = (way - way.min()) / np.ptp(way) * rng.choice((0, 0.3, 1))
    return (first + (last - first) * way[..., None]).astype(np.uint8)


def _shapes(rng: Any, fills: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Shapes of all sizes that cover each other, smooth or rough, as things in photographs do."""
    def fill(rough: float) -> Image.Image:
        return fills[int(rng.random() < rough)][rng.integers(_TEXTURES)]

    picture, rough = fill(0.5).copy(), rng.random()
    side = picture.width
    for size in sorted(np.minimum(side, 3 + side * rng.pareto(1.5, rng.integers(1, 40)) / 10), reverse=True):
        x, y = rng.uniform(-size / 2, side, 2)
        box = x, y, x + size * rng.uniform(0.3, 2), y + size * rng.uniform(0.3, 2)
        mask = Image.new("L", picture.size)
        draw = ImageDraw.Draw(mask)
        kind = rng.integers(3)
        if kind == 0:
            draw.rectangle(box, fill=255)
        elif kind == 1:
            draw.ellipse(box, fill=255)
        else:
            draw.polygon([tuple(corner) for corner in rng.uniform(box[:2], box[2:], (rng.integers(3, 7), 2))], fill=255)
        picture.paste(fill(rough), mask=mask)
    return picture.filter(ImageFilter.GaussianBlur(int(rng.choice((0, 1, 3)))))


def _strokes(rng: Any, side: int) -> Image.Image:
    """Lines of letters, or of strokes as other scripts, tables and forms have."""
    paper: tuple[int, ...] = (255, 255, 255)
    ink: tuple[int, ...] = (0, 0, 0)
    if rng.random() < 0.4:
        paper, ink = (tuple(map(int, colour)) for colour in rng.integers(0, 256, (2, 3)))
    picture = Image.new("RGB", (side, side), paper)
    draw = ImageDraw.Draw(picture)
    height, margin = max(4, int(side / rng.uniform(2, 6) ** 2)), int(rng.integers(0, side // 6))
    y, last = int(rng.integers(0, side // 3)), rng.choice((side, side, side // 2))
    font = ImageFont.load_default(size=height) if rng.random() < 0.5 else None
    while y < last:
        x, end = margin, rng.integers(side // 3, side + 1)
        if font is not None:
            letters = rng.choice(list(_LETTERS), int((end - x) / height * 2) + 1)
            draw.text((x, y), "".join(letters), ink, font)
        while font is None and x < end:
            width = int(rng.integers(2, height + 1))
            box, pen = (x, y, x + width, y + height), max(1, height // int(rng.integers(4, 10)))
            kind = rng.integers(3)
            if kind == 0:
                draw.rectangle(box, outline=ink, width=pen)
            elif kind == 1:
                draw.line(box, fill=ink, width=pen)
            else:
                draw.arc(box, 0, int(rng.integers(180, 361)), fill=ink, width=pen)
            x += width + (int(rng.integers(1, height)) if rng.random() < 0.2 else 1)
        y += int(height * rng.uniform(1.2, 2))
    return picture


def _mixed(rng: Any, scene: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A scene with another one or a texture over it, or its pieces in another order."""
    kind = rng.integers(3)
    if kind < 2:
        over, share = (other, 0.5) if kind else (_texture(rng, len(scene)), rng.uniform(0.3, 0.8))
        return (scene * share + over * (1 - share)).astype(np.uint8)
    pieces = scene.reshape(4, 16, 4, 16, 3).transpose(0, 2, 1, 3, 4).reshape(16, 16, 16, 3)[rng.permutation(16)]
    return pieces.reshape(4, 4, 16, 16, 3).transpose(0, 2, 1, 3, 4).reshape(64, 64, 3)


def _write(options: argparse.Namespace) -> int:
    write_domains(options.folders, options.number)
    return DONE


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m seed_nano.report.domain",
                                     description="write a system's domain: what it says of other pictures and words")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="systems that scenes trained")
    parser.add_argument("--number", type=whole_number(1), default=5000, metavar="N", help="training scenes (5000)")
    return run_program(parser, _write, arguments)


if __name__ == "__main__":
    sys.exit(main())
