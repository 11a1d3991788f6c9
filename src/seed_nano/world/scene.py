"""A scene: things, their positions, style and background; and its image.

    render(Scene("noto", "meadow", "left of", ("tiger", "penguin")))        # uint8 [64, 64, 3]

Words, questions, edits and stories are functions of the same dataclass. Positions and sizes are in
shares of the image (0..1, y downwards).
"""

from __future__ import annotations

import io
import os
import random
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from seed_multimodal.errors import ConfigError, DataError
from seed_nano.world.things import BACKGROUNDS, COLOURS, NAMES, STYLES, THINGS

SIZE = 64
LARGEST = 1024
# An image is drawn at four times its size and reduced once; at twice from LARGE_IMAGE pixels on.
OVERSAMPLE = 4
LARGE_IMAGE = 160

LOW = 0.25
MIDDLE = 0.5
HIGH = 0.75
SIDE = 0.44
LARGE = 0.84
"""Centres and longer side of all small drawings and of a large one: what an edit does not name
stays in place."""

HORIZONTAL_CENTRES = {"left": LOW, "middle": MIDDLE, "right": HIGH}

LAYOUTS = ("large", *HORIZONTAL_CENTRES, "left of", "above", "many", "two kinds")
"""One thing (large, or small at the left, middle, right); two kinds next to or above each other; n
of one; n and m."""

QUARTERS = ("top left", "top right", "bottom left", "bottom right")
Box = tuple[float, float, float, float]
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Slot:
    """One drawing in a scene: centre and longer side."""

    thing: str
    x: float
    y: float
    side: float


@dataclass(frozen=True)
class Scene:
    """One image, before it is drawn.

    Args:
        style: of all its drawings, see `STYLES`.
        background: a flat colour or a place, see `BACKGROUNDS`.
        layout: see `LAYOUTS`.
        things: one name or two different ones; the first is at the left or above.
        counts: how many of each, default one; more only in the layouts `many` (2 to 4) and `two
            kinds` (3 or 4 in all).
        jitter: seed of the small shifts of position and size.

    Raises:
        DataError: no such scene.
    """

    style: str
    background: str
    layout: str
    things: tuple[str, ...]
    counts: tuple[int, ...] = ()
    jitter: int = 0

    def __post_init__(self) -> None:
        if not self.counts:
            object.__setattr__(self, "counts", (1,) * len(self.things))
        kinds = 2 if self.layout in ("left of", "above", "two kinds") else 1
        if (
            self.style not in STYLES
            or self.background not in BACKGROUNDS
            or self.layout not in LAYOUTS
            or not set(self.things) <= set(THINGS)
            or not kinds == len(set(self.things)) == len(self.counts)
        ):
            raise DataError(f"no such nano scene: {self}")

    @property
    def key(self) -> tuple[object, ...]:
        """All visible properties, without the jitter."""
        return self.style, self.background, self.layout, self.things, self.counts

    def with_changes(self, **changes: object) -> Scene:
        """The same scene with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def slots(self, shifted: bool = True) -> list[Slot]:
        """All drawings, first kind first; `shifted`: with jitter."""
        slots = []
        for kind, x, y, side in anchors(self.layout, self.counts):
            if shifted:
                # By place, so that what an edit does not name stays.
                rng = random.Random(f"{self.jitter} {x} {y}")
                side *= 1 + rng.uniform(-0.07, 0.07)
                x += rng.uniform(-0.015, 0.015)
                y += rng.uniform(-0.015, 0.015)
            slots.append(Slot(self.things[kind], x, y, side))
        return slots


@dataclass(frozen=True)
class WideScene:
    """A scene of four times the area with at most one thing in each quarter: what several views of
    an image are for.

    Args:
        things: in the order of `QUARTERS`, "" for none; all different.
    """

    style: str
    background: str
    things: tuple[str, str, str, str]
    jitter: int = 0

    @property
    def present_things(self) -> list[str]:
        """Its things, without empty quarters."""
        return [name for name in self.things if name]

    def slots(self) -> list[Slot]:
        """All drawings, jitter included; half as large as in a `Scene`."""
        slots = []
        for quarter, name in enumerate(self.things):
            rng = random.Random(f"{self.jitter} {quarter}")
            side = SIDE / 2 * (1 + rng.uniform(-0.07, 0.07))
            x = LOW + quarter % 2 / 2 + rng.uniform(-0.03, 0.03)
            y = LOW + quarter // 2 / 2 + rng.uniform(-0.03, 0.03)
            if name:
                slots.append(Slot(name, x, y, side))
        return slots


def find_drawings(path: str | Path | None = None) -> Path:
    """Folder of the drawings: `path`, else $SEED_NANO_DATA, else data/nano of the project or the
    current folder.

    Raises:
        DataError: it has no manifest.json.
    """
    setting = path or os.environ.get("SEED_NANO_DATA")
    project = Path(__file__).resolve().parents[3]
    candidates = [project / "data" / "nano", Path.cwd() / "data" / "nano"]
    if setting:
        candidates = [Path(setting).expanduser()]
    for folder in candidates:
        if (folder / "manifest.json").is_file():
            return folder
    raise DataError(
        f"{candidates[-1]}: nano's drawings were not found (no manifest.json). They are in the "
        "repository, in data/nano: run from its root, or set SEED_NANO_DATA to that folder."
    )


@lru_cache(maxsize=4)
def load_sprites(path: str | Path | None = None) -> dict[tuple[str, str], Image.Image]:
    """Every drawing by (style, thing), mode `RGBa`: colours premultiplied with alpha, so that no
    colour of an invisible pixel gets into an edge when an image is reduced.

    Raises:
        DataError: the shard is missing or damaged.
    """
    file = find_drawings(path) / "sprites.tar"
    sprites = {}
    try:
        with tarfile.open(file) as tar:
            for member in tar:
                style, _, name = member.name.removesuffix(".webp").partition("-")
                # A drawing is named STYLE-THING.webp.
                content = tar.extractfile(member)
                if content is not None:
                    drawing = Image.open(io.BytesIO(content.read()))
                    sprites[style, name.replace("_", " ")] = drawing.convert("RGBA").convert("RGBa")
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{file}: missing or damaged ({error}).") from None
    return sprites


def write_thumbnails(folder: Path, side: int = 64) -> None:
    """Write a small drawing of each thing that has a name, for the page's *What can I draw?*."""
    folder.mkdir(exist_ok=True)
    sprites = load_sprites()
    for name in NAMES:
        thumbnail = sprites["noto", name].convert("RGBA")
        thumbnail.thumbnail((side, side))
        thumbnail.save(folder / f"{name.replace(' ', '_')}.webp", quality=70, method=6)


