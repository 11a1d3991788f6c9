"""Decoding of samples in the workers of a DataLoader: records → resized images as bytes, which keep a GPU fed.

A task holds the positions of its records, so workers need no indexes. Errors of a sample are returned as a sentence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from seed_multimodal.data.filters import bad_shape, dissimilar
from seed_multimodal.data.formats.open_files import OpenFiles
from seed_multimodal.data.formats.record import Record
from seed_multimodal.data.pretokenize.inputs import InputSettings, Shard, open_shard
from seed_multimodal.data.pretokenize.kinds import Kind
from seed_multimodal.data.pretokenize.samples import Dropped, Picture, Sample, view
from seed_multimodal.errors import DataError, ImageError
from seed_multimodal.images.transforms import ImageTransform


@dataclass
class DecodedSample:
    """What a kind has read, and the rows of its images' views (None: a lost image); or why it is left out."""

    number: int
    fields: dict[str, Any] = field(default_factory=dict)
    rows: list[list[int] | None] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    bad: str = ""
    dropped: str = ""


@dataclass
class Task:
    """Records decoded together, from number `first` of the file on; then what they are."""

    first: int
    records: list[Record]
    share: float  # of their shard
    last: bool  # the shard ends there
    samples: list[DecodedSample] = field(default_factory=list)
    pixels: Any = None  # of the images' views, uint8 Tensor [rows, 3, S, S]


class TaskDataset(Dataset[Task]):
    """`dataset[task]` is the decoded task; `views` of each image that a model reads (kinds that can hold several),
    augmented from `seed`. Equal images of a task are encoded once."""

    def __init__(self, kind: Kind, settings: InputSettings, transform: ImageTransform, views: int = 1, seed: int = 0
                 ) -> None:
        self.kind, self.settings, self.transform = kind, settings, transform
        self.views, self.seed = views if kind.views else 1, seed
        self._keys = kind.keys(settings.fields)
        self._filters = any(limit is not None for limit in (settings.similarity_thr, settings.min_resolution,
                                                            settings.min_aspect_ratio))
        self._files = OpenFiles(rows=0)  # they are read in order

    def __getitem__(self, task: Task) -> Task:
        rows: dict[str, tuple[int, np.ndarray]] = {}  # number and pixels by the names of views
        samples = [self._decode(task.first + place, record, rows) for place, record in enumerate(task.records)]
        pixels = np.stack([one for _, one in rows.values()]) if rows else np.empty(0, np.uint8)
        return replace(task, records=[], samples=samples, pixels=torch.from_numpy(pixels))

    def _decode(self, number: int, record: Record, rows: dict[str, tuple[int, np.ndarray]]) -> DecodedSample:
        known, made = len(rows), DecodedSample(number)
        try:
            sample = Sample(record, self._files, self.settings, self._keys)
            made.fields, pictures = self.kind.read(sample)
            metadata = made.fields.get("metadata", sample.fields)
            made.rows = [self._views(picture, f"{record.where} {place}", metadata, rows, made.lost)
                         for place, picture in enumerate(pictures)]
            if made.lost and not any(made.rows):
                raise ImageError(f"{made.lost[0].removesuffix('.')}; none of its pictures can be read.")
            return made
        except (Dropped, ImageError, DataError) as error:
            for name in list(rows)[known:]:
                del rows[name]
            dropped = isinstance(error, Dropped)
            return DecodedSample(number, dropped=str(error)) if dropped else DecodedSample(number, bad=str(error))

    def _views(self, picture: Picture, place: str, metadata: Any, rows: dict[str, tuple[int, np.ndarray]],
               lost: list[str]) -> list[int] | None:
        """The rows of an image's views; None for an optional image that cannot be read, which is added to `lost`."""
        name = picture.key or place
        names = [f"{name}#{number}" for number in range(self.views if picture.read else 1)]
        if self._filters or not all(one in rows for one in names):
            try:
                image = picture.load()
            except ImageError as error:
                if not picture.optional:
                    raise
                lost.append(str(error))
                return None
            try:
                reason = bad_shape(image.size, self.settings.min_resolution, self.settings.min_aspect_ratio) \
                    or dissimilar(metadata if isinstance(metadata, dict) else {}, self.settings.similarity_thr)
            except (TypeError, ValueError) as error:
                raise DataError(f"{picture.name}: its metadata holds no number for the filters ({error}).") from None
            if reason:
                raise Dropped(reason)
            small = self.transform.resize(image)
            for number, one in enumerate(names):
                if one not in rows:
                    pixels = np.asarray(view(small, number, self.seed, name), np.uint8).transpose(2, 0, 1)
                    rows[one] = len(rows), pixels
        return [rows[one][0] for one in names]


def decode_shards(shards: Sequence[Shard], dataset: TaskDataset, size: int, workers: int) -> Iterator[Task]:
    """The decoded tasks of shards, in order, of at most `size` samples each; each shard has at least one.

    Raises:
        DataError: a file cannot be opened, or a worker was killed.
    """
    tasks: Any = _tasks(shards, dataset.settings, size)
    try:
        yield from DataLoader(dataset, sampler=tasks, batch_size=None, num_workers=workers)
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
