"""Grids of codes, positions with axes, prompts.

    text to image   TEXT <sop>H W<eop> <sop>h w<eop> <start>    h · w codes, H · W codes, <end>
    edit            <start> CODES <end> … TEXT <sop>H W<eop> <start>    H · W codes, <end>

A code is 32 pixels a side; h × w is a small preview of about 16 × 16 codes. The ids of codes are
the codes themselves, start and end follow. A token of text has one position on all three axes
(time, row, column), that of a grid which begins at p (p, p + row, p + column); what follows goes on
behind the larger side.

Equal to transformers' `GlmImageProcessor` and `get_rope_index`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from seed_glm_image.spec import READ_PIXELS
from seed_multimodal.errors import CheckpointError, CodesError, RequestError
from seed_multimodal.inference.prompt import Prompt
from seed_multimodal.language.hub_tokenizer import HubTokenizer
from seed_multimodal.language.text_tokenizer import HUB_TOKENIZER, SpecialIds
from seed_multimodal.language.vocabulary import ImageVocabulary

PREVIEW = 16  # codes of a square preview's side
MAX_RATIO = 4  # of a source image's sides
CONTEXT = 8192  # tokens of prompt and answer; the model's own context would fill 5 GiB a row
SIZE_START = "<sop>"
SIZE_END = "<eop>"

Grid = tuple[int, int]  # rows and columns of codes


class Source(NamedTuple):
    """An image that is edited, in 32 pixels a code, and its codes `[h, w]`."""

    image: Image.Image
    codes: Tensor


@dataclass(frozen=True)
class DrawingRequest:
    """What the de-tokenizer reads besides the answer's codes; `grid`: of the image."""

    text: str = ""
    sources: Sequence[Source] = ()
    grid: Grid = (0, 0)


# ---- tokens


@dataclass(frozen=True)
class GlmImageVocabulary(ImageVocabulary):
    """Codes are the first ids, image start and end the next ones; text follows.

    n_text: all tokens. tokens_per_image: at most, of all grids.
    """

    n_codes: int = 16384
    tokens_per_image: int = CONTEXT
    fewest_codes: int | None = field(default=1, kw_only=True)

    @cached_property
    def code_start(self) -> int:
        return 0

    @cached_property
    def boi_id(self) -> int:
        return self.n_codes

    @cached_property
    def size(self) -> int:
        return self.n_text


class GlmImageTokenizer(HubTokenizer):
    """The text tokenizer of a processor's folder."""

    names_image_tokens = False
    vocabulary: GlmImageVocabulary

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> GlmImageTokenizer:
        """Raises CheckpointError: a missing or damaged file, or another tokenizer."""
        if not (Path(folder) / HUB_TOKENIZER).is_file():
            raise CheckpointError(f"{folder}: has no {HUB_TOKENIZER}, so it is no processor.")
        return cls(Path(folder), 0, CONTEXT)

    def _image_vocabulary(self, n_text: int) -> GlmImageVocabulary:
        start = self._hub.bos_token_id
        if start is None or self._hub.pad_token_id is None:
            raise CheckpointError(f"{self._folder}: its tokenizer names no image start or padding.")
        return GlmImageVocabulary(n_text, start)

    def _find_end_ids(self) -> tuple[int, ...]:
        # `<end>` belongs to the image.
        return (self._hub.pad_token_id,)

    @property
    def special_ids(self) -> SpecialIds:
        vocabulary = self.vocabulary
        return {
            "bos_token_id": vocabulary.boi_id,
            "eos_token_id": vocabulary.eoi_id,
            "pad_token_id": self.pad_token_id,
        }

    def size_ids(self, grid: Grid) -> list[int]:
        """The tokens that ask for a grid."""
        start, end = self.token_id(SIZE_START), self.token_id(SIZE_END)
        return [start, *self.encode_parts([f"{grid[0]} {grid[1]}"]), end]


# ---- grids


def answer_grids(grid: Grid, has_preview: bool) -> list[Grid]:
    """The grids of an answer in their order; `grid`: of the image, the last one."""
    if not has_preview:
        return [grid]
    ratio = grid[0] / grid[1]
    preview = int(math.sqrt(ratio) * PREVIEW), int(math.sqrt(1 / ratio) * PREVIEW)
    if not min(preview):
        raise RequestError(f"An image of {grid[0]} x {grid[1]} codes is too long.")
    return [preview, grid]