def anchors(layout: str, counts: Sequence[int]) -> list[tuple[int, float, float, float]]:
    """Where a layout has its drawings before jitter: (0 or 1, for the first or second kind, x, y,
    longer side)."""
    if layout == "large":
        return [(0, MIDDLE, MIDDLE, LARGE)]
    if layout in HORIZONTAL_CENTRES:
        return [(0, HORIZONTAL_CENTRES[layout], MIDDLE, SIDE)]
    if layout == "left of":
        return [(0, LOW, MIDDLE, SIDE), (1, HIGH, MIDDLE, SIDE)]
    if layout == "above":
        return [(0, MIDDLE, LOW, SIDE), (1, MIDDLE, HIGH, SIDE)]
    # Several things: one row of drawings, or two rows where one kind has three or four drawings or
    # there are two kinds.
    split_in_two: dict[tuple[int, ...], tuple[int, ...]] = {(3,): (1, 2), (4,): (2, 2)}
    row_sizes = split_in_two.get(tuple(counts), tuple(counts))
    heights = (MIDDLE,) if len(row_sizes) == 1 else (LOW, HIGH)
    centres = []
    for y, row_size in zip(heights, row_sizes, strict=True):
        columns = (MIDDLE,) if row_size == 1 else (LOW, HIGH)
        centres += [(x, y) for x in columns]

    # The drawings of the first kind come first.
    kinds = []
    for kind, count in enumerate(counts):
        kinds += [kind] * count
    return [(kind, x, y, SIDE) for kind, (x, y) in zip(kinds, centres, strict=True)]


def boxes(scene: Scene | WideScene) -> list[tuple[str, Box]]:
    """(thing, (left, top, right, bottom)) of every drawing."""
    result = []
    for slot in scene.slots():
        width, height = load_sprites()[scene.style, slot.thing].size
        half_x = slot.side * width / max(width, height) / 2
        half_y = slot.side * height / max(width, height) / 2
        box = (slot.x - half_x, slot.y - half_y, slot.x + half_x, slot.y + half_y)
        result.append((slot.thing, box))
    return result


def render(
    scene: Scene | WideScene, size: int = SIZE, folder: str | Path | None = None
) -> np.ndarray:
    """The image, uint8 [size, size, 3] RGB; `folder`: of the drawings, see `find_drawings`.

    Raises:
        ConfigError: a size below 1 or above `LARGEST`.
    """
    return render_slots(scene.style, scene.background, scene.slots(), size, folder)


def scene_image(
    scene: Scene | WideScene, size: int = SIZE, folder: str | Path | None = None
) -> Image.Image:
    """As `render`, as a PIL image."""
    return Image.fromarray(render(scene, size, folder))


def render_slots(
    style: str,
    background: str,
    drawings: Sequence[Slot],
    size: int,
    folder: str | Path | None = None,
) -> np.ndarray:
    """An image of drawings anywhere; else as `render`."""
    scale = _oversampling(size)
    canvas = _background(background, size * scale).copy()
    _draw([canvas], style, drawings, folder)
    return np.asarray(canvas.reduce(scale))


def _oversampling(size: int) -> int:
    """How many times larger an image is drawn. Raises ConfigError: it cannot be drawn."""
    if not 1 <= size <= LARGEST:
        raise ConfigError(
            f"nano: an image of {size} pixels a side cannot be drawn; give 1 to {LARGEST}."
        )
    return OVERSAMPLE if size < LARGE_IMAGE else OVERSAMPLE // 2


