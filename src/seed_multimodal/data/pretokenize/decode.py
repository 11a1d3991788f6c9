"""Decoding of samples: tasks of a few samples → resized pictures as bytes (uint8), in workers that keep a GPU fed.

    for result in iterate(decoding(units, TaskDecoder(...), workers=8)): ...    # in the order of the units' samples

A task holds the positions of its samples, so workers need no units. Pictures travel as uint8 [n, 3, S, S], a quarter of
their normalised size. Errors of a sample are returned as a sentence; programming errors are raised.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.data.filters import ImageTextFilter
from seed_multimodal.data.formats.open_files import OpenFiles
from seed_multimodal.data.formats.record import Record
from seed_multimodal.data.pretokenize.input_settings import InputSettings
from seed_multimodal.data.pretokenize.kinds import Kind
from seed_multimodal.data.pretokenize.pictures import Picture, view
from seed_multimodal.data.pretokenize.samples import Dropped, Sample
from seed_multimodal.data.pretokenize.units import Unit, unit_records
from seed_multimodal.data.stream.loader import StepLoader
from seed_multimodal.errors import DataError, ImageError
from seed_multimodal.images.transforms import ImageTransform

TASK = 32  # samples a worker decodes at a time


@dataclass(frozen=True)
class Task:
    """Samples to decode: numbers `first`, `first` + 1, … of a unit; `last`: the unit ends with them.

    `damage` is a sentence about the unit's file (empty: none), `weight` the task's share of the unit's.
    """

    unit: int
    first: int
    records: list[Record]
    last: bool
    damage: str
    weight: int


@dataclass
class DecodedSample:
    """A decoded sample: its record with slots and the rows of its pictures' views; or why it was left out."""

    number: int
    record: dict[str, Any] = field(default_factory=dict)
    rows: list[list[int] | None] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # optional pictures that cannot be read, and why
    bad: str = ""
    dropped: str = ""


@dataclass
class DecodedTask:
    """A task's result: `pixels` uint8 [rows, 3, S, S], `names` of the rows (equal names: equal pixels; "": unknown)."""

    task: Task
    samples: list[DecodedSample]
    pixels: Tensor
    names: list[str]


class TaskDecoder:
    """Decodes one task; used inside workers.

    Args:
        views: of each picture that a model reads (kinds that can hold several), augmented from `seed`.
    """

    def __init__(self, kind: Kind, settings: InputSettings, transform: ImageTransform, *, views: int = 1,
                 seed: int = 0) -> None:
        self.kind, self.settings, self.transform = kind, settings, transform
        self.views, self.seed = views if kind.views else 1, seed
        self._keys = kind.keys(settings.fields)
        self._filter = ImageTextFilter(settings.similarity_thr, settings.min_resolution, settings.min_aspect_ratio)
        self._files = OpenFiles(rows=0)  # they are read in order

    def enter_worker(self) -> None:
        """Ignore interrupts: the encoding process ends its workers."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def __call__(self, task: Task | None) -> DecodedTask | None:
        if task is None:  # the end
            return None
        rows = _Rows()
        samples = [self._decoded(task.first + place, record, rows)
                   for place, record in enumerate(task.records)]
        side = self.transform.image_size
        pixels = torch.from_numpy(np.stack(rows.pixels)) if rows.pixels else torch.empty(0, 3, side, side).byte()
        return DecodedTask(replace(task, records=[]), samples, pixels, rows.names)  # they need not be sent back

    def _decoded(self, number: int, record: Record, rows: _Rows) -> DecodedSample:
        known = len(rows.names)
        try:
            sample = Sample(record, self._files, self.settings.image_root)
            made, pictures = self.kind.parse(sample, self.settings, self._keys)
            metadata = made.get("metadata", sample.fields)
            lost: list[str] = []
            found = [self._add(picture, metadata, rows, f"{record.where} {place}", lost)
                     for place, picture in enumerate(pictures)]
            if lost and not any(found):
                raise ImageError(f"{lost[0].removesuffix('.')}; none of its pictures can be read.")
            return DecodedSample(number, made, found, lost)
        except Dropped as reason:
            rows.cut(known)
            return DecodedSample(number, dropped=str(reason))
        except (ImageError, DataError) as error:
            rows.cut(known)
            return DecodedSample(number, bad=str(error))

    def _add(self, picture: Picture, metadata: Any, rows: _Rows, name: str, lost: list[str]) -> list[int] | None:
        """The rows of a picture's views; None for an optional picture that cannot be read, which is added to `lost`."""
        names = [f"{picture.key}#{number}" if picture.key else ""
                 for number in range(self.views if picture.read else 1)]
        if not self._filter.active and all(one in rows.places for one in names):
            return [rows.places[one] for one in names]
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
            raise DataError(f"{picture.name}: its metadata holds no numbers where the filters look ({error})."
                            ) from None
        if reason:
            raise Dropped(reason)
        small = self.transform.resize(image)
        return [rows.add(view(small, number, self.seed, picture.key or name), one)
                for number, one in enumerate(names)]


class _Rows:
    """Pictures of a task, each name once."""

    def __init__(self) -> None:
        self.names, self.pixels = list[str](), list[np.ndarray]()
        self.places: dict[str, int] = {}

    def add(self, image: Image.Image, name: str) -> int:
        """The row of a picture."""
        if name in self.places:
            return self.places[name]
        if name:
            self.places[name] = len(self.names)
        self.names.append(name)
        self.pixels.append(np.asarray(image, np.uint8).transpose(2, 0, 1))
        return len(self.names) - 1

    def cut(self, count: int) -> None:
        """Drop the rows from `count` on, of a sample that is not kept."""
        for name in self.names[count:]:
            self.places.pop(name, None)
        del self.names[count:], self.pixels[count:]


def decoding(units: Sequence[Unit], decoder: TaskDecoder, workers: int, size: int = TASK) -> StepLoader:
    """A loader of the units' tasks in their order (see `iterate`); with `workers`, that many processes decode ahead."""
    tasks = tasks_of(units, decoder.settings, size)
    return StepLoader(decoder, lambda _: next(tasks, None), workers)


def iterate(loader: StepLoader) -> Iterator[DecodedTask]:
    """All results of a loader.

    Raises:
        DataError: a decode worker was killed.
    """
    for number in itertools.count():
        result = loader.at(number)
        if result is None:
            return
        yield result


def tasks_of(units: Sequence[Unit], settings: InputSettings, size: int) -> Iterator[Task]:
    """The tasks of units, each of at most `size` samples; the next unit is located while this one's tasks are in
    use."""
    with ThreadPoolExecutor(1) as ahead:
        located = [ahead.submit(unit_records, unit, settings) for unit in units[:1]]
        for place, unit in enumerate(units):
            records, damage = located.pop().result()
            located = [ahead.submit(unit_records, one, settings) for one in units[place + 1:place + 2]]
            count = max(len(records), 1)
            for start in range(0, count, size):
                part, last = records[start:start + size], start + size >= count
                weight = unit.weight * (start + len(part)) // count - unit.weight * start // count
                yield Task(unit.number, start, part, last, damage if last else "", weight)
