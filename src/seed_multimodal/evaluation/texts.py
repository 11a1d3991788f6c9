"""The canonical caption of a picture, for drawing and judging, and the style that a text names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from seed_multimodal.evaluation.metrics import mentions


def canonical_caption(record: Any) -> str:
    """The first caption of a `NanoRecord`: it names style and thing, and pictures are drawn from it."""
    return str(record.captions[0])


def style_of_text(text: str, styles: Sequence[str]) -> int:
    """Index of the only one of `styles` that `text` names, or -1."""
    named = [i for i, style in enumerate(styles) if mentions(text, style)]
    return named[0] if len(named) == 1 else -1
