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
    MANIFEST,
    VERSION,
    FileEntry,
    manifest_path,
    read_arrays,
    write_arrays,
)
from seed_multimodal.data.formats.storage import is_remote, stat, stat_files
from seed_multimodal.errors import DataError

MIN_FILES = 256  # in a folder with a manifest

Entries = dict[str, FileEntry]  # name in the folder → its entry


def read(paths: Iterable[str]) -> dict[str, FileEntry]:
    """Path → entry of the files that have one and are as when they were counted.

    Local files are compared where their folder's time changed; what else changed in place is
    noticed where the file is first read (`index.CountedFile.check_entry`).
    """
    known = {}
    for folder, names in _by_folder(paths).items():
        entries = _unchanged(folder)
        for name in names & entries.keys():
            known[os.path.join(folder, name)] = entries[name]
    return known


def write(counts: Mapping[str, int]) -> None:
    """Add files, by path with their numbers of records, to the manifests of their folders.

    Call it once, when all are written: files that are written later change the folder's time. If a
    manifest cannot be written, this is logged.
    """
    for folder, names in _by_folder(counts).items():
        # 1. The folder's time before those of its files: a later change is noticed.
        path = manifest_path(folder)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
        entries = _unchanged(folder)
        version = _version(folder)

        # 2. Files as they are now.
        for name in names - entries.keys():
            file = os.path.join(folder, name)
            with contextlib.suppress(DataError):  # removed
                entries[name] = FileEntry(*stat(file), counts[file])
        sizes, versions, records = zip(*entries.values(), strict=True)
        arrays = {
            "head": np.array([MANIFEST, VERSION]),
            "version": np.array(version),
            "names": np.array(list(map(os.fsencode, entries)), bytes),
            "sizes": np.array(sizes, np.int64),
            "versions": np.array([text.encode() for text in versions], bytes),
            "records": np.array(records, np.int64),
        }
        write_arrays(path, arrays, f"every process opens each file of {folder or '.'}")


def _by_folder(paths: Iterable[str]) -> dict[str, set[str]]:
    """Folder → names, of folders with `MIN_FILES` of these files."""
    names: dict[str, set[str]] = {}
    for path in paths:
        folder, name = os.path.split(path)
        names.setdefault(folder, set()).add(name)
    return {folder: names[folder] for folder in names if len(names[folder]) >= MIN_FILES}


def _version(folder: str) -> str:
    """The time of a local folder, which changes with its names; "" of a remote one."""
    return "" if is_remote(folder) else stat(folder or ".")[1]


def _unchanged(folder: str) -> Entries:
    """The stored entries of files that are as they were."""
    # 1. A damaged manifest is none.
    arrays = read_arrays(manifest_path(folder), np.array([MANIFEST, VERSION]))
    try:
        entries = _entries(arrays or {})
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}

    # 2. If the folder may have other files, each is compared.
    version = _version(folder)
    if arrays is None or (version and version == str(arrays["version"])):
        return entries
    stats = stat_files(folder, entries)
    return {name: entry for name, entry in entries.items() if stats.get(name) == entry[:2]}


def _entries(arrays: Mapping[str, np.ndarray]) -> Entries:
    """The entries of a manifest. Raises ValueError, LookupError, TypeError: none, or damaged."""
    columns = [arrays[name].tolist() for name in ("names", "sizes", "versions", "records")]
    entries = {}
    for name, size, version, records in zip(*columns, strict=True):
        if size < 0 or records < 0:
            raise ValueError("negative")
        entries[os.fsdecode(name)] = FileEntry(size, version.decode(), records)
    return entries
