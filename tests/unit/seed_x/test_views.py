"""SEED-X's views of an image, aspect ratios of edited images (rules for grids: golden kind
`seedx_anyres`).
"""

from __future__ import annotations

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
    return Image.merge(
        "RGB",
        [
            Image.linear_gradient("L").rotate(90).resize((width, height)),
            Image.linear_gradient("L").resize((width, height)),
            Image.new("L", (width, height)),
        ],
    )


def test_cut_views_row_by_row():
    image = gradient(90, 90)
    views = AnyResolution(image_size=30, grids=("3x3",)).cut(image)
    assert views.shape == (10, 3, 30, 30) and views.dtype == torch.uint8
    for view, (x, y) in zip(
        views, patch_positions((3, 3))[:-1].mul(90).round().int().tolist(), strict=False
    ):
        expected = image.crop((x - 15, y - 15, x + 15, y + 15))
        assert torch.equal(
            view,
            torch.frombuffer(bytearray(expected.tobytes()), dtype=torch.uint8)
            .view(30, 30, 3)
            .permute(2, 0, 1),
        )
    assert torch.allclose(
        patch_positions((3, 1)), torch.tensor([[1 / 6, 0.5], [0.5, 0.5], [5 / 6, 0.5], [0.5, 0.5]])
    )
    view, complete = AnyResolution(image_size=12, grids=("1x1",)).cut(gradient(31, 17))
    assert torch.equal(view, complete)


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (1, 1), (30_000, 2), (449, 447)])
def test_cut_images_of_extreme_shapes(size):
    rule = AnyResolution(image_size=14)
    views, (columns, rows) = rule.cut(Image.new("RGB", size, (255, 0, 0))), rule.grid(size)
    assert len(views) == columns * rows + 1 and f"{columns}x{rows}" in ORIGINAL_GRIDS
    assert torch.equal(views, views[:1, :, :1, :1].expand_as(views))


def test_read_grids_and_cut_with_wrong_sizes():
    for grids in ((), ("2 x 1",)):
        with pytest.raises(ConfigError, match="not grids of views"):
            read_grids(grids)
    with pytest.raises(ImageError, match="40000x3"):
        AnyResolution().cut(Image.new("RGB", (40_000, 3)))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ((1024, 1024), (1024, 1024)),
        ((800, 600), (1152, 896)),
        ((600, 800), (896, 1152)),
        ((1920, 1080), (1344, 768)),
        ((300, 3), (2048, 512)),
        ((1, 5000), (512, 2048)),
    ],
)
def test_drawing_size(source, expected):
    assert drawing_size(source, 1024) == expected
    assert drawing_size((300, 1), 16, unit=16) == (32, 16), "a side is never zero"


@pytest.mark.parametrize("source", [(800, 600), (600, 800), (2000, 100), (7, 5)])
def test_with_ratio_restores_the_source(source):
    for expected in ((1024, 1024), drawing_size(source, 1024)):
        width, height = with_ratio(Image.new("RGB", expected), source).size
        assert width / height == pytest.approx(source[0] / source[1], rel=0.012)
        assert width * height == pytest.approx(1024**2, rel=0.06)
    square = Image.new("RGB", (1024, 1024))
    assert with_ratio(square, (500, 501)) is square
