"""Where each record of a file stands, found once: indexes kept on disk, made in parallel, shared by all processes.

    IndexStore().fill(parts)              # beside the data, in FOLDER/.seed-index/
    IndexStore(folder).fill(parts)        # in a folder of their own

An index is a few arrays in one file, mapped into memory: all processes and data workers of a machine share one copy,
and a start reads no more than its header. It belongs to a file of the same size, time of change and kind; every other
one (torn, foreign, of another version) is made anew. One process of a machine makes what is missing, with as many
helpers as there are cores, while the others wait at the folder's lock. Small files are indexed in memory, which takes
no longer than reading an index would; so are files in folders that cannot be written, which is said.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seed_multimodal.data.formats.index_file import Arrays, IndexedFile, Scan, stamp_of, write_index
from seed_multimodal.disk import LOCK, disk_reason, lock
from seed_multimodal.entry import end_with_parent, log_line
from seed_multimodal.errors import DataError, counted
from seed_multimodal.progress import Progress

FOLDER = ".seed-index"
KEEP_FROM = 1 << 20  # bytes: smaller files beside which no index is kept
PARALLEL_FROM = 32 << 20  # bytes in all from which helpers are worth their start

class IndexStore:
    """Where indexes are kept.

    Args:
        folder: of all of them; None: beside each file, in `.seed-index`.
        instead: the folder of those whose files lie where nothing can be written.
        log: gets a sentence where an index cannot be kept or another process is waited for.
    """

    def __init__(self, folder: str | Path | None = None, instead: str | Path | None = None,
                 log: Callable[[str], None] | None = log_line) -> None:
        self.folder, self.instead = (Path(one) if one else None for one in (folder, instead))
        self.log = log if os.environ.get("RANK", "0") == "0" else None

    def fill(self, files: Sequence[IndexedFile]) -> None:
        """Give each file its index.

        Raises:
            DataError: a file cannot be read, or a folder that was named cannot be written.
        """
        missing: dict[Path, dict[IndexedFile, Path]] = {}
        for file in files:
            if file.indexed:
                continue
            place = self._place(file)
            if place is None:
                file.arrays  # noqa: B018  (made here)
            elif not file.take(place):
                missing.setdefault(place.parent, {})[file] = place
        for folder, places in missing.items():
            self._make(folder, places)

    def _place(self, file: IndexedFile) -> Path | None:
        """Where a file's index is kept; None: it is made in memory."""
        if self.folder is not None:
            return self.folder / _name(file.path, f"{file.path.resolve()} {file.kind}")
        large = stamp_of(file.path)[0] >= KEEP_FROM
        return file.path.parent / FOLDER / _name(file.path, f"{file.path.name} {file.kind}") if large else None

    def _make(self, folder: Path, places: Mapping[IndexedFile, Path]) -> None:
        """Make the indexes of files in a folder, or wait for the process that does."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with ExitStack() as held:
                try:
                    held.enter_context(lock(folder / LOCK, 1.0, remove=True))
                except TimeoutError:
                    self._say(f"{folder}: waiting for the process that makes the indexes.")
                    held.enter_context(lock(folder / LOCK, remove=True))
                self._scan([file for file, place in places.items() if not file.take(place)], places)
        except OSError as error:
            if self.folder is not None:
                raise DataError(f"{folder}: the index of a data file cannot be written there ({disk_reason(error)})."
                                ) from error
            left = [file for file in places if not file.indexed]
            if self.instead is not None:
                IndexStore(self.instead, log=self.log).fill(left)
                return
            self._say(f"{folder}: the index of {counted(len(left), 'file')} cannot be kept beside the data "
                      f"({disk_reason(error)}), so every process makes and holds its own at each start; name an "
                      "index_folder.")
            self._scan(left, {})

    def _scan(self, files: Sequence[IndexedFile], places: Mapping[IndexedFile, Path]) -> None:
        """Index files, and write what has a place. Raises OSError."""
        jobs: list[_Job] = []
        for file in files:
            stamp, scans = stamp_of(file.path), file.scans()
            alone = len(scans) == 1 and file in places  # then who makes it also writes it
            jobs += [_Job(file, number, len(scans), scan, places[file] if alone else None, stamp)
                     for number, scan in enumerate(scans)]
        size = sum(job.stamp[0] / job.count for job in jobs)
        found: dict[IndexedFile, dict[int, Arrays | None]] = {}
        with Progress("index", max(size / 1e6, 1e-6), "MB", log=self.log) as bar:
            for job, arrays in _results(jobs, size):
                bar.update(job.stamp[0] / job.count / 1e6)
                own = found.setdefault(job.file, {})
                own[job.number] = arrays
                if len(own) == job.count:
                    self._finish(job, [own[number] for number in range(job.count)], places.get(job.file))
                    found.pop(job.file)

    def _finish(self, job: _Job, parts: Sequence[Arrays | None], place: Path | None) -> None:
        whole = [part for part in parts if part is not None]
        if whole:
            job.file._arrays = job.file.join(whole)
        if whole and place is not None:
            write_index(place, job.stamp, job.file.kind, job.file._arrays or {})
        if place is not None:
            job.file.take(place)  # mapped, in place of what was made; made again if the file has changed meanwhile

    def _say(self, sentence: str) -> None:
        if self.log is not None:
            self.log(sentence)


@dataclass(eq=False)
class _Job:
    """One scan of a file; `place`: where the index is written by the process that makes it."""

    file: IndexedFile
    number: int
    count: int
    scan: Scan
    place: Path | None
    stamp: tuple[int, int]


def _results(jobs: Sequence[_Job], size: float) -> Iterator[tuple[_Job, Arrays | None]]:
    """Each job with its arrays (None: written to its place), as they are done."""
    helpers = min(len(jobs), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    left = list(jobs)
    if helpers > 1 and size >= PARALLEL_FROM:
        # Spawned: this process may hold threads and a GPU, which do not survive a fork.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(helpers, mp_context=context, initializer=end_with_parent) as pool:
            with _main_hidden():
                running: dict[Future[Arrays | None], _Job] = {
                    pool.submit(_work, job.file, job.scan, job.place, job.stamp): job for job in jobs}
            try:
                for future in as_completed(running):
                    arrays = future.result()
                    left.remove(running[future])
                    yield running.pop(future), arrays
            except BrokenProcessPool:  # a helper was killed, often because memory ran out: alone, then
                pass
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    for job in left:
        yield job, _work(job.file, job.scan, job.place, job.stamp)


@contextmanager
def _main_hidden() -> Iterator[None]:
    """Let processes be spawned that do not import the main module: a script without `if __name__ == "__main__"` would
    run a second time in each, and wait there for the lock that is held here."""
    main = sys.modules["__main__"]
    hidden: dict[str, Any] = {name: main.__dict__[name] for name in ("__spec__", "__file__") if name in main.__dict__}
    main.__dict__.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        main.__dict__.update(hidden)


def _work(file: IndexedFile, scan: Scan, place: Path | None, stamp: tuple[int, int]) -> Arrays | None:
    arrays = scan()
    if place is None:
        return arrays
    write_index(place, stamp, file.kind, file.join([arrays]))
    return None


def _name(path: Path, text: str) -> str:
    """The name of an index: a file's own may be as long as any can be, so of that the start."""
    return f"{path.name[:50]}.{hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}.idx"
