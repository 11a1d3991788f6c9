"""Which images a system of nano knows: `known_images` of its `system.json`, and how well it works.

    python -m seed_nano.known --model pretrained/nano --images photographs/

writes the key, and prints how many images are noted: other scenes and drawings than those of the
calibration, images of kinds that nano never learned, and those of a folder. The calibration reads
known images only.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from seed_multimodal.cli.common import program_parser
from seed_multimodal.disk import read_json_object, replace_text
from seed_multimodal.entry import DONE, run_program
from seed_multimodal.images.io import open_image
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_multimodal.pipelines.config import SYSTEM, KnownImages, SystemConfig
from seed_multimodal.pipelines.known_images import CORNERS, ImageFamiliarity
from seed_nano.world.scene import (
    HORIZONTAL_CENTRES,
    MIDDLE,
    Slot,
    render_slots,
    scene_image,
)
from seed_nano.world.splits import SPLITS, scene_at
from seed_nano.world.things import BACKGROUNDS, NAMES, STYLES

SIDES = (64, 96, 128, 256)  # of the calibration's images, in pixels
SCENES = 40  # of each split
DRAWINGS = 220
FARTHEST = 2.0  # distance of an image from its opposite
FALSE_NOTES = 0.0125  # share of known images beyond the threshold
USUAL = 0.005  # least share of the corners in a usual colour
BATCH = 32
CALIBRATION, HELD_OUT = 4242, 777  # seeds

Images = list[Image.Image]


class _Recorder(ImageFamiliarity):
    """Collects expected latents and pixels, instead of comparing them."""

    def __init__(self, conditioner: Any) -> None:
        super().__init__(KnownImages(0, ()), conditioner)
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def distances(self, embeds: Tensor, pixels: Tensor) -> list[float]:
        expected = self.conditioner.expected_latents(embeds.cpu().float())
        self.pairs.append((expected, pixels.cpu().float()))
        return [0.0] * len(pixels)


def calibrate(folder: Path) -> KnownImages:
    """Write `known_images` into the `system.json` of a system of nano."""
    # 1. Expected latents and pixels of known images.
    config = SystemConfig.find(folder, known_images=KnownImages(0, ()))
    codec = MultimodalSystem.from_pretrained(config, log=None).images
    images = known_images(CALIBRATION)
    assert codec.familiarity is not None
    codec.familiarity = recorder = _Recorder(codec.familiarity.conditioner)
    measure(codec, images)
    expected, pixels = map(torch.cat, zip(*recorder.pairs, strict=True))

    # 2. The preview by least squares, of columns of latents and the pixels in their size.
    small = F.adaptive_avg_pool2d(pixels, expected.shape[-2:])
    latents = expected.movedim(1, -1).flatten(0, 2)
    inputs = torch.cat([latents, torch.ones(len(latents), 1)], 1)
    preview = torch.linalg.lstsq(
        inputs, small.movedim(1, -1).flatten(0, 2)
    ).solution.T  # [3, C + 1]

    # 3. The usual colours of corners.
    corners = pixels[CORNERS].mT.flatten(0, 1)
    colours, counts = corners.round(decimals=1).unique(dim=0, return_counts=True)
    usual = colours[counts >= USUAL * len(corners)]

    # 4. The threshold.
    known = KnownImages(FARTHEST, _rounded(preview), _rounded(usual))
    codec = MultimodalSystem.from_pretrained(
        SystemConfig.find(folder, known_images=known), log=None
    ).images
    threshold = float(np.quantile(measure(codec, images), 1 - FALSE_NOTES))
    known = replace(known, threshold=round(threshold, 3))

    # 5. The key.
    content = read_json_object(folder / SYSTEM)
    content.pop("known_images", None)
    content = {"known_images": asdict(known), **content}
    replace_text(folder / SYSTEM, json.dumps(content, indent=1) + "\n")
    return known


def _rounded(matrix: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(round(value, 4) for value in row) for row in matrix.tolist())


def measure(codec: Any, images: Images) -> list[float]:
    """The distance of each image."""
    distances: list[float] = []
    for start in range(0, len(images), BATCH):
        distances += [image.distance for image in codec.read(images[start : start + BATCH])]
    return distances


# ---- images


def known_images(seed: int) -> Images:
    """Scenes of every split, and single drawings, large and small, on all backgrounds."""
    rng = random.Random(seed)
    images: Images = []
    for split in SPLITS:
        for index in range(SCENES):
            images.append(scene_image(scene_at(seed, index, split), rng.choice(SIDES)))
    for _ in range(DRAWINGS):
        slot = Slot(rng.choice(NAMES), MIDDLE, MIDDLE, rng.uniform(0.78, 1))
        if rng.random() < 0.5:
            x = rng.choice([*HORIZONTAL_CENTRES.values()])
            slot = Slot(slot.thing, x, MIDDLE, rng.uniform(0.41, 0.47))
        background = rng.choice(("white", rng.choice(BACKGROUNDS)))
        pixels = render_slots(rng.choice(STYLES), background, [slot], rng.choice(SIDES))
        images.append(Image.fromarray(pixels))
    return images


def _colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def _write(draw: ImageDraw.ImageDraw, rng: random.Random, box: Sequence[int], size: int) -> None:
    """Lines of words in a box."""
    left, top, right, bottom = box
    font = ImageFont.load_default(size)
    words = (__doc__ or "").split()
    for y in range(top, bottom - size, round(size * 1.4)):
        line = " ".join(rng.choice(words) for _ in range((right - left) // size // 2 + 1))
        while draw.textlength(line, font=font) > right - left and " " in line:
            line = line.rpartition(" ")[0]
        draw.text((left, y), line, fill="black", font=font)


def text(rng: random.Random) -> Image.Image:
    """A page of text."""
    page = Image.new("RGB", rng.choice(((256, 256), (300, 400), (400, 250))), "white")
    margin = rng.randrange(5, 40)
    box = (margin, margin, page.width - margin, page.height - margin)
    _write(ImageDraw.Draw(page), rng, box, rng.choice((10, 14, 20, 28)))
    return page


def chart(rng: random.Random) -> Image.Image:
    """Bars, a line or a pie, with axes and a title."""
    page = Image.new("RGB", rng.choice(((300, 300), (400, 300))), "white")
    draw = ImageDraw.Draw(page)
    left, top, right, bottom = 40, 40, page.width - 20, page.height - 40
    _write(draw, rng, (left, 8, right, 36), 14)
    kind = rng.choice(("bars", "line", "pie"))
    n = rng.randrange(4, 10)
    values = [rng.uniform(0.1, 1) for _ in range(n)]
    if kind == "pie":
        start = 0.0
        for value in values:
            end = start + 360 * value / sum(values)
            draw.pieslice((70, 60, 250, 240), start, end, fill=_colour(rng))
            start = end
        return page
    draw.line([(left, top), (left, bottom), (right, bottom)], "black", 2)
    points = []
    for index, value in enumerate(values):
        x = left + (right - left) * (index + 0.5) / n
        points.append((x, bottom - value * (bottom - top)))
        draw.text((x, bottom + 8), str(index), "black")
        if kind == "bars":
            draw.rectangle((x - 8, points[-1][1], x + 8, bottom), fill=_colour(rng))
    if kind == "line":
        draw.line(points, _colour(rng), 3)
    return page


def noise(rng: random.Random) -> Image.Image:
    """Coloured noise, fine or blurred."""
    side = rng.choice((64, 128, 256))
    image = Image.frombytes("RGB", (side, side), rng.randbytes(3 * side**2))
    return image.filter(ImageFilter.GaussianBlur(rng.choice((0, 1, 3, 6))))


def blank(rng: random.Random) -> Image.Image:
    """A page of one colour, some with a line or a word."""
    colour = rng.choice(((255, 255, 255), (0, 0, 0), _colour(rng)))
    page = Image.new("RGB", rng.choice(((256, 256), (210, 297), (64, 64))), colour)
    draw = ImageDraw.Draw(page)
    y = rng.randrange(page.height)
    kind = rng.choice(("empty", "line", "word"))
    if kind == "line":
        draw.line([(0, y), (page.width, y)], _colour(rng), 2)
    elif kind == "word":
        draw.text((rng.randrange(page.width // 2), y), "nano", _colour(rng))
    return page


def screen(rng: random.Random) -> Image.Image:
    """A list of messages on a phone."""
    page = Image.new("RGB", (390, 844), rng.choice(("white", (240, 240, 245))))
    draw = ImageDraw.Draw(page)
    draw.rectangle((0, 0, page.width, 80), fill=_colour(rng))
    y = 100
    while y < 760:
        height = rng.choice((50, 80, 120))
        left = rng.choice((12, 120))
        draw.rounded_rectangle((left, y, left + 250, y + height), 12, fill=(225, 235, 225))
        _write(draw, rng, (left + 10, y + 8, left + 240, y + height), 14)
        y += height + 14
    return page


UNKNOWN: dict[str, Callable[[random.Random], Image.Image]] = {
    "text": text,
    "chart": chart,
    "noise": noise,
    "blank": blank,
    "screen": screen,
}


def unknown_images(kind: str, count: int) -> Images:
    """Images of a kind that nano never learned."""
    return [UNKNOWN[kind](random.Random(f"{kind} {index}")) for index in range(count)]


# ---- command


def evaluate(folder: Path, images: Path | None) -> dict[str, dict[str, float]]:
    """Of images that the calibration did not read: shares that are noted, by kind, and the area
    under the curve of known images against the others."""
    system = MultimodalSystem.from_pretrained(folder, log=None)
    known = measure(system.images, known_images(HELD_OUT))
    distances = {kind: measure(system.images, unknown_images(kind, 60)) for kind in UNKNOWN}
    if images is not None:
        files = sorted(path for path in images.iterdir() if path.is_file())
        distances[images.name] = measure(system.images, [open_image(path).image for path in files])
    threshold = system.config.known_images.threshold
    figures = {"known": {"noted": float(np.mean(np.array(known) > threshold))}}
    for kind, values in distances.items():
        above = np.array(values)[:, None] > np.array(known)
        noted = float(np.mean(np.array(values) > threshold))
        figures[kind] = {"noted": noted, "auroc": float(above.mean())}
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = program_parser("python -m seed_nano.known", __doc__ or "")
    parser.add_argument("--model", type=Path, default=Path("pretrained/nano"))
    parser.add_argument("--images", type=Path, help="folder of images that nano does not know")
    parser.add_argument("--only-measure", action="store_true", help="leave system.json as it is")
    return run_program(parser, _run, arguments, "known")


def _run(options: argparse.Namespace) -> int:
    if not options.only_measure:
        print(f"threshold {calibrate(options.model).threshold}")
    for kind, values in evaluate(options.model, options.images).items():
        print(f"{kind:8} " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()))
    return DONE


if __name__ == "__main__":
    raise SystemExit(main())
