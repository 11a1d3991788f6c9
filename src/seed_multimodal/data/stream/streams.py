"""Streams of training sequences, packed into rows or padded one to a row.

Draw j of stream v takes a source by a random number that is a function of (seed, v, j), and of that source the
positions c · step + v and on of its endless order, c being how often the stream has drawn from it. So each sample of
each epoch belongs to exactly one draw of one stream, and a stream's state is small: rows so far, draws per source, and
which draws are in the look-ahead.

Padded micro-batches (`packing: false`, as the released training made them) are the rows of one stream: draw g takes the
source's next `batch_size` positions, and gives one padded row of the source's `max_length` for each. A sample that is
broken or left out makes its batch smaller; where a whole batch is, the source's next positions are taken instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from seed_multimodal.data.decoders.base import IGNORED, TokenSequence
from seed_multimodal.data.decoders.opened import PictureSequence
from seed_multimodal.data.stream.mixture import Mixture
from seed_multimodal.data.stream.packing import Arrays, best_fit, split_long
from seed_multimodal.data.stream.skip_budget import BROKEN, DROPPED, TOO_LONG, SkipBudget, SkippedSample
from seed_multimodal.data.stream.views import SequenceViews
from seed_multimodal.errors import ConfigError, DataError, counted

USABLE_WITHIN = 100
SPLIT_DECODERS = ("pretrain.text",)
Read = tuple[Arrays, SequenceViews | None]
_WORDS = {"skip": "skipped", "truncate": "cut", "split": "split"}


@dataclass
class Piece:
    """A sequence, or a piece of a split document, the draw it came from, and its pictures' views."""

    source: int
    count: int
    piece: int
    arrays: Arrays
    views: SequenceViews | None = None

    def __len__(self) -> int:
        return len(self.arrays[0])


def has_draws(mixture: Mixture, steps: Sequence[int], number: int, counts: Sequence[int]) -> list[bool]:
    """For each source, whether stream `number` has a draw left after `counts` draws from it."""
    return [limit is None or count * step + number < limit
            for limit, step, count in zip(mixture.limits, steps, counts, strict=True)]


class DrawStream:
    """Base of packed and padded streams.

    Args:
        number: which of the run's streams this is.
        steps: for each source, positions from one draw of a stream to its next.
        state: what `state` gave; None: from the start.
    """

    def __init__(self, mixture: Mixture, number: int, steps: Sequence[int],
                 state: Mapping[str, Any] | None = None) -> None:
        self.mixture, self.number, self.steps = mixture, number, steps
        self.rows = int(state["rows"]) if state else 0
        self.counts = list(state["counts"]) if state else [0] * len(mixture.names)
        broken = (state or {}).get("broken_of", [0] * len(mixture.names))
        self.budgets = [SkipBudget(mixture.settings.max_bad_in_a_row, number) for number in broken]  # of each source
        self.skipped: list[SkippedSample] = []

    def state(self) -> dict[str, Any]:
        """State to continue this stream from (json-able)."""
        return {"rows": self.rows, "counts": list(self.counts)}

    def next_row(self) -> list[Piece]:
        """The sequences of the next row (padded: of the next micro-batch); none when the stream's data is used up.

        Raises:
            DataError: too many unusable records one after another.
        """
        raise NotImplementedError

    def skip_row(self) -> None:
        """Advance by a row that is another rank's or worker's."""
        self.next_row()
        self.skipped.clear()

    def draw(self, *key: int) -> tuple[int, int] | None:
        """The next draw: its source, and how many draws from that were before; None when everything is used up.

        Args:
            key: what the choice depends on beside the number of the draw.
        """
        alive = has_draws(self.mixture, self.steps, self.number, self.counts)
        source = self.mixture.choice(self.counts, alive, *key, sum(self.counts))
        if source is None:
            return None
        self.counts[source] += 1
        return source, self.counts[source] - 1

    def read(self, source: int, position: int, length: int, too_long: str, must_learn: bool) -> list[Read]:
        """The sequence at a position, as pieces of at most `length`; none when it is skipped.

        Args:
            too_long: `skip`, `truncate` or `split` a longer one.
            must_learn: leave out what has no learned token.
        """
        pictured = self.mixture.readers[source] is not None  # their decoders know where they may be cut
        found = self.mixture.sequence(source, position, length if pictured else None)
        if isinstance(found, SkippedSample):
            return self._skip(found)
        sequence, where = found
        if isinstance(sequence, PictureSequence):
            return self._pictured(source, sequence, where, length, too_long)
        pieces = [_arrays(sequence)]
        if len(sequence) > length:
            if too_long == "split" and self.mixture.settings.sources[source].decoder not in SPLIT_DECODERS:
                too_long = "skip"
            note = SkippedSample(source, TOO_LONG, _WORDS[too_long],
                                 f"{where} ({len(sequence)} tokens, rows have {length})")
            if too_long == "skip":
                return self._skip(note)
            if too_long == "split":
                pieces = split_long(*pieces[0], length)
            else:
                cut = self.mixture.sequence(source, position, length)
                if isinstance(cut, SkippedSample):
                    return self._skip(cut)
                ids, labels = _arrays(cut[0])
                pieces = [(ids[:length], labels[:length])]
            self.skipped.append(note)
        if must_learn:
            pieces = [(ids, labels) for ids, labels in pieces if (labels[1:] != IGNORED).any()]
            if not pieces:
                return self._skip(SkippedSample(source, DROPPED, "nothing to learn in it", where))
        self.budgets[source].good()
        return [(arrays, None) for arrays in pieces]

    def _pictured(self, source: int, sequence: PictureSequence, where: str, length: int, too_long: str) -> list[Read]:
        """As `read`, of a sequence with pictures, which is cut already where it was too long."""
        if sequence.cut:
            skip = too_long != "truncate"
            note = SkippedSample(source, TOO_LONG, _WORDS["skip" if skip else too_long],
                                 f"{where} ({len(sequence) + sequence.cut} tokens, rows have {length})")
            if skip:
                return self._skip(note)
            self.skipped.append(note)
        self.budgets[source].good()
        return [(_arrays(sequence), self.mixture.views(source, sequence))]

    def _skip(self, sample: SkippedSample) -> list[Read]:
        self.skipped.append(sample)
        budget, name = self.budgets[sample.source], self.mixture.names[sample.source]
        if budget.spend(sample.kind):
            if sample.kind == BROKEN:
                raise DataError(f"{budget.broken} records of source {name} are broken without a good one between them, "
                                f"the last: {sample.where}")
            raise DataError(f"{budget.unusable} draws in a row from source {name} gave no sequence, the last "
                            f"({sample.reason}): {sample.where}")
        return []


