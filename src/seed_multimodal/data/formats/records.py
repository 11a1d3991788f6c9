"""Records by index from webdataset tars, JSONL, JSON lists, parquet and image folders.

Files are counted by the first `len()`, from manifests or indexes; call it before forking workers.

Other packages register formats by entry points of the group `seed_multimodal.formats`: a function
`open_mine(path, …)`, whose further parameters are its options, returns a `record.RecordFile`,
optionally with `pair_keys` for `pairs.PairKeys`; `path` may be None.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from seed_multimodal.data.formats import manifest
from seed_multimodal.data.formats.bad_records import (
    RECORD_FAULTS,
    VALUE_ERRORS,
    RecordNote,
    broken_note,
    unusable_value,
)
from seed_multimodal.data.formats.contents import FOLDER, find_files, registered_formats
from seed_multimodal.data.formats.conversations import with_messages
from seed_multimodal.data.formats.images import ImageFolder
from seed_multimodal.data.formats.index import CountedFile, IndexedFile
from seed_multimodal.data.formats.jsonl import CsvTable, JsonLines, JsonList
from seed_multimodal.data.formats.parquet import ArrowFile, ParquetFile
from seed_multimodal.data.formats.record import JsonObject, Record, RecordFile, find_part
from seed_multimodal.data.formats.storage import BLOCK_BYTES, DataFile, is_remote, stat
from seed_multimodal.data.formats.tar import TarFile
from seed_multimodal.entry import end_with_parent, log_line, rank_and_world_size
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.plugins import import_entry
from seed_multimodal.progress import Progress
from seed_multimodal.settings import check_keys

J = TypeVar("J")
R = TypeVar("R")
_OPENERS: dict[str, Callable[[DataFile], RecordFile]] = {
    "tar": TarFile,
    "jsonl": JsonLines,
    "json": JsonList,
    "csv": CsvTable,
    "parquet": ParquetFile,
    "arrow": ArrowFile,
    FOLDER: ImageFolder,
}
N_PROBED = 20  # samples tried before a source is rejected
REMOTE_THREADS = 16  # that read indexes of remote files
# For a checksum; blocks of 64 KiB of all of them.
CHECKED_FILES = 32
CHECKED_BLOCKS = 64


def open_records(
    files: str | Path | Sequence[str | Path] | None,
    *,
    format: str = "auto",
    name: str = "",
    options: JsonObject | None = None,
    **access: Any,
) -> FileRecords:
    """The records of files, patterns (braces, wildcards), folders (recursive) and URLs, in order.

    format: as of `find_files`, or a registered one, with its `options`.
    name: of the source in logs and counts.
    access: `cache`, `in_order` and `joined`, as of `storage.DataFile`.

    Raises ConfigError: unknown format or option.
    """
    patterns = [files] if isinstance(files, str | Path) else list(files or ())
    options = options or {}
    if format in registered_formats():
        # It reads its own names, or none; its options are its opener's parameters after the path.
        opener = import_entry(registered_formats()[format])
        _, *parameters = inspect.signature(opener).parameters.values()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            option_names = [parameter.name for parameter in parameters]
            check_keys(options, option_names, f"options of format {format}")
        record_files = [opener(pattern, **options) for pattern in patterns or (None,)]
        for file in record_files:
            for attribute in ("path", "sizes", "locate"):
                if not hasattr(file, attribute):
                    raise ConfigError(
                        f"format {format}: its {type(file).__name__} has no {attribute!r}, which a "
                        "RecordFile needs."
                    )
    else:
        check_keys(options, (), f"options of format {format}")  # ours have none
        record_files = [
            _OPENERS[kind](DataFile(path, **access)) for path, kind in find_files(patterns, format)
        ]
    return FileRecords(record_files, name or ", ".join(map(str, patterns)) or format)


@dataclass
class FileRecords:
    """The concatenated records of several files."""

    record_files: Sequence[RecordFile]
    name: str

    @cached_property
    def _sizes(self) -> list[list[int]]:
        """Number of records of each shard of each file."""
        # 1. Those that manifests have.
        is_main = rank_and_world_size()[0] == 0
        counted_files = [file for file in self.record_files if isinstance(file, CountedFile)]
        known = manifest.read(file.path for file in counted_files)
        for counted in counted_files:
            counted.entry = known.get(counted.path)
        files = self.record_files
        sizes = [list(file.sizes) if file.path in known else [] for file in files]

        # 2. The others.
        order = [i for i in _indexing_order(len(files)) if files[i].path not in known]
        ordered_files = [files[index] for index in order]
        with (
            ThreadPoolExecutor(REMOTE_THREADS) as pool,
            Progress("index", len(order), "file", log=log_line if is_main else None) as bar,
        ):
            # Threads read indexes of remote files ahead; those of local files are built one by one.
            prefetched = pool.map(_prefetch_index, ordered_files)
            for index, file, _ in zip(order, ordered_files, prefetched, strict=True):
                sizes[index] = [int(size) for size in file.sizes]
                bar.update()

        # 3. A manifest for the next start, by one process of each machine.
        counts = {file.path: sum(file.sizes) for file in counted_files}
        if counts.keys() - known and os.environ.get("LOCAL_RANK", "0") == "0":
            manifest.write(counts)
        if not any(map(any, sizes)):
            raise DataError(f"{self.name}: contains no record.")
        return sizes

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(map(sum, self._sizes)))

    @cached_property
    def shard_sizes(self) -> np.ndarray:
        """Number of records of each shard that has any, int64 [shards]."""
        sizes = np.array([*chain.from_iterable(self._sizes)], np.int64)
        return sizes[sizes > 0]

    @cached_property
    def checksum(self) -> int:
        """Of sizes and evenly spread blocks of the files, or of a share of many; 0: of none."""
        files = [getattr(file, "files", None) for file in self.record_files]
        if None in files and rank_and_world_size()[0] == 0:
            log_line(f"{self.name}: has no `files` whose contents are compared at resume.")
        paths = list(chain.from_iterable(filter(None, files)))
        checksum = 0
        n_checked = min(len(paths), CHECKED_FILES)
        for path in random.Random(0).sample(paths, n_checked):
            size, _ = stat(path)
            checksum = zlib.crc32(str(size).encode(), checksum)
            file = DataFile(path, cache=False)
            for start in range(0, size, max(size * n_checked // CHECKED_BLOCKS, BLOCK_BYTES)):
                block = file.read(start, min(BLOCK_BYTES, size - start))
                checksum = zlib.crc32(block, checksum)
        return checksum

    def __len__(self) -> int:
        return self._ends[-1]

    def locate(self, index: int) -> Record:
        """One record, unread if possible."""
        file_index, row = find_part(self._ends, index)
        return self.record_files[file_index].locate(row)

    def read(self, index: int) -> Record:
        """One record, with `messages` if it is a conversation.

        Raises DataError: damaged or missing.
        """
        return self.complete(self.locate(index))

    def check_usable(self, read: Callable[[int], object]) -> None:
        """Raise the first sample's error if `read` can use none of the first `N_PROBED`."""
        notes: list[RecordNote] = []
        for index in range(min(N_PROBED, len(self))):
            try:
                read(index)
                return
            except RECORD_FAULTS as error:
                notes.append(broken_note(error, self.locate(index).location))
        raise DataError(notes[0].location)

    def complete(self, record: Record) -> Record:
        """As `read`, for a record of `locate`."""
        try:
            record = record.parsed()
            record.fields = with_messages(record.fields, record.location)
        except VALUE_ERRORS as error:
            raise unusable_value(error, record.location) from error
        return record


