"""Batches of an LLM's training data by micro-step: the same whatever the workers, exactly resumable, elastic.

    with LlmBatches(settings, tokenizer, rank=rank, world=world, workers=2) as batches:
        batches.restore(states)                      # of all ranks; or not at all
        for micro_step in range(done, all):
            batch = batches.at(micro_step)           # consecutive steps are loaded ahead
        mine = batches.state()                       # the position after the last batch, json-able

Rows are packed, or padded micro-batches of one source (`stream.streams`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.data.decoders.base import IGNORED
from seed_multimodal.data.stream.data_settings import LlmDataSettings
from seed_multimodal.data.stream.loader import StepLoader
from seed_multimodal.data.stream.mixture import EndOfData, Mixture
from seed_multimodal.data.stream.plan import MicroBatch, StreamPlan
from seed_multimodal.data.stream.released_size import released_size
from seed_multimodal.data.stream.statistics import DataStatistics
from seed_multimodal.data.stream.streams import check_usable
from seed_multimodal.data.stream.views import BatchViews
from seed_multimodal.device import copy_to
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.tokenizer import MultimodalTokenizer


@dataclass
class LlmBatch:
    """A rank's micro-batch.

    Attributes:
        input_ids, labels: int64 [B, L]; label -100 is not learned. `labels` stand at their own token, as transformers'
            models take them (they shift); packed sequences have -100 at their first token, so that none predicts the
            next one's start.
        position_ids: int64 [B, L], from 0 in each packed sequence; padding counts as one of its own.
        attention_mask: int64 [B, L] 1/0, or None when packed (position ids hold the borders).
        tokens: positions that are no padding. learned: targets after the shift.
        sequences, images: how many of them. squares: sum of the squares of the sequences' lengths, which attention
            costs (each within itself).
        views: pixels of the pictures that are read or written as features (SEED-X); None where there are none.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    tokens: int
    learned: int
    sequences: int
    images: int
    squares: int
    views: BatchViews | None = None

    def to(self, device: str | torch.device) -> LlmBatch:
        """The same batch on a device."""
        place, mask = torch.device(device), self.attention_mask
        return replace(self, input_ids=copy_to(place, self.input_ids), labels=copy_to(place, self.labels),
                       position_ids=copy_to(place, self.position_ids),
                       attention_mask=None if mask is None else copy_to(place, mask),
                       views=None if self.views is None else self.views.to(place))