def n_codes(grids: Sequence[Grid]) -> int:
    """Codes of several grids."""
    return sum(height * width for height, width in grids)


def source_grid(size: tuple[int, int], shortest: int, longest: int) -> Grid:
    """The codes of a source image, whose sides are scaled between these numbers of pixels.

    size: width and height. As transformers' `smart_resize`. Raises RequestError: too long a strip.
    """
    width, height = size
    if max(size) > MAX_RATIO * min(size):
        raise RequestError(
            f"An image of {width} x {height} pixels is too long: its sides may differ by a factor "
            f"of {MAX_RATIO}."
        )
    scale = max(1.0, shortest / min(size))
    if max(size) * scale > longest:
        scale = longest / max(size)
    rows, columns = (max(1, round(side // 2 * scale / READ_PIXELS)) for side in (height, width))
    return rows, columns


def read_grids(codes: object, n_codes: int, label: str) -> list[Tensor]:
    """Codes of an image, an array or rows `[h, w]`; or of a square image in one row, behind those
    of its preview (`CodeNetwork.encode`). Returns the preview, if there is one, and the image.

    Raises CodesError: another form, or a code outside the codebook.
    """
    try:
        grid = codes if isinstance(codes, Tensor) else torch.tensor(codes, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        grid = torch.empty(0)
    n_preview = PREVIEW**2
    side = math.isqrt(max(0, grid.numel() - n_preview))
    is_row = grid.ndim == 1 and side > 0 and side**2 + n_preview == len(grid)
    is_whole = not grid.is_floating_point() and grid.dtype != torch.bool
    if not is_whole or not grid.numel() or not (is_row or grid.ndim == 2):
        raise CodesError(
            f"{label} must be a grid of codes, an array [h, w] of whole numbers; or a row of the "
            f"{n_preview} codes of a preview and those of a square image."
        )
    grid = grid.long().cpu()
    if not 0 <= int(grid.min()) <= int(grid.max()) < n_codes:
        raise CodesError(f"{label} holds a code outside 0 to {n_codes - 1}.")
    if not is_row:
        return [grid]
    return [grid[:n_preview].view(PREVIEW, PREVIEW), grid[n_preview:].view(side, side)]


# ---- prompts


def position_ids(parts: Sequence[int | Grid]) -> Tensor:
    """Positions `[3, N]` of texts (their number of tokens) and grids one after the other."""
    columns: list[Tensor] = []
    start = 0
    for part in parts:
        if isinstance(part, int):
            columns.append(torch.arange(start, start + part, device="cpu").expand(3, -1))
            start += part
            continue
        height, width = part
        rows = torch.arange(height, device="cpu").repeat_interleave(width)
        times = torch.full_like(rows, 0)
        columns.append(
            start + torch.stack([times, rows, torch.arange(width, device="cpu").repeat(height)])
        )
        start += max(part)
    return torch.cat(columns, dim=1)


def build_prompt(
    tokenizer: GlmImageTokenizer, text: str, grid: Grid, sources: Sequence[Tensor] = ()
) -> Prompt:
    """The prompt of an image of `grid`, up to where `<start>` is forced.

    sources: codes `[h, w]` of the images that are edited.
    """
    # 1. The tokens.
    ids: list[int] = []
    parts: list[int | Grid] = []
    vocabulary = tokenizer.vocabulary
    n_text = 0
    for codes in sources:
        ids += [vocabulary.boi_id, *codes.flatten().tolist(), vocabulary.eoi_id]
        parts += [n_text + 1, (codes.shape[0], codes.shape[1])]
        n_text = 1  # `<end>`
    grids = answer_grids(grid, has_preview=not sources)
    words = tokenizer.encode_parts([text])
    for size in reversed(grids):
        words += tokenizer.size_ids(size)
    ids += words

    # 2. Their positions; `<start>` and, behind the answer's grids, `<end>`.
    positions = position_ids([*parts, n_text + len(words) + 1, *grids, 1])
    return Prompt(ids, n_codes=n_codes(grids), position_ids=positions)
