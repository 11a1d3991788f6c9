"""Features of generated images that keep the images they are edits of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor


class GeneratedFeatures(Tensor):
    """Features `[B, 1, N, W]` with the source image of each row (None: nothing was edited).

    The sources stay with copies (`.to(…)`), and with rows (`features[index]`), which transformers'
    pipeline takes from a batch.
    """

    sources: list[Image.Image | None]

    @classmethod
    def of(cls, features: Tensor, sources: Sequence[Image.Image | None]) -> GeneratedFeatures:
        result = features.as_subclass(cls)
        result.sources = list(sources)
        return result

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        sources = sources_of(args[0]) if args else None
        if sources is None or not isinstance(result, cls):
            return result
        if func is Tensor.__getitem__ and isinstance(args[1], int | slice):
            index = args[1]
            sources = sources[index] if isinstance(index, slice) else [sources[index]]
        result.sources = sources
        return result


def sources_of(features: object) -> list[Image.Image | None] | None:
    """The source images of features; None: not known."""
    return getattr(features, "sources", None)
