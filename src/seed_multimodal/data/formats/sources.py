"""Records by index from webdataset tars, JSONL, JSON lists, parquet, image folders and registered formats.

Indexes are read or built by the first `len()`; call it before forking workers so that they share them.

Other packages add formats by entry points of the group `seed_multimodal.formats`: `open_mine(path, **options)` returns
a `record.RecordFile`, optionally with `pair_keys` for `pairs.PairKeys`; `path` may be None.
"""

from __future__ import annotations

import glob
import inspect
import multiprocessing
import os
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, cached_property
from importlib.metadata import EntryPoint, entry_points
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand

from seed_multimodal.data.formats.conversations import with_messages
from seed_multimodal.data.formats.images import IMAGE_SUFFIXES, ImageFolder
from seed_multimodal.data.formats.index import IndexedFile
from seed_multimodal.data.formats.jsonl import JsonLines, JsonList
from seed_multimodal.data.formats.layout import StorageLayout
from seed_multimodal.data.formats.open_files import OpenFiles
from seed_multimodal.data.formats.parquet import ParquetFile
from seed_multimodal.data.formats.record import VALUE_ERRORS, Record, RecordFile, unusable_value
from seed_multimodal.data.formats.storage import filesystem, is_remote, read_errors
from seed_multimodal.data.formats.tar import JsonTar
from seed_multimodal.entry import end_with_parent, log_line
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.progress import Progress
from seed_multimodal.settings import check_keys, nearest

SUFFIXES = {
    "tar": (".tar",),
    "jsonl": (".jsonl", ".ndjson"),
    "json": (".json",),
    "parquet": (".parquet",),
}
REMOTE_THREADS = 16
_WILD = re.compile(r"[*?\[]")


@cache
def registered_formats() -> dict[str, EntryPoint]:
    """Formats registered by other packages."""
    return {entry.name: entry for entry in entry_points(group="seed_multimodal.formats")}


def open_file(
    path: Any, format: str, *, needs_json: bool = True, options: Mapping[str, Any] | None = None
) -> RecordFile:
    """Open one file or folder. `needs_json`: tar samples must have a .json; `options`: of registered formats. Raises
    ConfigError: unknown option of the format."""
    if format == "tar":
        return JsonTar(path, needs_json)
    kinds: dict[str, Callable[..., RecordFile]] = {
        "parquet": ParquetFile,
        "json": JsonList,
        "jsonl": JsonLines,
        "folder": ImageFolder,
    }
    opener, given = (
        kinds[format] if format in kinds else registered_formats()[format].load(),
        options or {},
    )
    check_keys(given, list(inspect.signature(opener).parameters)[1:], f"options of format {format}")
    return opener(path, **given)


def open_records(
    files: str | Path | Sequence[str | Path] | None,
    *,
    format: str = "auto",
    name: str = "",
    cache: str | bool | None = None,
    needs_json: bool = True,
    images: bool = False,
    options: Mapping[str, Any] | None = None,
) -> FileRecords:
    """The records of files, patterns (braces, wildcards), folders (recursive) and URLs, in the given order.

    `format`: as of `find_files`, or a registered one, with its `options`; `name`: of the source in logs and counts;
    `cache`: folder for copies of remote files (None: `storage.default_cache`, where there is space; False: no copies,
    range requests); `needs_json`: as in `open_file`.
    """
    given = [files] if isinstance(files, str | Path) else list(files or ())
    found = (
        [(one, format) for one in given or (None,)]
        if format in registered_formats()
        else find_files(given, format, images=images or format == "folder")
    )
    parts = [open_file(path, kind, needs_json=needs_json, options=options) for path, kind in found]
    return FileRecords(parts, name or ", ".join(map(str, given)) or format, cache)


