"""Images of training sequences as pixels: opened with their record, cut into views, joined for a batch.

Of an image to be written there is the whole alone. The frozen vision encoder runs on the training device, so pixels
(uint8) and not features leave the data workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.data.decoders.seed_x import OpenedDecoder, PictureSequence
from seed_multimodal.data.formats.images import IMAGE_KEYS, stored_picture, text_member
from seed_multimodal.data.formats.record import FileReader, Record
from seed_multimodal.device import copy_to
from seed_multimodal.images.io import open_image
from seed_multimodal.images.transforms import ImageTransform
from seed_multimodal.seed_x.views import AnyResolution

READ, WRITTEN = 1, 2
T = TypeVar("T")


@dataclass
class SequenceViews:
    """The views of a sequence, in the order of their tokens: uint8 pixels [n, 3, S, S], the centre (x, y) of each in
    its image, whether it is written (else read), READ and WRITTEN at the tokens of views (int8 [tokens]), the images'
    seeds, and the tokens of each view."""

    pixels: Tensor
    positions: list[list[float]]
    written: list[bool]
    marks: np.ndarray
    seeds: list[int]
    words: int


@dataclass
class BatchViews:
    """The views of a batch: `marks` int8 [B, L]; `seeds` and `words` of each view."""

    pixels: Tensor
    positions: Tensor
    written: Tensor
    marks: Tensor
    seeds: list[int]
    words: list[int]


def on_device(batch: T, device: str | torch.device) -> T:
    """A dataclass with its tensors, and those of its dataclasses, on a device."""
    moved: dict[str, Any] = {}
    for entry in fields(batch):  # type: ignore[arg-type]
        value = getattr(batch, entry.name)
        if isinstance(value, Tensor):
            moved[entry.name] = copy_to(torch.device(device), value)
        elif is_dataclass(value):
            moved[entry.name] = on_device(value, device)
    return replace(batch, **moved)  # type: ignore[type-var]


class PictureReader:
    """Opens the images that a record names (in `folder`, or beside the record's file) or holds, and cuts those of its
    sequence."""

    def __init__(self, decoder: OpenedDecoder, files: FileReader, folder: str | None = None) -> None:
        self.decoder, self.files, self.folder = decoder, files, folder
        side = decoder.options.base_resolution
        self._whole = ImageTransform(side, interpolation=decoder.interpolation)
        self._cutter = AnyResolution(side, tuple(getattr(decoder.options, "resolution_grids", ("1x1",))))

    def fields(self, record: Record) -> dict[str, Any]:
        """The fields of a record with its images opened; of a tar also `image` and `text` out of its members. Raises
        BadRecord, ImageError: an image that is not there or damaged; a caption that is no text."""
        found = dict(record.fields)
        text = text_member(record, self.files, whole=True)  # the released sequences keep blanks at its end
        if text is not None:
            found["text"] = text
        image = record.member(*IMAGE_KEYS, files=self.files)
        if image is not None:
            found["image"] = image
        return self.decoder.opened(found, lambda value, name: open_image(
            stored_picture(value, record, self.folder), name=f"{record.where}: {name}"))

    def cut(self, sequence: PictureSequence) -> SequenceViews | None:
        """The views of a sequence; None without any."""
        if not sequence.pictures:
            return None
        pixels, positions, written, seeds = [], [], [], []
        for used in sequence.pictures:
            shown = self._whole.read(used.picture)[None] if used.grid is None else self._cutter.cut(used.picture)
            kept = slice(-1, None) if used.written else slice(None)
            pixels.append(shown[kept])
            positions += used.positions[kept]
            written += [used.written] * len(pixels[-1])
            seeds += [used.seed] * len(pixels[-1])
        marks = np.zeros(len(sequence), np.int8)
        marks[sequence.read], marks[sequence.written] = READ, WRITTEN
        return SequenceViews(torch.cat(pixels), positions, written, marks, seeds,
                             len(sequence.read + sequence.written) // len(seeds))


def join_views(rows: Sequence[Sequence[tuple[SequenceViews | None, int]]], length: int) -> BatchViews | None:
    """The views of a batch; None without any. Of each row its sequences' views and tokens, from left to right."""
    found = [views for row in rows for views, _ in row if views is not None]
    if not found:
        return None
    marks = np.zeros((len(rows), length), np.int8)
    for line, row in zip(marks, rows, strict=True):
        parts = [np.zeros(size, np.int8) if views is None else views.marks for views, size in row]
        line[:sum(size for _, size in row)] = np.concatenate([line[:0], *parts])
    return BatchViews(torch.cat([one.pixels for one in found]),
                      torch.tensor([place for one in found for place in one.positions]),
                      torch.tensor([written for one in found for written in one.written]), torch.from_numpy(marks),
                      [seed for one in found for seed in one.seeds], [one.words for one in found for _ in one.seeds])
