"""Micro-batches out of streams that can be split over any ranks and workers.

Row p of a run belongs to stream p % V; rank r of micro-step s takes rows (s · world + r) · rows and on. V is fixed when
a run starts (the smallest common multiple of 48 and world · rows, so that usual worlds on one machine have the same V,
hence the same data; where rows follow from the released micro-batches, of 48 times these and world · rows, so that the
rows that a GPU has room for do not change the data either) and kept in the state: a run can resume with another world
size, number of rows or workers, and the rows stay the same. Steps that use the same streams are made by the same
worker, so no sequence is made twice (unless V is no multiple of world · rows: then streams are made by each rank that
takes rows of them).

Padded micro-batches are the rows of one stream (V = 1), which any rank and worker can follow without reading.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from seed_multimodal.data.stream.mixture import Mixture
from seed_multimodal.data.stream.packing import make_row, pad_rows
from seed_multimodal.data.stream.skip_budget import SkippedSample
from seed_multimodal.data.stream.streams import DrawStream, PackingStream, PaddedStream, Piece, has_draws
from seed_multimodal.data.stream.views import BatchViews, join_views
from seed_multimodal.errors import ConfigError

STREAMS = 48
State = dict[str, Any]


@dataclass
class MicroBatch:
    """One micro-batch from a worker: int32 [B, L] arrays, and what the main process records about them.

    Attributes:
        position_ids: None for padded rows. lengths: tokens of each row, int64 [B].
        used: of each sequence its source, its tokens, and whether it is a record's first piece (all are, but for those
            of split documents).
        states: stream -> its state after these rows. skipped: records that were left out. views: of pictures that are
            read or written as features.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray | None
    lengths: np.ndarray
    used: list[tuple[int, int, bool]]
    images: int
    skipped: list[SkippedSample]
    states: dict[int, State]
    views: BatchViews | None = None


