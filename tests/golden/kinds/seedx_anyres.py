"""SEED-X's any-resolution input: both rules and the grid they give, views and their places, the plain transform.

Not covered: `transform.clipa`, `.clipb` and `.sd` (constants of other towers, which no released configuration of SEED-X
uses: `get_transform` refuses these names, checked here), and `resize_pad_True` (black borders, off in all of them).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runner import assert_close, assert_same, read_json, read_tensors

from seed_multimodal.errors import ConfigError
from seed_multimodal.images.transforms import TYPES, get_transform, normalise, resize_passes, to_bytes
from seed_multimodal.seed_x.views import (
    AnyResolution,
    choose_grid,
    fullest_grid,
    most_alike_grid,
    patch_positions,
    read_grids,
)

KIND = "seedx_anyres"
PIXEL_TOLERANCE = 2e-2
LEVELS = 2  # of 8-bit pixels: the same tolerance


def check_grid(case: dict[str, Any], lists: dict[str, list[str]]) -> None:
    grids, size, base = read_grids(lists[case["grids"]]), tuple(case["size"]), case["base"]
    for rule, column in ((fullest_grid, "select_best_resolution"), (most_alike_grid, "select_best_resolution_v2")):
        columns, rows = rule(size, grids, base)
        assert_same([columns * base, rows * base], case[column], f"{column} of {size}, {case['grids']}, {base}")
    assert_same(list(choose_grid(size, grids, base)), case["grid_shape"], f"grid of {size}, {case['grids']}, {base}")


def check_views(case: dict[str, Any], grids: list[str], tensors: dict[str, torch.Tensor]) -> None:
    name, rule = case["image"], AnyResolution(image_size=case["base"], grids=tuple(grids))
    picture = Image.fromarray(tensors[f"{name}.pixels"].numpy())
    assert_same(list(picture.size), case["size"], f"{name}: size")
    pixels = normalise(rule.cut(picture))
    assert_same(len(pixels), case["num"], f"{name}: number of views")
    assert_close(pixels, tensors[f"{name}.patches"], PIXEL_TOLERANCE, what=f"{name}.patches")
    positions = patch_positions(rule.grid(picture.size))
    assert_close(positions, tensors[f"{name}.patch_position"], 1e-6, what=f"{name}.patch_position")
    if f"{name}.resize_pad_False" in tensors:
        want = tensors[f"{name}.resize_pad_False"].permute(2, 0, 1)
        squashed = to_bytes(resize_passes(picture, (want.shape[2], want.shape[1]), Image.Resampling.BICUBIC))
        assert_close(squashed, want, LEVELS, what=f"{name}.resize_pad_False")


def check_transform(kind: str, keep_ratio: bool, picture: Image.Image, want: torch.Tensor) -> None:
    if kind not in TYPES:
        with pytest.raises(ConfigError, match=kind):
            get_transform(kind)
        return
    transform = get_transform(kind, keep_ratio=keep_ratio, image_size=want.shape[-1])
    assert_close(transform(picture), want, PIXEL_TOLERANCE, what=f"transform {kind}, keep_ratio {keep_ratio}")


def check(folder: Path) -> None:
    cases, tensors = read_json(folder / "cases.json"), read_tensors(folder / "tensors.safetensors")
    lists = cases["grids"]
    assert cases["grid_selection"] and cases["patches"], "the fixture holds no cases"
    for case in cases["grid_selection"]:
        check_grid(case, lists)
    for case in cases["patches"]:
        check_views(case, lists[case.get("grids", "released")], tensors)
    for name, want in tensors.items():
        if name.startswith("transform."):
            _, kind, keep_ratio = name.split(".")
            check_transform(kind, keep_ratio == "True", Image.fromarray(tensors["transform_input"].numpy()), want)
