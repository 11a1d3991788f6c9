"""The released filters of the caption pipe (`images.filters`), with the reason a sample is counted under."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from seed_multimodal.data.llm.pretokenize.settings import InputSettings
from seed_multimodal.images.filters import ImageTextFilter

ANY = ImageTextFilter(similarity=float("-inf"), min_resolution=0, min_aspect=1e-9)


def filters_of(settings: InputSettings) -> dict[str, ImageTextFilter]:
    """The filters that are on, each alone, by the reason it drops a sample for, in the released order."""
    found = {}
    if settings.min_resolution is not None:
        found["resolution"] = replace(ANY, min_resolution=settings.min_resolution)  # type: ignore[arg-type]
    if settings.min_aspect_ratio is not None:
        found["aspect ratio"] = replace(ANY, min_aspect=settings.min_aspect_ratio)
    if settings.similarity_thr is not None:
        found["similarity"] = replace(ANY, similarity=settings.similarity_thr)
    return found


def drop_reason(
    filters: Mapping[str, ImageTextFilter], size: tuple[int, int], metadata: Mapping[str, Any]
) -> str | None:
    """Why a picture of `size` (width, height) with this metadata is not wanted, or None."""
    item = {"pixel_values": True, "text": "", "width": size[0], "height": size[1]}
    return next((reason for reason, one in filters.items() if not one.keeps(item, metadata)), None)
