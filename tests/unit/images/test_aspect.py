"""Aspect ratios of edited pictures: what is drawn for a source, and what becomes of the result."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from seed_multimodal.errors import ConfigError
from seed_multimodal.images.aspect import drawing_size, with_ratio


@pytest.mark.parametrize(("source", "kept"), [
    ((1024, 1024), (1024, 1024)), ((800, 600), (1152, 896)), ((600, 800), (896, 1152)), ((1920, 1080), (1344, 768)),
    ((300, 3), (2048, 512)), ((1, 5000), (512, 2048)), ((4000, 3000), (1152, 896))])
def test_sizes_to_draw(source: tuple[int, int], kept: tuple[int, int]) -> None:
    assert drawing_size(source, 1024, "keep") == kept
    assert drawing_size(source, 1024) == drawing_size(source, 1024, "square") == (1024, 1024)


def test_a_small_model_keeps_ratios_in_its_own_units() -> None:
    assert drawing_size((300, 200), 64, "keep", unit=8) == (80, 56)
    assert drawing_size((300, 1), 16, "keep", unit=16) == (32, 16), "a side is never zero"


@pytest.mark.parametrize("source", [(800, 600), (600, 800), (2000, 100), (7, 5)])
def test_results_get_the_ratio_of_their_source(source: tuple[int, int]) -> None:
    for ratio in ("restore", "keep"):
        width, height = with_ratio(Image.new("RGB", drawing_size(source, 1024, ratio)), source).size
        assert width / height == pytest.approx(source[0] / source[1], rel=0.012)
        assert width * height == pytest.approx(1024**2, rel=0.06)


def test_a_picture_that_has_the_ratio_is_not_touched() -> None:
    picture = Image.fromarray(np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 9, 9]]], np.uint8)).resize(
        (1024, 1024), Image.Resampling.NEAREST)
    assert with_ratio(picture, (500, 501)) is picture
    wide = with_ratio(picture, (200, 100))
    assert wide.size == (1448, 724)
    corners = [wide.getpixel(at) for at in ((0, 0), (1447, 0), (0, 723), (1447, 723))]
    assert corners == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)], "stretched, not cropped"


@pytest.mark.parametrize(("options", "said"), [
    (((0, 5), 1024), "at least one pixel along each side, not 0 x 5"), (((5, 5), 0), "side must be at least 1, not 0"),
    (((5, 5), 32, "keep"), "unit must be at most 32, not 64"),
    (((5, 5), 1024, "kept"), "ratio must be 'restore' or 'keep' or 'square', not 'kept'")])
def test_bad_sizes(options: tuple, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        drawing_size(*options)
