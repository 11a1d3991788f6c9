"""Images of training sequences as pixels: opened with their record, cut into views, collated.

Target images have only the whole view. The frozen vision encoder runs on the training device, so data workers return
pixels (uint8), not features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.data.decoders.seed_x import FeatureDecoder, ImageSequence
from seed_multimodal.data.formats.images import IMAGE_KEYS, record_image, text_member
from seed_multimodal.data.formats.record import FileReader, Record
from seed_multimodal.device import copy_to
from seed_multimodal.images.io import open_image
from seed_multimodal.images.transforms import ImageTransform
from seed_multimodal.seed_x.views import AnyResolution

INPUT_IMAGE, TARGET_IMAGE = 1, 2
T = TypeVar("T")


@dataclass
class SequenceViews:
    """The n views of a sequence's images, in token order."""

    pixels: Tensor  # uint8 [n, 3, S, S]
    positions: list[list[float]]  # centre (x, y) of each view in its image
    is_target: list[bool]  # else an input
    marks: np.ndarray  # INPUT_IMAGE or TARGET_IMAGE at the tokens of views, else 0: int8 [tokens]
    seeds: list[int]  # of each view's image
    tokens_per_view: int


@dataclass
class BatchViews:
    """The views of a batch: `marks` int8 [B, L]; `seeds` and `tokens_per_view` of each view."""

    pixels: Tensor
    positions: Tensor
    is_target: Tensor
    marks: Tensor
    seeds: list[int]
    tokens_per_view: list[int]


def on_device(batch: T, device: str | torch.device) -> T:
    """Copy the tensors of a dataclass, recursively, to a device."""
    moved: dict[str, Any] = {}
    for entry in fields(batch):  # type: ignore[arg-type]
        value = getattr(batch, entry.name)
        if isinstance(value, Tensor):
            moved[entry.name] = copy_to(torch.device(device), value)
        elif is_dataclass(value):
            moved[entry.name] = on_device(value, device)
    return replace(batch, **moved)  # type: ignore[type-var]


class ImageReader:
    """Opens the images of a record (paths relative to `folder` or the record's file), and cuts those of its sequence
    into views."""

    def __init__(
        self, decoder: FeatureDecoder, files: FileReader, folder: str | None = None
    ) -> None:
        self.decoder, self.files, self.folder = decoder, files, folder
        side = decoder.options.base_resolution
        self._whole = ImageTransform(side, interpolation=decoder.interpolation)
        self._cutter = AnyResolution(
            side, tuple(getattr(decoder.options, "resolution_grids", ("1x1",)))
        )

    def fields(self, record: Record) -> dict[str, Any]:
        """The fields of a record with opened images; for a tar also `image` and `text` from its members. Raises
        BadRecord, ImageError: a missing or damaged image; a caption that is not text."""
        found = dict(record.fields)
        text = text_member(
            record, self.files, keep_whitespace=True
        )  # the original keeps trailing blanks
        if text is not None:
            found["text"] = text
        image = record.member(*IMAGE_KEYS, files=self.files)
        if image is not None:
            found["image"] = image
        return self.decoder.open_images(
            found,
            lambda value, name: open_image(
                record_image(value, record, self.folder), name=f"{record.location}: {name}"
            ),
        )

    def cut(self, sequence: ImageSequence) -> SequenceViews | None:
        """The views of a sequence, or None."""
        if not sequence.images:
            return None
        pixels, positions, written, seeds = [], [], [], []
        for used in sequence.images:
            shown = (
                self._whole.read(used.image)[None]
                if used.grid is None
                else self._cutter.cut(used.image)
            )
            kept = slice(-1, None) if used.is_target else slice(None)
            pixels.append(shown[kept])
            positions += used.positions[kept]
            written += [used.is_target] * len(pixels[-1])
            seeds += [used.seed] * len(pixels[-1])
        marks = np.zeros(len(sequence), np.int8)
        marks[sequence.input_positions], marks[sequence.target_positions] = (
            INPUT_IMAGE,
            TARGET_IMAGE,
        )
        return SequenceViews(
            torch.cat(pixels),
            positions,
            written,
            marks,
            seeds,
            len(sequence.input_positions + sequence.target_positions) // len(seeds),
        )


def join_views(
    rows: Sequence[Sequence[tuple[SequenceViews | None, int]]], length: int
) -> BatchViews | None:
    """The views of a batch, or None. `rows`: views and token counts of each row's sequences, left to right."""
    found = [views for row in rows for views, _ in row if views is not None]
    if not found:
        return None
    marks = np.zeros((len(rows), length), np.int8)
    for line, row in zip(marks, rows, strict=True):
        parts = [np.zeros(size, np.int8) if views is None else views.marks for views, size in row]
        line[: sum(size for _, size in row)] = np.concatenate([line[:0], *parts])
    return BatchViews(
        torch.cat([one.pixels for one in found]),
        torch.tensor([place for one in found for place in one.positions]),
        torch.tensor([written for one in found for written in one.is_target]),
        torch.from_numpy(marks),
        [seed for one in found for seed in one.seeds],
        [one.tokens_per_view for one in found for _ in one.seeds],
    )
