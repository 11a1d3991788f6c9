"""Batches of samples by step number, from data sets that are mixed by weight.

    with StepBatches([dataset], 64, seed=0, rank=rank, world=world, workers=8) as batches:
        for step in range(start, steps):
            batch = batches.at(step)       # the next steps are prefetched; a jump restarts workers

Together, the ranks of one node see the batch of a single process. A sample that cannot be used is
skipped.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, TypeVar

import numpy as np
from torch.utils.data import default_collate

from seed_multimodal.data.formats.bad_records import RECORD_FAULTS, RecordNote
from seed_multimodal.data.formats.record import JsonObject, RecordFields, find_part
from seed_multimodal.data.stream.order import DistinctOrder, EpochOrder, MixedOrder, Order
from seed_multimodal.data.stream.stream import ReadResult, SourceProgress, Stream
from seed_multimodal.errors import ConfigError, DataError

Sample = TypeVar("Sample")
Batch = TypeVar("Batch")


class SampleDataset(Generic[Sample]):
    """Training samples by (index, epoch), for `StepBatches`."""

    # Samples of each shard, int64 [shards]: the order keeps reads local. None: no shards.
    shard_sizes: np.ndarray | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def get(self, index: int, epoch: int = 0) -> Sample:
        """One sample. Raises one of `RECORD_FAULTS`: it cannot be used."""
        raise NotImplementedError

    def broken(self, index: int, error: Exception) -> RecordNote:
        """A sample whose `get` raised an error."""
        raise error

    def checksum(self) -> int:
        """Of the files; 0: they are not compared when a run resumes."""
        return 0


class ListedSamples(SampleDataset[Sample]):
    """Samples of JSON values in memory."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def get(self, index: int, epoch: int = 0) -> Sample:
        return self.samples[index]

    def checksum(self) -> int:
        return zlib.crc32(json.dumps(self.samples).encode())


@dataclass
class JoinedSource(Generic[Sample]):
    """Data sets as a source of a stream, in an order of all their samples, one set after another.

    shards: the order, or the one below it.
    rows: samples of a batch.
    """

    name = "images"
    datasets: Sequence[SampleDataset[Sample]]
    order: EpochOrder | MixedOrder | DistinctOrder
    shards: EpochOrder | MixedOrder
    rows: int

    def __post_init__(self) -> None:
        self._ends = list(accumulate(map(len, self.datasets)))
        self.size = self._ends[-1]

    def read(self, position: int) -> ReadResult[Sample]:
        """The sample at a position of the endless order."""
        ((epoch, index),) = self.order.samples(position, 1)
        part, part_index = find_part(self._ends, index)
        dataset = self.datasets[part]
        try:
            return ReadResult([dataset.get(part_index, epoch)])
        except RECORD_FAULTS as error:
            return ReadResult([], dataset.broken(part_index, error))

    def checksum(self) -> int:
        """Of all files."""
        return sum(dataset.checksum() for dataset in self.datasets)


