"""Batches of an LLM's training data: workers decode, the main process packs; exactly resumable.

    with LlmBatches(settings, tokenizer, rank=rank, world=world, workers=2) as batches:
        batches.restore(states)                      # of all ranks; or not at all
        for micro_step in range(done, all):
            batch = batches.at(micro_step)
        mine = batches.state()                       # the position after the last batch, json-able

Draw n of a rank picks a source by a random number that is a function of (seed, n · world + rank), and of that source
the next positions of its endless order that are this rank's: one position if sequences are packed, those of a padded
micro-batch if not. The state is a few integers and the draws that wait for a row. For the same number of processes the
rows after `restore` are bit-equal. For another number the pending draws are dealt to the new ranks and rows are packed
again: no sample is lost or used twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.data.decoders.base import IGNORED
from seed_multimodal.data.stream.data_settings import LlmDataSettings
from seed_multimodal.data.stream.loader import StepLoader
from seed_multimodal.data.stream.mixture import Mixture, Piece, Read
from seed_multimodal.data.stream.packing import best_fit, make_row, pad_rows
from seed_multimodal.data.stream.skip_budget import BROKEN, TOO_LONG, SkipBudget, SkippedSample, add_counts, add_skipped
from seed_multimodal.data.stream.views import BatchViews, join_views
from seed_multimodal.device import copy_to
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.language.tokenizer import MultimodalTokenizer

TOGETHER = 8  # packed draws that a worker decodes at a time
Draw = tuple[int, int, tuple[int, ...] | None]  # source, first position, and the pieces to use (None: all)
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


class DrawOrder:
    """The draws of one rank, one after the other.

    `counts`: draws of this rank from each source; `firsts`: position at which this number of processes began, of each
    source; `left`: draws to make before new ones (those that waited for a row, or of an earlier number of processes).
    """

    def __init__(self, mixture: Mixture, rank: int, world: int) -> None:
        settings, sources = mixture.settings, range(len(mixture.names))
        self.mixture, self.rank, self.world = mixture, rank, world
        self.sizes = [1 if settings.packing else settings.padded_shape(source)[0] for source in sources]
        self.counts, self.firsts, self.left = [0 for _ in sources], [0 for _ in sources], list[Draw]()

    def copy(self) -> DrawOrder:
        """Another reader at the same position."""
        other = DrawOrder(self.mixture, self.rank, self.world)
        other.counts, other.firsts, other.left = list(self.counts), list(self.firsts), list(self.left)
        return other

    def next(self) -> Draw | None:
        """The next draw; None when everything is used up."""
        if self.left:
            return self.left.pop(0)
        starts = [self.start(source, count, self.rank) for source, count in enumerate(self.counts)]
        alive = [limit is None or start < limit for start, limit in zip(starts, self.mixture.limits, strict=True)]
        number = (sum(self.firsts) + sum(self.counts)) * self.world + self.rank
        source = self.mixture.choice(self.counts, alive, number)
        if source is None:
            return None
        self.counts[source] += 1
        return source, starts[source], None

    def start(self, source: int, count: int, rank: int) -> int:
        """First position of a rank's draw number `count` from a source."""
        return self.firsts[source] + (count * self.world + rank) * self.sizes[source]

    def positions(self, draw: Draw) -> range:
        """Positions of a draw; fewer at the end of a source's cycles."""
        source, start, _ = draw
        end, limit = start + self.sizes[source], self.mixture.limits[source]
        return range(start, end if limit is None else min(end, limit))

    def jobs(self) -> Iterator[list[tuple[int, int]] | None]:
        """(source, position) of the next draws, for one worker; None for ever after the last."""
        together = TOGETHER if self.mixture.settings.packing else 1
        while True:
            draws = [draw for draw in (self.next() for _ in range(together)) if draw is not None]
            yield [(draw[0], position) for draw in draws for position in self.positions(draw)] or None

    def deal(self, states: Sequence[State]) -> None:
        """Continue from the states of another number of processes: what one of them has not drawn yet before the
        furthest draw of all, and what waits for a row, is dealt to the ranks of now."""
        before = DrawOrder(self.mixture, 0, len(states))
        before.firsts = list(states[0]["firsts"])
        pending = [_draw(one) for state in states for one in [*_grouped(state["waiting"]), *state["left"]]]
        for source in range(len(self.counts)):
            most = max(state["counts"][source] for state in states)
            starts = [before.start(source, count, rank) for rank, state in enumerate(states)
                      for count in range(state["counts"][source], most)]
            limit = self.mixture.limits[source]
            pending += [(source, start, None) for start in starts if limit is None or start < limit]
            self.firsts[source] = before.start(source, most, 0)
        self.left = sorted(pending, key=lambda draw: draw[:2])[self.rank::self.world]