def check_usable(mixture: Mixture) -> None:
    """Read the first record of each source that training can use.

    Raises:
        DataError: a source has none among its first ones in training's order (`USABLE_WITHIN`, or `max_bad_in_a_row`).
    """
    settings = mixture.settings
    for source, name in enumerate(mixture.names):
        stream = DrawStream(mixture, 0, [1] * len(mixture.names))
        count = min(mixture.sizes[source], max(USABLE_WITHIN, settings.max_bad_in_a_row))
        stream.budgets[source] = SkipBudget(count + 1)
        length, too_long = (settings.length, settings.too_long) if settings.packing else (
            settings.padded_shape(source)[1], "truncate")
        if not any(stream.read(source, position, length, too_long, settings.packing) for position in range(count)):
            first = stream.skipped[0]
            reason = "too long" if first.kind == TOO_LONG else first.reason
            raise DataError(f"Source {name}: no record can be used ({counted(count, 'record')} tried); the first: "
                            + (first.where if first.kind == BROKEN else f"{first.where}: {reason}."))


class PackingStream(DrawStream):
    """Packed rows of `length`, filled from a look-ahead of about `buffer` rows of tokens.

    Raises:
        ConfigError: the data has changed since the state was saved.
    """

    def __init__(self, mixture: Mixture, number: int, steps: Sequence[int],
                 state: Mapping[str, Any] | None = None) -> None:
        super().__init__(mixture, number, steps, state)
        self.waiting: list[Piece] = []  # the look-ahead, the oldest first
        if state:
            self._restore(state)

    def state(self) -> dict[str, Any]:
        """State to continue this stream from (json-able); the look-ahead is read again from its draws."""
        return {**super().state(), "broken_of": [one.broken for one in self.budgets],
                "waiting": [[one.source, one.count, one.piece] for one in self.waiting]}

    def next_row(self) -> list[Piece]:
        """The sequences of the next row, the oldest first; none when the stream's data is used up.

        Raises:
            DataError: too many unusable records one after another.
        """
        settings = self.mixture.settings
        tokens = sum(map(len, self.waiting))
        while tokens < settings.buffer * settings.length:
            drawn = self.draw(self.number)
            if drawn is None:
                break
            pieces = self._pieces(*drawn)
            self.waiting += pieces
            tokens += sum(map(len, pieces))
        self.rows += 1
        if not self.waiting:
            return []
        chosen = set(best_fit([len(one) for one in self.waiting], settings.length))
        row = [one for index, one in enumerate(self.waiting) if index in chosen]
        self.waiting = [one for index, one in enumerate(self.waiting) if index not in chosen]
        return row

    def _pieces(self, source: int, count: int) -> list[Piece]:
        settings, position = self.mixture.settings, count * self.steps[source] + self.number
        found = self.read(source, position, settings.length, settings.too_long, must_learn=True)
        return [Piece(source, count, piece, *one) for piece, one in enumerate(found)]

    def _restore(self, state: Mapping[str, Any]) -> None:
        known: dict[tuple[int, int], list[Piece]] = {}
        before = [budget.broken for budget in self.budgets]
        for source, count, piece in state["waiting"]:
            if (source, count) not in known:
                known[source, count] = self._pieces(source, count)
            if piece >= len(known[source, count]):
                raise ConfigError(f"Source {self.mixture.names[source]!r} has changed since the state was saved: its "
                                  f"draw {count} of lane {self.number} no longer gives a sequence.")
            self.waiting.append(known[source, count][piece])
        self.skipped.clear()  # those were reported before
        for budget, broken in zip(self.budgets, before, strict=True):
            budget.broken = broken


class PaddedStream(DrawStream):
    """The micro-batches of a run, each of one source; every rank computes all ranks' choices, without reading data."""

    def next_row(self) -> list[Piece]:
        """The sequences of the next micro-batch; none when every source is used up.

        Raises:
            DataError: too many unusable records one after another.
        """
        drawn = self.draw()
        self.rows += 1
        if drawn is None:
            return []
        source, count = drawn
        size, length = self.mixture.settings.padded_shape(source)
        limit, start = self.mixture.limits[source], count * size
        self.budgets[source] = SkipBudget(self.mixture.settings.max_bad_in_a_row)
        pieces: list[Piece] = []
        while not pieces:
            end = start + size
            for position in range(start, end if limit is None else min(end, limit)):
                found = self.read(source, position, length, "truncate", must_learn=False)
                pieces += [Piece(source, count, 0, *one) for one in found]
            start = end if limit is None else end % limit
        return pieces

    def skip_row(self) -> None:
        """Advance by a micro-batch that is another rank's or worker's, without reading it."""
        self.draw()
        self.rows += 1


def _arrays(sequence: TokenSequence) -> Arrays:
    return np.array(sequence.ids, np.int32), np.array(sequence.labels, np.int32)
