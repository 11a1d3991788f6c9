"""A lane: an independent stream of draws, packed into rows. Row p of a run belongs to lane p % V (see `packed_rows`).

Draw j of lane v takes a source by a random number that is a function of (seed, v, j), and of that source the position
c · V + v of its endless order, c being how often the lane has drawn from it; so each sample of each epoch belongs to
exactly one draw of one lane. The lane packs its sequences into rows from a look-ahead of about `buffer` rows of tokens.

A lane's state is small: rows and draws so far, draws per source, and which draws wait in the look-ahead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from seed_multimodal.data.llm.mixture import DROPPED, TOO_LONG, Dropped, Mixture, Patience, SourceChoice
from seed_multimodal.data.llm.packing import best_fit, split_long
from seed_multimodal.data.decoders.sequence import IGNORED, TokenSequence
from seed_multimodal.errors import ConfigError

SPLIT_DECODERS = ("pretrain.text",)
Arrays = tuple[np.ndarray, np.ndarray]


@dataclass
class Loaded:
    """One micro-batch as it comes out of a worker: int32 [B, L] arrays and what the main process is to note down.

    Attributes:
        lengths: tokens of each row, int64 [B]. used: of each sequence its source, its tokens, and whether it is a
            record's first piece (all are, but for those of split documents).
        states: lane -> its state after these rows. dropped: what was passed over on the way.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray | None
    lengths: np.ndarray
    used: list[tuple[int, int, bool]]
    images: int
    dropped: list[Dropped] = field(default_factory=list)
    states: dict[int, dict[str, Any]] = field(default_factory=dict)


def has_draws(limit: int | None, count: int, number: int, lanes: int) -> bool:
    """Whether a source with `limit` draws (None: without end) has one left for lane `number`, which has made `count`."""
    return limit is None or count * lanes + number < limit


@dataclass
class Waiting:
    """A sequence in the look-ahead, and the draw it came from."""

    source: int
    count: int
    piece: int
    arrays: Arrays


class Lane:
    """One lane's stream of rows, from the start or from a state."""

    def __init__(self, mixture: Mixture, number: int, lanes: int, state: Mapping[str, Any] | None = None) -> None:
        self.mixture, self.number, self.lanes = mixture, number, lanes
        settings = mixture.settings
        self.length = settings.length
        self.choice = SourceChoice(mixture.weights, settings.concat_type, settings.seed)
        state = state or {"rows": 0, "draws": 0, "counts": [0] * len(mixture.names), "waiting": [], "broken": 0}
        self.rows, self.draws, self.counts = int(state["rows"]), int(state["draws"]), list(state["counts"])
        self.patience = Patience(settings.max_bad_in_a_row, int(state["broken"]))
        self.alive = [self._has(source) for source in range(len(mixture.names))]
        self.waiting: list[Waiting] = []
        self.dropped: list[Dropped] = []
        known: dict[tuple[int, int], list[Arrays]] = {}
        for source, count, piece in state["waiting"]:
            if (source, count) not in known:
                known[source, count] = self._pieces(source, count)
            pieces = known[source, count]
            if piece >= len(pieces):
                raise ConfigError(f"Source {mixture.names[source]!r} has changed since the state was saved: its draw "
                                  f"{count} of lane {number} no longer gives a sequence.")
            self.waiting.append(Waiting(source, count, piece, pieces[piece]))
        self.dropped.clear()  # those were told before
        self.patience = Patience(settings.max_bad_in_a_row, int(state["broken"]))

    def state(self) -> dict[str, Any]:
        """What continues this lane (json-able)."""
        return {"rows": self.rows, "draws": self.draws, "counts": list(self.counts), "broken": self.patience.broken,
                "waiting": [[one.source, one.count, one.piece] for one in self.waiting]}

    def next_row(self) -> list[Waiting]:
        """The sequences of the next row, the oldest first; none when the lane's data is used up.

        Raises:
            DataError: too many unusable records one after another.
        """
        wanted = self.mixture.settings.buffer * self.length
        tokens = sum(len(one.arrays[0]) for one in self.waiting)
        while tokens < wanted:
            drawn = self._draw()
            if drawn is None:
                break
            self.waiting += drawn
            tokens += sum(len(one.arrays[0]) for one in drawn)
        self.rows += 1
        if not self.waiting:
            return []
        chosen = best_fit([len(one.arrays[0]) for one in self.waiting], self.length)
        row = [self.waiting[index] for index in chosen]
        taken = set(chosen)
        self.waiting = [one for index, one in enumerate(self.waiting) if index not in taken]
        return row

    def _has(self, source: int) -> bool:
        return has_draws(self.mixture.limits[source], self.counts[source], self.number, self.lanes)

    def _draw(self) -> list[Waiting] | None:
        """The next draw's sequences (none when it is passed over), or None when everything is used up."""
        source = self.choice(self.counts, self.alive, self.number, self.draws)
        if source is None:
            return None
        count = self.counts[source]
        self.draws += 1
        self.counts[source] += 1
        self.alive[source] = self._has(source)
        return [Waiting(source, count, piece, arrays) for piece, arrays in enumerate(self._pieces(source, count))]

    def _pieces(self, source: int, count: int) -> list[Arrays]:
        position = count * self.lanes + self.number
        found = self.mixture.sequence(source, position)
        if isinstance(found, Dropped):
            return self._lost(found)
        sequence, where = found
        settings = self.mixture.settings
        pieces = [_arrays(sequence)]
        if len(sequence) > self.length:
            splits = settings.too_long == "split" and settings.sources[source].decoder in SPLIT_DECODERS
            what = "split" if splits else "cut" if settings.too_long == "truncate" else "skipped"
            note = Dropped(source, TOO_LONG, what, f"{where} ({len(sequence)} tokens, rows have {self.length})")
            if splits:
                pieces = split_long(*pieces[0], self.length)
            elif settings.too_long == "truncate":
                cut = self.mixture.sequence(source, position, self.length)
                if isinstance(cut, Dropped):
                    return self._lost(cut)
                pieces = [_arrays(cut[0])]
            else:
                return self._lost(note)
            self.dropped.append(note)
        pieces = [(ids, labels) for ids, labels in pieces if (labels[1:] != IGNORED).any()]
        if not pieces:
            return self._lost(Dropped(source, DROPPED, "nothing to learn in it", where))
        self.patience.good()
        return pieces

    def _lost(self, dropped: Dropped) -> list[Arrays]:
        self.dropped.append(dropped)
        self.patience.lose(dropped, self.mixture.names[dropped.source])
        return []


def _arrays(sequence: TokenSequence) -> Arrays:
    return np.array(sequence.ids, np.int32), np.array(sequence.labels, np.int32)
