"""Views of images of any resolution, and aspect ratios of edited images.

An image is squashed onto a grid of square views that suits its shape and size, cut into them, and
followed by one view of the complete image. Two rules propose a grid each and the smaller one is
used; in a tie the first of the list. Even 1x1 gives two views, which are then equal.

Source: SEED-X's original code (`any_res.py`); the models were not trained with the rule of the
paper's eq. 1.
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
    """An image → views of `image_size` pixels a side on one of the `grids` (columns x rows)."""

    image_size: int = 448
    grids: tuple[str, ...] = ORIGINAL_GRIDS

    def grid(self, size: tuple[int, int]) -> Grid:
        """The grid of an image; raises `ImageError` outside the default limits.

        size: width and height in pixels.
        """
        DEFAULT_LIMITS.check_size(size, "image")
        return choose_grid(size, read_grids(self.grids), self.image_size)

    def cut(self, image: Image.Image) -> Tensor:
        """The views row by row, the complete image last: uint8 [V, 3, S, S] for `normalise`."""
        # 1. The image squashed onto the grid, and onto a single view.
        columns, rows = self.grid(image.size)
        side = self.image_size
        image = plain_rgb(image)
        large = resize_passes(image, (columns * side, rows * side), Image.Resampling.BICUBIC)
        small = resize_passes(image, (side, side), Image.Resampling.BICUBIC)

        # 2. The grid cut into views:
        #    [3, rows · S, columns · S] → [3, rows, S, columns, S] → [rows · columns, 3, S, S]
        parts = to_bytes(large).unflatten(1, (rows, side)).unflatten(3, (columns, side))
        parts = parts.permute(1, 3, 0, 2, 4).flatten(0, 1)
        return torch.cat([parts, to_bytes(small)[None]])


def read_grids(names: Sequence[str]) -> list[Grid]:
    """`["1x1", "4x2"]` → (columns, rows) each; raises `ConfigError` for other names."""
    matches = [re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", name) for name in names]
    grids = [(int(match[1]), int(match[2])) for match in matches if match is not None]
    if not names or len(grids) < len(names) or max(columns * rows for columns, rows in grids) >= 64:
        raise ConfigError(
            f"{', '.join(names) or 'nothing'}: not grids of views; write columns x rows, as 2x1, "
            f"of fewer than 64 views."
        )
    return grids


def choose_grid(size: tuple[int, int], grids: Sequence[Grid], side: int) -> Grid:
    """The grid of views of `side` pixels for an image of `size` (width, height)."""
    by_resolution = best_resolution_grid(size, grids, side)
    by_ratio = nearest_ratio_grid(size, grids, side)
    return by_ratio if math.prod(by_resolution) > math.prod(by_ratio) else by_resolution


def best_resolution_grid(size: tuple[int, int], grids: Sequence[Grid], side: int) -> Grid:
    """The grid that fits most of the image's pixels without changing its aspect ratio.

    A tie goes to the grid with the least unused area (the original `select_best_resolution`).
    """
    width, height = size

    def merit(grid: Grid) -> tuple[int, int]:
        grid_width = grid[0] * side
        grid_height = grid[1] * side
        scale = min(grid_width / width, grid_height / height)
        # Enlarging adds no pixels of the image.
        n_pixels = min(int(width * scale) * int(height * scale), width * height)
        n_unused = grid_width * grid_height - n_pixels
        return n_pixels, -n_unused

    return max(grids, key=merit)


def nearest_ratio_grid(size: tuple[int, int], grids: Sequence[Grid], side: int) -> Grid:
    """The grid whose aspect ratio is nearest to the image's.

    A tie goes to the nearest area (the original `select_best_resolution_v2`).
    """
    width, height = size

    def difference(grid: Grid) -> tuple[float, float]:
        grid_width = grid[0] * side
        grid_height = grid[1] * side
        # Both at least 1, which is equality.
        ratio_difference = _quotient(grid_width / grid_height, width / height)
        area_difference = _quotient(grid_width * grid_height, width * height)
        return ratio_difference, area_difference

    return min(grids, key=difference)


def _quotient(a: float, b: float) -> float:
    """The larger value divided by the smaller one."""
    return max(a, b) / min(a, b)


def patch_positions(grid: Grid) -> Tensor:
    """Centres (x, y) in [0, 1] of a grid's views row by row, then the image's: `[V, 2]`."""
    columns, rows = grid
    centres: list[tuple[float, float]] = []
    for row in range(rows):
        for column in range(columns):
            centres.append(((column + 0.5) / columns, (row + 0.5) / rows))
    centres.append((0.5, 0.5))
    return torch.tensor(centres, dtype=torch.float32, device="cpu")


def drawing_size(source: tuple[int, int], side: int, unit: int = UNIT) -> tuple[int, int]:
    """Width and height of about `side`² pixels in the aspect ratio of a source.

    source: width and height.
    unit: both are multiples of it.
    """
    # Longer sources are drawn at the most extreme ratio that SDXL knows.
    ratio = source[0] / source[1]
    ratio = min(max(ratio, 1 / MAX_ASPECT_RATIO), MAX_ASPECT_RATIO)
    width, height = _sides(ratio, side / unit)
    return width * unit, height * unit


def with_ratio(image: Image.Image, source: tuple[int, int]) -> Image.Image:
    """The image stretched to the aspect ratio of a source, with about as many pixels as before.

    It is unchanged if a side would change by less than half a percent.

    source: width and height.
    """
    side = math.sqrt(image.width * image.height)
    width, height = _sides(source[0] / source[1], side)
    if abs(width / image.width - 1) < 0.005:
        return image
    return resize_passes(image, (width, height), Image.Resampling.BICUBIC)


def _sides(ratio: float, side: float) -> tuple[int, int]:
    """Width and height, at least 1, of a rectangle with a ratio and the area of a square."""
    stretch = math.sqrt(ratio)
    return max(1, round(side * stretch)), max(1, round(side / stretch))
