"""The run's stream of packed rows, made of lanes that can be split over any ranks and workers.

Row p belongs to lane p % V; rank r of micro-step s takes rows (s · world + r) · rows and on. V is fixed when a run
starts (the smallest common multiple of 48 and world · rows, so that usual worlds on one machine have the same V, hence
the same data) and kept in the state: a run goes on with another world size, number of rows or workers, and the stream
of rows stays the same. Steps that use the same lanes are made by the same worker, so no sequence is made twice (unless
V is no multiple of world · rows: then lanes are made by each rank that takes rows of them).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from seed_multimodal.data.stream.packing import PackingStream, MicroBatch, Waiting, has_draws
from seed_multimodal.data.stream.mixture import Mixture
from seed_multimodal.data.stream.packing import make_row
from seed_multimodal.errors import ConfigError

LANES = 48


class PackedFetch:
    """Makes micro-batches of `rows` rows from a first row's number; keeps the lanes it has used.

    `states`: where lanes were last seen by the main process; a lane goes on from there, from where this process has it,
    or from its start, whichever is nearest before the wanted row.
    """

    def __init__(self, mixture: Mixture, lanes: int, rows: int, pad_id: int, boi_id: int) -> None:
        self.mixture, self.lanes, self.rows, self.pad_id, self.boi_id = mixture, lanes, rows, pad_id, boi_id
        self.states: dict[int, dict[str, Any]] = {}
        self._lanes: dict[int, PackingStream] = {}

    def __call__(self, first: int) -> MicroBatch:
        """Rows `first` .. `first + rows`; those of lanes that have ended are padding."""
        parts = [self._row(row) for row in range(first, first + self.rows)]
        length = self.mixture.settings.length
        rows = [make_row([one.arrays for one in part], length, self.pad_id) for part in parts]
        used = [(one.source, len(one.arrays[0]), one.piece == 0) for part in parts for one in part]
        touched = {row % self.lanes: self._lanes[row % self.lanes] for row in range(first, first + self.rows)}
        dropped = [one for lane in touched.values() for one in lane.dropped]
        for lane in touched.values():
            lane.dropped = []
        input_ids = np.stack([row.input_ids for row in rows])
        return MicroBatch(input_ids, np.stack([row.labels for row in rows]), np.stack([row.position_ids for row in rows]),
                      np.array([sum(len(one.arrays[0]) for one in part) for part in parts]), used,
                      int((input_ids == self.boi_id).sum()), dropped,
                      {number: lane.state() for number, lane in touched.items()})

    def _row(self, row: int) -> list[Waiting]:
        number, before = row % self.lanes, row // self.lanes
        lane = self._lanes.get(number)
        seen = self.states.get(number)
        if seen is not None and seen["rows"] <= before and (lane is None or not seen["rows"] <= lane.rows <= before):
            lane = PackingStream(self.mixture, number, self.lanes, seen)
        elif lane is None or lane.rows > before:
            lane = PackingStream(self.mixture, number, self.lanes)
        self._lanes[number] = lane
        while lane.rows < before:
            lane.next_row()
            lane.dropped.clear()  # another rank's or an earlier row's to tell
        return lane.next_row()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lanes": {}}  # a spawned worker builds its own


class PackedPlan:
    """Which rows a rank takes at each micro-step, and the state that continues them."""

    def __init__(self, mixture: Mixture, rank: int, world: int, pad_id: int, boi_id: int) -> None:
        settings = mixture.settings
        self.rank, self.world, self.rows = rank, world, settings.rows
        self.fetch = PackedFetch(mixture, settings.lanes or math.lcm(LANES, world * settings.rows), settings.rows,
                                 pad_id, boi_id)
        self._first_row, self._first_step = 0, 0  # rows done by all ranks before that step

    @property
    def stride(self) -> int:
        """Rows of one micro-step of all ranks."""
        return self.world * self.rows

    def start_at(self, step: int) -> None:
        """Go on from the restored position with this step."""
        self._first_step = step

    def jobs(self, step: int) -> Iterator[int]:
        """First rows of the rank's micro-batches from `step` on."""
        row = self._first_row + (step - self._first_step) * self.stride + self.rank * self.rows
        if row < 0:
            raise ConfigError(f"Step {step} lies before the start of the data.")
        while True:
            yield row
            row += self.stride

    @property
    def period(self) -> int:
        """Micro-steps until the same lanes come again."""
        return math.lcm(self.fetch.lanes, self.stride) // self.stride

    def worker_of(self, step: int) -> int:
        """Steps that use the same lanes have the same number."""
        return (step - self._first_step) % self.period

    def note(self, loaded: MicroBatch) -> None:
        """A micro-batch was handed out."""
        self.fetch.states.update(loaded.states)

    def used_up(self, loaded: MicroBatch) -> bool:
        """Whether nothing is left for this rank after a micro-batch: each of its lanes has ended."""
        limits, lanes = self.fetch.mixture.limits, self.fetch.lanes
        if None in limits:
            return False
        states = {**self.fetch.states, **loaded.states}
        return not any(self._left(states.get(number), number, limits, lanes) for number in self._own())

    @staticmethod
    def _left(state: Mapping[str, Any] | None, number: int, limits: Sequence[int | None], lanes: int) -> bool:
        """Whether a lane in this state (None: not begun) has draws or waiting sequences."""
        counts = state["counts"] if state is not None else [0] * len(limits)
        return bool(state and state["waiting"]) or any(
            has_draws(limit, count, number, lanes) for count, limit in zip(counts, limits, strict=True))

    def _own(self) -> set[int]:
        """The lanes this rank takes rows of."""
        firsts = itertools.islice(self.jobs(self._first_step), self.period)
        return {row % self.fetch.lanes for first in firsts for row in range(first, first + self.rows)}

    def state(self, next_step: int) -> dict[str, Any]:
        """The position before `next_step`; lanes that have ended are there, too, however far behind they were left."""
        position, limits = self._first_row + (next_step - self._first_step) * self.stride, self.fetch.mixture.limits
        states = {}
        for number in sorted(self._own()):
            known, rows = self.fetch.states.get(number), -(-(position - number) // self.fetch.lanes)
            if rows > (known["rows"] if known else 0) and not self._left(known, number, limits, self.fetch.lanes):
                known = {**(known or PackingStream(self.fetch.mixture, number, self.fetch.lanes).state()), "rows": rows}
            if known is not None:
                states[str(number)] = known
        return {"position": position, "lanes": self.fetch.lanes, "states": states}

    def restore(self, states: list[Mapping[str, Any]], next_step: int) -> None:
        """Continue from what all ranks saved; `next_step` is what the next step will be called."""
        wanted = self.fetch.mixture.settings.lanes
        lanes, position = int(states[0]["lanes"]), int(states[0]["position"])
        if wanted not in (None, lanes):
            raise ConfigError(f"The state was saved with {lanes} lanes, and the settings ask for {wanted}; leave lanes "
                              f"out to go on.")
        merged: dict[int, dict[str, Any]] = {}
        for state in states:
            for number, lane in state["states"].items():
                if int(number) not in merged or merged[int(number)]["rows"] < lane["rows"]:
                    merged[int(number)] = dict(lane)
        for number in range(min(lanes, position)):
            if merged.get(number, {}).get("rows") != (position - number - 1) // lanes + 1:
                raise ConfigError(f"The saved states do not hold lane {number} at row {position}; give the states of "
                                  f"all ranks of one step.")
        old = self.fetch
        self.fetch = PackedFetch(old.mixture, lanes, old.rows, old.pad_id, old.boi_id)
        self.fetch.states = merged
        self._first_row, self._first_step = position, next_step
