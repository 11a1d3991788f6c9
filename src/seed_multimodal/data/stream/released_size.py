"""How much a released micro-batch holds: its positions, and the tokens among them, measured on the data at hand.

The released micro-batches are padded: `batch_size` rows of `max_length` positions, each with one sequence, which is cut
there. Their useful tokens are the positions that hold one. Learning rates, steps and accumulation of the released
recipes were chosen for so many tokens a step, so a packed micro-batch, which has hardly any padding, takes as many rows
as hold them: mean over the mixture's draws of `batch_size` times the mean length of the source's sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

from seed_multimodal.data.stream.mixture import Mixture
from seed_multimodal.data.stream.skip_budget import SkippedSample

SAMPLES = 64  # sequences measured of each source: its mean length within some 5 %, the mixture's within less


@dataclass(frozen=True)
class ReleasedSize:
    """Mean over a mixture's draws. `positions`: of a padded micro-batch; `tokens`: those that are no padding;
    `measured`: sequences that were looked at."""

    positions: float
    tokens: float
    measured: int

    def rows(self, length: int) -> int:
        """Packed rows of `length` that hold the tokens (to the nearest row)."""
        return max(1, round(self.tokens / length))


def released_size(mixture: Mixture, samples: int = SAMPLES) -> ReleasedSize | None:
    """Size of a released micro-batch of a mixture; None where a source has no `batch_size` or no `max_length`.

    Args:
        samples: sequences to read of each source, the first of its order; broken ones are left out here (they are
            named when they are drawn), and a source without a usable one counts as if it had no padding.
    """
    settings = mixture.settings
    positions = tokens = 0.0
    measured = 0
    shares = [source.weight if settings.concat_type == "sample" else 1.0 for source in settings.sources]
    most = max(shares)  # sums of huge weights would be infinite
    whole = sum(share / most for share in shares)
    for number, (source, share) in enumerate(zip(settings.sources, shares, strict=True)):
        if source.batch_size is None or source.max_length is None:
            return None
        found = [mixture.sequence(number, position, source.max_length)
                 for position in range(min(samples, mixture.sizes[number]))]
        lengths = [min(len(one[0]), source.max_length) for one in found if not isinstance(one, SkippedSample)]
        mean = sum(lengths) / len(lengths) if lengths else source.max_length
        measured += len(lengths)
        rows = share / most / whole * source.batch_size
        positions += rows * source.max_length
        tokens += rows * mean
    return ReleasedSize(positions, tokens, measured)
