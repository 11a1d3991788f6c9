"""A long set of samples worked off by any number of processes into one folder, which the same command resumes.

    folder/settings.json       what the run depends on; another run is refused
    folder/samples-0.jsonl     one line a sample, appended as it is done, by process 0 (-1 by process 1, …)
    folder/results_rank0.json  the results of what process 0 has done, in the benchmark's own format
    folder/results.json        written when every sample has its line, with summary.json; each sample is once in it

Blocks of samples go round the processes (torchrun's RANK and WORLD_SIZE); a resumed run, of as many processes or of
others, leaves out what has a line. A sample that cannot be used is named, counted and tried again by the next run;
`max_bad` of them in a row end the run. Only one block of samples is in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Generic, Protocol, TypeVar

from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.data.stream.skip_budget import SkipBudget
from seed_multimodal.disk import folder_lock, lock, read_json_object, replace_text, writing
from seed_multimodal.entry import log_line
from seed_multimodal.errors import DataError, GenerationError, ImageError, counted
from seed_multimodal.progress import Progress
from seed_multimodal.settings import changed_settings
from seed_multimodal.training.distributed import environment_place

SETTINGS, SUMMARY, RESULTS = "settings.json", "summary.json", "results"
NAMED = 5  # bad samples that the summary names
Line = dict[str, Any]
S = TypeVar("S")
S_co = TypeVar("S_co", covariant=True)


class Samples(Protocol[S_co]):
    """Samples by number."""

    @property
    def keys(self) -> Sequence[int | str]:
        """The name of each in the results, each another."""

    def read(self, number: int) -> S_co:
        """One sample. Raises ImageError or BadRecord: it cannot be used."""


@dataclass(frozen=True)
class Work(Generic[S]):
    """What is done to each sample.

    Attributes:
        samples: all of them. answer: a block of samples → a line each, without `id`.
        settings: what the answers depend on. limit: only so many, the first.
    """

    samples: Samples[S]
    answer: Callable[[list[S]], list[Line]]
    settings: Mapping[str, Any]
    limit: int | None = None

    @property
    def keys(self) -> list[int | str]:
        """The names of the samples that are asked for."""
        return list(self.samples.keys[:self.limit])


@dataclass(frozen=True)
class Score:
    """What is made of the lines.

    Attributes:
        results: in the benchmark's own format. numbers: of the summary; `notes` among them are sentences on what could
            not be measured.
    """

    results: Callable[[Sequence[Line]], Any]
    numbers: Callable[[Sequence[Line]], Mapping[str, Any]] = lambda lines: {}


def run_through(work: Work[S], score: Score, folder: Path, *, batch: int, max_bad: int = 20, name: str = RESULTS
                ) -> Line | None:
    """Work off this process's share; who ends last writes results and summary, which is returned. Else None.

    Args:
        name: of the files of results, without `.json`.

    Raises:
        DataError, ConfigError: see `work_off`.
    """
    work_off(work, folder, batch=batch, max_bad=max_bad)
    rank, world = environment_place()
    keys, known = work.keys, read_lines(folder)
    if world > 1:
        own = read_lines(folder, f"samples-{rank}.jsonl")
        with writing(folder, DataError):
            replace_text(folder / f"{name}_rank{rank}.json", json.dumps(
                score.results([own[key] for key in keys if key in own]), ensure_ascii=False))
    if any(key not in known for key in keys):
        log_line(f"{folder}: this share is finished; other processes still work or have to be run.")
        return None
    lines = [known[key] for key in keys]
    return finish(folder, lines, score.results(lines), score.numbers(lines), name)


def work_off(work: Work[S], folder: Path, *, batch: int, max_bad: int = 20) -> None:
    """Answer this process's share (by torchrun's environment) of the samples that have no line yet, `batch` at a time.

    Raises:
        DataError: the folder belongs to another run, another process writes there with this rank, the disk refuses,
            or `max_bad` samples in a row cannot be used.
        ConfigError: RANK and WORLD_SIZE do not belong together.
    """
    rank, world = environment_place()
    _agree(folder, work.settings)
    own = folder / f"samples-{rank}.jsonl"
    with _held(own):
        known, keys = read_lines(folder), work.keys
        blocks = [range(start, min(start + batch, len(keys))) for start in range(0, len(keys), batch)][rank::world]
        share = sum(map(len, blocks))
        todo = ([row for row in block if "bad" in known.get(keys[row], {"bad": 1})] for block in blocks)
        left = [rows for rows in todo if rows]
        done = share - sum(map(len, left))
        if done:
            log_line(f"{folder}: {done:,} of {counted(share, 'sample')} have been answered before.")
        budget = SkipBudget(max_bad)
        with Progress("evaluation", share, "sample", start=done) as bar, _appending(own) as file:
            for rows in left:
                good: list[tuple[int | str, S]] = []
                for row in rows:
                    try:
                        good.append((keys[row], work.samples.read(row)))
                        budget.good()
                    except (ImageError, BadRecord) as error:
                        _note(file, keys[row], str(error), budget, bar)
                for key, line in _answered(work, good, lambda key, reason: _note(file, key, reason, budget, bar)):
                    _write(file, {"id": key, **line})
                with writing(own, DataError):
                    file.flush()
                bar.update(len(rows))


def finish(folder: Path, lines: Sequence[Line], results: Any, numbers: Mapping[str, Any], name: str = RESULTS) -> Line:
    """Write the results and a summary, which is returned: counts, the first bad samples, `numbers`."""
    bad = [line for line in lines if "bad" in line]
    summary = {"samples": len(lines), "answered": len(lines) - len(bad), "bad": len(bad),
               "bad_first": [line["bad"] for line in bad[:NAMED]], **numbers}
    with folder_lock(folder, DataError, timeout=-1), writing(folder, DataError):
        replace_text(folder / f"{name}.json", json.dumps(results, ensure_ascii=False))
        replace_text(folder / SUMMARY, json.dumps(summary, ensure_ascii=False, indent=1) + "\n")
    for note in summary.get("notes", ()):
        log_line(note)
    return summary


def read_lines(folder: Path, files: str = "samples-*.jsonl") -> dict[int | str, Line]:
    """Every sample's line: the answer if there is one, else the latest reason why there is none. What a killed process
    left unfinished is passed over."""
    found: dict[int | str, Line] = {}
    for path in sorted(folder.glob(files)):
        with open(path, encoding="utf-8", errors="replace") as file:
            for text in file:
                try:
                    line = json.loads(text) if text.endswith("\n") else None
                except ValueError:
                    continue
                if isinstance(line, dict) and "id" in line and ("bad" not in line or "bad" in found.get(
                        line["id"], {"bad": 1})):
                    found[line["id"]] = line
    return found


def _answered(work: Work[S], good: Sequence[tuple[int | str, S]], refuse: Callable[[int | str, str], None]
              ) -> Iterator[tuple[int | str, Line]]:
    """The lines of a block; where the model refuses it as a whole, one sample at a time, so that only those at fault
    are lost."""
    if not good:
        return
    try:
        yield from zip([key for key, _ in good], work.answer([sample for _, sample in good]), strict=True)
    except (GenerationError, ImageError) as error:
        if len(good) == 1:
            refuse(good[0][0], f"sample {good[0][0]}: {error}")
            return
        for one in good:
            yield from _answered(work, [one], refuse)


def _note(file: IO[str], key: int | str, reason: str, budget: SkipBudget, bar: Progress) -> None:
    """Write, name and count a sample that cannot be used."""
    bar.write(f"skipped: {reason}")
    _write(file, {"id": key, "bad": reason})
    if budget.spend():
        raise DataError(f"{budget.broken} samples in a row cannot be used, the last: {reason}")


def _write(file: IO[str], line: Line) -> None:
    with writing(file.name, DataError):
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _held(own: Path) -> Iterator[None]:
    """The lock of a process's file."""
    with contextlib.ExitStack() as stack:
        with writing(own, DataError):
            try:
                stack.enter_context(lock(own.with_name(f".{own.name}.lock"), 0, remove=True))
            except TimeoutError:
                raise DataError(f"{own}: another run is writing it; let it end first.") from None
        yield


@contextlib.contextmanager
def _appending(own: Path) -> Iterator[IO[str]]:
    """The file at its end, without a line that a killed process left unfinished."""
    with writing(own, DataError):
        with open(own, "ab+") as tail:
            size = tail.seek(0, os.SEEK_END)
            while size and (tail.seek(size - 1), tail.read(1))[1] != b"\n":
                size -= 1
            tail.truncate(size)
        file = open(own, "a", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed below)
    try:
        yield file
    finally:
        with writing(own, DataError):  # what a full disk refused is tried again
            file.close()


def _agree(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings into the folder, or check that they are the same."""
    file, plain = folder / SETTINGS, json.loads(json.dumps(dict(settings)))
    with folder_lock(folder, DataError, timeout=-1), writing(file, DataError):
        if not file.exists():
            if any(folder.glob("samples-*.jsonl")):
                raise DataError(f"{file}: is missing, so the settings of the answers beside it are unknown; choose "
                                "another --out.")
            replace_text(file, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")
    changes = changed_settings(read_json_object(file, DataError), plain)
    if changes:
        raise DataError(f"{folder}: was begun with other settings ({'; '.join(changes)}); choose another --out, or the "
                        "same settings.")
