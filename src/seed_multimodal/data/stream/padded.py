"""Padded micro-batches of one source each, one sequence a row, as the released training made them (`packing: false`).

There is one stream for the whole run: micro-batch g is its draw g, and a draw takes the source's next `batch_size`
positions. Every rank follows the choices of all, which costs no reading, so nothing is exchanged between them.

Rows are cut and padded to the source's `max_length` as released. A sample that is broken or left out makes its batch
smaller; where a whole batch is, the source's next positions are taken instead.
"""

from __future__ import annotations

from seed_multimodal.data.stream.draws import DrawStream, Piece
from seed_multimodal.data.stream.mixture import Mixture
from seed_multimodal.data.stream.skip_budget import SkipBudget


def row_lengths(mixture: Mixture) -> list[int]:
    """Positions of a padded row of each source."""
    return [source.max_length or mixture.settings.length for source in mixture.settings.sources]


def batch_sizes(mixture: Mixture) -> list[int]:
    """Sequences in a micro-batch of each source."""
    settings = mixture.settings
    return [source.batch_size or max(1, settings.rows * settings.length // length)
            for source, length in zip(settings.sources, row_lengths(mixture), strict=True)]


class PaddedStream(DrawStream):
    """The stream of micro-batches of a run."""

    key = ()

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
        self.budget = SkipBudget(self.budget.most)
        length, size, limit = row_lengths(self.mixture)[source], self.steps[source], self.mixture.limits[source]
        pieces: list[Piece] = []
        start = count * size
        while not pieces:
            end = start + size
            for position in range(start, end if limit is None else min(end, limit)):
                pieces += [Piece(source, count, 0, arrays)
                           for arrays in self.read(source, position, length, "truncate")]
            start = end if limit is None else end % limit
        return pieces

    def pass_row(self) -> None:
        """Go past a micro-batch that is another rank's or worker's, without reading it."""
        self.draw()
        self.rows += 1