class StreamPlan:
    """Which rows a rank takes at each micro-step, the micro-batch of these rows, and the state that continues them.

    Called with the number of a first row it makes a micro-batch, in this process or a worker. `states` are the streams'
    last states in the main process; a stream continues from there, from this process's own state, or from its start,
    whichever is nearest before the wanted row.
    """

    def __init__(self, mixture: Mixture, rank: int, world: int, pad_id: int, boi_id: int, released_rows: int = 1
                 ) -> None:
        settings = mixture.settings
        self.mixture, self.rank, self.pad_id, self.boi_id = mixture, rank, pad_id, boi_id
        self.packing, self.length = settings.packing, settings.length
        self.rows = (settings.rows or 1) if settings.packing else 1
        self.stride = world * self.rows
        self._first_row, self._first_step = 0, 0  # rows done by all ranks before that step
        self._start((settings.lanes or math.lcm(STREAMS * released_rows, self.stride)) if self.packing else 1, {})

    def _start(self, streams: int, states: dict[int, State]) -> None:
        self.streams, self.states = streams, states
        self.steps = [streams if self.packing else self.mixture.settings.padded_shape(source)[0]
                      for source in range(len(self.mixture.names))]
        self._at_work: dict[int, DrawStream] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_at_work": {}}  # a spawned worker builds its own

    def start_at(self, step: int) -> None:
        """Continue from the restored position with this step."""
        self._first_step = step

    def first_row(self, step: int) -> int:
        """First row of the rank's micro-batch at a step."""
        row = self._position(step) + self.rank * self.rows
        if row < 0:
            raise ConfigError(f"Step {step} lies before the start of the data.")
        return row

    def worker_of(self, step: int) -> int:
        """Steps that use the same packing streams have the same number; padded ones may come from any worker."""
        return (step - self._first_step) % self._period if self.packing else step - self._first_step

    def __call__(self, first: int) -> MicroBatch:
        """Rows `first` .. `first + rows`; those of streams that have ended are padding."""
        found = [self._row(row) for row in range(first, first + self.rows)]
        touched = {row % self.streams: self._at_work[row % self.streams] for row in range(first, first + self.rows)}
        skipped = [one for stream in touched.values() for one in stream.skipped]
        for stream in touched.values():
            stream.skipped = []
        if self.packing:
            rows = [make_row([one.arrays for one in row], self.length, self.pad_id) for row in found]
            input_ids, labels, positions = (np.stack(column) for column in zip(*rows, strict=True))
            lengths = [sum(map(len, row)) for row in found]
        else:
            length = self.mixture.settings.padded_shape(found[0][0].source)[1] if found[0] else 1
            input_ids, labels = pad_rows([one.arrays for one in found[0]], length, self.pad_id)
            positions = None
            lengths = [len(one) for one in found[0]]
            found = [[one] for one in found[0]]
        views = join_views([[one.views for one in row] for row in found], [list(map(len, row)) for row in found],
                           input_ids.shape[1])
        return MicroBatch(input_ids, labels, positions, np.array(lengths, np.int64),
                          [(one.source, len(one), one.piece == 0) for row in found for one in row],
                          int((input_ids == self.boi_id).sum()), skipped,
                          {number: stream.state() for number, stream in touched.items()}, views)

    def _row(self, row: int) -> list[Piece]:
        number, before = row % self.streams, row // self.streams
        stream, seen = self._at_work.get(number), self.states.get(number)
        if seen is not None and seen["rows"] <= before and not (stream and seen["rows"] <= stream.rows <= before):
            stream = self._new_stream(number, seen)
        elif stream is None or stream.rows > before:
            stream = self._new_stream(number)
        self._at_work[number] = stream
        while stream.rows < before:
            stream.skip_row()
        return stream.next_row()

    def _new_stream(self, number: int, state: State | None = None) -> DrawStream:
        return (PackingStream if self.packing else PaddedStream)(self.mixture, number, self.steps, state)

    def note(self, batch: MicroBatch) -> None:
        """Keep the state of the streams after a micro-batch that was used."""
        self.states.update(batch.states)

    def used_up(self) -> bool:
        """Whether no data is left for this rank: each of its streams has ended."""
        return None not in self.mixture.limits and all(self._ended(number) for number in self._own())

    def state(self, next_step: int) -> State:
        """The position before `next_step`; streams that have ended may be some rows behind."""
        return {"position": self._position(next_step), "lanes": self.streams,
                "states": {str(number): self.states[number] for number in sorted(self._own() & set(self.states))}}

    def restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continue from what all ranks saved; `start_at` sets the number of the next step.

        Raises:
            ConfigError: another number of streams than in the settings, or one that is missing.
        """
        wanted = self.mixture.settings.lanes if self.packing else None
        streams, position = int(states[0]["lanes"]), int(states[0]["position"])
        if wanted not in (None, streams):
            raise ConfigError(f"The state was saved with {streams} lanes, and the settings ask for {wanted}; remove "
                              f"lanes to resume.")
        merged: dict[int, State] = {}
        for number, one in ((int(number), one) for state in states for number, one in state["states"].items()):
            if number not in merged or merged[number]["rows"] < one["rows"]:
                merged[number] = dict(one)
        self._start(streams, merged)
        for number in range(min(streams, position)):
            rows = (position - number - 1) // streams + 1
            if merged.get(number, {}).get("rows") == rows:
                continue
            if not self._ended(number):
                raise ConfigError(f"The saved states do not hold lane {number} at row {position}; give the states of "
                                  f"all ranks of one step.")
            merged[number] = {**merged.get(number, self._new_stream(number).state()), "rows": rows}
        self._first_row, self._first_step = position, 0

    def _ended(self, number: int) -> bool:
        """Whether a stream has neither draws nor waiting sequences left, as far as the main process has seen it."""
        state = self.states.get(number) or {"counts": [0] * len(self.mixture.names)}
        return not state.get("waiting") and not any(has_draws(self.mixture, self.steps, number, state["counts"]))

    @property
    def _period(self) -> int:
        """Micro-steps until the same streams come again."""
        return math.lcm(self.streams, self.stride) // self.stride

    def _position(self, step: int) -> int:
        return self._first_row + (step - self._first_step) * self.stride

    def _own(self) -> set[int]:
        """The streams this rank takes rows of."""
        firsts = [self.first_row(self._first_step + step) for step in range(self._period)]
        return {row % self.streams for first in firsts for row in range(first, first + self.rows)}
