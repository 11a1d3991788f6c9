"""SEED-X's views of an image, aspect ratios of edited images (grids and views: golden
`seedx_anyres`).
"""

import pytest
import torch
from PIL import Image
from yaml_tables import read_tables

from seed_multimodal.errors import ConfigError, ImageError
from seed_multimodal.images.views import (
    ORIGINAL_GRIDS,
    AnyResolution,
    drawing_size,
    read_grids,
    with_ratio,
)

TABLES = read_tables(__file__)


@pytest.mark.parametrize("size", TABLES["extreme"])
def test_cut_images_of_extreme_shapes(size):
    # Screenshots of long pages and single-pixel images are cut, not refused.
    rule = AnyResolution(image_size=14)
    views = rule.cut(Image.new("RGB", size, (255, 0, 0)))
    columns, rows = rule.grid(size)
    assert len(views) == columns * rows + 1
    assert f"{columns}x{rows}" in ORIGINAL_GRIDS
    assert torch.equal(views, views[:1, :, :1, :1].expand_as(views))


def test_read_grids_and_cut_with_wrong_sizes():
    # A system's `grids`, and images beyond any grid.
    for grids in ((), ("2 x 1",)):
        with pytest.raises(ConfigError):
            read_grids(grids)
    with pytest.raises(ImageError, match="40000x3"):
        AnyResolution().cut(Image.new("RGB", (40_000, 3)))


@pytest.mark.parametrize("source, expected", TABLES["drawings"])
def test_drawing_size(source, expected):
    # SDXL's trained sizes of about a megapixel.
    assert drawing_size(source, 1024) == tuple(expected)
    assert drawing_size((300, 1), 16, unit=16) == (32, 16), "a side is never zero"


@pytest.mark.parametrize("source", [(800, 600), (2000, 100), (7, 50)])
def test_with_ratio_restores_the_source(source):
    for drawn in ((1024, 1024), drawing_size(source, 1024)):
        width, height = with_ratio(Image.new("RGB", drawn), source).size
        assert width / height == pytest.approx(source[0] / source[1], rel=0.012)
        assert width * height == pytest.approx(1024**2, rel=0.06)