class FileRecords:
    """The concatenated records of several files; `cache` as in `open_records`."""

    def __init__(
        self, parts: Sequence[RecordFile], name: str, cache: str | bool | None = None
    ) -> None:
        self.parts, self.name = parts, name
        self.open_files = OpenFiles(cache=cache)

    @cached_property
    def _sizes(self) -> list[list[int]]:
        """Number of records of each shard of each file; indexes of remote files are read in parallel."""
        log = log_line if os.environ.get("RANK", "0") == "0" else None
        order = _indexing_order(len(self.parts))
        sizes: list[list[int]] = [[] for _ in self.parts]
        with (
            ThreadPoolExecutor(REMOTE_THREADS) as pool,
            Progress("index", len(self.parts), "file", log=log) as bar,
        ):
            parts = [self.parts[number] for number in order]
            ready = pool.map(lambda part: is_remote(part.path) and part.sizes, parts)
            for number, part, _ in zip(order, parts, ready, strict=True):
                sizes[number] = [int(size) for size in part.sizes]
                bar.update()
        if not any(map(any, sizes)):
            raise DataError(f"{self.name}: contains no record.")
        return sizes

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(map(sum, self._sizes)))

    @cached_property
    def layout(self) -> StorageLayout:
        """The non-empty shards and row groups."""
        sizes, group_bytes = list[int](), list[int]()
        for part, part_sizes in zip(self.parts, self._sizes, strict=True):
            part_bytes = (
                part.group_bytes if isinstance(part, ParquetFile) else [0] * len(part_sizes)
            )
            for size, count in zip(part_sizes, part_bytes, strict=True):
                if size:
                    sizes.append(size)
                    group_bytes.append(count)
        return StorageLayout(np.array(sizes, np.int64), np.array(group_bytes, np.int64))

    def __len__(self) -> int:
        return self._ends[-1]

    def locate(self, index: int) -> Record:
        """One record, unread if possible."""
        number = bisect_right(self._ends, index)
        return self.parts[number].locate(index - (self._ends[number - 1] if number else 0))

    def read(self, index: int) -> Record:
        """One record, with `messages` if it is a conversation. Raises DataError: damaged or missing."""
        record = self.locate(index)
        try:  # the body of `bad_values`: as a context it would take a tenth of the time of a read
            record = record.parsed(self.open_files)
            record.fields = with_messages(record.fields, record.location)
        except VALUE_ERRORS as error:
            raise unusable_value(error, record.location) from error
        return record


