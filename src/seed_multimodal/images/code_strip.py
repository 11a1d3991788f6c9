"""Codes as colours: a cell for each code, coloured by its number within its section, so equal codes look equal."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

from PIL import Image, ImageDraw

UNKNOWN = (128, 128, 136, 90)  # a code that is not used, or not known yet
_TURN, _LIGHT = 0.61803398875, (0.48, 0.62, 0.76)


def code_colour(code: int, section: int) -> tuple[int, int, int]:
    """The colour of a code; `section`: codes in a section of the codebook (all of them, if it has none)."""
    number = code % section
    red, green, blue = colorsys.hls_to_rgb(number * _TURN % 1, _LIGHT[number % 3], 0.65)
    return round(255 * red), round(255 * green), round(255 * blue)


def code_strip(codes: Sequence[int], section: int, *, first: int | None = None, columns: int = 32,
               cell: int = 12, gap: int = 2) -> Image.Image:
    """A picture of one picture's codes, RGBA, `columns` cells a line.

    Args:
        first: codes after so many are faint.
        cell, gap: side of a cell and the transparent space between two, in pixels.
    """
    rows, step = -(-len(codes) // columns), cell + gap
    strip = Image.new("RGBA", (min(columns, len(codes)) * step - gap, rows * step - gap))
    draw = ImageDraw.Draw(strip)
    for place, code in enumerate(codes):
        x, y = place % columns * step, place // columns * step
        known = first is None or place < first
        draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=code_colour(code, section) if known else UNKNOWN)
    return strip


def above_strip(picture: Image.Image, strip: Image.Image, gap: int = 6) -> Image.Image:
    """A picture, enlarged or reduced to the strip's width, above the strip; RGBA."""
    height = max(1, round(strip.width * picture.height / picture.width))
    page = Image.new("RGBA", (strip.width, height + gap + strip.height))
    page.paste(picture.convert("RGB").resize((strip.width, height), Image.Resampling.BICUBIC))
    page.paste(strip, (0, height + gap))
    return page
