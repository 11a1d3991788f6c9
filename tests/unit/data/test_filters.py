"""Filters of web-scale image-text pairs, at their thresholds."""

from __future__ import annotations

import pytest

from seed_multimodal.data.filters import bad_shape, dissimilar


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((180, 180), ""),
        ((179, 200), "resolution"),
        ((1000, 666), ""),
        ((1000, 665), "aspect ratio"),
        ((665, 1000), "aspect ratio"),
        ((0, 0), "resolution"),
    ],
)
def test_bad_shape(size, reason):
    assert bad_shape(size, 180, 0.666) == reason
    assert not bad_shape((2, 90), None, None) and not bad_shape((2, 90), 0, 0.0)


@pytest.mark.parametrize(
    ("metadata", "passes"),
    [
        ({}, True),
        ({"similarity": 0.2}, True),
        ({"similarity": 0.1999}, False),
        ({"SCORE": 0.4}, True),
        ({"score": 0.1, "SCORE": 0.4}, False),
        ({"all_similarities": [0.1, 0.3], "similarity": 0.1}, True),
    ],
)
def test_dissimilar(metadata, passes):
    assert (dissimilar(metadata, 0.2) == "") is passes and not dissimilar(metadata, None)
