"""A stream of draws: which source each draw takes, which of its positions, and the sequences that stand there.

Draw j of stream v takes a source by a random number that is a function of (seed, v, j), and of that source the
positions c · step + v and on of its endless order, c being how often the stream has drawn from it. So each sample of
each epoch belongs to exactly one draw of one stream, and a stream's state is small: rows so far and draws per source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from seed_multimodal.data.decoders.sequence import IGNORED, TokenSequence
from seed_multimodal.data.stream.mixture import Mixture
from seed_multimodal.data.stream.packing import Arrays, split_long
from seed_multimodal.data.stream.skip_budget import BROKEN, DROPPED, TOO_LONG, SkipBudget, SkippedSample
from seed_multimodal.errors import DataError

SPLIT_DECODERS = ("pretrain.text",)
_WORDS = {"skip": "skipped", "truncate": "cut", "split": "split"}


@dataclass
class Piece:
    """A sequence, or a piece of a split document, and the draw it came from."""

    source: int
    count: int
    piece: int
    arrays: Arrays

    def __len__(self) -> int:
        return len(self.arrays[0])


def has_draws(mixture: Mixture, steps: Sequence[int], number: int, counts: Sequence[int]) -> list[bool]:
    """For each source, whether stream `number` has a draw left after `counts` draws from it."""
    return [limit is None or count * step + number < limit
            for limit, step, count in zip(mixture.limits, steps, counts, strict=True)]


class DrawStream:
    """The part that packed and padded streams share.

    Args:
        number: which of the run's streams this is.
        steps: for each source, positions from one draw of a stream to its next.
        state: what `state` gave; None: from the start.
    """

    key: tuple[int, ...]  # beside the draw's number, what the choice of a source depends on
    must_learn = False  # whether sequences without a learned token are left out

    def __init__(self, mixture: Mixture, number: int, steps: Sequence[int], state: Mapping[str, Any] | None) -> None:
        self.mixture, self.number, self.steps = mixture, number, steps
        self.rows = int(state["rows"]) if state else 0
        self.counts = list(state["counts"]) if state else [0] * len(mixture.names)
        self.budget = SkipBudget(mixture.settings.max_bad_in_a_row)
        self.skipped: list[SkippedSample] = []

    def state(self) -> dict[str, Any]:
        """What continues this stream (json-able)."""
        return {"rows": self.rows, "counts": list(self.counts)}

    def next_row(self) -> list[Piece]:
        """The sequences of the next row (padded: of the next micro-batch); none when the stream's data is used up.

        Raises:
            DataError: too many unusable records one after another.
        """
        raise NotImplementedError

    def pass_row(self) -> None:
        """Go past a row that is another rank's or worker's."""
        self.next_row()
        self.skipped.clear()

    def draw(self) -> tuple[int, int] | None:
        """The next draw: its source, and how many draws from that were before; None when everything is used up."""
        alive = has_draws(self.mixture, self.steps, self.number, self.counts)
        source = self.mixture.choice(self.counts, alive, *self.key, sum(self.counts))
        if source is None:
            return None
        self.counts[source] += 1
        return source, self.counts[source] - 1

    def read(self, source: int, position: int, length: int, too_long: str) -> list[Arrays]:
        """The sequence at a position, as pieces of at most `length`; none when it is skipped.

        Args:
            too_long: `skip`, `truncate` or `split`: what happens to a longer one.
        """
        found = self.mixture.sequence(source, position)
        if isinstance(found, SkippedSample):
            return self._skip(found)
        sequence, where = found
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
        if self.must_learn:
            pieces = [(ids, labels) for ids, labels in pieces if (labels[1:] != IGNORED).any()]
            if not pieces:
                return self._skip(SkippedSample(source, DROPPED, "nothing to learn in it", where))
        self.budget.good()
        return pieces

    def _skip(self, sample: SkippedSample) -> list[Arrays]:
        self.skipped.append(sample)
        if self.budget.spend(sample.kind):
            name, budget = self.mixture.names[sample.source], self.budget
            if sample.kind == BROKEN and budget.broken >= budget.most:
                raise DataError(f"{budget.broken} records are broken without a good one between them, the last of "
                                f"source {name}: {sample.where}")
            raise DataError(f"{budget.unusable} draws in a row gave no sequence, the last of source {name} "
                            f"({sample.reason}): {sample.where}")
        return []


def _arrays(sequence: TokenSequence) -> Arrays:
    return np.array(sequence.ids, np.int32), np.array(sequence.labels, np.int32)