def _prefetch_index(file: RecordFile) -> None:
    if is_remote(file.path):
        len(file.sizes)


def _indexing_order(n_files: int) -> list[int]:
    """The order in which this process of a run reads or builds the indexes of files.

    First its share of them; then the others at random, most of which other processes have indexed
    by then.
    """
    rank, world_size = rank_and_world_size()
    share = range(n_files * rank // world_size, n_files * (rank + 1) // world_size)
    others = [index for index in range(n_files) if index not in share]
    random.Random(rank).shuffle(others)
    return [*share, *others]


def write_indexes(patterns: Sequence[str | Path], processes: int) -> int:
    """Write the indexes of all tars and JSONL files; returns their number."""
    files = [_OPENERS[format](DataFile(path)) for path, format in find_files(patterns)]
    indexed = [file for file in files if isinstance(file, IndexedFile)]
    counts = run_in_processes(IndexedFile.write_index, indexed, processes, "index")
    manifest.write({file.path: count for file, count in zip(indexed, counts, strict=True)})
    return len(indexed)


def run_in_processes(
    work: Callable[[J], R], jobs: Sequence[J], processes: int, name: str
) -> Iterator[R]:
    """Results of jobs in order, with a progress bar. Raises DataError: a process was killed."""
    context = multiprocessing.get_context("spawn")  # threads do not survive a fork
    with (
        ProcessPoolExecutor(processes, mp_context=context, initializer=end_with_parent) as pool,
        Progress(name, len(jobs), "file") as bar,
    ):
        try:
            results = pool.map(work, jobs) if processes > 1 else map(work, jobs)
            for result in results:
                bar.update()
                yield result
        except BrokenProcessPool:
            raise DataError(
                "A process was killed (often because memory ran out); the same command resumes."
            ) from None
