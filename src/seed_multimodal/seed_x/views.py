"""Views of images of any resolution, and aspect ratios of edited images.

An image is squashed onto a grid of square views that suits its shape and size, cut into them, and followed by one view
of the whole. Two rules propose a grid each and the smaller wins; the first of the list wins a tie. Even 1x1 gives two
views, which are then equal. Source: SEED-X's original code (`any_res.py`); the rule of the paper's eq. 1 is another
one, which the models were not trained with.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.errors import ConfigError
from seed_multimodal.images.io import DEFAULT_LIMITS
from seed_multimodal.images.transforms import plain_rgb, resize_passes, to_bytes

ORIGINAL_GRIDS = ("1x1", "1x2", "1x3", "2x1", "3x1", "1x4", "4x1", "2x2")
UNIT = 64  # sides of SDXL's training images are multiples of it
MAX_ASPECT_RATIO = 4.0  # aspect ratio of SDXL's training images (Podell et al. 2023, appendix I)
Grid = tuple[int, int]  # columns, rows
Ratio = Literal["restore", "keep", "square"]


@dataclass(frozen=True)
class AnyResolution:
    """An image → views of `image_size` pixels a side on one of the allowed `grids` (columns x rows)."""

    image_size: int = 448
    grids: tuple[str, ...] = ORIGINAL_GRIDS

    def grid(self, size: tuple[int, int]) -> Grid:
        """The grid of an image of `size` (width, height) in pixels; raises `ImageError` outside the default limits."""
        DEFAULT_LIMITS.check_size(size, "image")
        return choose_grid(size, read_grids(self.grids), self.image_size)

    def cut(self, image: Image.Image) -> Tensor:
        """The views row by row, the whole image last: uint8 [V, 3, S, S] for `normalise`."""
        (columns, rows), side = self.grid(image.size), self.image_size
        image = plain_rgb(image)
        large = to_bytes(
            resize_passes(image, (columns * side, rows * side), Image.Resampling.BICUBIC)
        )
        parts = large.unflatten(1, (rows, side)).unflatten(
            3, (columns, side)
        )  # [3, rows, S, columns, S]
        parts = parts.permute(1, 3, 0, 2, 4).flatten(0, 1)
        return torch.cat(
            [parts, to_bytes(resize_passes(image, (side, side), Image.Resampling.BICUBIC))[None]]
        )


def read_grids(names: Sequence[str]) -> list[Grid]:
    """`["1x1", "4x2"]` → (columns, rows) each; raises `ConfigError` for other names."""
    matches = [re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", name) for name in names]
    grids = [(int(match[1]), int(match[2])) for match in matches if match is not None]
    if not names or len(grids) < len(names) or max(columns * rows for columns, rows in grids) >= 64:
        raise ConfigError(
            f"{', '.join(names) or 'nothing'}: not grids of views; write columns x rows, as 2x1, of "
            f"fewer than 64 views."
        )
    return grids


def choose_grid(size: tuple[int, int], grids: Sequence[Grid], side: int) -> Grid:
    """The grid of views of `side` pixels for an image of `size` (width, height)."""
    fullest, alike = fullest_grid(size, grids, side), most_alike_grid(size, grids, side)
    return alike if fullest[0] * fullest[1] > alike[0] * alike[1] else fullest


def fullest_grid(size: tuple[int, int], grids: Sequence[Grid], side: int) -> Grid:
    """The grid inside which the image, its shape kept, has most pixels of its own; a tie goes to the one with least
    left over (the original `select_best_resolution`)."""
    width, height = size

    def merit(grid: Grid) -> tuple[int, int]:
        full_width, full_height = grid[0] * side, grid[1] * side
        scale = min(full_width / width, full_height / height)
        own = min(int(width * scale) * int(height * scale), width * height)
        return own, own - full_width * full_height

    return max(grids, key=merit)


def most_alike_grid(size: tuple[int, int], grids: Sequence[Grid], side: int) -> Grid:
    """The grid whose shape is nearest to the image's; a tie goes to the nearest area (the original
    `select_best_resolution_v2`)."""
    width, height = size

    def quotient(one: float, other: float) -> float:
        return max(one, other) / min(one, other)

    def difference(grid: Grid) -> tuple[float, float]:
        full_width, full_height = grid[0] * side, grid[1] * side
        return quotient(full_width / full_height, width / height), quotient(
            full_width * full_height, width * height
        )

    return min(grids, key=difference)


def patch_positions(grid: Grid) -> Tensor:
    """Centres (x, y) in [0, 1] of a grid's views row by row, then that of the whole image: `[V, 2]`."""
    columns, rows = grid
    centres = [
        ((column + 0.5) / columns, (row + 0.5) / rows)
        for row in range(rows)
        for column in range(columns)
    ]
    return torch.tensor([*centres, (0.5, 0.5)])


def drawing_size(source: tuple[int, int], side: int, unit: int = UNIT) -> tuple[int, int]:
    """(width, height) of about `side`² pixels in the aspect ratio of a source, in multiples of `unit`."""
    stretch = math.sqrt(min(max(source[0] / source[1], 1 / MAX_ASPECT_RATIO), MAX_ASPECT_RATIO))
    return max(1, round(side * stretch / unit)) * unit, max(1, round(side / stretch / unit)) * unit


def with_ratio(image: Image.Image, source: tuple[int, int]) -> Image.Image:
    """The image stretched to the aspect ratio of a source of (width, height), with as many pixels as it has; unchanged
    where a side would change by less than half a percent."""
    stretch, side = math.sqrt(source[0] / source[1]), math.sqrt(image.width * image.height)
    size = max(1, round(side * stretch)), max(1, round(side / stretch))
    if abs(size[0] / image.width - 1) < 0.005:
        return image
    return resize_passes(image, size, Image.Resampling.BICUBIC)
