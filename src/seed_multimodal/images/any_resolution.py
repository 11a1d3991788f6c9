"""Any-resolution input of SEED-X: a picture is squashed onto a grid of square views that suits its shape and size, cut
into them, and followed by one view of the whole.

    views = AnyResolution()(picture)              # an 800 × 600 picture: grid 2x2
    views.pixels                                  # float32 [5, 3, 448, 448]: row by row, the whole picture last
    views.positions                               # float32 [5, 2]: centres (x, y) in [0, 1]

Grids are named columns x rows. Two rules propose one each and the smaller wins; the first of the list wins a tie. Even
1x1 gives two views, which are then equal. Source: SEED-X's released code (`any_res.py`); the rule of the paper's eq. 1
is another one, which the models were not trained with. Note: resizing is bicubic there, Pillow's default; the bilinear
transform that follows changes nothing at the same size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.errors import ConfigError
from seed_multimodal.images.open import DEFAULT_LIMITS
from seed_multimodal.images.transforms import INTERPOLATIONS, normalise, plain_rgb, resize_passes, to_bytes
from seed_multimodal.settings import check_settings, setting

RELEASED_GRIDS = ("1x1", "1x2", "1x3", "2x1", "3x1", "1x4", "4x1", "2x2")
MOST_VIEWS = 64  # of one picture; the released grids give five
Grid = tuple[int, int]  # columns, rows


@dataclass(frozen=True)
class Views:
    """A picture's views: normalised pixels `[V, 3, S, S]`, centres (x, y) `[V, 2]`, and the grid (columns, rows)."""

    pixels: Tensor
    positions: Tensor
    grid: Grid


@dataclass(frozen=True)
class AnyResolution:
    """A picture → `Views` of `image_size` pixels a side on one of the allowed `grids`."""

    image_size: int = setting(448, least=1)
    grids: tuple[str, ...] = RELEASED_GRIDS
    interpolation: str = setting("bicubic", choices=tuple(INTERPOLATIONS))

    def __post_init__(self) -> None:
        check_settings(self, "any resolution")
        read_grids(self.grids)

    def __call__(self, image: Image.Image) -> Views:
        """
        Raises:
            ImageError: a picture without pixels, or beyond the limits of `images.open`.
        """
        grid = self.grid(image.size)
        return Views(normalise(self.cut(image)), patch_positions(grid), grid)

    def grid(self, size: tuple[int, int]) -> Grid:
        """The grid (columns, rows) of a picture of `size` (width, height) in pixels; `ImageError` as above."""
        DEFAULT_LIMITS.check_size(size, "image")
        return choose_grid(size, read_grids(self.grids), self.image_size)

    def cut(self, image: Image.Image) -> Tensor:
        """The views, uint8 [V, 3, S, S] for `normalise`."""
        columns, rows = self.grid(image.size)
        image = plain_rgb(image)
        side, filter_ = self.image_size, INTERPOLATIONS[self.interpolation]
        large = to_bytes(resize_passes(image, (columns * side, rows * side), filter_))
        parts = large.unflatten(1, (rows, side)).unflatten(3, (columns, side))  # [3, rows, S, columns, S]
        parts = parts.permute(1, 3, 0, 2, 4).flatten(0, 1)
        return torch.cat([parts, to_bytes(resize_passes(image, (side, side), filter_))[None]])


def read_grids(names: Sequence[str]) -> list[Grid]:
    """`["1x1", "4x2"]` → (columns, rows) each.

    Raises:
        ConfigError: no grid, or a name that is none.
    """
    found = []
    for name in names:
        match = re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", name)
        if match is None or int(match[1]) * int(match[2]) >= MOST_VIEWS:
            raise ConfigError(f"{name!r} is no grid of views: write columns x rows, as 2x1, of fewer than {MOST_VIEWS} "
                              f"views.")
        found.append((int(match[1]), int(match[2])))
    if not found:
        raise ConfigError(f"At least one grid of views is needed, for example {', '.join(RELEASED_GRIDS)}.")
    return found


def choose_grid(size: tuple[int, int], grids: Sequence[Grid], side: int) -> Grid:
    """The grid (columns, rows) of views of `side` pixels for a picture of `size` (width, height)."""
    fullest, alike = fullest_grid(size, grids, side), most_alike_grid(size, grids, side)
    return alike if fullest[0] * fullest[1] > alike[0] * alike[1] else fullest


def fullest_grid(size: tuple[int, int], grids: Sequence[Grid], side: int) -> Grid:
    """The grid inside which the picture, its shape kept, has most pixels of its own; a tie goes to the one with least
    left over (the released `select_best_resolution`)."""
    width, height = size

    def merit(grid: Grid) -> tuple[int, int]:
        full_width, full_height = grid[0] * side, grid[1] * side
        scale = min(full_width / width, full_height / height)
        own = min(int(width * scale) * int(height * scale), width * height)
        return own, own - full_width * full_height

    return max(grids, key=merit)


def most_alike_grid(size: tuple[int, int], grids: Sequence[Grid], side: int) -> Grid:
    """The grid whose shape is nearest to the picture's; a tie goes to the nearest area (the released
    `select_best_resolution_v2`)."""
    width, height = size

    def difference(grid: Grid) -> tuple[float, float]:
        full_width, full_height = grid[0] * side, grid[1] * side
        return (_quotient(full_width / full_height, width / height),
                _quotient(full_width * full_height, width * height))

    return min(grids, key=difference)


def _quotient(one: float, other: float) -> float:
    """The larger by the smaller."""
    return max(one, other) / min(one, other)


def patch_positions(grid: Grid) -> Tensor:
    """Centres (x, y) in [0, 1] of a grid's views row by row, then that of the whole picture: `[V, 2]`."""
    columns, rows = grid
    centres = [((column + 0.5) / columns, (row + 0.5) / rows) for row in range(rows) for column in range(columns)]
    return torch.tensor([*centres, (0.5, 0.5)])


def position_features(positions_N2: Tensor) -> Tensor:
    """Centres (x, y) → what the tables of patch positions are multiplied by, (x, y, 1 - x, 1 - y) / 2: `[N, 4]`.

    The paper's eq. 2 has no half; the released code does.
    """
    return torch.cat([positions_N2, 1 - positions_N2], dim=-1) / 2
