"""A conversation as the language model reads it, and its answer before images are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from seed_multimodal.language.generation import Prompt
from seed_multimodal.system.messages import Answer

Task = Literal["describe", "ask", "detect", "draw", "edit", "chat"]


@dataclass
class Request:
    """A conversation as the model reads it.

    Attributes:
        note: a sentence about words and images unlike those of the training. source: the image that is edited.
    """

    prompt: Prompt
    note: str = ""
    source: Image.Image | None = None


@dataclass
class Written:
    """An answer before its images are drawn; `values`: of each whole image its codes, or its features [N, W]."""

    answer: Answer
    values: Sequence[Any]
    request: Request
