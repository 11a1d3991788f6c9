"""Several sequences in one row of fixed length: which ones, and the row's arrays.

The choice is a subset sum over the sequences at hand (a bit for each reachable length, so one shift per sequence): with
a few dozen short ones a row is filled to the last position almost always. The oldest is always taken, so none waits for
long.

A lane: an independent stream of draws, packed into rows. Row p of a run belongs to lane p % V (see `packed`).

Draw j of lane v takes a source by a random number that is a function of (seed, v, j), and of that source the position
c · V + v of its endless order, c being how often the lane has drawn from it; so each sample of each epoch belongs to
exactly one draw of one lane. The lane packs its sequences into rows from a look-ahead of about `buffer` rows of tokens.

A lane's state is small: rows and draws so far, draws per source, and which draws wait in the look-ahead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from seed_multimodal.data.decoders.sequence import IGNORED, TokenSequence
from seed_multimodal.data.stream.mixture import Mixture, SourceChoice
from seed_multimodal.data.stream.skip_budget import DROPPED, TOO_LONG, SkipBudget, SkippedSample
from seed_multimodal.errors import ConfigError


SPLIT_DECODERS = ("pretrain.text",)
Arrays = tuple[np.ndarray, np.ndarray]


@dataclass
class Row:
    """One packed row: int32 [length] each. Padding: `pad_id`, label -100, positions as if a sequence of its own."""

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray


def best_fit(lengths: Sequence[int], capacity: int) -> list[int]:
    """Indices (rising) of the sequences that fill `capacity` best, the first always among them.

    Among equally good choices the one with the oldest sequences wins.

    Args:
        lengths: tokens of each sequence, the oldest first, each from 1 to `capacity`.
    """
    full, mask = 1 << capacity, (1 << capacity + 1) - 1
    reachable = [1 << lengths[0]]  # after n sequences: bit k is set when some of them make up k tokens
    for length in lengths[1:]:
        if reachable[-1] & full:
            break
        reachable.append((reachable[-1] | reachable[-1] << length) & mask)
    left = reachable[-1].bit_length() - 1
    chosen = []
    for index in range(len(reachable) - 1, 0, -1):
        if not reachable[index - 1] >> left & 1:
            chosen.append(index)
            left -= lengths[index]
    return [0, *reversed(chosen)]


def make_row(sequences: Sequence[tuple[np.ndarray, np.ndarray]], length: int, pad_id: int) -> Row:
    """The row of (ids, labels) pairs, int32 [n] each, together at most `length` long; none: padding only.

    The first label of each sequence becomes -100: models predict a token from the place before it, which here belongs
    to another sequence.
    """
    input_ids = np.full(length, pad_id, np.int32)
    labels = np.full(length, IGNORED, np.int32)
    sizes = [len(ids) for ids, _ in sequences]
    ends = np.cumsum(sizes, dtype=np.int64)
    used = int(ends[-1]) if sizes else 0
    starts = np.concatenate([ends - sizes, [used]]).astype(np.int64)
    if sizes:
        input_ids[:used] = np.concatenate([ids for ids, _ in sequences])
        labels[:used] = np.concatenate([own for _, own in sequences])
        labels[starts[:-1]] = IGNORED
    positions = np.arange(length, dtype=np.int32) - np.repeat(starts, [*sizes, length - used]).astype(np.int32)
    return Row(input_ids, labels, positions)


def split_long(ids: np.ndarray, labels: np.ndarray, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """A document's tokens as pieces of at most `length`: BOS opens the first, EOS closes the last, nothing is added.

    Each later piece begins with the last token of the piece before, as context for its first target (which would be
    nobody's target otherwise); so each token is a target exactly once.
    """
    if len(ids) <= length:
        return [(ids, labels)]
    return [(ids[start:start + length], labels[start:start + length]) for start in range(0, len(ids) - 1, length - 1)]


@dataclass
class MicroBatch:
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
    dropped: list[SkippedSample] = field(default_factory=list)
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


class PackingStream:
    """One lane's stream of rows, from the start or from a state."""

    def __init__(self, mixture: Mixture, number: int, lanes: int, state: Mapping[str, Any] | None = None) -> None:
        self.mixture, self.number, self.lanes = mixture, number, lanes
        settings = mixture.settings
        self.length = settings.length
        self.choice = SourceChoice(mixture.weights, settings.concat_type, settings.seed)
        state = state or {"rows": 0, "draws": 0, "counts": [0] * len(mixture.names), "waiting": [], "broken": 0}
        self.rows, self.draws, self.counts = int(state["rows"]), int(state["draws"]), list(state["counts"])
        self.budget = SkipBudget(settings.max_bad_in_a_row, int(state["broken"]))
        self.alive = [self._has(source) for source in range(len(mixture.names))]
        self.waiting: list[Waiting] = []
        self.dropped: list[SkippedSample] = []
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
        self.budget = SkipBudget(settings.max_bad_in_a_row, int(state["broken"]))

    def state(self) -> dict[str, Any]:
        """What continues this lane (json-able)."""
        return {"rows": self.rows, "draws": self.draws, "counts": list(self.counts), "broken": self.budget.broken,
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
        if isinstance(found, SkippedSample):
            return self._lost(found)
        sequence, where = found
        settings = self.mixture.settings
        pieces = [_arrays(sequence)]
        if len(sequence) > self.length:
            splits = settings.too_long == "split" and settings.sources[source].decoder in SPLIT_DECODERS
            what = "split" if splits else "cut" if settings.too_long == "truncate" else "skipped"
            note = SkippedSample(source, TOO_LONG, what, f"{where} ({len(sequence)} tokens, rows have {self.length})")
            if splits:
                pieces = split_long(*pieces[0], self.length)
            elif settings.too_long == "truncate":
                cut = self.mixture.sequence(source, position, self.length)
                if isinstance(cut, SkippedSample):
                    return self._lost(cut)
                pieces = [_arrays(cut[0])]
            else:
                return self._lost(note)
            self.dropped.append(note)
        pieces = [(ids, labels) for ids, labels in pieces if (labels[1:] != IGNORED).any()]
        if not pieces:
            return self._lost(SkippedSample(source, DROPPED, "nothing to learn in it", where))
        self.budget.good()
        return pieces

    def _lost(self, dropped: SkippedSample) -> list[Arrays]:
        self.dropped.append(dropped)
        self.budget.lose(dropped, self.mixture.names[dropped.source])
        return []


def _arrays(sequence: TokenSequence) -> Arrays:
    return np.array(sequence.ids, np.int32), np.array(sequence.labels, np.int32)
