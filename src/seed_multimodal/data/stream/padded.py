"""Padded micro-batches of one source each, as the released training made them (`packing: false`).

Micro-batch g of the run (rank r of step s: g = s · world + r) takes a source by a random number that is a function of
(seed, g); the n-th batch of a source takes positions n · batch_size and on of its endless order. Every rank follows the
choices of all, so nothing needs to be told between them, and the state is the number g with the batches per source.

Rows are cut and padded to the source's `max_length` as released. A sample that is broken or left out makes its batch
smaller; where a whole batch is, the source's next positions are taken instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from seed_multimodal.data.stream.packing import MicroBatch
from seed_multimodal.data.stream.mixture import EndOfData, Mixture, SourceChoice
from seed_multimodal.data.stream.skip_budget import TOO_LONG, SkipBudget, SkippedSample
from seed_multimodal.data.decoders.sequence import IGNORED, TokenSequence
from seed_multimodal.errors import ConfigError

Job = tuple[int, int] | EndOfData  # source and number of its batch


class PaddedFetch:
    """Makes the n-th micro-batch of a source."""

    def __init__(self, mixture: Mixture, pad_id: int, boi_id: int) -> None:
        self.mixture, self.pad_id, self.boi_id = mixture, pad_id, boi_id
        settings = mixture.settings
        self.lengths = [source.max_length or settings.length for source in settings.sources]
        self.sizes = [source.batch_size or max(1, settings.rows * settings.length // length)
                      for source, length in zip(settings.sources, self.lengths, strict=True)]

    def batches(self, source: int) -> int | None:
        """How many micro-batches a source has until it is used up; None: no end."""
        limit = self.mixture.limits[source]
        return None if limit is None else -(-limit // self.sizes[source])

    def __call__(self, job: Job) -> MicroBatch:
        """Raises DataError: too many unusable records one after another; EndOfData: nothing is left."""
        if isinstance(job, EndOfData):
            raise job
        source, number = job
        budget = SkipBudget(self.mixture.settings.max_bad_in_a_row)
        dropped: list[SkippedSample] = []
        sequences: list[TokenSequence] = []
        start, limit = number * self.sizes[source], self.mixture.limits[source]
        while not sequences:
            end = start + self.sizes[source]
            for position in range(start, end if limit is None else min(end, limit)):
                sequences += self._sequence(source, position, budget, dropped)
            start = end % limit if limit is not None else end
        return self._batch(source, sequences, dropped)

    def _sequence(self, source: int, position: int, budget: SkipBudget,
                  dropped: list[SkippedSample]) -> list[TokenSequence]:
        length = self.lengths[source]
        found = self.mixture.sequence(source, position)
        if not isinstance(found, SkippedSample) and len(found[0]) > length:
            where = f"{found[1]} ({len(found[0])} tokens, rows have {length})"
            dropped.append(SkippedSample(source, TOO_LONG, "cut", where))
            found = self.mixture.sequence(source, position, length)
        if isinstance(found, SkippedSample):
            dropped.append(found)
            budget.lose(found, self.mixture.names[source])
            return []
        budget.good()
        return [found[0]]

    def _batch(self, source: int, sequences: list[TokenSequence], dropped: list[SkippedSample]) -> MicroBatch:
        length = self.lengths[source]
        input_ids = np.full((len(sequences), length), self.pad_id, np.int32)
        labels = np.full((len(sequences), length), IGNORED, np.int32)
        lengths = np.array([min(len(sequence), length) for sequence in sequences])
        for row, (sequence, used) in enumerate(zip(sequences, lengths, strict=True)):
            input_ids[row, :used] = sequence.ids[:used]
            labels[row, :used] = sequence.labels[:used]
        used = [(source, int(count), True) for count in lengths]
        return MicroBatch(input_ids, labels, None, lengths, used, int((input_ids == self.boi_id).sum()), dropped)


class PaddedPlan:
    """Which micro-batch each step takes, and the state that continues them (see `packed.PackedPlan`)."""

    def __init__(self, mixture: Mixture, rank: int, world: int, pad_id: int, boi_id: int) -> None:
        self.rank, self.world = rank, world
        self.fetch = PaddedFetch(mixture, pad_id, boi_id)
        self.choice = SourceChoice(mixture.weights, mixture.settings.concat_type, mixture.settings.seed)
        self._first, self._first_step = 0, 0  # micro-batches done by all ranks before that step
        self._counts = [0] * len(mixture.names)  # of them, for each source
        self._known: tuple[int, list[int]] = (0, list(self._counts))  # the same at a later place, to count on from

    def start_at(self, step: int) -> None:
        """Go on from the restored position with this step."""
        self._first_step = step

    def _place(self, step: int) -> int:
        return self._first + (step - self._first_step) * self.world

    def _counts_at(self, place: int) -> list[int]:
        """Batches of each source among the run's first `place` micro-batches."""
        if place < self._first:
            raise ConfigError("There is no step before the one the data was restored at.")
        at, counts = self._known if self._first <= self._known[0] <= place else (self._first, self._counts)
        counts = list(counts)
        for number in range(at, place):
            source = self._choose(number, counts)
            if source is None:
                break
            counts[source] += 1
        self._known = place, list(counts)
        return counts

    def _choose(self, number: int, counts: list[int]) -> int | None:
        limits = [self.fetch.batches(source) for source in range(len(counts))]
        alive = [limit is None or count < limit for count, limit in zip(counts, limits, strict=True)]
        return self.choice(counts, alive, number)

    def jobs(self, step: int) -> Iterator[Job]:
        """The rank's micro-batches from `step` on."""
        place = self._place(step)
        counts = self._counts_at(place)
        for number in itertools.count(place):
            source = self._choose(number, counts)
            if (number - place) % self.world == self.rank:
                yield self.fetch.mixture.end_of_data() if source is None else (source, counts[source])
            if source is not None:
                counts[source] += 1

    worker_of = None  # any worker can make any of them

    def used_up(self, loaded: MicroBatch) -> bool:
        """Never after a micro-batch: `fetch` refuses those past the end."""
        return False

    def note(self, loaded: MicroBatch) -> None:
        """A micro-batch was handed out."""

    def state(self, next_step: int) -> dict[str, Any]:
        """The position before `next_step`."""
        place = self._place(next_step)
        return {"position": place, "counts": self._counts_at(place)}

    def restore(self, states: list[Mapping[str, Any]], next_step: int) -> None:
        """Continue from what all ranks saved; `next_step` is what the next step will be called."""
        self._first, self._first_step = int(states[0]["position"]), next_step
        self._counts = [int(count) for count in states[0]["counts"]]
        self._known = self._first, list(self._counts)
