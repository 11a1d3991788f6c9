"""Two small data sets, as a team would bring them: 60 images with captions, and 60 conversations.

    python benchmarks/own_data.py shapes outputs/shapes
    python benchmarks/own_data.py toys outputs/toys

shapes: circles, squares and others in five colours on white.
toys: drawings of things that nano does not know (a robot, a lighthouse, …) in three colours.

Each writes `images/NAME.png` with `NAME.txt`, and `chats.json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 256
COLOURS = {
    "red": (220, 40, 40),
    "blue": (40, 80, 220),
    "green": (30, 150, 60),
    "yellow": (240, 200, 20),
    "purple": (140, 60, 180),
    "orange": (245, 130, 20),
}
DARK, LIGHT = (50, 50, 60), (250, 250, 245)

Colour = tuple[int, int, int]
Drawing = Callable[["Pen", Colour], None]


class Pen:
    """Draws in shares of a square, from -1 to 1."""

    def __init__(self, image: Image.Image, x: float, y: float, size: float) -> None:
        self.draw = ImageDraw.Draw(image)
        self.x, self.y, self.size = x, y, size

    def points(self, *values: float) -> list[tuple[float, float]]:
        pairs = zip(values[::2], values[1::2], strict=True)
        return [(self.x + x * self.size, self.y + y * self.size) for x, y in pairs]

    def box(self, colour: Colour, *values: float) -> None:
        self.draw.rectangle(self.points(*values), colour, DARK, 2)

    def oval(self, colour: Colour, *values: float) -> None:
        self.draw.ellipse(self.points(*values), colour, DARK, 2)

    def shape(self, colour: Colour, *values: float) -> None:
        self.draw.polygon(self.points(*values), colour, DARK, 2)


# ---- shapes


def circle(pen: Pen, colour: Colour) -> None:
    pen.oval(colour, -1, -1, 1, 1)


def square(pen: Pen, colour: Colour) -> None:
    pen.box(colour, -0.9, -0.9, 0.9, 0.9)


def triangle(pen: Pen, colour: Colour) -> None:
    pen.shape(colour, 0, -1, 1, 0.9, -1, 0.9)


def cross(pen: Pen, colour: Colour) -> None:
    arm = 0.33
    pen.shape(
        colour,
        *(-arm, -1, arm, -1, arm, -arm, 1, -arm, 1, arm, arm, arm),
        *(arm, 1, -arm, 1, -arm, arm, -1, arm, -1, -arm, -arm, -arm),
    )


def ring(pen: Pen, colour: Colour) -> None:
    pen.oval(colour, -1, -1, 1, 1)
    pen.oval((255, 255, 255), -0.5, -0.5, 0.5, 0.5)


def hexagon(pen: Pen, colour: Colour) -> None:
    corners = [(math.cos(k * math.pi / 3), math.sin(k * math.pi / 3)) for k in range(6)]
    pen.shape(colour, *itertools.chain.from_iterable(corners))


# ---- toys


def robot(pen: Pen, colour: Colour) -> None:
    pen.box(colour, -0.6, -0.9, 0.6, -0.1)
    pen.box(colour, -0.75, 0, 0.75, 0.8)
    for x in (-0.3, 0.3):
        pen.oval(LIGHT, x - 0.16, -0.7, x + 0.16, -0.4)
        pen.box(DARK, x - 0.15, 0.8, x + 0.15, 1)


def lighthouse(pen: Pen, colour: Colour) -> None:
    pen.shape(LIGHT, -0.25, -0.5, 0.25, -0.5, 0.45, 1, -0.45, 1)
    pen.shape(colour, -0.3, -0.1, 0.3, -0.1, 0.36, 0.35, -0.36, 0.35)
    pen.box((255, 230, 90), -0.22, -0.8, 0.22, -0.5)
    pen.shape(colour, 0, -1, 0.35, -0.78, -0.35, -0.78)


def windmill(pen: Pen, colour: Colour) -> None:
    pen.shape(colour, -0.3, -0.3, 0.3, -0.3, 0.5, 1, -0.5, 1)
    for angle in (0.4, 2, 3.5, 5.1):
        x, y = math.cos(angle), math.sin(angle)
        pen.shape(LIGHT, 0, -0.3, x - y * 0.2, y + x * 0.2 - 0.3, x + y * 0.2, y - x * 0.2 - 0.3)


def ghost(pen: Pen, colour: Colour) -> None:
    pen.oval(colour, -0.7, -1, 0.7, 0.4)
    pen.shape(colour, -0.7, -0.3, 0.7, -0.3, 0.7, 1, 0.35, 0.7, 0, 1, -0.35, 0.7, -0.7, 1)
    for x in (-0.3, 0.3):
        pen.oval(DARK, x - 0.14, -0.5, x + 0.14, -0.1)


def mailbox(pen: Pen, colour: Colour) -> None:
    pen.box(DARK, -0.1, 0.2, 0.1, 1)
    pen.box(colour, -0.8, -0.5, 0.8, 0.2)
    pen.box(LIGHT, -0.5, -0.3, 0.5, -0.15)


def ladder(pen: Pen, colour: Colour) -> None:
    for x in (-0.55, 0.55):
        pen.box(colour, x - 0.12, -1, x + 0.12, 1)
    for y in (-0.7, -0.25, 0.2, 0.65):
        pen.box(colour, -0.5, y - 0.09, 0.5, y + 0.09)


def submarine(pen: Pen, colour: Colour) -> None:
    pen.box(colour, -0.2, -0.8, 0.3, -0.2)
    pen.oval(colour, -1, -0.4, 1, 0.6)
    for x in (-0.5, 0, 0.5):
        pen.oval(LIGHT, x - 0.15, -0.05, x + 0.15, 0.25)


def signal(pen: Pen, colour: Colour) -> None:
    pen.box(colour, -0.4, -1, 0.4, 1)
    for y, light in ((-0.6, (230, 40, 40)), (0, (250, 210, 40)), (0.6, (40, 180, 60))):
        pen.oval(light, -0.26, y - 0.26, 0.26, y + 0.26)


def igloo(pen: Pen, colour: Colour) -> None:
    pen.draw.pieslice(pen.points(-1, -0.8, 1, 1.2), 180, 360, colour, DARK, 2)
    pen.box(DARK, -0.25, -0.2, 0.25, 0.2)


def fence(pen: Pen, colour: Colour) -> None:
    for y in (-0.2, 0.4):
        pen.box(colour, -1, y, 1, y + 0.18)
    for x in (-0.75, -0.25, 0.25, 0.75):
        pen.shape(colour, x - 0.15, 0.9, x - 0.15, -0.5, x, -0.8, x + 0.15, -0.5, x + 0.15, 0.9)


SETS: dict[str, tuple[list[Drawing], int]] = {
    "shapes": ([circle, square, triangle, cross, ring, hexagon], 5),
    "toys": (
        [
            *(robot, lighthouse, windmill, ghost, mailbox),
            *(ladder, submarine, signal, igloo, fence),
        ],
        3,
    ),
}
IMAGES = 60


def main() -> None:
    """Write one of the sets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=SETS)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    images = args.out / "images"
    images.mkdir(parents=True, exist_ok=True)
    drawings, n_colours = SETS[args.name]
    rng = random.Random(args.name)
    combinations = list(itertools.product(drawings, list(COLOURS)[:n_colours]))
    chats = []
    for index in range(IMAGES):
        drawing, colour = combinations[index % len(combinations)]
        thing = drawing.__name__
        image = Image.new("RGB", (SIDE, SIDE), "white")
        x, y = (SIDE / 2 + rng.uniform(-14, 14) for _ in range(2))
        drawing(Pen(image, x, y, rng.uniform(80, 104)), COLOURS[colour])
        name = f"{colour}_{thing}_{index:02d}"
        image.save(images / f"{name}.png")
        (images / f"{name}.txt").write_text(f"a {colour} {thing}\n")
        chats.append(conversation(index, f"images/{name}.png", colour, thing))
    (args.out / "chats.json").write_text(json.dumps(chats, indent=1))
    print(f"{args.out}: {IMAGES} images with captions in images/, {len(chats)} chats in chats.json")


def conversation(index: int, image: str, colour: str, thing: str) -> dict[str, object]:
    """A question about an image, or a request to draw it, in turn."""
    if index % 2:
        request, answer = f"Draw a {colour} {thing}.", "<image>"
    else:
        request, answer = "<image>\nWhat colour is it?", f"{colour.capitalize()}."
        if index % 4:
            request, answer = "<image>\nWhat is this?", f"A {thing}."
    turns = [{"from": "human", "value": request}, {"from": "gpt", "value": answer}]
    return {"id": str(index), "image": image, "conversations": turns}


if __name__ == "__main__":
    main()
