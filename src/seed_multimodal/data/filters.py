"""Filters of a web-scale set's images: size, shape and how well the caption fits.

The rule of the released pre-tokenisation: values measured on the image win over its metadata, and a missing value
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
        """Whether a decoded sample (`pixel_values`, `text`, optionally `width`, `height`, `filter_flag`) stays."""
        if "pixel_values" not in item or "text" not in item or not item.get("filter_flag", True):
            return False
        return not self.drop_reason(picture_size(item, metadata), metadata)

    def drop_reason(self, size: tuple[float, float] | None, metadata: Mapping[str, Any]) -> str:
        """Why an image of `size` (width, height) with this metadata is dropped; "": it is kept."""
        if size is not None:
            width, height = size
            if self.min_resolution is not None and (min(size) < self.min_resolution or min(size) <= 0):
                return "resolution"
            if self.min_aspect is not None and not self.min_aspect <= height / width <= 1 / self.min_aspect:
                return "aspect ratio"
        if self.similarity is not None:
            similarity = caption_similarity(metadata)
            return "" if similarity is None or similarity >= self.similarity else "similarity"  # NaN is dropped
        return ""


def picture_size(item: Mapping[str, Any], metadata: Mapping[str, Any]) -> tuple[float, float] | None:
    """(width, height) from the image, else from the first pair that the metadata holds, else None."""
    pairs: list[Any] = [(item.get("width"), item.get("height")), (metadata.get("width"), metadata.get("height")),
                        (metadata.get("WIDTH"), metadata.get("HEIGHT")), metadata.get("resolution"),
                        metadata.get("original_resolution"),
                        (metadata.get("original_width"), metadata.get("original_height"))]
    for pair in pairs:
        if isinstance(pair, list | tuple) and len(pair) == 2 and None not in pair:
            return float(pair[0]), float(pair[1])
    return None


def caption_similarity(metadata: Mapping[str, Any]) -> float | None:
    """The best of `all_similarities`, else `similarity`, `score` or `SCORE`, else None."""
    values = metadata.get("all_similarities")
    if isinstance(values, list | tuple) and values:
        return max(float(value) for value in values)
    return next((float(metadata[key]) for key in ("similarity", "score", "SCORE") if metadata.get(key) is not None),
                None)