def render_with_mask(scene: Scene, size: int) -> tuple[np.ndarray, np.ndarray]:
    """`render` and `thing_mask` of a scene, whose drawings are scaled once for both."""
    scale = _oversampling(size)
    canvas = _background(scene.background, size * scale).copy()
    mask = Image.new("L", canvas.size)
    _draw([canvas, mask], scene.style, scene.slots())
    return np.asarray(canvas.reduce(scale)), _shares(mask, scale)


def empty_images(size: int) -> np.ndarray:
    """Every background without a thing, uint8 [E, size, size, 3], in the order of `BACKGROUNDS`."""
    return np.stack([render_slots(STYLES[0], name, [], size) for name in BACKGROUNDS])


def thing_mask(scene: Scene, size: int = SIZE, shifted: bool = True) -> np.ndarray:
    """How much of each pixel is covered by a thing, float32 [size, size] in 0..1; shifted: as of
    `Scene.slots`."""
    scale = _oversampling(size)
    mask = Image.new("L", (size * scale, size * scale))
    _draw([mask], scene.style, scene.slots(shifted))
    return _shares(mask, scale)


def _shares(mask: Image.Image, scale: int) -> np.ndarray:
    return np.asarray(mask.reduce(scale), np.float32) / 255


def _draw(
    canvases: Sequence[Image.Image],
    style: str,
    drawings: Sequence[Slot],
    folder: str | Path | None = None,
) -> None:
    """Paste drawings on canvases of one size; on a mode-L canvas, white shapes."""
    side = canvases[0].width
    for slot in drawings:
        # 1. The longer side of the drawing gets the side of the slot.
        sprite = load_sprites(folder)[style, slot.thing]
        scale = slot.side * side / max(sprite.size)
        width = max(1, round(sprite.width * scale))
        height = max(1, round(sprite.height * scale))
        scaled = sprite.resize((width, height), Image.Resampling.BILINEAR).convert("RGBA")
        # 2. Paste it around the centre of the slot; its alpha channel is the mask.
        left = round(slot.x * side - width / 2)
        top = round(slot.y * side - height / 2)
        alpha = scaled.getchannel("A")
        for canvas in canvases:
            fill = 255 if canvas.mode == "L" else scaled
            canvas.paste(fill, (left, top, left + width, top + height), alpha)


@lru_cache(maxsize=32)
def _background(name: str, side: int) -> Image.Image:
    """A flat colour, or one of the four places, RGB [side, side]."""
    if name in COLOURS:
        return Image.new("RGB", (side, side), COLOURS[name])
    canvas = Image.new("RGB", (side, side))
    draw = ImageDraw.Draw(canvas)
    unit = side / 64

    # Coordinates are those of an image of 64 pixels; `unit` converts them.
    def scaled(*coordinates: float) -> list[float]:
        return [value * unit for value in coordinates]

    def line_width(width: float) -> int:
        return max(1, round(width * unit))

    def bands(top: float, bottom: float, upper: Colour, lower: Colour) -> None:
        rows = range(round(top * unit), round(bottom * unit))
        for row in rows:
            share = (row - rows.start) / max(1, len(rows) - 1)
            colour = tuple(round(a + (b - a) * share) for a, b in zip(upper, lower, strict=True))
            draw.line([(0, row), (side, row)], colour)

    if name == "meadow":
        # Sky above grass with tufts.
        bands(0, 38, (150, 205, 250), (215, 238, 255))
        bands(38, 64, (132, 200, 92), (84, 160, 62))
        for x, y in ((7, 46), (20, 57), (33, 44), (45, 59), (57, 49), (30, 61), (12, 61), (61, 60)):
            tuft = scaled(x, y, x + 1, y - 3, x + 2, y)
            draw.line(tuft, (58, 128, 48), line_width(0.6))
    elif name == "sea":
        # Sky above water with waves.
        bands(0, 26, (168, 222, 250), (226, 244, 253))
        bands(26, 64, (62, 156, 208), (20, 92, 158))
        for row, y in enumerate((32, 41, 51, 60)):
            for x in range(-8 + 6 * (row % 2), 72, 14):
                wave = scaled(x, y, x + 8, y + 4)
                draw.arc(wave, 200, 340, (150, 212, 240), line_width(0.8))
    elif name == "night":
        # A dark sky with stars at fixed positions.
        bands(0, 64, (14, 16, 48), (52, 40, 92))
        rng = random.Random(5)
        for _ in range(26):
            left = rng.uniform(1, 63)
            top = rng.uniform(1, 63)
            radius = rng.choice((0.4, 0.5, 0.8))
            star = scaled(left - radius, top - radius, left + radius, top + radius)
            draw.ellipse(star, (255, 250, 214))
    else:
        # A wall above a wooden floor.
        bands(0, 44, (250, 226, 196), (244, 214, 180))
        bands(44, 64, (176, 122, 82), (142, 94, 60))
        draw.rectangle([0, 43 * unit, side, 45 * unit], (255, 248, 238))
        for y in (50, 57):
            draw.line([0, y * unit, side, y * unit], (126, 82, 52), line_width(0.5))
    return canvas
