"""Decoding of samples in DataLoader workers: records → resized images as bytes. A task has the offsets of its records,
so workers need no indexes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from seed_multimodal.data.formats.open_files import OpenFiles
from seed_multimodal.data.formats.pairs import shape_problem, similarity_problem
from seed_multimodal.data.formats.record import RECORD_FAULTS, Record, bad_values
from seed_multimodal.data.pretokenize.frames import view
from seed_multimodal.data.pretokenize.inputs import InputSettings, Shard
from seed_multimodal.data.pretokenize.record_types import Dropped, RecordType, Sample, SourceImage
from seed_multimodal.errors import ImageError
from seed_multimodal.images.transforms import ImageTransform

Rows = dict[tuple[str, bool], list[int]]  # pixel rows of an image's views, by image key


@dataclass
class DecodedSample:
    """Decoded fields, and pixel rows of the images' views (None: unreadable image); or the reason for skipping."""

    number: int
    fields: dict[str, Any] = field(default_factory=dict)
    rows: list[list[int] | None] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    bad: str = ""
    dropped: str = ""


@dataclass
class Task:
    """Records decoded together, from index `first` of the file; then the decoded samples."""

    first: int
    records: list[Record]
    share: float  # fraction of the shard
    last: bool  # last task of the shard
    samples: list[DecodedSample] = field(default_factory=list)
    pixels: Any = None  # of the images' views, uint8 Tensor [rows, 3, S, S]


class TaskDataset(Dataset[Task]):
    """`dataset[task]` is the decoded task, with `views` views of each input image, augmented from `seed`. Equal images
    of a task are encoded once."""

    def __init__(
        self,
        kind: RecordType,
        settings: InputSettings,
        transform: ImageTransform,
        views: int = 1,
        seed: int = 0,
    ) -> None:
        self.kind, self.settings, self.transform = kind, settings, transform
        self.views, self.seed = views if kind.views else 1, seed
        self._keys = kind.keys(settings.fields)
        self._files = OpenFiles(group_cache_bytes=0, in_order=True)

    def __getitem__(self, task: Task) -> Task:
        pixels: list[np.ndarray] = []
        rows: Rows = {}
        samples = [
            self._decode(task.first + place, record, pixels, rows)
            for place, record in enumerate(task.records)
        ]
        stacked = np.stack(pixels) if pixels else np.empty(0, np.uint8)
        return replace(task, records=[], samples=samples, pixels=torch.from_numpy(stacked))

    def _decode(
        self, number: int, record: Record, pixels: list[np.ndarray], rows: Rows
    ) -> DecodedSample:
        try:
            with bad_values(record.location):
                return self._read(number, record, pixels, rows)
        except Dropped as reason:
            return DecodedSample(number, dropped=str(reason))
        except RECORD_FAULTS as error:
            message = str(error)
            return DecodedSample(
                number,
                bad=message if record.location in message else f"{record.location}: {message}",
            )

    def _read(
        self, number: int, record: Record, pixels: list[np.ndarray], rows: Rows
    ) -> DecodedSample:
        made = DecodedSample(number)
        sample = Sample(record, self._files, self.settings, self._keys)
        made.fields, images = self.kind.read(sample)
        metadata = made.fields.get("metadata", sample.fields)
        if reason := similarity_problem(
            metadata if isinstance(metadata, dict) else {}, self.settings.similarity_thr
        ):
            raise Dropped(reason)
        for place, image in enumerate(images):
            try:
                made.rows.append(self._views(image, f"{record.location} {place}", pixels, rows))
            except ImageError as error:
                if not image.optional:
                    raise
                made.lost.append(str(error))
                made.rows.append(None)
        if made.lost and not any(made.rows):
            raise ImageError(f"{made.lost[0].removesuffix('.')}; none of its images is readable.")
        return made

    def _views(
        self, source: SourceImage, place: str, pixels: list[np.ndarray], rows: Rows
    ) -> list[int]:
        """The rows of an image's views, appended to `pixels` if new."""
        name = source.key or place
        if (name, source.read) not in rows:
            image = source.load(self.settings.image_root)
            if reason := shape_problem(
                image.size, self.settings.min_resolution, self.settings.min_aspect_ratio
            ):
                raise Dropped(reason)
            image, first = self.transform.resize(image), len(pixels)
            for number in range(self.views if source.read else 1):
                pixels.append(
                    np.asarray(view(image, number, self.seed, name), np.uint8).transpose(2, 0, 1)
                )
            rows[name, source.read] = list(range(first, len(pixels)))
        return rows[name, source.read]


def decode_shards(
    shards: Sequence[Shard], dataset: TaskDataset, size: int, workers: int
) -> Iterator[Task]:
    """Decoded tasks of shards in order, at most `size` samples each, at least one per shard. Raises DataError: a file
    cannot be opened."""
    tasks: Any = _tasks(shards, size)
    yield from DataLoader(dataset, sampler=tasks, batch_size=None, num_workers=workers)


def _tasks(shards: Sequence[Shard], size: int) -> Iterator[Task]:
    for shard in shards:
        file = copy.copy(shard.file)  # so that a tar's index is freed afterwards
        numbers = range(shard.start, sum(file.sizes) if shard.stop is None else shard.stop)
        for start in range(0, max(len(numbers), 1), size):
            part = numbers[start : start + size]
            yield Task(
                numbers.start + start,
                [file.locate(number) for number in part],
                len(part) / max(len(numbers), 1),
                start + size >= len(numbers),
            )
