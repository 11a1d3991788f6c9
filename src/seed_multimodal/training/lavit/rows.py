"""Rows with pictures of any number of tokens: what the selector kept takes the place of what packing had planned.

The data workers plan a number of places for each picture (`data.decoders.lavit`); how many patches are kept, and their
codes, are known on the device only. Here rows become longer or shorter by the difference, their sequences and their
order stay. Packed rows keep their length where what was kept fits, so that attention is compiled for few lengths; the
rest is padding. Where more was kept than planned, rows grow by eighths.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.data.decoders.base import IGNORED
from seed_multimodal.data.stream.llm_batches import LlmBatch
from seed_multimodal.data.stream.pairs_dataset import sample_seed
from seed_multimodal.device import copy_to
from seed_multimodal.errors import DataError
from seed_multimodal.images.transforms import normalise
from seed_multimodal.lavit.modeling import DynamicTokenizer
from seed_multimodal.training.frozen_features import FrozenFeatures

_EIGHTH = 8
Mode = Literal["draw", "threshold"]


class ImageCodes(FrozenFeatures):
    """Pixels of the tokenizer's size → codes int32 `[B, N]` in raster order of the patches, -1 behind the last one.

    `selection`: of patches, as of `DynamicTokenizer.select`; what is drawn follows from the image and `seed`, so that
    an image always has the same codes.
    """

    def __init__(self, tokenizer: DynamicTokenizer, device: torch.device, selection: Mode = "draw", seed: int = 0
                 ) -> None:
        super().__init__(tokenizer, device)
        self.selection, self.seed, self.places = selection, seed, tokenizer.config.patches

    def compute(self, pixels: Tensor) -> Tensor:
        """See `FrozenFeatures`."""
        generators = [torch.Generator().manual_seed(sample_seed(self.seed, 0, zlib.crc32(one.numpy().tobytes())))
                      for one in pixels.cpu()] if self.selection == "draw" else None
        found = self.model.encode(normalise(pixels), mode=self.selection, generator=generators)
        codes = torch.full((len(found), self.places), -1, dtype=torch.int32, device=self.device)
        for row, one in zip(codes, found, strict=True):
            row[:len(one)] = one
        return codes


@dataclass
class ReadyBatch(LlmBatch):
    """A micro-batch whose pictures are as long as they are.

    Attributes:
        features: [n, N, D] of the pictures that are read, on the device; keep: [n, N], 1 kept or 0; None without any.
        kept: int64 [T], which rows of all their patches are kept. places: int64 [T], where these stand among all
            positions of the batch.
    """

    features: Tensor | None = None
    keep: Tensor | None = None
    kept: Tensor | None = None
    places: Tensor | None = None

    def to(self, device: str | torch.device) -> ReadyBatch:
        """The same on a device."""
        moved, place = super().to(device), torch.device(device)
        assert isinstance(moved, ReadyBatch)
        if moved.kept is None or moved.places is None:
            return moved
        return replace(moved, kept=copy_to(place, moved.kept), places=copy_to(place, moved.places))


def fill_rows(batch: LlmBatch, counts: Sequence[int], codes: Sequence[Sequence[int] | None], code_start: int,
              pad_id: int, start_id: int) -> tuple[LlmBatch, Tensor]:
    """The batch with its pictures as they are, and the places of those that are read (int64 [T], in their order).

    Args:
        counts: of each picture the patches it keeps. codes: theirs of a picture that is written, None of one that is
            read, whose ids there are `code_start` and mean nothing.
        start_id: of the word before a picture that is counted.

    Raises:
        DataError: another number of pictures than the batch has places for.
    """
    views = batch.views
    words = [] if views is None else views.words.tolist()
    if len(words) != len(counts) or len(codes) != len(counts):
        raise DataError(f"The batch has places for {len(words)} pictures, but there are {len(counts)}.")
    marks = np.zeros(batch.input_ids.shape, np.int8) if views is None else views.marks.cpu().numpy()
    if int((marks != 0).sum()) != sum(words):
        raise DataError(f"The batch has {int((marks != 0).sum())} places of pictures, but {sum(words)} were planned.")
    packed, rows, picture = batch.attention_mask is None, [], 0
    for line in range(len(marks)):
        row = _Row(batch, line)
        at = np.flatnonzero(marks[line])
        while len(at):
            row.put(int(at[0]), words[picture], counts[picture], codes[picture])
            at, picture = at[words[picture]:], picture + 1
        rows.append(row.filled(code_start))
    planned, length = batch.input_ids.shape[1], max(len(row.ids) for row in rows)
    if packed:
        step = -(-planned // _EIGHTH)
        length = max(planned, -(-length // step) * step)
    ids, labels, positions = (torch.from_numpy(np.stack(column)).long() for column in zip(
        *(row.padded(length, pad_id, packed) for row in rows), strict=True))
    places = [torch.from_numpy(row.places) + number * length for number, row in enumerate(rows)]
    tokens = torch.tensor([len(row.ids) for row in rows])
    return replace(
        batch, input_ids=ids, labels=labels, position_ids=positions, tokens=int(tokens.sum()),
        attention_mask=None if packed else (torch.arange(length)[None] < tokens[:, None]).long(),
        learned=int((labels[:, 1:] != IGNORED).sum()), images=int((ids == start_id).sum()),
        squares=sum(row.squares for row in rows), views=None), torch.cat(places)


class _Row:
    """One row: as planned, then `filled`. `ids`, `labels`, `positions` without padding; `places` of features."""

    def __init__(self, batch: LlmBatch, line: int) -> None:
        self.ids, self.labels = batch.input_ids[line].numpy(), batch.labels[line].numpy()
        self.positions = batch.position_ids[line].numpy()
        self.repeat = np.ones(len(self.ids), np.int64)
        self.pictures: list[tuple[int, Sequence[int] | None]] = []
        self.places = np.zeros(0, np.int64)
        self.repeat[self._used(batch, line):] = 0

    def _used(self, batch: LlmBatch, line: int) -> int:
        """Positions that are no padding, which in packed rows is a last sequence without anything to learn."""
        if batch.attention_mask is not None:
            return int(batch.attention_mask[line].sum())
        last = int(np.flatnonzero(self.positions == 0)[-1])
        return len(self.ids) if (self.labels[last:] != IGNORED).any() else last

    def put(self, start: int, words: int, count: int, codes: Sequence[int] | None) -> None:
        """A picture of `count` tokens in the place of `words`."""
        self.repeat[start:start + words] = 0
        self.repeat[start] = count
        self.pictures.append((start, codes))

    def filled(self, code_start: int) -> _Row:
        """The row with its pictures."""
        source, ends = np.repeat(np.arange(len(self.ids)), self.repeat), np.cumsum(self.repeat)
        number = np.cumsum(self.positions == 0)[source]
        self.ids, self.labels = self.ids[source], self.labels[source]
        firsts = np.flatnonzero(np.diff(number, prepend=-1))
        sizes = np.diff(firsts, append=len(source))
        self.positions, self.squares = np.arange(len(source)) - np.repeat(firsts, sizes), int((sizes * sizes).sum())
        places = []
        for start, codes in self.pictures:
            here = np.arange(ends[start] - self.repeat[start], ends[start])
            if codes is None:
                places.append(here)
                continue
            self.ids[here] = code_start + np.asarray(codes, np.int64)
            self.labels[here] = np.where(self.labels[here] == IGNORED, IGNORED, self.ids[here])
        self.places = np.concatenate([self.places, *places])
        return self

    def padded(self, length: int, pad_id: int, packed: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, labels and positions of a row of this length; padding counts as a sequence of its own if `packed`."""
        rest = length - len(self.ids)
        after = np.arange(rest) + (0 if packed else len(self.ids))
        return (np.pad(self.ids, (0, rest), constant_values=pad_id),
                np.pad(self.labels, (0, rest), constant_values=IGNORED), np.concatenate([self.positions, after]))
