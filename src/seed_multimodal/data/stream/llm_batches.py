"""Batches of an LLM's training data: workers decode, the main process packs; exactly resumable.

    with LlmBatches(settings, tokenizer, rank=rank, world=world, workers=2) as batches:
        batches.restore(states)                      # of all ranks; or not at all
        for micro_step in range(done, all):
            batch = batches.at(micro_step)
        mine = batches.state()                       # the position after the last batch, json-able

Draw n of a rank picks a source by a random number that is a function of (seed, n · world + rank), and of that source
the next positions of its endless order that are this rank's: one if sequences are packed, those of a padded micro-batch
if not. The state is a few integers and what waits for a row. For the same number of processes the rows after `restore`
are bit-equal. For another number the pending draws are dealt to the new ranks: no sample is lost or used twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.data.decoders.base import IGNORED
from seed_multimodal.data.stream.config import LlmDataSettings
from seed_multimodal.data.stream.loader import StepLoader
from seed_multimodal.data.stream.mixture import BROKEN, TOO_LONG, Mixture, Piece, Read, add_counts, add_skipped
from seed_multimodal.data.stream.packing import best_fit, make_row, pad_rows
from seed_multimodal.data.stream.views import BatchViews, join_views
from seed_multimodal.device import copy_to
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.settings import changed_settings

TOGETHER = 8  # packed draws that a worker decodes at a time
UNUSABLE_IN_A_ROW = 1000  # limit of dropped and over-long sequences in a row, against an endless search
State = Mapping[str, Any]


@dataclass
class LlmBatch:
    """A rank's micro-batch.

    Attributes:
        input_ids, labels: int64 [B, L]; label -100 is not learned. `labels` stand at their own token, as transformers'
            models expect them (they shift); packed sequences have -100 at their first token.
        position_ids: int64 [B, L], from 0 in each packed sequence; padding counts as one of its own.
        attention_mask: int64 [B, L] 1/0, or None when packed (position ids hold the borders).
        tokens: positions that are no padding. learned: targets after the shift.
        sequences, images: how many of them. squares: sum of the squares of the sequences' lengths (attention's cost).
        views: pixels of the images that are read or written as features (SEED-X); None where there are none.
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


class Draw(NamedTuple):
    """A source, the first position that is read, and which of its pieces are used (None: all)."""

    source: int
    start: int
    pieces: list[int] | None = None


class DrawOrder:
    """The draws of one rank, one after the other.

    `counts`: draws of this rank from each source; `firsts`: position at which this number of processes began, of each
    source; `left`: draws to make before new ones, dealt from an earlier number of processes.
    """

    def __init__(self, mixture: Mixture, rank: int, world: int, firsts: Sequence[int] = ()) -> None:
        self.mixture, self.rank, self.world = mixture, rank, world
        self.counts, self.firsts = [0 for _ in mixture.names], list(firsts or [0 for _ in mixture.names])
        self.left: list[Draw] = []

    def following(self) -> Iterator[Draw]:
        """The draws that are not taken yet, until everything is used up."""
        yield from list(self.left)
        counts = list(self.counts)
        while True:
            starts = [self.start(source, count, self.rank) for source, count in enumerate(counts)]
            alive = [limit is None or start < limit for start, limit in zip(starts, self.mixture.limits, strict=True)]
            number = (sum(self.firsts) + sum(counts)) * self.world + self.rank
            source = self.mixture.choice(counts, alive, number)
            if source is None:
                return
            counts[source] += 1
            yield Draw(source, starts[source])

    def take(self, draw: Draw) -> None:
        """Go past the next draw."""
        if self.left:
            self.left.pop(0)
        else:
            self.counts[draw.source] += 1

    def start(self, source: int, count: int, rank: int) -> int:
        """First position of a rank's draw number `count` from a source."""
        return self.firsts[source] + (count * self.world + rank) * self.mixture.settings.shape(source)[0]

    def deal(self, states: Sequence[State]) -> None:
        """Continue from the states of another number of processes: what one of them has not drawn yet before the
        furthest draw of all, and what waits for a row, is dealt to the ranks of now."""
        before = DrawOrder(self.mixture, 0, len(states), states[0]["firsts"])
        pending = [Draw(*one) for state in states for one in state["left"]]
        for state in states:
            groups: dict[tuple[int, int], list[int]] = {}
            for source, start, piece in state["waiting"]:
                groups.setdefault((source, start), []).append(piece)
            pending += [Draw(*place, pieces) for place, pieces in groups.items()]
        for source, limit in enumerate(self.mixture.limits):
            most = max(state["counts"][source] for state in states)
            starts = [before.start(source, count, rank) for rank, state in enumerate(states)
                      for count in range(state["counts"][source], most)]
            pending += [Draw(source, start) for start in starts if limit is None or start < limit]
            self.firsts[source] = before.start(source, most, 0)
        self.left = sorted(pending, key=lambda draw: draw[:2])[self.rank::self.world]


