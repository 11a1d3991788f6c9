"""Records by number from files of any kind: webdataset tars, jsonl, json lists, parquet.

    source = open_records("dataset/part-{0000..0031}/*.tar")      # or a folder, a .jsonl, a list of them
    source.read(17)                                               # LlmRecord(key, where, fields)

Every source is map-style, so that the order of training can be a function of (seed, step). What is kept of a file is
where its records lie (8 to 40 bytes each); a file is indexed when its length is first asked for. Index before forking
workers (`len(source)`), so that they share it.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from seed_multimodal.settings import nearest
from seed_multimodal.data.formats.conversations import with_messages
from seed_multimodal.data.formats.record import BadRecord, LlmRecord, parse_object
from seed_multimodal.data.formats.json_lines import index_array, index_lines, is_lines
from seed_multimodal.data.formats.parquet import ParquetFile, RowGroups
from seed_multimodal.data.formats.files import expand_braces, expand_pattern
from seed_multimodal.data.formats.tar import ShardFiles, ShardIndex, index_shards
from seed_multimodal.errors import ConfigError, DataError

SUFFIXES = {"tar": (".tar", ".tar.gz", ".tgz"), "jsonl": (".jsonl", ".ndjson", ".jsonl.gz"),
            "json": (".json", ".json.gz"),  # compressed ones are found in order to be refused, not passed over
            "parquet": (".parquet",)}
PICKLED = ("pkl", "pickle")
OF_EXTRACTIONS = ("manifest.json", "settings.json")  # what pre-tokenisation writes beside its shards


class RecordSource(Protocol):
    """Records by number. `shard_sizes`: records per file (per row group of parquet), for shuffling near by."""

    name: str
    shard_sizes: Sequence[int]

    def __len__(self) -> int: ...

    def read(self, index: int) -> LlmRecord:
        """One record. Raises DataError, one sentence with file and place, when it is broken."""


class RecordFile(Protocol):
    """The records of one file; `sizes` are those of its pieces that are read together."""

    @property
    def sizes(self) -> Sequence[int]: ...

    def read(self, row: int) -> tuple[str, str, dict[str, Any]]:
        """(place for the key, place for people, fields)."""


def open_records(
    files: str | Path | Sequence[str | Path],
    *,
    format: str = "auto",
    name: str = "",
    index_folder: str | Path | None = None,
) -> FileRecords:
    """The records of files, patterns (braces, wildcards) and folders (searched recursively), in the order written.

    Args:
        format: tar, jsonl, json or parquet; auto goes by each file's suffix, and by the kind of file a folder holds.
        name: how logs and counts call the source; default: what was given as `files`.
        index_folder: where the indexes of tars are kept between runs.

    Raises:
        ConfigError: an unknown format. DataError: nothing matches, or a folder holds several kinds of files.
    """
    given = [files] if isinstance(files, str | Path) else list(files)
    return FileRecords(find_files(given, format), name or ", ".join(map(str, given)), index_folder)


def find_files(given: Sequence[str | Path], format: str = "auto") -> list[tuple[Path, str]]:
    """(file, its format) of each file behind the patterns and folders, each once.

    Raises:
        ConfigError, DataError: as `open_records`.
    """
    if format not in ("auto", *SUFFIXES):
        raise ConfigError(f"{', '.join(map(str, given))}: format must be auto, {', '.join(SUFFIXES)}, not {format!r}"
                          f"{nearest(format, SUFFIXES)}.")
    found: dict[Path, str] = {}
    if not given:
        raise DataError("The list of files is empty.")
    for one in given:
        folders = _folders(str(one))
        if folders:
            for folder in folders:
                found.update(_in_folder(folder, format))
        else:
            found.update((path, _format_of(path, format)) for path in expand_pattern(one))
    return list(found.items())


def labels(files: Sequence[Path]) -> list[str]:
    """Short distinct names of files: the path below their common folder, without suffix where that stays distinct."""
    parents = [file.absolute().parent.parts for file in files]
    shared = 0
    while all(len(parts) > shared and parts[shared] == parents[0][shared] for parts in parents):
        shared += 1
    full = [Path(*file.absolute().parts[shared:]) for file in files]
    short = [path.with_name(path.name.split(".", 1)[0] or path.name).as_posix() for path in full]
    return short if len(set(short)) == len(short) else [path.as_posix().replace(".", "_") for path in full]


class FileRecords:
    """The records of several files, numbered through (see `RecordSource`)."""

    def __init__(self, files: Sequence[tuple[Path, str]], name: str, index_folder: str | Path | None = None) -> None:
        self.name = name
        self.files = [path for path, _ in files]
        self._labels = labels(self.files)
        self._handles = handles = ShardFiles()
        self._groups = groups = RowGroups()
        self._parts: list[RecordFile] = [
            TarFile(path, handles, index_folder) if format == "tar" else
            ParquetFile(path, groups) if format == "parquet" else JsonFile(path, format == "jsonl", handles)
            for path, format in files]

    @cached_property
    def _ends(self) -> np.ndarray:
        ends = np.cumsum([sum(map(int, part.sizes)) for part in self._parts], dtype=np.int64)
        if not ends[-1]:
            others = f", nor do the other {len(self.files) - 1} files" if len(self.files) > 1 else ""
            raise DataError(f"{self.files[0]}: holds no record{others}.")
        return ends

    @cached_property
    def shard_sizes(self) -> np.ndarray:  # type: ignore[override]
        """Records of each file (of each row group of parquet), int64; empty files are left out."""
        sizes = np.array([int(size) for part in self._parts for size in part.sizes], np.int64)
        return sizes[sizes > 0]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> LlmRecord:
        """One record, read by seek.

        Raises:
            DataError: one sentence with file and line, item, row or sample, when it is broken or no longer there.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: there is no record {index} among {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        row = index - int(self._ends[number - 1] if number else 0)
        place, where, fields = self._parts[number].read(row)
        return LlmRecord(f"{self._labels[number]}/{place}", where, with_messages(fields, where))

    def close(self) -> None:
        """Close the files this process holds open and forget rows kept in memory; reading opens them again."""
        self._handles.close()
        self._groups.clear()


class TarFile:
    """The `KEY.json` members of a plain tar."""

    def __init__(self, path: Path, handles: ShardFiles, index_folder: str | Path | None = None) -> None:
        self.path, self._handles, self._index_folder = path, handles, index_folder

    @cached_property
    def _index(self) -> ShardIndex:
        part = index_shards([self.path], PICKLED, "json", index_folder=self._index_folder).parts[0]
        pickled = (part.spans["image"] >= 0) & (part.spans["text"] < 0)
        if pickled.any():
            raise BadRecord("pickled", f"{self.path}: sample {part.keys[int(pickled.argmax())]} is a pickle, which may "
                            f"hold code; convert the shards once: seed data convert {self.path} --out FOLDER.")
        if len(part.spans) and (part.spans["text"] < 0).all():
            raise BadRecord("missing member", f"{self.path}: none of its {len(part.spans)} samples has a .json member.")
        return part

    @property
    def sizes(self) -> Sequence[int]:
        """All samples are one piece."""
        return [len(self._index.spans)]

    def read(self, row: int) -> tuple[str, str, dict[str, Any]]:
        """See `RecordFile`."""
        key, span = self._index.keys[row], self._index.spans[row]
        where = f"{self.path}: sample {key}"
        if span["text"] < 0:
            raise BadRecord("missing member", f"{where}: has no .json member.")
        return key, where, parse_object(self._handles.read(self.path, int(span["text"]), int(span["text_size"])), where)


class JsonFile:
    """The lines of a .jsonl (blank ones passed over), or the items of a .json list."""

    def __init__(self, path: Path, lines: bool, handles: ShardFiles) -> None:
        self.path, self._handles = path, handles
        self._lines = lines

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        if self._lines or is_lines(self.path):
            return index_lines(self.path)
        starts, ends = index_array(self.path)
        return starts, ends, None

    @property
    def sizes(self) -> Sequence[int]:
        """All records are one piece."""
        return [len(self._index[0])]

    def read(self, row: int) -> tuple[str, str, dict[str, Any]]:
        """See `RecordFile`."""
        starts, ends, numbers = self._index
        place = f"item {row}" if numbers is None else f"line {numbers[row]}"
        where = f"{self.path}: {place}"
        data = self._handles.read(self.path, int(starts[row]), int(ends[row] - starts[row]))
        return place.replace(" ", ""), where, parse_object(data, where)


def _folders(pattern: str) -> list[Path]:
    """The folders that a path, or a pattern whose every match is a folder, stands for; none where it means files.

    Raises:
        DataError: some of the folders that braces spell out are missing.
    """
    if Path(pattern).is_dir():
        return [Path(pattern)]
    matches = {one: [Path(one)] if Path(one).exists() else sorted(map(Path, glob.glob(one, recursive=True)))
               for one in expand_braces(pattern)}
    places = [match for some in matches.values() for match in some]
    if not places or not all(place.is_dir() for place in places):
        return []
    missing = [one for one, some in matches.items() if not some]
    if missing:
        raise DataError(f"{pattern}: {len(missing)} of its {len(matches)} folders are missing, first {missing[0]}.")
    return places


def _in_folder(folder: Path, format: str) -> dict[Path, str]:
    kinds: dict[str, list[Path]] = {}
    notes: list[Path] = []
    for path in sorted(folder.rglob("*")):
        kind = next((kind for kind, endings in SUFFIXES.items() if path.name.lower().endswith(endings)), "")
        if kind and format in ("auto", kind) and path.is_file() and not path.name.startswith("."):
            (notes if _is_note(path) else kinds.setdefault(kind, [])).append(path)
    if "tar" in kinds:
        kinds.pop("json", None)  # beside shards these are manifests and statistics
    if not kinds and notes:
        raise DataError(f"{folder}: there are no records in it, only {' and '.join(sorted({p.name for p in notes}))}: "
                        "the extraction that made it wrote none.")
    if not kinds:
        wanted = ", ".join(SUFFIXES if format == "auto" else (format,))
        raise DataError(f"{folder}: this folder holds no {wanted} files, at any depth.")
    if len(kinds) > 1:
        raise DataError(f"{folder}: this folder holds {' and '.join(kinds)} files; say which by format, or name "
                        "files.")
    return {path: kind for kind, paths in kinds.items() for path in paths}


def _is_note(path: Path) -> bool:
    """Whether a file of a folder says how an extraction went; a list of records may have the same name."""
    if path.name not in OF_EXTRACTIONS:
        return False
    try:
        with open(path, "rb") as file:
            return file.read(2) == b"{\n"
    except OSError:
        return False


def _format_of(path: Path, format: str) -> str:
    if format != "auto":
        return format
    for kind, endings in SUFFIXES.items():
        if path.name.lower().endswith(endings):
            return kind
    known = ", ".join(ending for endings in SUFFIXES.values() for ending in endings)
    raise DataError(f"{path}: its suffix tells no format (known: {known}); say it by format.")