def _draw(saved: Sequence[Any]) -> Draw:
    source, start, pieces = saved
    return source, start, None if pieces is None else tuple(pieces)


def _grouped(waiting: Sequence[Sequence[int]]) -> list[list[Any]]:
    """Waiting (source, position, piece)s as draws, in their order."""
    groups: dict[tuple[int, int], list[int]] = {}
    for source, start, piece in waiting:
        groups.setdefault((source, start), []).append(piece)
    return [[source, start, pieces] for (source, start), pieces in groups.items()]


class _Decoded:
    """What the workers do: (source, position)s of draws -> what is read there."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture

    def __call__(self, job: list[tuple[int, int]] | None) -> list[Read] | None:
        return None if job is None else [self.mixture.read(*place) for place in job]


def _own_memory(read: Read) -> None:
    """Copy pixels out of the memory shared with a worker: each tensor there holds a file open."""
    for views in (piece.views for piece in read.pieces):
        if views is not None:
            views.pixels = views.pixels.clone()


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
    """Micro-batches of one rank by number, one after the other.

    Args:
        workers: data processes; 0 loads in this process when asked. Batches are the same either way.
        log: gets one sentence for each of the first few records skipped for a reason.

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
        self._waited = 0.0
        self._begin(DrawOrder(self.mixture, rank, world))
        self._next: int | None = 0  # step of the next batch; None: as `at` says

    def _begin(self, draws: DrawOrder, again: int = 0, broken: Sequence[int] | None = None) -> None:
        """Read from these draws on; the first `again` of them have been counted before."""
        self.draws, self._again = draws, again
        self._open()
        self.budgets = [SkipBudget(self.settings.max_bad_in_a_row, number)
                        for number in broken or [0] * len(self.mixture.names)]
        self.waiting: list[_Waiting] = []  # the look-ahead of packing, the oldest first
        self.positions = self.tokens = 0
        self.sources: list[dict[str, Any]] = [{"sequences": 0, "tokens": 0, "draws": 0, "skipped": {}, "too_long": {}}
                        for _ in self.mixture.names]

    def _open(self) -> None:
        """A loader of the draws that are not counted yet."""
        jobs = self.draws.copy().jobs()
        self.loader = StepLoader(_Decoded(self.mixture), lambda _: next(jobs), self.workers)
        self._job, self._read = 0, list[Read]()

    @property
    def wait_seconds(self) -> float:
        """Seconds spent waiting for workers."""
        return self._waited + self.loader.wait_seconds

    def at(self, step: int) -> LlmBatch:
        """The batch at a micro-step. After `restore` the first call sets the number of the next step. Steps other
        than the next one are reached by making those before them (an earlier one: from the start).

        Raises:
            EndOfData: every source is used up, as far as this rank reads it (ranks may come to it some steps apart).
            DataError: too many unusable records, or a worker that was killed.
        """
        start = step if self._next is None else self._next
        if step < start:
            self.close()
            self._begin(DrawOrder(self.mixture, self.rank, self.world))
            start = 0
        for number in range(start, step + 1):
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
        draw = self.draws.next()
        if draw is None:
            self.loader.close()
            return None
        if not self._read:
            self._read = self.loader.at(self._job) or []
            self._job += 1
        source, _, pieces = draw
        found: list[_Waiting] = []
        for position in self.draws.positions(draw):
            read = self._read.pop(0)
            if self._again == 0:
                self._count(source, read)
            if self.workers:
                _own_memory(read)
            found += [_Waiting(source, position, number, made) for number, made in enumerate(read.pieces)
                      if pieces is None or number in pieces]
        self._again = max(0, self._again - 1)
        return found

    def _packed(self) -> LlmBatch:
        """Rows of `length`, filled from a look-ahead of about `buffer` rows of tokens."""
        length = self.settings.length
        rows = [self._row() for _ in range(self.settings.rows)]
        if not any(rows):
            raise self.mixture.end_of_data()
        ids, labels, positions = (np.stack(column) for column in zip(*(
            make_row([(one.made.ids, one.made.labels) for one in row], length, self.pad_id) for row in rows),
            strict=True))
        return self._batch(rows, ids, labels, positions, None)

    def _row(self) -> list[_Waiting]:
        """The sequences of the next row, the oldest first; none at the end of the data."""
        settings = self.settings
        tokens = sum(map(len, self.waiting))
        while self._again or tokens < settings.buffer * settings.length:
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
        while True:
            row = self._next_draw()
            if row is None:
                raise self.mixture.end_of_data()
            if row:
                break
        length = self.settings.padded_shape(row[0].source)[1]
        ids, labels = pad_rows([(one.made.ids, one.made.labels) for one in row], length, self.pad_id)
        positions = np.arange(length)[None].repeat(len(row), 0)
        mask = positions < np.array([len(one) for one in row])[:, None]
        return self._batch([[one] for one in row], ids, labels, positions, torch.from_numpy(mask).long())

    def _batch(self, rows: list[list[_Waiting]], ids: np.ndarray, labels: np.ndarray, positions: np.ndarray,
               mask: Tensor | None) -> LlmBatch:
        used = [one for row in rows for one in row]
        for one in used:
            self.sources[one.source]["sequences"] += 1
            self.sources[one.source]["tokens"] += len(one)
        tokens = sum(map(len, used))
        self.tokens += tokens
        self.positions += ids.size
        views = join_views([[one.made.views for one in row] for row in rows], [list(map(len, row)) for row in rows],
                           ids.shape[1])
        return LlmBatch(torch.from_numpy(ids).long(), torch.from_numpy(labels).long(),
                        torch.from_numpy(positions).long(), mask, tokens=tokens,
                        learned=int((labels[:, 1:] != IGNORED).sum()), sequences=len(used),
                        images=int((ids == self.boi_id).sum()), squares=sum(len(one) ** 2 for one in used),
                        views=views)

    # ----------------------------------------------------------------------------------------------------- the counts

    def _count(self, source: int, read: Read) -> None:
        """Count what a position gave; raises DataError after too many unusable records in a row."""
        self.sources[source]["draws"] += 1
        note, budget, name = read.note, self.budgets[source], self.mixture.names[source]
        if note is not None:
            self._note(name, self.sources[source], note)
        if read.pieces:
            budget.good()
        elif note is not None and budget.spend(note.kind):
            self.loader.close()
            if note.kind == BROKEN:
                raise DataError(f"{budget.broken} records of source {name} are broken without a good one between them, "
                                f"the last: {note.where}")
            raise DataError(f"{budget.unusable} draws in a row from source {name} gave no sequence, the last "
                            f"({note.reason}): {note.where}")

    def _note(self, name: str, counts: dict[str, Any], note: SkippedSample) -> None:
        group = counts["too_long" if note.kind == TOO_LONG else "skipped"]
        if add_skipped(group, note.reason, 1, [note.where]) and self.log is not None:
            what = f"too long, {note.reason}" if note.kind == TOO_LONG else f"skipped ({note.reason})"
            self.log(f"{name}: {what}: {note.where}")

    def report(self) -> dict[str, Any]:
        """`{"fill", "positions", "tokens", "sources": {name: counts}}` of this rank.

        Counts of a source: `sequences` and `tokens` in batches, `draws`, `epochs` (draws over its records), and
        `skipped` and `too_long`: reason -> {"count", "first"}, the first few named by file and line or sample.
        """
        sources = {name: {**deepcopy(counts), "epochs": counts["draws"] / size}
                   for name, counts, size in zip(self.mixture.names, self.sources, self.mixture.sizes, strict=True)}
        return {"fill": self.tokens / self.positions if self.positions else 1.0, "positions": self.positions,
                "tokens": self.tokens, "sources": sources}

    # ------------------------------------------------------------------------------------------------------ the state

    def state(self) -> dict[str, Any]:
        """State for `restore`, after the last batch that `at` returned; each rank saves its own (json-able)."""
        waiting = [[one.source, one.start, one.piece] for one in self.waiting]
        waiting += [[source, start, piece] for source, start, pieces in self.draws.left[:self._again]
                    for piece in pieces or ()]
        return {"rank": self.rank, "world": self.world, "data": self._fingerprint(), "firsts": list(self.draws.firsts),
                "counts": list(self.draws.counts), "waiting": waiting,
                "left": [list(draw) for draw in self.draws.left[self._again:]],
                "broken": [budget.broken for budget in self.budgets],
                "report": {"positions": self.positions, "tokens": self.tokens, "sources": deepcopy(self.sources)}}

    def restore(self, states: Sequence[State]) -> None:
        """Continue from a run's saved states.

        Args:
            states: of all ranks of that run, in any order; this run may have another number of ranks, rows or workers.

        Raises:
            ConfigError: not the states of all ranks, or of other data or settings.
        """
        states = sorted(states, key=lambda state: int(state["rank"]))
        if [state["rank"] for state in states] != list(range(states[0]["world"])):
            raise ConfigError(f"The data's state needs those of {states[0]['world']} ranks, not of "
                              f"{[state['rank'] for state in states]}.")
        for key, value in self._fingerprint().items():
            before = states[0]["data"].get(key)
            if before != value:
                raise ConfigError(f"The data's state was saved with {key} {before!r}, and now it is {value!r}; the "
                                  f"data cannot be resumed from it.")
        draws = DrawOrder(self.mixture, self.rank, self.world)
        again, broken, counted = 0, None, [] if self.rank else states  # the first rank counts on for all
        if len(states) == self.world:
            mine = states[self.rank]
            waiting = _grouped(mine["waiting"])
            draws.counts, draws.firsts = list(mine["counts"]), list(mine["firsts"])
            draws.left = [_draw(one) for one in [*waiting, *mine["left"]]]
            again, broken, counted = len(waiting), mine["broken"], [mine]
        else:
            draws.deal(states)
        self.close()
        self._begin(draws, again, broken)
        for state in counted:
            self.positions += state["report"]["positions"]
            self.tokens += state["report"]["tokens"]
            for own, counts in zip(self.sources, state["report"]["sources"], strict=True):
                add_counts(own, counts)
        self._next = None

    def _fingerprint(self) -> dict[str, Any]:
        """Settings that must not change between save and resume: with other values it would be other data."""
        settings = self.settings
        own = {"packing": settings.packing, "seed": settings.seed, "concat_type": settings.concat_type,
               "shuffle_block": settings.shuffle_block,
               **{f"source {source.name}": {**{key: value for key, value in asdict(source).items() if key in _FIXED},
                                            "number": number, "records": self.mixture.sizes[number],
                                            "rows": self.draws.sizes[number]}
                  for number, source in enumerate(settings.sources)}}
        if settings.packing:
            own |= {"length": settings.length, "too_long": settings.too_long, "buffer": settings.buffer}
        return own


_FIXED = ("decoder", "cycles", "max_length")  # other weights are allowed: later draws follow them
