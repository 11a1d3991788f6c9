"""Decoding of samples in worker processes: records → resized images as bytes.

A task has the offsets of its records, so workers need no indexes.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.data.formats.bad_records import (
    DROPPED,
    RECORD_FAULTS,
    REPAIRED,
    RecordNote,
    broken_note,
)
from seed_multimodal.data.formats.pairs import shape_problem, similarity_problem
from seed_multimodal.data.formats.record import JsonObject, Record
from seed_multimodal.data.stream.loader import load
from seed_multimodal.errors import ImageError
from seed_multimodal.images.transforms import ImageTransform
from seed_multimodal.pretokenize.frames import augmented_view
from seed_multimodal.pretokenize.inputs import InputSettings, Shard
from seed_multimodal.pretokenize.record_types import (
    Dropped,
    RecordType,
    Sample,
    SourceImage,
    replace_images,
)


@dataclass(frozen=True)
class EncodedViews:
    """The views of an image in a record, by their rows in `Task.pixels`."""

    rows: list[int]


@dataclass
class DecodedSample:
    """The output record with `EncodedViews` for images; None: it is skipped."""

    index: int  # in the file
    record: JsonObject | None = None
    note: RecordNote | None = None  # why it is skipped, or how it was repaired
    lost_images: list[str] = field(default_factory=list)  # errors of unreadable optional images


@dataclass
class Task:
    """Records decoded together, from index `first` of the file; then the decoded samples."""

    shard: str  # its name
    first: int
    records: list[Record]
    share: float  # fraction of the shard
    last: bool  # last task of the shard
    samples: list[DecodedSample] = field(default_factory=list)
    pixels: Tensor | None = None  # of the images' views, uint8 [rows, 3, S, S]


@dataclass
class TaskDecoder:
    """`decoder(task)` is the decoded task. Equal images of a task are encoded once.

    views: views of each input image, augmented from `seed`.
    """

    record_type: RecordType
    settings: InputSettings
    transform: ImageTransform
    views: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.record_type.views:
            self.views = 1
        self._keys = self.record_type.keys(self.settings.fields)

    def __call__(self, task: Task) -> Task:
        pixels: list[np.ndarray] = []  # uint8 [3, S, S] of each row
        views: dict[tuple[str, bool], EncodedViews] = {}  # by image and whether it is an input
        samples: list[DecodedSample] = []
        for index, record in enumerate(task.records, task.first):
            decoded = DecodedSample(index)
            try:
                self._decode(decoded, record, pixels, views)
            except Dropped as reason:
                note = RecordNote(DROPPED, str(reason), record.location)
                decoded = DecodedSample(index, note=note)
            except RECORD_FAULTS as error:
                decoded = DecodedSample(index, note=broken_note(error, record.location))
            samples.append(decoded)
        stacked = np.stack(pixels) if pixels else np.empty(0, np.uint8)
        return replace(task, records=[], samples=samples, pixels=torch.from_numpy(stacked))

    def _decode(
        self,
        decoded: DecodedSample,
        record: Record,
        pixels: list[np.ndarray],
        views: dict[tuple[str, bool], EncodedViews],
    ) -> None:
        # 1. The output record, filtered by its similarity.
        sample = Sample(record, self.settings, self._keys)
        output = self.record_type.read(sample)
        if sample.repaired:
            decoded.note = RecordNote(REPAIRED, sample.repaired, record.location)
        metadata = output.get("metadata", sample.fields)
        reason = similarity_problem(
            metadata if isinstance(metadata, dict) else {}, self.settings.similarity_thr
        )
        if reason:
            raise Dropped(reason)

        # 2. Its images, of which a document may lose some.
        names: list[str] = []

        def read_image(image: SourceImage) -> EncodedViews | None:
            names.append(image.key or f"{record.location} {len(names)}")
            key = (names[-1], image.is_input)
            try:
                if key not in views:
                    views[key] = self._read_views(image, names[-1], pixels)
            except ImageError as error:
                if not image.optional:
                    raise
                decoded.lost_images.append(str(error))
                return None
            return views[key]

        decoded.record = replace_images(output, SourceImage, read_image)
        if decoded.lost_images and len(decoded.lost_images) == len(names):
            first_error = decoded.lost_images[0].removesuffix(".")
            raise ImageError(f"{first_error}; none of its images is readable.")

    def _read_views(self, source: SourceImage, name: str, pixels: list[np.ndarray]) -> EncodedViews:
        """Append the views of an image to `pixels`."""
        settings = self.settings
        image = source.load(settings.image_root)
        reason = shape_problem(image.size, settings.min_resolution, settings.min_aspect_ratio)
        if reason:
            raise Dropped(reason)
        image = self.transform.resize(image)
        first = len(pixels)
        for view_index in range(self.views if source.is_input else 1):
            view = augmented_view(image, view_index, self.seed, name)
            pixels.append(np.asarray(view, np.uint8).transpose(2, 0, 1))
        return EncodedViews(list(range(first, len(pixels))))


def decode_shards(
    shards: Iterable[Shard], decoder: TaskDecoder, size: int, workers: int
) -> Generator[Task, None, None]:
    """Decoded tasks of shards in order, at most `size` samples each, at least one per shard.

    Raises as `load`.
    """
    return load(decoder, _tasks(shards, size), workers)


def _tasks(shards: Iterable[Shard], size: int) -> Iterator[Task]:
    for shard in shards:
        file = copy.copy(shard.file)  # so that a tar's index is freed afterwards
        indices = range(shard.start, sum(file.sizes) if shard.stop is None else shard.stop)
        n_records = max(len(indices), 1)
        for start in range(0, n_records, size):
            batch = indices[start : start + size]
            yield Task(
                shard=shard.name,
                first=indices.start + start,
                records=[file.locate(index) for index in batch],
                share=len(batch) / n_records,
                last=start + size >= len(indices),
            )
