"""Images that a system of nano knows, and others, made by programs; and how well a system tells
them apart.

    python -m seed_nano.known --model pretrained/nano --images photographs/ charts/

prints which share of other known images, of images of each kind, and of the images of folders is
noted. Stage `known` of the trainings learns from the same programs, with other seeds.
"""

from __future__ import annotations

import argparse
import colorsys
import io
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from seed_multimodal.cli.common import program_parser
from seed_multimodal.entry import DONE, run_program
from seed_multimodal.images.io import open_image
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_nano.world.scene import HORIZONTAL_CENTRES, MIDDLE, Slot, render_slots, scene_image
from seed_nano.world.splits import SPLITS, scene_at
from seed_nano.world.things import BACKGROUNDS, NAMES, STYLES

SIDES = (64, 96, 128, 256)  # of scenes, in pixels
DRAWINGS = 0.35  # share of single drawings among known images
HELD_OUT = 777  # seed
COUNT = 200  # images of a kind
BATCH = 32

Maker = Callable[[random.Random], Image.Image]
Images = list[Image.Image]


# ---- known images


def known(rng: random.Random) -> Image.Image:
    """A scene of any split, or a single drawing, large or small, on any background."""
    if rng.random() >= DRAWINGS:
        scene = scene_at(rng.randrange(10**6), rng.randrange(10**6), rng.choice(SPLITS))
        return scene_image(scene, rng.choice(SIDES))
    slot = Slot(rng.choice(NAMES), MIDDLE, MIDDLE, rng.uniform(0.78, 1))
    if rng.random() < 0.5:
        x = rng.choice([*HORIZONTAL_CENTRES.values()])
        slot = Slot(slot.thing, x, MIDDLE, rng.uniform(0.41, 0.47))
    background = rng.choice(("white", rng.choice(BACKGROUNDS)))
    return Image.fromarray(render_slots(rng.choice(STYLES), background, [slot], rng.choice(SIDES)))


# ---- others: changed scenes


def turned(rng: random.Random) -> Image.Image:
    """A scene upside down or on its side."""
    ways = (Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM)
    sides = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270)
    return known(rng).transpose(rng.choice((*ways, *ways, *sides)))


def recoloured(rng: random.Random) -> Image.Image:
    """A scene in other colours: turned hues, a negative, or grey."""
    image = known(rng)
    kind = rng.choice(("hue", "hue", "negative", "grey"))
    if kind == "negative":
        return Image.eval(image, lambda value: 255 - value)
    hue, saturation, value = image.convert("HSV").split()
    if kind == "grey":
        return value.convert("RGB")
    turn = rng.randrange(50, 206)
    hue = hue.point(lambda value: (value + turn) % 256)
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def collage(rng: random.Random) -> Image.Image:
    """Many drawings of any size, anywhere."""
    slots = []
    for _ in range(rng.randrange(4, 14)):
        side = rng.uniform(0.12, 0.7)
        slots.append(Slot(rng.choice(NAMES), rng.random(), rng.random(), side))
    pixels = render_slots(rng.choice(STYLES), rng.choice(BACKGROUNDS), slots, rng.choice(SIDES))
    return Image.fromarray(pixels)


def hybrid(rng: random.Random) -> Image.Image:
    """A drawing whose halves are of two things, or that is sheared or squeezed."""
    background = rng.choice(("white", rng.choice(BACKGROUNDS)))
    side = rng.uniform(0.6, 1)
    first, second = [
        Image.fromarray(
            render_slots(rng.choice(STYLES), background, [Slot(thing, MIDDLE, MIDDLE, side)], 128)
        )
        for thing in rng.sample(NAMES, 2)
    ]
    if rng.random() < 0.6:
        box = rng.choice(((0, 0, 128, 64), (0, 0, 64, 128)))
        first.paste(second.crop(box), box)
        return first
    shear, squeeze = rng.choice((-1, 1)) * rng.uniform(0.4, 0.9), rng.uniform(0.5, 1)
    matrix = (squeeze, shear, 64 - 64 * (squeeze + shear), 0, 1, 0)
    corner = first.getpixel((0, 0))
    return first.transform(
        first.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=corner
    )


# ---- others: drawn from nothing


def _colour(rng: random.Random) -> tuple[int, ...]:
    hue, saturation, value = rng.random(), rng.uniform(0.2, 1), rng.uniform(0.2, 1)
    return tuple(round(255 * share) for share in colorsys.hsv_to_rgb(hue, saturation, value))


def _box(rng: random.Random, left: float, top: float, width: float, height: float) -> list[float]:
    """A random box inside of another: left, top, right, bottom."""
    x, y = (sorted(rng.uniform(0, 1) for _ in range(2)) for _ in range(2))
    return [left + x[0] * width, top + y[0] * height, left + x[1] * width, top + y[1] * height]


