"""Boxes drawn on a picture, as SEED-X's released scripts show what they found: green, two pixels wide."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw

GREEN = (0, 255, 0)


def draw_boxes(picture: Image.Image, boxes: Iterable[Sequence[int]], colour: tuple[int, int, int] = GREEN,
               width: int = 2) -> Image.Image:
    """A copy of the picture with rectangles.

    Args:
        boxes: left, top, right, bottom in pixels; parts outside the picture are not seen.
        width: of the lines, in pixels.
    """
    drawn = picture.convert("RGB")
    drawn = drawn.copy() if drawn is picture else drawn
    pen = ImageDraw.Draw(drawn)
    for left, top, right, bottom in boxes:
        pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=width)
    return drawn
