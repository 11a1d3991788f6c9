"""Pictures of training sequences as pixels: opened beside their record, cut into views, laid beside the batch's words.

Only views that the model reads or writes are kept: of a picture to be written the whole alone. The vision tower, which
is frozen, runs on the training device, so pixels and not features leave the data workers, as bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.data.decoders.opened import OpenedDecoder, PictureSequence
from seed_multimodal.data.formats.images import IMAGE_KEYS, stored_picture, text_member
from seed_multimodal.data.formats.record import FileReader, Record
from seed_multimodal.device import copy_to
from seed_multimodal.images.io import open_image
from seed_multimodal.images.transforms import ImageTransform
from seed_multimodal.seed_x.views import AnyResolution

TAR_PARTS = {"image": IMAGE_KEYS, "txt": ("txt",)}  # of a sample, beside its json
READ, WRITTEN = 1, 2


@dataclass
class SequenceViews:
    """The views of a sequence, in the order of their words.

    Attributes:
        pixels: uint8 [n, 3, S, S]. positions: [n, 2], the centre (x, y) of each in its picture. written: bool [n], the
            others are read.
        marks: int8 [tokens], READ and WRITTEN at the words of views.
        seeds: int64 [n], of the pictures. words: int64 [n], how many words each
            view has, where all of the sequence have as many.
    """

    pixels: Tensor
    positions: Tensor
    written: Tensor
    marks: np.ndarray
    seeds: Tensor
    words: Tensor


@dataclass
class BatchViews:
    """The views of a batch: as of `SequenceViews`, `marks` int8 [B, L]; `seeds` and `words` stay on the CPU."""

    pixels: Tensor
    positions: Tensor
    written: Tensor
    marks: Tensor
    seeds: Tensor
    words: Tensor

    def to(self, device: torch.device) -> BatchViews:
        """The same on a device."""
        return replace(self, pixels=copy_to(device, self.pixels), positions=copy_to(device, self.positions),
                       written=copy_to(device, self.written), marks=copy_to(device, self.marks))


class PictureReader:
    """Opens the pictures that a record names or holds, and cuts those of its sequence.

    Args:
        folder: of the pictures that records name; None: they lie beside the record's file, or in the current folder.
    """

    def __init__(self, decoder: OpenedDecoder, files: FileReader, folder: str | None = None) -> None:
        self.decoder, self.files, self.folder = decoder, files, folder

    def fields(self, record: Record) -> dict[str, Any]:
        """The fields of a record with its pictures opened; of a tar also `image` and `text` out of its members.

        Raises:
            BadRecord, ImageError: a picture that is not there, none, or damaged; a caption that is no text.
        """
        found = dict(record.fields)
        text = text_member(record, self.files, whole=True)  # the released sequences keep blanks at its end
        if text is not None:
            found["text"] = text
        image = record.member("image", files=self.files)
        if image is not None:
            found["image"] = image
        return self.decoder.opened(found, lambda value, name: open_image(
            stored_picture(value, record, self.folder), name=f"{record.where}: {name}"))

    def cut(self, sequence: PictureSequence) -> SequenceViews | None:
        """The views of a sequence, whose opened pictures are let go; None without any."""
        pixels, positions, written, seeds = [], [], [], []
        for used in sequence.pictures:
            shown = self._views(used.picture, used.grid is not None)
            kept = slice(-1, None) if used.written else slice(None)
            pixels.append(shown[kept])
            positions += used.positions[kept]
            written += [used.written] * len(pixels[-1])
            seeds += [used.seed] * len(pixels[-1])
        if not pixels:
            return None
        marks = np.zeros(len(sequence), np.int8)
        marks[sequence.read], marks[sequence.written] = READ, WRITTEN
        sequence.pictures = []
        words = torch.full((len(seeds),), len(sequence.read + sequence.written) // len(seeds))
        return SequenceViews(torch.cat(pixels), torch.tensor(positions), torch.tensor(written), marks,
                             torch.tensor(seeds), words)

    def _views(self, picture: Any, parts: bool) -> Tensor:
        return self._cutter.cut(picture) if parts else self._whole.read(picture)[None]

    @cached_property
    def _cutter(self) -> AnyResolution:
        options = self.decoder.options
        return AnyResolution(options.base_resolution, tuple(options.resolution_grids))

    @cached_property
    def _whole(self) -> ImageTransform:
        return ImageTransform(self.decoder.options.base_resolution, interpolation=self.decoder.interpolation)


def join_views(rows: Sequence[Sequence[SequenceViews | None]], lengths: Sequence[Sequence[int]], length: int
               ) -> BatchViews | None:
    """The views of a batch; None without any.

    Args:
        rows: of each row its sequences' views, from left to right. lengths: tokens of these sequences. length: of rows.
    """
    found = [views for row in rows for views in row if views is not None]
    if not found:
        return None
    marks = np.zeros((len(rows), length), np.int8)
    for line, row, sizes in zip(marks, rows, lengths, strict=True):
        start = 0
        for views, size in zip(row, sizes, strict=True):
            if views is not None:
                line[start:start + size] = views.marks[:size]
            start += size
    pixels, positions, written, seeds, words = (
        torch.cat([getattr(one, name) for one in found]) for name in ("pixels", "positions", "written", "seeds",
                                                                      "words"))
    return BatchViews(pixels, positions, written, torch.from_numpy(marks), seeds, words)


def view_sides(decoders: Mapping[str, Any]) -> dict[int, str]:
    """Side of the views in pixels -> the first source (by name) that has it."""
    sides: dict[int, str] = {}
    for name, decoder in decoders.items():
        if isinstance(decoder, OpenedDecoder):
            sides.setdefault(decoder.options.base_resolution, name)
    return sides
