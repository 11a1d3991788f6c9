"""TaskDecoder workers: samples of a task → resized pictures as bytes (uint8), in worker processes that keep a GPU fed.

    for part in decoded(tasks, TaskDecoder(...), workers=8): ...      # in the order of the tasks, whatever the workers

A task carries where its samples lie, so workers know nothing of units. Pictures travel as uint8 [n, 3, S, S], a
quarter of their normalised size. What is wrong with a sample travels as a sentence; programming errors are raised.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from seed_multimodal.data.pretokenize.pictures import drop_reason, filters_of
from seed_multimodal.data.pretokenize.kinds import Kind
from seed_multimodal.data.pretokenize.samples import Dropped, Picture, SampleReference, Sample
from seed_multimodal.data.pretokenize.input_settings import InputSettings
from seed_multimodal.data.pretokenize.pictures import view
from seed_multimodal.data.formats.tar import OpenFiles
from seed_multimodal.errors import DataError, ImageError
from seed_multimodal.images.transforms import ImageTransform

AHEAD = 4  # tasks that wait decoded, per worker


@dataclass(frozen=True)
class Task:
    """Samples to decode: numbers `first`, `first` + 1, … of a unit; `last`: the unit ends with them."""

    unit: int
    first: int
    references: list[SampleReference]
    last: bool
    damage: str = ""


@dataclass
class DecodedSample:
    """A sample as decoded: what its kind parsed and the rows of its pictures' views; or why there is nothing of it."""

    number: int
    parsed: dict[str, Any] = field(default_factory=dict)
    rows: list[list[int] | None] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # optional pictures that cannot be read, and why
    bad: str = ""
    dropped: str = ""


@dataclass
class DecodedTask:
    """A task's result: `pixels` uint8 [rows, 3, S, S], `names` of the rows (equal names: equal pixels; "": unknown)."""

    task: Task
    entries: list[DecodedSample]
    pixels: Tensor
    names: list[str]

    def pin_memory(self, *_: Any) -> DecodedTask:
        """For the loader: pixels in memory that a GPU copies from at once."""
        self.pixels = self.pixels.pin_memory()
        return self


class TaskDecoder:
    """Decodes one task; used inside workers.

    Args:
        keys: the input's keys by what they hold (`Kind.keys`).
        views: of each picture that a model reads (kinds that can hold several).
    """

    def __init__(self, kind: Kind, settings: InputSettings, transform: ImageTransform, *, views: int = 1,
                 seed: int = 0) -> None:
        self.kind, self.settings, self.transform = kind, settings, transform
        self.keys = kind.keys(settings.fields)
        self.views, self.seed = views if kind.views else 1, seed
        self._filters = filters_of(settings)
        self._files = OpenFiles()

    def __getitem__(self, task: Task) -> DecodedTask:
        rows = _Rows(self.transform.image_size)
        entries = [self._entry(task.first + place, raw, rows) for place, raw in enumerate(task.references)]
        light = Task(task.unit, task.first, [], task.last, task.damage)  # no need to send the samples back
        return DecodedTask(light, entries, rows.pixels(), rows.names)

    def _entry(self, number: int, raw: SampleReference, rows: _Rows) -> DecodedSample:
        known = len(rows.names)
        try:
            sample = Sample(raw, self._files, self.settings.image_root)
            parsed, pictures = self.kind.parse(sample, self.settings, self.keys)
            metadata = parsed.get("metadata", sample.fields)
            lost: list[str] = []
            found = [self._add(picture, metadata, rows, f"{raw.where} {place}", lost)
                     for place, picture in enumerate(pictures)]
            if lost and not any(found):
                raise ImageError(f"{lost[0].removesuffix('.')}; none of its pictures can be read.")
            return DecodedSample(number, parsed, found, lost)
        except Dropped as reason:
            entry = DecodedSample(number, dropped=str(reason))
        except (ImageError, DataError) as error:
            entry = DecodedSample(number, bad=str(error))
        rows.cut(known)
        return entry

    def _add(self, picture: Picture, metadata: Any, rows: _Rows, name: str, lost: list[str]) -> list[int] | None:
        """The rows of a picture's views; None for an optional picture that cannot be read, which goes to `lost`."""
        count = self.views if picture.read else 1
        names = [f"{picture.key}#{number}" if picture.key else "" for number in range(count)]
        if picture.key and not self._filters and all(one in rows.places for one in names):
            return [rows.places[one] for one in names]
        try:
            image = picture.load()
        except ImageError as error:
            if picture.optional:
                lost.append(str(error))
                return None
            raise
        self._filter(image, metadata, picture.name)
        small = self.transform.resize(image)
        return [rows.add(view(small, number, self.seed, picture.key or name), names[number])
                for number in range(count)]

    def _filter(self, image: Image.Image, metadata: Any, name: str) -> None:
        if not self._filters:
            return
        try:
            reason = drop_reason(self._filters, image.size, metadata if isinstance(metadata, dict) else {})
        except (TypeError, ValueError) as error:
            raise DataError(f"{name}: its metadata holds no numbers where the filters look ({error}).") from None
        if reason is not None:
            raise Dropped(reason)


class _Rows:
    """Pictures of a task, equal ones once."""

    def __init__(self, size: int) -> None:
        self.size, self.names = size, list[str]()
        self.places: dict[str, int] = {}
        self._pixels: list[np.ndarray] = []

    def add(self, image: Image.Image, name: str) -> int:
        if name and name in self.places:
            return self.places[name]
        if name:
            self.places[name] = len(self.names)
        self.names.append(name)
        self._pixels.append(np.asarray(image, np.uint8).transpose(2, 0, 1))
        return len(self.names) - 1

    def cut(self, count: int) -> None:
        """Forget the rows from `count` on, of a sample that is not kept."""
        for name in self.names[count:]:
            self.places.pop(name, None)
        del self.names[count:], self._pixels[count:]

    def pixels(self) -> Tensor:
        if not self._pixels:
            return torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        return torch.from_numpy(np.stack(self._pixels))


def decoded(tasks: Iterable[Task], decode: TaskDecoder, *, workers: int, pin: bool = False) -> Iterator[DecodedTask]:
    """The tasks' results in their order; with `workers` they are made ahead, in that many processes."""
    if workers < 1:
        return map(decode.__getitem__, tasks)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # the user has chosen how many
        # A generator of its own: nothing here may touch the global random numbers.
        return iter(DataLoader(decode, batch_size=None, sampler=tasks, num_workers=workers,  # type: ignore[arg-type]
                               prefetch_factor=AHEAD, collate_fn=_as_is, worker_init_fn=_quiet, pin_memory=pin,
                               generator=torch.Generator()))


def tasks_of(units: Iterable[Any], locate: Callable[[Any], Any], size: int) -> Iterator[Task]:
    """The tasks of units, each of at most `size` samples; the next unit is located while this one's are handed out."""
    from concurrent.futures import ThreadPoolExecutor

    units = list(units)
    with ThreadPoolExecutor(1) as ahead:
        next_one = ahead.submit(locate, units[0]) if units else None
        for place, unit in enumerate(units):
            assert next_one is not None
            found = next_one.result()
            next_one = ahead.submit(locate, units[place + 1]) if place + 1 < len(units) else None
            references = list(found.references)
            starts = range(0, len(references), size) or range(1)
            for start in starts:
                last = start == starts[-1]
                yield Task(unit.number, start, references[start:start + size], last, found.damage if last else "")


def _as_is(value: Any) -> Any:
    return value


def _quiet(worker: int) -> None:
    """Workers leave interrupts to the process that encodes, which ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
