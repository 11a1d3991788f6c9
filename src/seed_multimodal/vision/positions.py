"""Tables of positions on a square grid: resized bicubically to another grid, kept per size, and 2-D sines."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.nn.layers import resize_square


def side_of(tokens: int, what: str) -> int:
    """Side of the square grid that `tokens` positions fill, row by row.

    Raises:
        ConfigError: not a square; the sentence begins with `what`.
    """
    side = math.isqrt(tokens)
    if side == 0 or side * side != tokens:
        raise ConfigError(f"{what} has {tokens} patches, which is not a square grid.")
    return side


def sine_table(width: int, grid: int) -> Tensor:
    """Sines and cosines of the columns in the first half of the channels, of the rows in the second: `[grid², width]`.

    Source: MAE's `get_2d_sincos_pos_embed`, as in Qwen-VL; frequencies are 10000^(-i / (width / 4)), computed in fp64.

    Raises:
        ConfigError: a width that is not a multiple of 4.
    """
    if width % 4:
        raise ConfigError(f"The resampler's width {width} is not a multiple of 4, as sines in two directions need.")
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = waves[None].expand(grid, -1, -1), waves[:, None].expand(-1, grid, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1).float()


class SquarePositions(nn.Module):
    """Gives `resize_square` of a table, for as many tokens as there are; holds no parameters.

    What a frozen table gives is kept per size, until the table changes or the module is moved; a trained one is resized
    each time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, tuple[Tensor, int | None, Tensor]] = {}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.kept.clear()  # another device or precision
        return super()._apply(fn, recurse)

    def forward(self, table_NW: Tensor, tokens: int, what: str) -> Tensor:
        """Table `[g², W]` → `[tokens, W]`.

        Raises:
            ConfigError: `tokens` (of `what`) is not of a square grid.
        """
        grid = side_of(tokens, what)
        if table_NW.requires_grad or torch.compiler.is_compiling():
            return _apart(resize_square(table_NW, grid))
        version = None if table_NW.is_inference() else table_NW._version
        kept = self.kept.get(tokens)
        if kept is None or kept[0] is not table_NW or kept[1] != version:
            with torch.inference_mode(False):  # what is kept may meet a backward pass later
                kept = table_NW, version, resize_square(table_NW, grid)
            self.kept[tokens] = kept
        return _apart(kept[2])


def _apart(table: Tensor) -> Tensor:
    """A view. DeepSpeed's ZeRO-3 takes a parameter that leaves a module for one that others need, and keeps it whole;
    in processes with other numbers of tokens it does not, and what they gather no longer agrees."""
    return table.view_as(table)
