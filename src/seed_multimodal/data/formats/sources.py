"""Records by index from webdataset tars, JSONL, JSON lists, parquet and image folders.

Indexes are read or built by the first `len()`; call it before forking workers so that they share
them.

Other packages register formats by entry points of the group `seed_multimodal.formats`: a function
`open_mine(path, **options)` returns a `record.RecordFile`, optionally with `pair_keys` for
`pairs.PairKeys`; `path` may be None.
"""

from __future__ import annotations

import glob
import inspect
import multiprocessing
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, cached_property
from importlib.metadata import EntryPoint
from itertools import accumulate, chain
from pathlib import Path
from typing import TypeVar

import numpy as np
from braceexpand import braceexpand

from seed_multimodal.data.formats.conversations import with_messages
from seed_multimodal.data.formats.images import IMAGE_SUFFIXES, ImageFolder
from seed_multimodal.data.formats.index import IndexedFile
from seed_multimodal.data.formats.jsonl import JsonLines, JsonList
from seed_multimodal.data.formats.open_files import OpenFiles
from seed_multimodal.data.formats.parquet import ParquetFile
from seed_multimodal.data.formats.record import (
    VALUE_ERRORS,
    JsonObject,
    Record,
    RecordFile,
    find_part,
    unusable_value,
)
from seed_multimodal.data.formats.storage import filesystem, is_remote, read_safely
from seed_multimodal.data.formats.tar import JsonTar
from seed_multimodal.entry import end_with_parent, log_line
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.plugins import import_entry, registered
from seed_multimodal.progress import Progress
from seed_multimodal.settings import check_keys, nearest

J = TypeVar("J")
R = TypeVar("R")
SUFFIXES = {
    "tar": (".tar",),
    "jsonl": (".jsonl", ".ndjson"),
    "json": (".json",),
    "parquet": (".parquet",),
}
_OPENERS: dict[str, Callable[..., RecordFile]] = {
    "tar": JsonTar,
    "jsonl": JsonLines,
    "json": JsonList,
    "parquet": ParquetFile,
    "folder": ImageFolder,
}
# Configured format -> formats of the files that are read, by their suffixes.
_ACCEPTED = {
    "auto": tuple(SUFFIXES),
    "tar": ("tar",),
    "jsonl": ("jsonl",),
    "json": ("json", "jsonl"),
    "parquet": ("parquet",),
}
REMOTE_THREADS = 16  # that read indexes of remote files
_WILDCARD = re.compile(r"[*?\[]")


@cache
def registered_formats() -> dict[str, EntryPoint]:
    """Formats of other packages."""
    return registered("formats")


def open_file(
    path: str | Path | None,
    format: str,
    *,
    needs_json: bool = True,
    options: JsonObject | None = None,
) -> RecordFile:
    """Open one file or folder.

    path: may be None for a registered format.
    needs_json: samples of tars must have a .json.
    options: of registered formats.

    Raises ConfigError: unknown option of the format.
    """
    options = options or {}
    opener = _OPENERS.get(format)
    option_names: list[str] = []  # ours have none
    if opener is None:
        # The options of a registered format are its opener's parameters after the path.
        opener = import_entry(registered_formats()[format])
        _, *option_names = inspect.signature(opener).parameters
    check_keys(options, option_names, f"options of format {format}")
    if format == "tar":
        return opener(path, needs_json)
    return opener(path, **options)


def open_records(
    files: str | Path | Sequence[str | Path] | None,
    *,
    format: str = "auto",
    name: str = "",
    cache: str | bool | None = None,
    needs_json: bool = True,
    images: bool = False,
    options: JsonObject | None = None,
) -> FileRecords:
    """The records of files, patterns (braces, wildcards), folders (recursive) and URLs, in order.

    format: as of `find_files`, or a registered one, with its `options`.
    name: of the source in logs and counts.
    cache: folder for copies of remote files. None: `storage.default_cache`, where there is space;
        False: no copies, range requests.
    needs_json: as of `open_file`.
    images: as of `find_files`.
    """
    patterns = [files] if isinstance(files, str | Path) else list(files or ())
    record_files: list[RecordFile] = []
    if format in registered_formats():
        # It reads its own names, or none.
        for pattern in patterns or (None,):
            record_files.append(open_file(pattern, format, options=options))
    else:
        for path, file_format in find_files(patterns, format, images=images or format == "folder"):
            file = open_file(path, file_format, needs_json=needs_json, options=options)
            record_files.append(file)
    default_name = ", ".join(map(str, patterns)) or format
    return FileRecords(record_files, name or default_name, cache)


