"""Packed rows: a packing stream fills rows of fixed length from a look-ahead of about `buffer` rows of tokens.

Its state has, beside rows and draws, which draws wait in the look-ahead: their sequences are read again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from seed_multimodal.data.stream.draws import DrawStream, Piece
from seed_multimodal.data.stream.mixture import Mixture
from seed_multimodal.data.stream.packing import Arrays, best_fit
from seed_multimodal.data.stream.skip_budget import SkipBudget
from seed_multimodal.errors import ConfigError


class PackingStream(DrawStream):
    """One stream of packed rows, from the start or from a state.

    Raises:
        ConfigError: the data has changed since the state was saved.
    """

    must_learn = True

    def __init__(self, mixture: Mixture, number: int, steps: Sequence[int],
                 state: Mapping[str, Any] | None = None) -> None:
        super().__init__(mixture, number, steps, state)
        self.key = (number,)
        self.waiting: list[Piece] = []  # the look-ahead, the oldest first
        if state:
            self._restore(state)

    def state(self) -> dict[str, Any]:
        """What continues this stream (json-able)."""
        return {**super().state(), "broken": self.budget.broken,
                "waiting": [[one.source, one.count, one.piece] for one in self.waiting]}

    def next_row(self) -> list[Piece]:
        """The sequences of the next row, the oldest first; none when the stream's data is used up.

        Raises:
            DataError: too many unusable records one after another.
        """
        settings = self.mixture.settings
        tokens = sum(map(len, self.waiting))
        while tokens < settings.buffer * settings.length:
            drawn = self.draw()
            if drawn is None:
                break
            pieces = [Piece(*drawn, piece, arrays) for piece, arrays in enumerate(self._pieces(*drawn))]
            self.waiting += pieces
            tokens += sum(map(len, pieces))
        self.rows += 1
        if not self.waiting:
            return []
        chosen = best_fit([len(one) for one in self.waiting], settings.length)
        row = [self.waiting[index] for index in chosen]
        taken = set(chosen)
        self.waiting = [one for index, one in enumerate(self.waiting) if index not in taken]
        return row

    def _pieces(self, source: int, count: int) -> list[Arrays]:
        settings = self.mixture.settings
        return self.read(source, count * self.steps[source] + self.number, settings.length, settings.too_long)

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Read what waits in the look-ahead again."""
        known: dict[tuple[int, int], list[Arrays]] = {}
        for source, count, piece in state["waiting"]:
            if (source, count) not in known:
                known[source, count] = self._pieces(source, count)
            if piece >= len(known[source, count]):
                raise ConfigError(f"Source {self.mixture.names[source]!r} has changed since the state was saved: its "
                                  f"draw {count} of lane {self.number} no longer gives a sequence.")
            self.waiting.append(Piece(source, count, piece, known[source, count][piece]))
        self.skipped.clear()  # those were reported before
        self.budget = SkipBudget(self.budget.most, int(state["broken"]))
