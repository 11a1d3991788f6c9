"""SEED-X's any-resolution input: the grid of a picture, the views and their places, odd pictures, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from seed_multimodal.errors import ConfigError, ImageError
from seed_multimodal.images.any_resolution import (
    RELEASED_GRIDS,
    AnyResolution,
    choose_grid,
    patch_positions,
    position_features,
    read_grids,
)
from seed_multimodal.images.transforms import ImageTransform
from seed_multimodal.settings import read_settings

# Sizes of the specification, among them those of the released demo pictures.
KNOWN = {"1x1": [(640, 480), (449, 449), (1, 1)], "2x1": [(1280, 720), (1920, 1080)], "1x2": [(720, 1280)],
         "2x2": [(800, 600), (800, 599), (896, 896), (1024, 1024), (700, 700), (1200, 1200), (1252, 1082)],
         "3x1": [(1000, 300)], "4x1": [(2000, 400)]}


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    return Image.merge("RGB", [Image.linear_gradient("L").rotate(90).resize((width, height)),
                               Image.linear_gradient("L").resize((width, height)), Image.new("L", (width, height))])


@pytest.mark.parametrize("grid", KNOWN)
def test_the_released_rule(grid: str) -> None:
    rule = AnyResolution()
    assert [rule.grid(size) for size in KNOWN[grid]] == read_grids([grid]) * len(KNOWN[grid])


def test_views_are_cut_row_by_row_with_the_whole_picture_last() -> None:
    views = AnyResolution(image_size=8)(gradient(24, 8))
    assert views.grid == (3, 1) and views.pixels.shape == (4, 3, 8, 8) and views.pixels.dtype == torch.float32
    reds = views.pixels[:, 0].mean(dim=(1, 2))
    assert reds[0] < reds[1] < reds[2] or reds[0] > reds[1] > reds[2]
    assert torch.allclose(reds[3], reds[:3].mean(), atol=0.05)
    assert torch.allclose(views.positions, torch.tensor([[1 / 6, 0.5], [0.5, 0.5], [5 / 6, 0.5], [0.5, 0.5]]))


def test_each_view_lies_where_its_position_says() -> None:
    picture, rule = gradient(90, 90), AnyResolution(image_size=30, grids=("3x3",))
    cut = rule.cut(picture)
    large = picture.resize((90, 90), Image.Resampling.BICUBIC)
    for view, (x, y) in zip(cut, patch_positions((3, 3))[:-1].mul(90).round().int().tolist(), strict=False):
        expected = large.crop((x - 15, y - 15, x + 15, y + 15))
        assert torch.equal(view, torch.frombuffer(bytearray(expected.tobytes()), dtype=torch.uint8).view(
            30, 30, 3).permute(2, 0, 1))


def test_one_cell_gives_the_whole_picture_twice_as_the_bicubic_transform_does() -> None:
    picture = gradient(31, 17)
    views = AnyResolution(image_size=12, grids=("1x1",))(picture)
    whole = ImageTransform(image_size=12, interpolation="bicubic")(picture)
    assert torch.equal(views.pixels, torch.stack([whole, whole]))
    assert views.positions.tolist() == [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (1, 1), (30_000, 2), (3, 30_000), (449, 447)])
def test_odd_pictures_get_views(size: tuple[int, int]) -> None:
    views = AnyResolution(image_size=14)(Image.new("RGB", size, (255, 0, 0)))
    assert len(views.pixels) == len(views.positions) == views.grid[0] * views.grid[1] + 1
    assert f"{views.grid[0]}x{views.grid[1]}" in RELEASED_GRIDS
    assert torch.equal(views.pixels, views.pixels[:1, :, :1, :1].expand_as(views.pixels))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16", "1"])
def test_pictures_of_every_mode_become_rgb(mode: str) -> None:
    assert AnyResolution(image_size=14)(Image.new(mode, (40, 20))).pixels.shape == (3, 3, 14, 14)


def test_the_half_in_the_position_features_is_kept() -> None:
    assert torch.allclose(position_features(torch.tensor([[0.25, 0.75]])), torch.tensor([[0.125, 0.375, 0.375, 0.125]]))


def test_the_first_grid_of_the_list_wins_a_tie() -> None:
    square = (500, 500)
    assert choose_grid(square, [(1, 2), (2, 1)], 448) == (1, 2) and choose_grid(square, [(2, 1), (1, 2)], 448) == (2, 1)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (40_000, 3)])
def test_pictures_that_cannot_be_are_refused_in_a_sentence(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=rf"{size[0]}x{size[1]}"):
        AnyResolution()(Image.new("RGB", size))


@pytest.mark.parametrize(("values", "words"), [
    ({"grids": []}, "At least one grid"), ({"grids": ["2 x 1"]}, "'2 x 1' is no grid of views"),
    ({"grids": ["1x1", "0x2"]}, "'0x2' is no grid"), ({"grids": ["8x8"]}, "fewer than 64 views"),
    ({"grids": "2x2"}, "grids must be a list"), ({"image_size": 0}, "at least 1"),
    ({"interpolation": "cubic"}, "did you mean 'bicubic'"),
    ({"base_resolution": 448}, "unknown key 'base_resolution'")])
def test_settings_that_cannot_be_are_refused_in_a_sentence(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_settings(AnyResolution, values, "picture")