class FileRecords:
    """The concatenated records of several files; `cache` as in `open_records`."""

    def __init__(
        self, record_files: Sequence[RecordFile], name: str, cache: str | bool | None = None
    ) -> None:
        self.record_files = record_files
        self.name = name
        self.open_files = OpenFiles(cache=cache)

    @cached_property
    def _sizes(self) -> list[list[int]]:
        """Number of records of each shard of each file."""
        is_main = os.environ.get("RANK", "0") == "0"
        order = _indexing_order(len(self.record_files))
        ordered_files = [self.record_files[index] for index in order]
        sizes: list[list[int]] = [[] for _ in order]
        with (
            ThreadPoolExecutor(REMOTE_THREADS) as pool,
            Progress("index", len(order), "file", log=log_line if is_main else None) as bar,
        ):
            # Threads read indexes of remote files ahead; those of local files are built one by one.
            prefetched = pool.map(_prefetch_index, ordered_files)
            for index, file, _ in zip(order, ordered_files, prefetched, strict=True):
                sizes[index] = [int(size) for size in file.sizes]
                bar.update()
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
        record = self.locate(index)
        try:  # the body of `bad_values`: as a context it would take a tenth of the time of a read
            record = record.parsed(self.open_files)
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
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    share = range(n_files * rank // world_size, n_files * (rank + 1) // world_size)
    others = [index for index in range(n_files) if index not in share]
    random.Random(rank).shuffle(others)
    return [*share, *others]


def write_indexes(patterns: Sequence[str | Path], processes: int = 1) -> int:
    """Write the indexes of all tars and JSONL files; returns their number."""
    files = [open_file(path, file_format) for path, file_format in find_files(patterns)]
    indexed = [file for file in files if isinstance(file, IndexedFile)]
    results = run_in_processes(IndexedFile.write_index, indexed, processes, "index")
    return len(list(results))


def run_in_processes(
    work: Callable[[J], R], jobs: Sequence[J], processes: int, name: str
) -> Iterator[R]:
    """Results of jobs in order, with a progress bar. Raises DataError: a process was killed."""
    context = multiprocessing.get_context("spawn")  # threads do not survive a fork
    with (
        ProcessPoolExecutor(processes, mp_context=context, initializer=end_with_parent) as pool,
        Progress(name, len(jobs), "file", log=log_line) as bar,
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


def find_files(
    patterns: Sequence[str | Path], format: str = "auto", *, images: bool = False
) -> list[tuple[str, str]]:
    """(file, format) of each distinct file that matches the patterns and folders.

    format: auto: by suffix.
    images: a folder of images without lists or tables has format `folder`.

    Raises ConfigError: unknown format; DataError: nothing matches, or a folder has files of several
    formats.
    """
    # 1. The format must be one of these.
    formats = [*SUFFIXES]
    if images:
        formats.append("folder")
    formats += registered_formats()
    if format not in ("auto", *formats):
        raise ConfigError(
            f"{', '.join(map(str, patterns))}: format must be auto, {', '.join(formats)}, not "
            f"{format!r}{nearest(format, formats)}."
        )
    if not patterns:
        raise DataError("The list of files is empty.")

    # 2. The format of each file; a dictionary, since patterns may overlap.
    format_of: dict[str, str] = {}
    for path in expand_pattern(patterns):
        suffix_format = _suffix_format(path)
        if _is_folder(path):
            format_of.update(_in_folder(path, format, images))
        elif suffix_format in _ACCEPTED.get(format, ()):
            format_of[path] = suffix_format
        elif format == "auto":
            raise DataError(
                f"{path}: unknown suffix (known: {', '.join(SUFFIXES)}); set the format."
            )
        else:
            format_of[path] = format
    return list(format_of.items())


def expand_pattern(patterns: Sequence[str | Path]) -> list[str]:
    """Distinct files matching patterns, in order (wildcards sorted); folders where no file matches.

    Raises DataError: a pattern matches nothing, or a file named by braces is missing.
    """
    matches: dict[str, None] = {}
    for pattern in patterns:
        for name in braceexpand(str(pattern), escape=False):
            paths = _matches(name)
            if not paths:
                reason = f"no such file or folder{nearest_path(name)}"
                if _WILDCARD.search(name):
                    reason = "no file matches this pattern"
                raise DataError(f"{name[:200]}: {reason}.")
            # Folders are used only where no file matches.
            files = [path for path in paths if not _is_folder(path)]
            matches.update(dict.fromkeys(files or paths))
    return list(matches)


def nearest_path(path: str | Path) -> str:
    """` (did you mean 'nano'?)`: the most similar name in the folder of a missing path."""
    folder, name = os.path.split(path)
    folder = folder or "."
    if not os.path.isdir(folder):
        return ""
    return nearest(name, os.listdir(folder)[:2000])


def _matches(name: str) -> list[str]:
    """Paths with this name or matching its wildcards.

    Whether remote files exist is not checked.
    """
    if not is_remote(name):
        # A file whose name has wildcards is itself.
        paths = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        # Without broken links, sockets and devices.
        return [path for path in paths if os.path.isfile(path) or os.path.isdir(path)]
    if not _WILDCARD.search(name):
        return [name]
    return _remote_files(name, "glob")


def _remote_files(url: str, method: str) -> list[str]:
    """The files that a URL's file system finds, sorted."""

    def find() -> list[str]:
        files, name = filesystem(url)
        return sorted(map(files.unstrip_protocol, getattr(files, method)(name)))

    return read_safely(url, find)


def _is_folder(path: str) -> bool:
    """Whether it is a folder; URLs are classified by suffix."""
    if is_remote(path):
        return not _suffix_format(path)
    return os.path.isdir(path)


def _listing(folder: str) -> list[str]:
    """The files below a folder, without hidden ones, sorted."""
    if is_remote(folder):
        paths = _remote_files(folder, "find")
    else:
        paths = [str(path) for path in sorted(Path(folder).glob("**/*")) if path.is_file()]
    return [path for path in paths if not path.rpartition("/")[2].startswith(".")]


def _in_folder(folder: str, format: str, images: bool) -> dict[str, str]:
    """The format of each data file below a folder; or of the folder, if it has only images."""
    # 1. Data files by format. With images, a .json with the name of an image is its caption.
    files = _listing(folder)
    image_names: set[str] = set()
    if images:
        image_files = [path for path in files if path.lower().endswith(IMAGE_SUFFIXES)]
        image_names = {os.path.splitext(path)[0] for path in image_files}
    paths_of: dict[str, list[str]] = {}
    for path in files:
        file_format = _suffix_format(path)
        is_caption = file_format == "json" and os.path.splitext(path)[0] in image_names
        if file_format in _ACCEPTED.get(format, ()) and not is_caption:
            paths_of.setdefault(file_format, []).append(path)
    if "tar" in paths_of:
        paths_of.pop("json", None)  # next to shards: counts, settings and statistics

    # 2. They must have one format; with `json` some may be .jsonl.
    if format in ("auto", "folder") and image_names and not paths_of:
        return {folder: "folder"}
    if not paths_of:
        formats = ", ".join(SUFFIXES) if format == "auto" else format
        or_images = " or images" if images else ""
        raise DataError(f"{folder}: contains no {formats} files{or_images}, at any depth.")
    if len(paths_of) > 1 and format == "auto":
        raise DataError(
            f"{folder}: contains {' and '.join(paths_of)} files; set the format or list the files."
        )
    format_of: dict[str, str] = {}
    for file_format, paths in paths_of.items():
        format_of.update(dict.fromkeys(paths, file_format))
    return format_of


def _suffix_format(path: str) -> str:
    """The format that a file's suffix tells, or ""."""
    for format, suffixes in SUFFIXES.items():
        if path.lower().endswith(suffixes):
            return format
    return ""