class StepBatches(AbstractContextManager["StepBatches[Batch]"], Generic[Batch]):
    """Batches of one rank by step number.

    weights: share of each data set in the draws, each in epochs of its own; none: all have one
        epoch together.
    collate: samples -> batch.
    nodes: machines of equally many ranks; data in shards is dealt to them.
    distinct: no sample twice in a step of all ranks, also at an epoch's end.
    max_bad_in_a_row: consecutive unusable samples that end the run.
    log: receives a line for the first unusable samples of each kind.
    """

    def __init__(
        self,
        datasets: Sequence[SampleDataset[Any]],
        batch_size: int,
        *,
        seed: int,
        weights: Sequence[float] = (),
        rank: int = 0,
        world: int = 1,
        nodes: int = 1,
        workers: int = 0,
        collate: Callable[[list[Any]], Batch] = default_collate,
        shuffle: bool = True,
        distinct: bool = False,
        max_bad_in_a_row: int = 20,
        log: Callable[[str], None] | None = print,
    ) -> None:
        self.batch_size = batch_size
        self.collate = collate
        self.wait_seconds = 0.0  # time spent in `at`
        self.next_step = 0
        # The step from which `at` went back, and the progress there.
        self._left: tuple[int, list[SourceProgress]] | None = None

        # 1. The order of all samples.
        sizes = list(map(len, datasets))
        self.n_samples = sum(sizes)
        if not all(sizes):
            raise DataError("The training set is empty.")
        shard_sizes = [dataset.shard_sizes for dataset in datasets]
        shards_order: EpochOrder | MixedOrder
        is_mixed = len(weights) > 1
        if is_mixed:
            if not shuffle:
                raise ConfigError("shuffle=False: data sets mixed by weight are always shuffled.")
            shards_order = MixedOrder(sizes, weights, seed, shard_sizes=shard_sizes)
        else:
            shards = _joined_shards(sizes, shard_sizes)
            shards_order = EpochOrder(self.n_samples, seed, shuffle=shuffle, shard_sizes=shards)
        order = DistinctOrder(shards_order, batch_size * world) if distinct else shards_order

        # 2. Their stream, in which a rank takes a batch of neighbouring positions at a time.
        identity: JsonObject = {
            "seed": seed,
            "shuffle": shuffle,
            "records": sizes,
            "weights": list(weights) if is_mixed else [],
        }
        self.stream: Stream[Any] = Stream(
            [JoinedSource(datasets, order, shards_order, batch_size)],
            Order([1.0], [self.n_samples], seed, [None], [0], run=batch_size, nodes=nodes),
            identity,
            rank=rank,
            world=world,
            workers=workers,
            job_size=batch_size,
            max_bad_in_a_row=max_bad_in_a_row,
            log=log,
        )

    @property
    def n_bad(self) -> int:
        """Unusable samples so far, of this rank."""
        return self.stream.progress[0].skipped.total

    def at(self, step: int) -> Batch:
        """The batch of this rank at a (micro) step, from 0. Raises as `Stream.next_unit`.

        A step that does not follow the last one is found as if no sample had been skipped, but one
        from which `at` went back is found exactly.
        """
        started = time.perf_counter()
        if step != self.next_step or (self._left is not None and step == self._left[0]):
            self._jump(step)
        batch = self.collate(self.stream.next_unit())
        self.next_step = step + 1
        self.wait_seconds += time.perf_counter() - started
        return batch

    def _jump(self, step: int) -> None:
        """Go to another step than the next."""
        self.stream.close()
        if self._left is not None and step == self._left[0]:
            _, self.stream.progress = self._left
            self._left = None
            return
        if self._left is None and step < self.next_step:
            self._left = (self.next_step, self.stream.progress)
        self.stream.seek(step * self.batch_size * self.stream.world)

    def status(self) -> dict[str, float]:
        """For log lines."""
        return {"wait_seconds": self.wait_seconds, "bad_samples": self.n_bad}

    def state_dict(self) -> JsonObject:
        """Position and skipped samples of this rank, JSON-serializable."""
        n_samples = self.next_step * self.batch_size * self.stream.world
        return {"batches": {**self.stream.state(), "samples": n_samples}}

    def load_state_dict(self, states: Sequence[RecordFields]) -> None:
        """Resume from the `state_dict`s of all ranks, whose number may differ.

        Raises ConfigError: other data. Earlier versions saved no position, which follows from the
        step.
        """
        saved = [state["batches"] for state in states if "batches" in state]
        if not saved:
            self.stream.deal([None])
        else:
            self.stream.restore(saved)
            self.next_step = saved[0]["samples"] // (self.batch_size * self.stream.world)

    def close(self) -> None:
        """Stop the workers; the next `at` starts new ones."""
        self.stream.close()

    def __exit__(self, *error: object) -> None:
        self.close()


def _joined_shards(
    sizes: Sequence[int], shard_sizes: Sequence[np.ndarray | None]
) -> np.ndarray | None:
    """Samples of each shard of some data sets; None: none has shards. One without is a shard."""
    if all(shards is None for shards in shard_sizes):
        return None
    pairs = zip(sizes, shard_sizes, strict=True)
    return np.concatenate([[size] if shards is None else shards for size, shards in pairs])
