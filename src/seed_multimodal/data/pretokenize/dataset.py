"""Decoding of samples in the workers of a DataLoader: records → resized images as bytes, which keep a GPU fed.

A task holds the positions of its records, so workers need no indexes. Images travel as uint8 [n, 3, S, S], a quarter of
their normalised size. Errors of a sample are returned as a sentence; other errors are raised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from seed_multimodal.data.filters import ImageTextFilter
from seed_multimodal.data.formats.open_files import OpenFiles
from seed_multimodal.data.formats.record import Record
from seed_multimodal.data.pretokenize.input_settings import InputSettings
from seed_multimodal.data.pretokenize.kinds import Kind
from seed_multimodal.data.pretokenize.pictures import Picture, view
from seed_multimodal.data.pretokenize.samples import Dropped, Sample
from seed_multimodal.data.pretokenize.shards import Shard, open_shard
from seed_multimodal.errors import DataError, ImageError
from seed_multimodal.images.transforms import ImageTransform


@dataclass
class Task:
    """Records of a shard that are decoded together, from number `first` of the file on.

    `share`: of the shard; `last`: the shard ends with them.
    """

    first: int
    records: list[Record]
    share: float
    last: bool


@dataclass
class DecodedSample:
    """A decoded sample: what its kind has read, and the rows of its images' views (None: an optional image that cannot
    be read, see `lost`); or why it is `bad` or `dropped`."""

    number: int
    fields: dict[str, Any] = field(default_factory=dict)
    rows: list[list[int] | None] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    bad: str = ""
    dropped: str = ""


@dataclass
class DecodedTask:
    """A task's samples, and the rows of pixels of all their images: uint8 [rows, 3, S, S]."""

    samples: list[DecodedSample]
    pixels: Tensor
    share: float
    last: bool


class TaskDataset(Dataset[DecodedTask]):
    """`dataset[task]` is the decoded task.

    Args:
        views: of each image that a model reads (kinds that can hold several), augmented from `seed`.
    """

    def __init__(self, kind: Kind, settings: InputSettings, transform: ImageTransform, views: int = 1, seed: int = 0
                 ) -> None:
        self.kind, self.settings, self.transform = kind, settings, transform
        self.views, self.seed = views if kind.views else 1, seed
        self._keys = kind.keys(settings.fields)
        self._filter = ImageTextFilter(settings.similarity_thr, settings.min_resolution, settings.min_aspect_ratio)
        self._files = OpenFiles(rows=0)  # they are read in order

    def __getitem__(self, task: Task) -> DecodedTask:
        rows: dict[str, int] = {}  # of each view by its name: an image with several questions is encoded once
        pixels: list[np.ndarray] = []
        samples = [self._decode(task.first + place, record, rows, pixels) for place, record in enumerate(task.records)]
        side = self.transform.image_size
        made = torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0, 3, side, side, dtype=torch.uint8)
        return DecodedTask(samples, made, task.share, task.last)

    def _decode(self, number: int, record: Record, rows: dict[str, int], pixels: list[np.ndarray]) -> DecodedSample:
        known = len(pixels)
        try:
            if not record.members and not record.fields and record.row is None and record.problem is None:
                raise Dropped("no image, text or json")
            sample = Sample(record, self._files, self.settings, self._keys)
            fields, pictures = self.kind.read(sample)
            lost: list[str] = []
            found = [self._views(picture, f"{record.where} {place}", fields.get("metadata", sample.fields), rows,
                                 pixels, lost) for place, picture in enumerate(pictures)]
            if lost and not any(found):
                raise ImageError(f"{lost[0].removesuffix('.')}; none of its pictures can be read.")
            return DecodedSample(number, fields, found, lost)
        except (Dropped, ImageError, DataError) as error:
            del pixels[known:]
            for name in [name for name, row in rows.items() if row >= known]:
                del rows[name]
            reason = str(error)
            return DecodedSample(number, dropped=reason) if isinstance(error, Dropped) else \
                DecodedSample(number, bad=reason)

    def _views(self, picture: Picture, place: str, metadata: Any, rows: dict[str, int], pixels: list[np.ndarray],
               lost: list[str]) -> list[int] | None:
        """The rows of an image's views; None for an optional image that cannot be read, which is added to `lost`."""
        name = picture.key or place
        names = [f"{name}#{number}" for number in range(self.views if picture.read else 1)]
        if not self._filter.active and all(one in rows for one in names):
            return [rows[one] for one in names]
        try:
            image = picture.load()
        except ImageError as error:
            if not picture.optional:
                raise
            lost.append(str(error))
            return None
        try:
            reason = self._filter.drop_reason(image.size, metadata if isinstance(metadata, dict) else {})
        except (TypeError, ValueError) as error:
            raise DataError(f"{picture.name}: its metadata holds no number for the filters ({error}).") from None
        if reason:
            raise Dropped(reason)
        small = self.transform.resize(image)
        for number, one in enumerate(names):
            if one not in rows:
                rows[one] = len(pixels)
                pixels.append(np.asarray(view(small, number, self.seed, name), np.uint8).transpose(2, 0, 1))
        return [rows[one] for one in names]


def decode_shards(shards: Sequence[Shard], dataset: TaskDataset, size: int, workers: int) -> Iterator[DecodedTask]:
    """The decoded tasks of shards, in order, of at most `size` samples each; each shard has at least one.

    Raises:
        DataError: a file cannot be opened, or a worker was killed.
    """
    loader = DataLoader(dataset, sampler=_tasks(shards, dataset.settings, size), batch_size=None,  # type: ignore[arg-type]
                        num_workers=workers)
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(f"{str(error).splitlines()[0]} Often memory ran out: try fewer --num_workers.") from error


def _tasks(shards: Sequence[Shard], settings: InputSettings, size: int) -> Iterator[Task]:
    for shard in shards:
        locate, numbers = open_shard(shard, settings)
        for start in range(0, max(len(numbers), 1), size):
            part = numbers[start:start + size]
            yield Task(numbers.start + start, [locate(number) for number in part], len(part) / max(len(numbers), 1),
                       start + size >= len(numbers))
