"""SEED-X's views of an image, aspect ratios of edited images (rules for grids: golden kind
`seedx_anyres`).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from seed_multimodal.errors import ConfigError, ImageError
from seed_multimodal.images.views import (
    ORIGINAL_GRIDS,
    AnyResolution,
    drawing_size,
    patch_positions,
    read_grids,
    with_ratio,
)


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    columns = Image.linear_gradient("L").rotate(90).resize((width, height))
    rows = Image.linear_gradient("L").resize((width, height))
    return Image.merge("RGB", [columns, rows, Image.new("L", (width, height))])


def test_cut_views_row_by_row():
    image = gradient(90, 90)
    views = AnyResolution(image_size=30, grids=("3x3",)).cut(image)
    assert views.shape == (10, 3, 30, 30)
    centres = patch_positions((3, 3))[:-1].mul(90).round().int().tolist()
    for view, (x, y) in zip(views, centres, strict=False):  # the last view is the whole image
        expected = image.crop((x - 15, y - 15, x + 15, y + 15))
        assert np.array_equal(view.permute(1, 2, 0).numpy(), np.asarray(expected))
    centres = torch.tensor([[1 / 6, 0.5], [0.5, 0.5], [5 / 6, 0.5], [0.5, 0.5]])
    torch.testing.assert_close(patch_positions((3, 1)), centres)
    view, complete = AnyResolution(image_size=12, grids=("1x1",)).cut(gradient(31, 17))
    assert torch.equal(view, complete)


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (1, 1), (30_000, 2), (449, 447)])
def test_cut_images_of_extreme_shapes(size):
    rule = AnyResolution(image_size=14)
    views = rule.cut(Image.new("RGB", size, (255, 0, 0)))
    columns, rows = rule.grid(size)
    assert len(views) == columns * rows + 1
    assert f"{columns}x{rows}" in ORIGINAL_GRIDS
    assert torch.equal(views, views[:1, :, :1, :1].expand_as(views))


def test_read_grids_and_cut_with_wrong_sizes():
    for grids in ((), ("2 x 1",)):
        with pytest.raises(ConfigError):
            read_grids(grids)
    with pytest.raises(ImageError, match="40000x3"):
        AnyResolution().cut(Image.new("RGB", (40_000, 3)))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ((1024, 1024), (1024, 1024)),
        ((800, 600), (1152, 896)),
        ((1080, 1920), (768, 1344)),
        ((300, 3), (2048, 512)),
        ((1, 5000), (512, 2048)),
    ],
)
def test_drawing_size(source, expected):
    assert drawing_size(source, 1024) == expected
    assert drawing_size((300, 1), 16, unit=16) == (32, 16), "a side is never zero"


@pytest.mark.parametrize("source", [(800, 600), (600, 800), (2000, 100), (7, 5)])
def test_with_ratio_restores_the_source(source):
    for drawn in ((1024, 1024), drawing_size(source, 1024)):
        width, height = with_ratio(Image.new("RGB", drawn), source).size
        assert width / height == pytest.approx(source[0] / source[1], rel=0.012)
        assert width * height == pytest.approx(1024**2, rel=0.06)
    square = Image.new("RGB", (1024, 1024))
    assert with_ratio(square, (500, 501)) is square
