"""Batches of an LLM's training data: decoded in workers, packed in the main process, exactly
resumable.

    with LlmBatches(settings, tokenizer, rank=rank, world=world, workers=2) as batches:
        batches.load_state_dict(states)              # optional: states of all ranks
        for batch in itertools.islice(batches, 100):
            ...
        mine = batches.state_dict()                  # position after the last batch, for JSON

Sources are drawn for what is delivered (`stream.Stream`): a packed sequence, or a padded
micro-batch of usable records. The state holds the stream's and the pieces not yet packed. With the
same number of processes, rows after `load_state_dict` are bit-equal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain
from typing import Self

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.data.decoders.features import BatchViews
from seed_multimodal.data.formats.record import JsonObject
from seed_multimodal.data.stream.config import LlmDataSettings
from seed_multimodal.data.stream.order import Order
from seed_multimodal.data.stream.packing import (
    Piece,
    best_fit,
    join_position_ids,
    join_views,
    make_row,
)
from seed_multimodal.data.stream.source import open_sources
from seed_multimodal.data.stream.stream import State, Stream
from seed_multimodal.device import copy_to
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.language.vocabulary import IGNORE_INDEX

RECORDS_PER_JOB = 128  # read by a worker at once
PIXEL_RECORDS_PER_JOB = 8  # with images
LOOK_AHEAD = 2  # rows of tokens that packing selects from


@dataclass
class LlmBatch:
    """A rank's micro-batch: int64 [B, L].

    Labels are not shifted, as transformers' models expect; -100: no loss.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor  # from 0 in each packed sequence, and in the padding
    attention_mask: Tensor | None  # None when packed: position ids mark the boundaries
    tokens: int  # non-padding positions
    squares: int  # sum of squared sequence lengths (cost of attention)
    views: BatchViews | None = None  # images that are input or target features (SEED-X)
    axis_ids: Tensor | None = None  # positions on the axes [A, B, L]; None: they are `position_ids`

    @property
    def learned(self) -> int:
        """Number of targets."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())

    def to(self, device: torch.device) -> Self:
        """The batch without its views, on a device."""
        if device.type == "cpu":
            return replace(self, views=None)
        tensors = {
            name: copy_to(device, value)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **tensors, views=None)


class LlmBatches(Iterator[LlmBatch], AbstractContextManager["LlmBatches"]):
    """Micro-batches of one rank until all sources are exhausted; `workers` and `log` of its stream,
    `nodes` of its order.

    Raises as `OpenedSource`.
    """

    def __init__(
        self,
        settings: LlmDataSettings,
        tokenizer: TextTokenizer,
        *,
        rank: int = 0,
        world: int = 1,
        nodes: int = 1,
        workers: int = 0,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self.settings = settings
        self.pad_id = tokenizer.pad_token_id
        self.sources = open_sources(settings, tokenizer)
        for source in self.sources:
            source.check_usable(settings.max_bad_in_a_row)
        order = Order(
            settings.sampling_weights(),
            [source.size for source in self.sources],
            settings.seed,
            [source.settings.cycles for source in self.sources],
            [source.shards.block for source in self.sources],
            settings.concat_type,
            nodes=nodes,
        )
        has_pixels = any(source.has_pixels for source in self.sources)
        self.stream: Stream[Piece] = Stream(
            self.sources,
            order,
            self._fingerprint(),
            rank=rank,
            world=world,
            workers=workers,
            job_size=PIXEL_RECORDS_PER_JOB if has_pixels else RECORDS_PER_JOB,
            max_bad_in_a_row=settings.max_bad_in_a_row,
            log=log,
        )
        self.waiting: list[Piece] = []  # look-ahead of packing, oldest first
        self.positions = 0
        self.wait_seconds = 0.0  # time spent in `next`

    def __next__(self) -> LlmBatch:
        """The next batch; ranks may end some steps apart.

        Raises DataError: too many consecutive broken records, or a killed worker.
        """
        started = time.perf_counter()
        if self.settings.packing:
            rows = [self._packed_row() for _ in range(self.settings.rows)]
        else:
            rows = [[piece] for piece in self.stream.next_unit()]
        if not any(rows):
            raise StopIteration
        batch = self._batch(rows)
        self.wait_seconds += time.perf_counter() - started
        return batch

    def close(self) -> None:
        """Stop the workers; the next batch starts new ones."""
        self.stream.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _packed_row(self) -> list[Piece]:
        """The sequences of the next row, oldest first; empty at the end of the data."""
        # 1. Fill the look-ahead.
        length = self.settings.length
        tokens = sum(map(len, self.waiting))
        while tokens < LOOK_AHEAD * length:
            pieces = self.stream.next_unit()
            if not pieces:
                break
            self.waiting += pieces
            tokens += sum(map(len, pieces))
        if not self.waiting:
            return []

        # 2. Take what fills the row best, always with the oldest.
        chosen = best_fit(list(map(len, self.waiting)), length)
        row = [self.waiting[index] for index in chosen]
        for index in reversed(chosen):
            del self.waiting[index]
        return row

    def _batch(self, rows: list[list[Piece]]) -> LlmBatch:
        """The batch of B rows of pieces."""
        packing = self.settings.packing
        pieces = list(chain.from_iterable(rows))
        lengths = list(map(len, pieces))
        for piece in pieces:
            counts = self.stream.progress[piece.source].counts
            counts["sequences"] += 1
            counts["tokens"] += len(piece)

        # 1. Rows of int32 arrays [L] → int64 tensors [B, L].
        length = self.sources[rows[0][0].source].length
        arrays = []
        for row in rows:
            sequences = [(piece.ids, piece.labels) for piece in row]
            arrays.append(make_row(sequences, length, self.pad_id, packing))
        arrays_3BL = np.stack(arrays, axis=1)
        input_ids, labels, position_ids = torch.from_numpy(arrays_3BL).long()
        self.positions += input_ids.numel()

        # 2. Padded rows hold one sequence each, whose end the mask marks.
        mask = None
        if not packing:
            mask = (position_ids < torch.tensor(lengths)[:, None]).long()

        # 3. Images, and what the metrics need.
        views = join_views(rows, length)
        return LlmBatch(
            input_ids,
            labels,
            position_ids,
            mask,
            tokens=sum(lengths),
            squares=sum(n_tokens**2 for n_tokens in lengths),
            views=views,
            axis_ids=join_position_ids(rows, length),
        )

    def report(self) -> JsonObject:
        """Counts of this rank: `{"positions", "tokens", "sources": {name: counts}}`.

        A source has `sequences` and `tokens` in batches, `draws` (records read), `epochs`, and
        `skipped` (also truncated or split): reason -> {"count", "first": records}.
        """
        sources = {}
        for source, progress in zip(self.sources, self.stream.progress, strict=True):
            counts = deepcopy(progress.counts)
            sources[source.name] = {**counts, "epochs": counts["draws"] / source.size}
        return {
            "positions": self.positions,
            "tokens": sum(counts["tokens"] for counts in sources.values()),
            "sources": sources,
        }

    def status(self) -> dict[str, float]:
        """For log lines."""
        return {"wait_seconds": self.wait_seconds}

    def state_dict(self) -> JsonObject:
        """State after the last batch, JSON-serializable; each rank saves its own."""
        return {
            **self.stream.state(),
            "waiting": [[piece.source, piece.position, piece.index] for piece in self.waiting],
            "positions": self.positions,
        }

    def load_state_dict(self, states: Sequence[State]) -> None:
        """Resume from the saved states of all ranks, as `Stream.restore`; the number of rows may
        differ, too."""
        stream = self.stream
        stream.restore(states)
        states = sorted(states, key=lambda state: int(state["rank"]))
        counted = states[stream.rank :: stream.world]
        self.positions = sum(state["positions"] for state in counted)
        self.waiting = []
        if len(states) == stream.world:
            self.waiting = self._read_again(states[stream.rank]["waiting"])

    def _read_again(self, waiting: Sequence[Sequence[int]]) -> list[Piece]:
        """Pieces by source, position and index."""
        results: dict[tuple[int, int], list[Piece]] = {}  # by source and position
        pieces: list[Piece] = []
        for source, position, index in waiting:
            if (source, position) not in results:
                results[source, position] = self.sources[source].read(position).samples
            # A record that cannot be read any more has none.
            pieces += results[source, position][index : index + 1]
        return pieces

    def _fingerprint(self) -> JsonObject:
        """Settings that must not change on resume; weights may."""
        keys = ["packing", "seed", "concat_type"]
        if self.settings.packing:
            keys += ["length", "too_long"]
        fingerprint: JsonObject = {key: getattr(self.settings, key) for key in keys}
        for source in self.sources:
            fingerprint[f"source {source.name}"] = {
                "decoder": source.settings.decoder,
                "cycles": source.settings.cycles,
                "max_length": source.settings.max_length,
                "number": source.index,
                "records": source.size,
                "rows": source.rows,
            }
        return fingerprint
