"""The keep rule of web-scale sets, at its borders."""

from __future__ import annotations

import pytest

from seed_multimodal.data.filters import ImageTextFilter, caption_similarity, picture_size

ITEM = {"pixel_values": 0, "text": "a cat"}


@pytest.mark.parametrize(("item", "metadata", "keep"), [
    ({}, {}, True),
    ({"width": 180, "height": 180}, {}, True),
    ({"width": 179, "height": 200}, {}, False),
    ({"width": 1000, "height": 666}, {}, True),
    ({"width": 1000, "height": 665}, {}, False),
    ({"width": 665, "height": 1000}, {}, False),
    ({"width": 0, "height": 0}, {}, False),
    ({}, {"similarity": 0.2}, True),
    ({}, {"similarity": 0.1999}, False),
    ({"filter_flag": False}, {}, False),
])
def test_defaults(item: dict, metadata: dict, keep: bool) -> None:
    assert ImageTextFilter().keeps({**ITEM, **item}, metadata) is keep


def test_thresholds_can_be_given() -> None:
    loose = ImageTextFilter(similarity=0.0, min_resolution=0, min_aspect=0.1)
    assert loose.keeps({**ITEM, "width": 10, "height": 90}, {"score": 0.01})
    assert not ImageTextFilter(similarity=0.25).keeps(ITEM, {"score": 0.24})


def test_what_counts_first() -> None:
    assert picture_size({"width": 1, "height": 2}, {"width": 3, "height": 4}) == (1, 2)
    assert picture_size({}, {"resolution": [5, 6], "original_width": 7, "original_height": 8}) == (5, 6)
    assert picture_size({}, {"width": 9}) is None
    assert caption_similarity({"all_similarities": [0.1, 0.3], "similarity": 0.9}) == 0.3
    assert caption_similarity({"SCORE": 0.4}) == 0.4
    assert caption_similarity({}) is None
