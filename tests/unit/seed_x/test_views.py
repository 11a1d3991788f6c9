"""SEED-X's views of an image, aspect ratios of edited images, boxes."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from seed_multimodal.errors import ConfigError, ImageError
from seed_multimodal.images.transforms import ImageTransform
from seed_multimodal.seed_x.views import (
    RELEASED_GRIDS,
    AnyResolution,
    choose_grid,
    drawing_size,
    patch_positions,
    read_grids,
    with_ratio,
)

# Sizes of the specification, among them those of the released demo pictures.
KNOWN = {"1x1": [(640, 480), (449, 449), (1, 1)], "2x1": [(1280, 720), (1920, 1080)], "1x2": [(720, 1280)],
         "2x2": [(800, 600), (800, 599), (896, 896), (1024, 1024), (700, 700), (1200, 1200), (1252, 1082)],
         "3x1": [(1000, 300)], "4x1": [(2000, 400)]}


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    return Image.merge("RGB", [Image.linear_gradient("L").rotate(90).resize((width, height)),
                               Image.linear_gradient("L").resize((width, height)), Image.new("L", (width, height))])


@pytest.mark.parametrize("grid", KNOWN)
def test_grid_of_known_sizes(grid: str) -> None:
    rule = AnyResolution()
    assert [rule.grid(size) for size in KNOWN[grid]] == read_grids([grid]) * len(KNOWN[grid])


def test_views_are_cut_row_by_row() -> None:
    views = AnyResolution(image_size=8)(gradient(24, 8))
    assert views.grid == (3, 1) and views.pixels.shape == (4, 3, 8, 8) and views.pixels.dtype == torch.float32
    reds = views.pixels[:, 0].mean(dim=(1, 2))
    assert reds[0] < reds[1] < reds[2] or reds[0] > reds[1] > reds[2]
    assert torch.allclose(reds[3], reds[:3].mean(), atol=0.05)
    assert torch.allclose(views.positions, torch.tensor([[1 / 6, 0.5], [0.5, 0.5], [5 / 6, 0.5], [0.5, 0.5]]))


def test_patch_positions_are_the_centres() -> None:
    picture, rule = gradient(90, 90), AnyResolution(image_size=30, grids=("3x3",))
    cut = rule.cut(picture)
    large = picture.resize((90, 90), Image.Resampling.BICUBIC)
    for view, (x, y) in zip(cut, patch_positions((3, 3))[:-1].mul(90).round().int().tolist(), strict=False):
        expected = large.crop((x - 15, y - 15, x + 15, y + 15))
        assert torch.equal(view, torch.frombuffer(bytearray(expected.tobytes()), dtype=torch.uint8).view(
            30, 30, 3).permute(2, 0, 1))


def test_views_of_one_cell_are_equal() -> None:
    picture = gradient(31, 17)
    views = AnyResolution(image_size=12, grids=("1x1",))(picture)
    whole = ImageTransform(image_size=12, interpolation="bicubic")(picture)
    assert torch.equal(views.pixels, torch.stack([whole, whole]))
    assert views.positions.tolist() == [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (1, 1), (30_000, 2), (3, 30_000), (449, 447)])
def test_views_of_extreme_shapes(size: tuple[int, int]) -> None:
    views = AnyResolution(image_size=14)(Image.new("RGB", size, (255, 0, 0)))
    assert len(views.pixels) == len(views.positions) == views.grid[0] * views.grid[1] + 1
    assert f"{views.grid[0]}x{views.grid[1]}" in RELEASED_GRIDS
    assert torch.equal(views.pixels, views.pixels[:1, :, :1, :1].expand_as(views.pixels))


def test_choose_grid_takes_the_first_of_a_tie() -> None:
    square = (500, 500)
    assert choose_grid(square, [(1, 2), (2, 1)], 448) == (1, 2) and choose_grid(square, [(2, 1), (1, 2)], 448) == (2, 1)


def test_any_resolution_of_wrong_grids_and_sizes() -> None:
    for grids in ((), ("2 x 1",), ("1x1", "0x2"), ("8x8",)):
        with pytest.raises(ConfigError, match="not grids of views"):
            AnyResolution(grids=grids)
    with pytest.raises(ImageError, match="40000x3"):
        AnyResolution()(Image.new("RGB", (40_000, 3)))


@pytest.mark.parametrize(("source", "kept"), [
    ((1024, 1024), (1024, 1024)), ((800, 600), (1152, 896)), ((600, 800), (896, 1152)), ((1920, 1080), (1344, 768)),
    ((300, 3), (2048, 512)), ((1, 5000), (512, 2048)), ((4000, 3000), (1152, 896))])
def test_drawing_size_of_sources(source: tuple[int, int], kept: tuple[int, int]) -> None:
    assert drawing_size(source, 1024, "keep") == kept
    assert drawing_size(source, 1024) == drawing_size(source, 1024, "square") == (1024, 1024)


def test_drawing_size_in_other_units() -> None:
    assert drawing_size((300, 200), 64, "keep", unit=8) == (80, 56)
    assert drawing_size((300, 1), 16, "keep", unit=16) == (32, 16), "a side is never zero"


@pytest.mark.parametrize("source", [(800, 600), (600, 800), (2000, 100), (7, 5)])
def test_with_ratio_restores_the_source(source: tuple[int, int]) -> None:
    for ratio in ("restore", "keep"):
        width, height = with_ratio(Image.new("RGB", drawing_size(source, 1024, ratio)), source).size
        assert width / height == pytest.approx(source[0] / source[1], rel=0.012)
        assert width * height == pytest.approx(1024**2, rel=0.06)
    square = Image.new("RGB", (1024, 1024))
    assert with_ratio(square, (500, 501)) is square