def shapes(rng: random.Random) -> Image.Image:
    """An object or a face of simple shapes, as emoji are, on a plain page."""
    image = Image.new("RGB", (256, 256), rng.choice(("white", "white", _colour(rng))))
    draw = ImageDraw.Draw(image)
    width = rng.choice((0, 0, 4, 8))
    size = rng.randrange(90, 230)
    left, top = (256 - size) / 2, (256 - size) / 2
    for index in range(rng.randrange(2, 9)):
        box = _box(rng, left, top, size, size)
        if index == 0:
            box = [left, top, left + size, top + size * rng.uniform(0.6, 1)]
        style: Any = {"fill": _colour(rng), "outline": _colour(rng), "width": width}
        kind = rng.choice(("ellipse", "ellipse", "rounded", "polygon", "pie"))
        if kind == "ellipse":
            draw.ellipse(box, **style)
        elif kind == "rounded":
            draw.rounded_rectangle(box, min(box[2] - box[0], box[3] - box[1]) / 3, **style)
        elif kind == "pie":
            draw.pieslice(box, rng.randrange(180), rng.randrange(180, 360), **style)
        else:
            points = [(rng.uniform(*box[::2]), rng.uniform(*box[1::2])) for _ in range(5)]
            draw.polygon(points, fill=_colour(rng))
    return image


def noise(rng: random.Random) -> Image.Image:
    """Coloured noise, fine, blurred, or in large soft patches as photographs have."""
    side = rng.choice((8, 16, 64, 128))
    image = Image.frombytes("RGB", (side, side), rng.randbytes(3 * side**2))
    image = image.resize((128, 128), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        image = Image.blend(image, Image.new("RGB", image.size, _colour(rng)), rng.random() * 0.7)
    return image.filter(ImageFilter.GaussianBlur(rng.choice((0, 1, 3, 6))))


def chart(rng: random.Random) -> Image.Image:
    """A chart of matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=rng.choice(((4, 3), (3, 3), (5, 3))), dpi=60)
    axes = figure.subplots()
    n = rng.randrange(3, 12)
    values = [rng.uniform(0.1, 1) for _ in range(n)]
    colours = [f"#{rng.randrange(16**6):06x}" for _ in range(n)]
    kind = rng.choice(("bars", "rows", "line", "points", "pie", "pie", "image", "steps"))
    if kind in ("bars", "rows"):
        draw_bars: Any = axes.bar if kind == "bars" else axes.barh
        draw_bars(range(n), values, color=rng.choice((colours, colours[0])))
    elif kind in ("line", "steps"):
        for colour in colours[: rng.randrange(1, 4)]:
            heights = [rng.random() for _ in range(n)]
            axes.plot(heights, color=colour, drawstyle="steps" if kind == "steps" else "default")
    elif kind == "points":
        axes.scatter(values, [rng.random() for _ in range(n)], c=colours)
    elif kind == "pie":
        axes.pie(values, colors=rng.choice((colours, None)))
    else:
        axes.imshow([[rng.random() for _ in range(n)] for _ in range(n)])
    if rng.random() < 0.5:
        axes.set_title(_sentence(rng, 3))
        axes.grid(rng.random() < 0.5)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return Image.open(stream).convert("RGB")


def _sentence(rng: random.Random, count: int) -> str:
    words = (__doc__ or "").split()
    return " ".join(rng.choice(words) for _ in range(count))


def _write(draw: ImageDraw.ImageDraw, rng: random.Random, box: Sequence[int], size: int) -> None:
    """Lines of words in a box."""
    left, top, right, bottom = box
    font = ImageFont.load_default(size)
    for y in range(top, bottom - size, round(size * 1.4)):
        line = _sentence(rng, (right - left) // size // 2 + 1)
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


OTHERS: dict[str, Maker] = {
    maker.__name__: maker
    for maker in (
        turned,
        recoloured,
        collage,
        hybrid,
        shapes,
        noise,
        chart,
        text,
        blank,
        screen,
    )
}


def images_of(maker: Maker, count: int, seed: int = HELD_OUT) -> Images:
    """Images by a program."""
    return [maker(random.Random(f"{maker.__name__} {seed} {index}")) for index in range(count)]


# ---- how well a system tells them apart


def measure(codec: Any, images: Images) -> list[float]:
    """The distance of each image."""
    distances: list[float] = []
    for start in range(0, len(images), BATCH):
        distances += [image.distance for image in codec.read(images[start : start + BATCH])]
    return distances


def evaluate(codec: Any, folders: Sequence[Path], count: int = COUNT) -> dict[str, list[float]]:
    """The distances of images by kind; folders: of other images."""
    distances = {"known": measure(codec, images_of(known, 2 * count))}
    for kind, maker in OTHERS.items():
        distances[kind] = measure(codec, images_of(maker, count))
    for folder in folders:
        files = sorted(path for path in folder.iterdir() if path.is_file())
        distances[folder.name] = measure(codec, [open_image(path).image for path in files])
    return distances


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = program_parser("python -m seed_nano.known", __doc__ or "")
    parser.add_argument("--model", type=Path, default=Path("pretrained/nano"))
    parser.add_argument("--images", type=Path, nargs="*", default=(), help="folders of images")
    return run_program(parser, _run, arguments, "known")


def _run(options: argparse.Namespace) -> int:
    codec = MultimodalSystem.from_pretrained(options.model, log=None).images
    for kind, values in evaluate(codec, options.images).items():
        print(f"{kind:12} noted {np.mean(np.array(values) > 0):.3f} (n {len(values)})")
    return DONE


if __name__ == "__main__":
    raise SystemExit(main())