class _Decoded:
    """What the workers do: draws -> what is read at each position of each."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture

    def __call__(self, draws: list[Draw]) -> list[tuple[Draw, list[Read]]]:
        return [(draw, [self.mixture.read(draw.source, position) for position in self.mixture.positions(
            draw.source, draw.start)]) for draw in draws]


@dataclass
class _Waiting:
    """A sequence without a row: piece number `piece` of what the position gave."""

    source: int
    start: int
    piece: int
    made: Piece

    def __len__(self) -> int:
        return len(self.made.ids)


class LlmBatches:
    """Micro-batches of one rank, one after the other; the same for any number of `workers` (0: none).

    `log` gets one sentence for each of the first few records skipped for a reason.

    Raises:
        ConfigError: settings that contradict each other. DataError: sources that cannot be opened, or of which
            nothing can be used.
    """

    def __init__(self, settings: LlmDataSettings, tokenizer: MultimodalTokenizer, *, rank: int = 0, world: int = 1,
                 workers: int = 0, log: Callable[[str], None] | None = None) -> None:
        self.settings, self.rank, self.world, self.workers, self.log = settings, rank, world, workers, log
        self.mixture = Mixture(settings, tokenizer)
        self.mixture.check_usable()
        self.pad_id, self.boi_id = tokenizer.pad_id, tokenizer.vocabulary.boi_id
        self.broken = [0 for _ in self.mixture.names]  # records of each source since the last good one
        self.unusable = list(self.broken)  # the same, with dropped and over-long ones
        self.waiting: list[_Waiting] = []  # the look-ahead of packing, the oldest first
        self.positions = 0
        self.sources: list[dict[str, Any]] = [{"sequences": 0, "tokens": 0, "draws": 0, "skipped": {}, "too_long": {}}
                                              for _ in self.mixture.names]
        self._next: int | None = 0  # step of the next batch; None: as `at` says
        self._waited = 0.0
        self.draws = DrawOrder(self.mixture, rank, world)
        self._open()

    def _open(self) -> None:
        """A loader of the draws that are not taken yet."""
        following = self.draws.following()
        together = TOGETHER if self.settings.packing else 1
        self.loader = StepLoader(_Decoded(self.mixture), lambda _: list(itertools.islice(following, together)),
                                 self.workers)
        self._job, self._read, self._ended = 0, list[tuple[Draw, list[Read]]](), False

    @property
    def wait_seconds(self) -> float:
        """Seconds spent waiting for workers."""
        return self._waited + self.loader.wait_seconds

    def at(self, step: int) -> LlmBatch:
        """The batch at a micro-step, after those before it. After `restore` the first call numbers the next one.

        Raises:
            EndOfData: every source is used up, as far as this rank reads it (ranks may come to it some steps apart).
            DataError: too many unusable records, or a worker that was killed.
        """
        for number in range(step if self._next is None else self._next, step + 1):
            batch = self._packed() if self.settings.packing else self._padded()
            self._next = number + 1
        return batch

    def close(self) -> None:
        """Stop the workers; the next `at` starts new ones."""
        self.loader.close()
        self._waited += self.loader.wait_seconds
        self._open()

    def __enter__(self) -> LlmBatches:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------------------- the batches

    def _next_draw(self) -> list[_Waiting] | None:
        """The sequences of the next draw, counted; None when everything is used up."""
        if not self._read and not self._ended:
            self._read = self.loader.at(self._job)
            self._job += 1
            if not self._read:
                self._ended = True
                self.loader.close()
        if not self._read:
            return None
        draw, reads = self._read.pop(0)
        self.draws.take(draw)
        found: list[_Waiting] = []
        for position, read in zip(self.mixture.positions(draw.source, draw.start), reads, strict=True):
            self._count(draw.source, read)
            found += [_Waiting(draw.source, position, number, made) for number, made in enumerate(read.pieces)
                      if draw.pieces is None or number in draw.pieces]
        for views in (one.made.views for one in found if self.workers):
            if views is not None:  # out of the memory shared with a worker: each tensor there holds a file open
                views.pixels = views.pixels.clone()
        return found

    def _packed(self) -> LlmBatch:
        """Rows of `length`, filled from a look-ahead of about `buffer` rows of tokens."""
        length = self.settings.length
        rows = [self._row() for _ in range(self.settings.rows)]
        if not any(rows):
            raise self.mixture.end_of_data()
        made = [make_row([one.made[:2] for one in row], length, self.pad_id) for row in rows]
        ids, labels, positions = map(np.stack, zip(*made, strict=True))
        return self._batch(rows, ids, labels, positions, None)

    def _row(self) -> list[_Waiting]:
        """The sequences of the next row, the oldest first; none at the end of the data."""
        settings, tokens = self.settings, sum(map(len, self.waiting))
        while tokens < settings.buffer * settings.length:
            found = self._next_draw()
            if found is None:
                break
            self.waiting += found
            tokens += sum(map(len, found))
        if not self.waiting:
            return []
        chosen = set(best_fit([len(one) for one in self.waiting], settings.length))
        row = [one for index, one in enumerate(self.waiting) if index in chosen]
        self.waiting = [one for index, one in enumerate(self.waiting) if index not in chosen]
        return row

    def _padded(self) -> LlmBatch:
        """The sequences of one draw, each in a row of its own; a draw without any is passed over."""
        row: list[_Waiting] | None = []
        while row is not None and not row:
            row = self._next_draw()
        if row is None:
            raise self.mixture.end_of_data()
        length = self.settings.padded_shape(row[0].source)[1]
        ids, labels = pad_rows([one.made[:2] for one in row], length, self.pad_id)
        positions = np.arange(length)[None].repeat(len(row), 0)
        mask = positions < np.array([len(one) for one in row])[:, None]
        return self._batch([[one] for one in row], ids, labels, positions, torch.from_numpy(mask).long())

    def _batch(self, rows: list[list[_Waiting]], ids: np.ndarray, labels: np.ndarray, positions: np.ndarray,
               mask: Tensor | None) -> LlmBatch:
        used = [one for row in rows for one in row]
        for one in used:
            self.sources[one.source]["sequences"] += 1
            self.sources[one.source]["tokens"] += len(one)
        self.positions += ids.size
        views = join_views([[one.made.views for one in row] for row in rows], [list(map(len, row)) for row in rows],
                           ids.shape[1])
        return LlmBatch(torch.from_numpy(ids).long(), torch.from_numpy(labels).long(),
                        torch.from_numpy(positions).long(), mask, tokens=sum(map(len, used)),
                        learned=int((labels[:, 1:] != IGNORED).sum()), sequences=len(used),
                        images=int((ids == self.boi_id).sum()), squares=sum(len(one) ** 2 for one in used),
                        views=views)

    # ----------------------------------------------------------------------------------------------------- the counts

    def _count(self, source: int, read: Read) -> None:
        """Count what a position gave; raises DataError after too many unusable records in a row."""
        counts, note, name = self.sources[source], read.note, self.mixture.names[source]
        counts["draws"] += 1
        if note is not None:
            long = note.kind == TOO_LONG
            if add_skipped(counts["too_long" if long else "skipped"], note.reason, 1, [note.where]) and self.log:
                what = f"too long, {note.reason}" if long else f"skipped ({note.reason})"
                self.log(f"{name}: {what}: {note.where}")
        if read.pieces:
            self.broken[source] = self.unusable[source] = 0
        elif note is not None:
            self.broken[source] += note.kind == BROKEN
            self.unusable[source] += 1
            if self.broken[source] >= self.settings.max_bad_in_a_row:
                self.loader.close()
                raise DataError(f"{self.broken[source]} records of source {name} are broken without a good one between "
                                f"them, the last: {note.where}")
            if self.unusable[source] >= UNUSABLE_IN_A_ROW:
                self.loader.close()
                raise DataError(f"{self.unusable[source]} draws in a row from source {name} gave no sequence, the last "
                                f"({note.reason}): {note.where}")

    def report(self) -> dict[str, Any]:
        """`{"positions", "tokens", "sources": {name: counts}}` of this rank.

        Counts of a source: `sequences` and `tokens` in batches, `draws`, `epochs` (draws over its records), and
        `skipped` and `too_long`: reason -> {"count", "first"}, the first few named by file and line or sample.
        """
        sources = {name: {**deepcopy(counts), "epochs": counts["draws"] / size}
                   for name, counts, size in zip(self.mixture.names, self.sources, self.mixture.sizes, strict=True)}
        return {"positions": self.positions, "tokens": sum(one["tokens"] for one in self.sources), "sources": sources}

    # ------------------------------------------------------------------------------------------------------ the state

    def state(self) -> dict[str, Any]:
        """State for `restore`, after the last batch that `at` returned; each rank saves its own (json-able)."""
        return {"rank": self.rank, "world": self.world, "data": self._fingerprint(), "firsts": list(self.draws.firsts),
                "counts": list(self.draws.counts), "left": [list(draw) for draw in self.draws.left],
                "waiting": [[one.source, one.start, one.piece] for one in self.waiting], "broken": list(self.broken),
                "report": {"positions": self.positions, "sources": deepcopy(self.sources)}}

    def restore(self, states: Sequence[State]) -> None:
        """Continue from the saved states of all ranks, in any order; this run may have another number of ranks, rows
        or workers.

        Raises:
            ConfigError: not the states of all ranks, or of other data or settings.
        """
        states = sorted(states, key=lambda state: int(state["rank"]))
        if [state["rank"] for state in states] != list(range(states[0]["world"])):
            raise ConfigError(f"The data's state needs those of {states[0]['world']} ranks, not of "
                              f"{[state['rank'] for state in states]}.")
        changes = changed_settings(states[0]["data"], self._fingerprint())
        if changes:
            raise ConfigError(f"The data cannot be resumed; what changed since then: {'; '.join(changes)}.")
        counted = [] if self.rank else states  # the first rank counts on for all
        if len(states) == self.world:
            mine, counted = states[self.rank], [states[self.rank]]
            self.draws.counts, self.draws.firsts = list(mine["counts"]), list(mine["firsts"])
            self.draws.left = [Draw(*one) for one in mine["left"]]
            self.broken = list(mine["broken"])
            read = {(source, start): self.mixture.read(source, start).pieces for source, start, _ in mine["waiting"]}
            self.waiting = [_Waiting(source, start, piece, read[source, start][piece])
                            for source, start, piece in mine["waiting"] if piece < len(read[source, start])]
        else:
            self.draws.deal(states)
        for state in counted:
            self.positions += state["report"]["positions"]
            for own, counts in zip(self.sources, state["report"]["sources"], strict=True):
                add_counts(own, counts)
        self.close()
        self._next = None

    def _fingerprint(self) -> dict[str, Any]:
        """Settings that must not change between save and resume: with other values it would be other data. Other
        weights are allowed: later draws follow them."""
        keys = ("packing", "seed", "concat_type", "shuffle_block",
                *(("length", "too_long", "buffer") if self.settings.packing else ()))
        return {**{key: getattr(self.settings, key) for key in keys},
                **{f"source {source.name}": {
                    "decoder": source.decoder, "cycles": source.cycles, "max_length": source.max_length,
                    "number": number, "records": self.mixture.sizes[number], "rows": self.settings.shape(number)[0]}
                   for number, source in enumerate(self.settings.sources)}}
