"""Filters of a web-scale set's pictures: size, shape and how well the caption fits.

The rule of the released pre-tokenisation: values measured on the picture win over its metadata, and a missing value
never drops a sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ImageTextFilter:
    """Thresholds of the keep rule; None: not checked.

    `similarity`: least caption similarity; `min_resolution`: least shorter side in pixels; `min_aspect`: height / width
    must lie in [min_aspect, 1 / min_aspect].
    """

    similarity: float | None = 0.2
    min_resolution: float | None = 180
    min_aspect: float | None = 0.666

    @property
    def active(self) -> bool:
        """Whether it drops anything."""
        return any(limit is not None for limit in (self.similarity, self.min_resolution, self.min_aspect))

    def keeps(self, item: Mapping[str, Any], metadata: Mapping[str, Any]) -> bool:
        """Whether a decoded sample stays.

        Args:
            item: needs `pixel_values` and `text`; may hold `width`, `height` (pixels) and `filter_flag`.
            metadata: the parsed json beside the picture.
        """
        if "pixel_values" not in item or "text" not in item or not item.get("filter_flag", True):
            return False
        return not self.drop_reason(picture_size(item, metadata), metadata)

    def drop_reason(self, size: tuple[float, float] | None, metadata: Mapping[str, Any]) -> str:
        """Why a picture of `size` (width, height) with this metadata is dropped; "": it is kept."""
        if size is not None:
            width, height = size
            if self.min_resolution is not None and (min(size) < self.min_resolution or min(size) <= 0):
                return "resolution"
            if self.min_aspect is not None and not self.min_aspect <= height / width <= 1 / self.min_aspect:
                return "aspect ratio"
        if self.similarity is not None:
            similarity = caption_similarity(metadata)
            return "" if similarity is None or similarity >= self.similarity else "similarity"
        return ""


def picture_size(item: Mapping[str, Any], metadata: Mapping[str, Any]) -> tuple[float, float] | None:
    """(width, height) from the picture, else from the first pair the metadata holds, else None."""
    pairs = [(item.get("width"), item.get("height")),
             (metadata.get("width"), metadata.get("height")),
             (metadata.get("WIDTH"), metadata.get("HEIGHT"))]
    for key in ("resolution", "original_resolution"):
        value = metadata.get(key)
        if isinstance(value, (list, tuple)) and len(value) == 2:
            pairs.append((value[0], value[1]))
    pairs.append((metadata.get("original_width"), metadata.get("original_height")))
    for width, height in pairs:
        if width is not None and height is not None:
            return float(width), float(height)
    return None


def caption_similarity(metadata: Mapping[str, Any]) -> float | None:
    """The best of `all_similarities`, else `similarity`, `score` or `SCORE`, else None."""
    values = metadata.get("all_similarities")
    if isinstance(values, (list, tuple)) and values:
        return max(float(value) for value in values)
    for key in ("similarity", "score", "SCORE"):
        if metadata.get(key) is not None:
            return float(metadata[key])
    return None
