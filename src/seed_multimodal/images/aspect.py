"""The aspect ratio of a source when a model that draws squares edits it.

SEED-X's released editing squashed every source to a square and returned a square. Two ways keep the ratio:

    size = drawing_size(source.size, 1024, "keep")          # (width, height) that the model draws
    picture = with_ratio(draw(size), source.size)           # stretched to the source's ratio, if it has not got it

* "restore": the model draws the square that it was trained on, and the result is stretched back;
* "keep": the model draws about as many pixels in about the source's ratio, as far as SDXL was trained on such (up to 4
  to 1, Podell et al. 2023, appendix I).

"square" asks for the original's result, without `with_ratio`.
"""

from __future__ import annotations

import math
from typing import Literal

from PIL import Image

from seed_multimodal.errors import ConfigError
from seed_multimodal.images.transforms import resize_passes
from seed_multimodal.settings import check_value

Ratio = Literal["restore", "keep", "square"]
STEEPEST = 4.0
UNIT = 64  # sides of SDXL's training pictures are multiples of it


def drawing_size(source: tuple[int, int], side: int, ratio: Ratio = "restore", unit: int = UNIT) -> tuple[int, int]:
    """(width, height) to draw for a source of (width, height): `side`², or about so many pixels in its ratio.

    Args:
        unit: what both sides are multiples of if the ratio is kept; at most `side`.

    Raises:
        ConfigError: another ratio, or sizes below 1.
    """
    check_value(Ratio, ratio, "ratio")
    check_value(int, unit, "unit", least=1, most=check_value(int, side, "side", least=1))
    wanted = _ratio(source)
    if ratio != "keep":
        return side, side
    stretch = math.sqrt(min(max(wanted, 1 / STEEPEST), STEEPEST))
    return max(1, round(side * stretch / unit)) * unit, max(1, round(side / stretch / unit)) * unit


def with_ratio(picture: Image.Image, source: tuple[int, int]) -> Image.Image:
    """The picture stretched to the ratio of a source of (width, height), with as many pixels as it has.

    As it is where that would move a side by less than half a percent.
    """
    wanted, (width, height) = _ratio(source), picture.size
    side = math.sqrt(width * height)
    size = max(1, round(side * math.sqrt(wanted))), max(1, round(side / math.sqrt(wanted)))
    if abs(size[0] / width - 1) < 0.005:
        return picture
    return resize_passes(picture, size, Image.Resampling.BICUBIC)


def _ratio(size: tuple[int, int]) -> float:
    width, height = size
    if width < 1 or height < 1:
        raise ConfigError(f"A picture has at least one pixel along each side, not {width} x {height}.")
    return width / height
