"""Decoding of samples in DataLoader workers: records → resized images as bytes.

A task has the offsets of its records, so workers need no indexes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from seed_multimodal.data.formats.open_files import OpenFiles
from seed_multimodal.data.formats.pairs import shape_problem, similarity_problem
from seed_multimodal.data.formats.record import RECORD_FAULTS, Record, bad_values
from seed_multimodal.data.pretokenize.frames import augmented_view
from seed_multimodal.data.pretokenize.inputs import InputSettings, Shard
from seed_multimodal.data.pretokenize.record_types import Dropped, RecordType, Sample, SourceImage
from seed_multimodal.errors import ImageError
from seed_multimodal.images.transforms import ImageTransform

Rows = dict[tuple[str, bool], list[int]]  # (image key, is input) → pixel rows of the image's views


@dataclass
class DecodedSample:
    """Decoded fields and pixel rows of the images; or the reason for skipping."""

    index: int  # in the file
    fields: dict[str, Any] = field(default_factory=dict)
    rows: list[list[int] | None] = field(default_factory=list)  # of views; None: unreadable image
    lost_images: list[str] = field(default_factory=list)  # errors of unreadable optional images
    error: str = ""  # broken
    drop_reason: str = ""  # filtered


@dataclass
class Task:
    """Records decoded together, from index `first` of the file; then the decoded samples."""

    first: int
    records: list[Record]
    share: float  # fraction of the shard
    last: bool  # last task of the shard
    samples: list[DecodedSample] = field(default_factory=list)
    pixels: Tensor | None = None  # of the images' views, uint8 [rows, 3, S, S]


class TaskDataset(Dataset[Task]):
    """`dataset[task]` is the decoded task. Equal images of a task are encoded once.

    views: views of each input image, augmented from `seed`.
    """

    def __init__(
        self,
        record_type: RecordType,
        settings: InputSettings,
        transform: ImageTransform,
        views: int = 1,
        seed: int = 0,
    ) -> None:
        self.record_type = record_type
        self.settings = settings
        self.transform = transform
        self.views = views if record_type.views else 1
        self.seed = seed
        self._keys = record_type.keys(settings.fields)
        self._files = OpenFiles(group_cache_bytes=0, in_order=True)

    def __getitem__(self, task: Task) -> Task:
        pixels: list[np.ndarray] = []  # uint8 [3, S, S] of each row
        rows: Rows = {}
        samples = [
            self._decode(task.first + offset, record, pixels, rows)
            for offset, record in enumerate(task.records)
        ]
        stacked = np.stack(pixels) if pixels else np.empty(0, np.uint8)
        return replace(task, records=[], samples=samples, pixels=torch.from_numpy(stacked))

    def _decode(
        self, index: int, record: Record, pixels: list[np.ndarray], rows: Rows
    ) -> DecodedSample:
        try:
            with bad_values(record.location):
                return self._read(index, record, pixels, rows)
        except Dropped as reason:
            return DecodedSample(index, drop_reason=str(reason))
        except RECORD_FAULTS as error:
            message = str(error)
            if record.location not in message:
                message = f"{record.location}: {message}"
            return DecodedSample(index, error=message)

    def _read(
        self, index: int, record: Record, pixels: list[np.ndarray], rows: Rows
    ) -> DecodedSample:
        # 1. Fields, filtered by their similarity.
        decoded = DecodedSample(index)
        sample = Sample(record, self._files, self.settings, self._keys)
        decoded.fields, images = self.record_type.read(sample)
        metadata = decoded.fields.get("metadata", sample.fields)
        if not isinstance(metadata, dict):
            metadata = {}
        reason = similarity_problem(metadata, self.settings.similarity_thr)
        if reason:
            raise Dropped(reason)

        # 2. Images; a document may lose some of them.
        for image_index, image in enumerate(images):
            name = image.key or f"{record.location} {image_index}"
            try:
                decoded.rows.append(self._view_rows(image, name, pixels, rows))
            except ImageError as error:
                if not image.optional:
                    raise
                decoded.lost_images.append(str(error))
                decoded.rows.append(None)
        if decoded.lost_images and not any(decoded.rows):
            first_error = decoded.lost_images[0].removesuffix(".")
            raise ImageError(f"{first_error}; none of its images is readable.")
        return decoded

    def _view_rows(
        self, source: SourceImage, name: str, pixels: list[np.ndarray], rows: Rows
    ) -> list[int]:
        """The rows of an image's views, appended to `pixels` if new."""
        key = (name, source.is_input)
        if key in rows:
            return rows[key]
        image = source.load(self.settings.image_root)
        reason = shape_problem(
            image.size, self.settings.min_resolution, self.settings.min_aspect_ratio
        )
        if reason:
            raise Dropped(reason)
        image = self.transform.resize(image)
        first = len(pixels)
        for view_index in range(self.views if source.is_input else 1):
            view = augmented_view(image, view_index, self.seed, name)
            pixels.append(np.asarray(view, np.uint8).transpose(2, 0, 1))
        rows[key] = list(range(first, len(pixels)))
        return rows[key]


def decode_shards(
    shards: Sequence[Shard], dataset: TaskDataset, size: int, workers: int
) -> Iterator[Task]:
    """Decoded tasks of shards in order, at most `size` samples each, at least one per shard.

    Raises DataError: a file cannot be opened.
    """
    tasks: Any = _tasks(shards, size)
    yield from DataLoader(dataset, sampler=tasks, batch_size=None, num_workers=workers)


def _tasks(shards: Sequence[Shard], size: int) -> Iterator[Task]:
    for shard in shards:
        file = copy.copy(shard.file)  # so that a tar's index is freed afterwards
        indices = range(shard.start, sum(file.sizes) if shard.stop is None else shard.stop)
        n_records = max(len(indices), 1)
        for start in range(0, n_records, size):
            batch = indices[start : start + size]
            yield Task(
                first=indices.start + start,
                records=[file.locate(index) for index in batch],
                share=len(batch) / n_records,
                last=start + size >= len(indices),
            )