class LlmBatches(StepLoader):
    """Micro-batches of one rank by number.

    Args:
        workers: data processes; 0 loads in this process when asked. Batches are the same either way. With packing at
            most `lanes / (world · rows)` of them are used.
        rows: gives the rows of a packed micro-batch where the settings leave them open, and how many it would have if
            there were room for all tokens of a released one; by default these.
        log: gets one sentence for each of the first few records skipped for a reason.

    Raises:
        ConfigError: settings that contradict each other. DataError: sources that cannot be opened, or of which
            nothing can be used.
    """

    def __init__(self, settings: LlmDataSettings, tokenizer: MultimodalTokenizer, *, rank: int = 0, world: int = 1,
                 workers: int = 0, rows: Callable[[Mixture], tuple[int, int]] | None = None,
                 log: Callable[[str], None] | None = None) -> None:
        if not 0 <= rank < world or workers < 0:
            raise ConfigError(f"Rank {rank} of {world} with {workers} workers: rank must be below world, and nothing "
                              f"negative.")
        self.rank, self.world = rank, world
        self.mixture = Mixture(settings, tokenizer)
        released = 1
        if settings.packing and settings.rows is None:
            fitting, released = (rows or _released_rows)(self.mixture)
            self.mixture.settings = replace(settings, rows=fitting)
        check_usable(self.mixture)
        self.settings = self.mixture.settings
        self.plan = StreamPlan(self.mixture, rank, world, tokenizer.pad_id, tokenizer.vocabulary.boi_id,
                               released)
        self.statistics = DataStatistics(self.mixture.names, log)
        self._restored = False  # and no batch asked for since
        self._next_step = 0
        self._empty = 0  # micro-batches without anything, left out at the end of the data
        self._end_step: int | None = None  # the first step for which nothing was left
        super().__init__(self.plan, self.plan.first_row, workers, self.plan.worker_of)

    def at(self, step: int) -> LlmBatch:
        """The rank's batch at a micro-step. After `restore` the first call sets the number of the next step; a step
        that does not follow the one before is reached by making all rows up to it (slow when packed).

        With packing and finite `cycles` some streams end before others; their rows are padding until all have ended. A
        micro-batch of padding only is left out in a run of one rank, and kept with several, so that they stay in step.

        Raises:
            EndOfData: every source is used up, as far as this rank reads it (ranks may come to it some steps apart, so
                finite `cycles` are best given a last step before). DataError: too many unusable records, or a worker
                that was killed.
        """
        if self._restored:
            self.plan.start_at(step)
            self._restored, self._next_step = False, step
        if self._end_step is not None and step >= self._end_step:
            raise self._end(step)
        if step != self._next_step:
            self._empty = 0
        while True:
            batch: MicroBatch = super().at(step + self._empty)
            self.plan.note(batch)
            ended = not batch.used and self.plan.used_up()
            if batch.used or (self.world > 1 and not ended):  # all ranks need the same number of steps
                break
            self.statistics.note_skipped(batch.skipped)
            if ended:
                raise self._end(step)
            self._empty += 1
        self.statistics.note(batch)
        self._next_step = step + 1
        return _as_batch(batch)

    def _end(self, step: int) -> EndOfData:
        """The data has ended before this step."""
        self.close()
        self._end_step = step if self._end_step is None else min(self._end_step, step)
        self._next_step = step + 1
        return self.mixture.end_of_data()

    def report(self) -> dict[str, Any]:
        """Records read and skipped, per source: see `statistics.DataStatistics.report`."""
        return self.statistics.report(self.mixture.sizes, self.settings.sources)

    def state(self, micro_steps: int = 0) -> dict[str, Any]:
        """State for `restore`, after the last batch that `at` returned; each rank saves its own (json-able).

        Args:
            micro_steps: steps that all ranks have completed. A rank whose data ended earlier reports the same step,
                since only states of one step fit together.
        """
        done = max(self._next_step, micro_steps if self._end_step is not None else 0)
        return {"rank": self.rank, "world": self.world, **self._fingerprint(),
                **self.plan.state(done + self._empty), "statistics": self.statistics.state()}

    def restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continue from a run's saved states.

        Args:
            states: of all ranks of that run, in any order; this run may have another number of ranks, rows or workers.

        Raises:
            ConfigError: states of different steps, not of all ranks, or of other data or settings.
        """
        states = sorted(states, key=lambda state: int(state["rank"]))
        if not states or [state["rank"] for state in states] != list(range(int(states[0]["world"]))):
            wanted = states[0]["world"] if states else "all"
            raise ConfigError(f"The data's state needs those of {wanted} ranks, not of "
                              f"{[state['rank'] for state in states]}.")
        if len({state["position"] for state in states}) > 1:
            raise ConfigError("The data's states of the ranks were saved at different steps.")
        for key, value in self._fingerprint().items():
            before = states[0].get(key)
            # Counts are kept by a source's number, so their order belongs to what must not change.
            if before != value or (isinstance(before, Mapping) and list(before) != list(value)):
                raise ConfigError(f"The data's state was saved with {_difference(key, before, value)}; the data cannot "
                                  f"be resumed from it.")
        self.close()
        self.plan.restore(states)
        self.statistics.restore([state["statistics"] for state in states] if self.rank == 0 else [])
        self._restored, self._next_step, self._empty, self._end_step = True, 0, 0, None

    def _fingerprint(self) -> dict[str, Any]:
        """Settings that must not change between save and resume: with other values it would be other data."""
        settings = self.settings
        sources = {source.name: {**{key: value for key, value in asdict(source).items() if key in _FIXED},
                                 "records": size}
                   for source, size in zip(settings.sources, self.mixture.sizes, strict=True)}
        own = {"packing": settings.packing, "seed": settings.seed, "concat_type": settings.concat_type,
               "sources": sources, "shuffle_block": settings.shuffle_block}
        if settings.packing:
            return {**own, "length": settings.length, "too_long": settings.too_long, "buffer": settings.buffer}
        # a source's n-th micro-batch begins at n times its rows
        return {**own, "rows of micro-batches": dict(zip(sources, self.plan.steps, strict=True))}


def _released_rows(mixture: Mixture) -> tuple[int, int]:
    size = released_size(mixture)
    rows = 1 if size is None else size.rows(mixture.settings.length)
    return rows, rows


_FIXED = ("decoder", "cycles", "batch_size", "max_length")  # other weights are allowed: later draws follow them


def _difference(key: str, before: Any, now: Any) -> str:
    """The saved and the present value of a setting that differs; of many sources the first one that differs, else their
    order."""
    if key == "sources" and isinstance(before, Mapping):
        name = next((name for name in (*before, *now) if before.get(name) != now.get(name)), None)
        if name is None:
            key, before, now = "sources in the order", list(before), list(now)
        else:
            key, before, now = f"source {name!r} as", before.get(name, "absent"), now.get(name, "absent")
    return f"{key} {before!r}, and now it is {now!r}"


def _as_batch(batch: MicroBatch) -> LlmBatch:
    labels = torch.from_numpy(batch.labels).long()
    rows, length = batch.input_ids.shape
    positions, mask = batch.position_ids, None
    if positions is None:
        positions = np.arange(length)[None].repeat(rows, 0)
        mask = torch.from_numpy(positions < batch.lengths[:, None]).long()
    return LlmBatch(torch.from_numpy(batch.input_ids).long(), labels, torch.from_numpy(positions).long(), mask,
                    tokens=int(batch.lengths.sum()), learned=int((labels[:, 1:] != IGNORED).sum()),
                    sequences=len(batch.used), images=batch.images,
                    squares=sum(tokens * tokens for _, tokens, _ in batch.used), views=batch.views)