def _indexing_order(count: int) -> list[int]:
    """The order in which this process of a run reads the indexes of files, or builds them: its share of the files, then
    the others at random, most of which other processes have indexed by then."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    share = range(count * rank // world, count * (rank + 1) // world)
    others = [number for number in range(count) if number not in share]
    random.Random(rank).shuffle(others)
    return [*share, *others]


def write_indexes(given: Sequence[str | Path], processes: int = 1) -> int:
    """Write the indexes of all tars and JSONL files; returns their number."""
    files = [
        file
        for path, kind in find_files(given)
        if isinstance(file := open_file(path, kind), IndexedFile)
    ]
    return sum(1 for _ in run_in_processes(IndexedFile.write_index, files, processes, "index"))


def run_in_processes(
    work: Callable[[Any], Any], jobs: Sequence[Any], processes: int, name: str
) -> Iterator[Any]:
    """Results of jobs in order, with a progress bar. Raises DataError: a process was killed."""
    context = multiprocessing.get_context("spawn")  # threads do not survive a fork
    with (
        ProcessPoolExecutor(processes, mp_context=context, initializer=end_with_parent) as pool,
        Progress(name, len(jobs), "file", log=log_line) as bar,
    ):
        try:
            for result in (pool.map if processes > 1 else map)(work, jobs):
                bar.update()
                yield result
        except BrokenProcessPool:
            raise DataError(
                "A process was killed (often because memory ran out); the same command resumes."
            ) from None


def find_files(
    given: Sequence[str | Path], format: str = "auto", *, images: bool = False
) -> list[tuple[str, str]]:
    """(file, format) of each distinct file matching the patterns and folders; auto goes by suffixes. `images`: a folder
    of images without lists or tables has format `folder`. Raises ConfigError: unknown format; DataError: nothing
    matches, or a folder has files of several formats."""
    known = [*SUFFIXES, *(["folder"] if images else []), *registered_formats()]
    if format not in ("auto", *known):
        raise ConfigError(
            f"{', '.join(map(str, given))}: format must be auto, {', '.join(known)}, not {format!r}"
            f"{nearest(format, known)}."
        )
    if not given:
        raise DataError("The list of files is empty.")
    found: dict[str, str] = {}
    for path in expand_pattern(given):
        kind = _suffix_format(path)
        if _is_folder(path):
            found.update(_in_folder(path, format, images))
        elif format == "auto" and not kind:
            raise DataError(
                f"{path}: unknown suffix (known: {', '.join(SUFFIXES)}); set the format."
            )
        else:
            found[path] = kind if format in ("auto", kind[:4]) else format  # jsonl is also json
    return list(found.items())


def expand_pattern(patterns: Sequence[str | Path]) -> list[str]:
    """Distinct files matching patterns, in order (wildcards sorted); folders where no file matches. Raises DataError: a
    pattern matches nothing, or a file named by braces is missing."""
    found: dict[str, None] = {}
    for name in (name for one in patterns for name in braceexpand(str(one), escape=False)):
        paths = _matches(name)
        if not paths:
            reason = (
                "no file matches this pattern"
                if _WILD.search(name)
                else f"no such file or folder{nearest_path(name)}"
            )
            raise DataError(f"{name[:200]}: {reason}.")
        found.update(dict.fromkeys([path for path in paths if not _is_folder(path)] or paths))
    return list(found)


def nearest_path(path: str | Path) -> str:
    """` (did you mean 'nano'?)`: the most similar name in the folder of a missing path."""
    folder, name = os.path.split(path)
    return nearest(name, os.listdir(folder or ".")[:2000]) if os.path.isdir(folder or ".") else ""


def _matches(name: str) -> list[str]:
    """Paths with this name or matching its wildcards; existence of remote files is not checked."""
    if is_remote(name):
        if not _WILD.search(name):
            return [name]
        files, pattern = filesystem(name)
        with read_errors(name):
            return sorted(files.unstrip_protocol(one) for one in files.glob(pattern))
    found = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
    return [path for path in found if os.path.isfile(path) or os.path.isdir(path)]


def _is_folder(path: str) -> bool:
    """Whether it is a folder; URLs are classified by suffix."""
    return not _suffix_format(path) if is_remote(path) else os.path.isdir(path)


def _listing(folder: str) -> list[str]:
    """The files below a folder, without hidden ones, sorted."""
    if is_remote(folder):
        files, name = filesystem(folder)
        with read_errors(folder):
            found = sorted(map(files.unstrip_protocol, files.find(name)))
    else:
        found = [str(path) for path in sorted(Path(folder).glob("**/*")) if path.is_file()]
    return [path for path in found if not path.rpartition("/")[2].startswith(".")]


def _in_folder(folder: str, format: str, images: bool) -> dict[str, str]:
    files = _listing(folder)
    shown = {
        os.path.splitext(path)[0]
        for path in files
        if images and path.lower().endswith(IMAGE_SUFFIXES)
    }
    kinds: dict[str, list[str]] = {}
    for path in files:
        kind = _suffix_format(path)
        if (
            kind
            and format in ("auto", kind, kind[:4])
            and not (kind == "json" and os.path.splitext(path)[0] in shown)
        ):
            kinds.setdefault(kind, []).append(path)
    if "tar" in kinds:
        kinds.pop("json", None)  # next to shards: counts, settings and statistics
    if format in ("auto", "folder") and shown and not kinds:
        return {folder: "folder"}
    if not kinds:
        wanted = f"{', '.join(SUFFIXES if format == 'auto' else (format,))} files{' or images' if images else ''}"
        raise DataError(f"{folder}: contains no {wanted}, at any depth.")
    if len(kinds) > 1 and format == "auto":
        raise DataError(
            f"{folder}: contains {' and '.join(kinds)} files; set the format or list the files."
        )
    return {path: kind for kind, paths in kinds.items() for path in paths}


def _suffix_format(path: str) -> str:
    return next((kind for kind, endings in SUFFIXES.items() if path.lower().endswith(endings)), "")
