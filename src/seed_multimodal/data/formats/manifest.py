"""The manifest of a folder: size, version and number of records of each of its data files.

It is stored as an index of the folder, in one `.npz`. With it a process opens a folder by one
listing, instead of opening each file. `write` is called by `seed data index`, by what writes
shards, and where files were counted; a small folder has none.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping

import numpy as np

from seed_multimodal.data.formats.index import (
    MANIFEST_HEAD,
    FileEntry,
    manifest_path,
    read_arrays,
    write_arrays,
)
from seed_multimodal.data.formats.storage import by_folder, is_remote, stat, stat_files

MIN_FILES = 256  # in a folder with a manifest

Entries = dict[str, FileEntry]


def read(paths: Iterable[str]) -> Entries:
    """Path → entry of the files that have one and are as when they were counted.

    Local files are compared where their folder's time changed; what else changed in place is
    noticed where the file is first read (`index.CountedFile.check_entry`).
    """
    known = {}
    for folder, files in by_folder(paths, MIN_FILES).items():
        entries, _ = _current(folder)
        known.update({files[name]: entries[name] for name in entries.keys() & files})
    return known


def write(counts: Mapping[str, int]) -> None:
    """Add files, by path with their numbers of records, to the manifests of their folders.

    Call it once, when all are written: files that are written later change the folder's time. If a
    manifest cannot be written, this is logged.
    """
    for folder, files in by_folder(counts, MIN_FILES).items():
        # The folder's time is that of its names; the folder of indexes is one of them.
        with contextlib.suppress(OSError):
            manifest_path(folder).parent.mkdir(parents=True, exist_ok=True)
        entries, time = _current(folder)
        new = files.keys() - entries
        stats = stat_files(folder, new)
        for name in new & stats.keys():
            entries[name] = FileEntry(*stats[name], counts[files[name]])
        _store(folder, entries, time)


def _store(folder: str, entries: Entries, time: str) -> None:
    if not entries:  # a server that lists no sizes
        return
    rows = [
        (os.fsencode(name), entry.size, entry.version.encode(), entry.records)
        for name, entry in entries.items()
    ]
    arrays = {"head": MANIFEST_HEAD, "time": np.array(time), "files": np.rec.fromrecords(rows)}
    effect = f"every process opens each file of {folder or '.'}"
    write_arrays(manifest_path(folder), arrays, effect)


def _current(folder: str) -> tuple[Entries, str]:
    """Name → entry of the files that are as they were, and the folder's time before they were read.

    The time of a local folder changes with its names; a remote one has none.
    """
    # 1. A damaged manifest is none.
    time = "" if is_remote(folder) else stat(folder or ".")[1]
    arrays = read_arrays(manifest_path(folder), MANIFEST_HEAD)
    if arrays is None:
        return {}, time
    try:
        entries = {
            os.fsdecode(name): FileEntry(size, version.decode(), records)
            for name, size, version, records in arrays["files"].tolist()
            if records >= 0
        }
        stored_time = str(arrays["time"])
    except (LookupError, TypeError, ValueError, AttributeError):
        return {}, time

    # 2. If the folder's names changed, each file is compared, once.
    if time == "" or time != stored_time:
        stats = stat_files(folder, entries)
        entries = {name: entry for name, entry in entries.items() if stats.get(name) == entry[:2]}
        if time and os.environ.get("LOCAL_RANK", "0") == "0":
            _store(folder, entries, time)
    return entries, time
