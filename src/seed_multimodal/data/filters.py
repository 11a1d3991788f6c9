"""Filters of web-scale pairs; as in the original, an unknown value never drops a sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seed_multimodal.data.formats.record import BadRecord, shorten


def bad_shape(
    size: tuple[float, float], min_resolution: float | None, min_aspect: float | None
) -> str:
    """Why an image of (width, height) is dropped, or "": shorter side below `min_resolution`, or height / width outside
    [min_aspect, 1 / min_aspect]."""
    width, height = size
    if min_resolution is not None and min(size) < max(min_resolution, 1):
        return "resolution"
    return (
        "aspect ratio" if min_aspect and not min_aspect <= height / width <= 1 / min_aspect else ""
    )


def dissimilar(metadata: Mapping[str, Any], threshold: float | None) -> str:
    """Why a pair is dropped, or "": caption-image similarity below the threshold (maximum of `all_similarities`, else
    `similarity`, `score` or `SCORE`). Raises BadRecord: it is not a number."""
    values = metadata.get("all_similarities")
    if not isinstance(values, list | tuple) or not values:
        values = [
            metadata[key]
            for key in ("similarity", "score", "SCORE")
            if metadata.get(key) is not None
        ][:1]
    if threshold is None or not values:
        return ""
    try:
        best = max(map(float, values))
    except (TypeError, ValueError):
        raise BadRecord(
            "wrong type", f"similarity: must be a number, not {shorten(values)}."
        ) from None
    return "" if best >= threshold else "similarity"
