"""Records by number from files of any kind: webdataset tars, jsonl, json lists, parquet, images, registered formats.

    source = open_records("dataset/part-{0000..0031}/*.tar")      # or a folder, a .jsonl, a list of them
    source.read(17)                                               # Record(key, where, fields)
    source.locate(17)                                             # the same, unread

Every source is map-style, so that the order of training can be a function of (seed, step). Only the positions of its
records are kept of a file (8 to 40 bytes each); a file is indexed when its length is first asked for. Index before
forking workers (`len(source)`), so that they share it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from seed_multimodal.data.formats.conversations import with_messages
from seed_multimodal.data.formats.files import find_files
from seed_multimodal.data.formats.index_file import IndexedFile
from seed_multimodal.data.formats.index_store import IndexStore
from seed_multimodal.data.formats.json_lines import JsonFile
from seed_multimodal.data.formats.parquet import ParquetFile
from seed_multimodal.data.formats.pictures import PictureFolder
from seed_multimodal.data.formats.record import BadRecord, Record, RecordFile
from seed_multimodal.data.formats.registry import open_registered, registered
from seed_multimodal.data.formats.tar import OpenFiles, TarFile
from seed_multimodal.errors import DataError

PICKLED = ("pkl", "pickle")


class JsonTar(TarFile):
    """The `KEY.json` members of a plain tar, and those of `others` (part → extensions), with which a sample needs no
    json."""

    def __init__(self, path: Path, others: Mapping[str, Sequence[str]] | None = None) -> None:
        super().__init__(path, {"json": ("json",), "pickle": PICKLED, **(others or {})})
        self.others = list(others or ())

    @property
    def sizes(self) -> Sequence[int]:
        """All samples are one piece. Raises BadRecord: a sample is a pickle, or none has a .json."""
        whole = len(self.keys)
        pickled = self.has("pickle") & ~self.has("json") if self.count("json") < whole and self.count("pickle") else ()
        if np.any(pickled):
            key = self.keys[int(np.argmax(pickled))]
            raise BadRecord("pickled", f"{self.path}: sample {key} is a pickle, which may hold code; convert the "
                            f"shards once: seed data convert {self.path} --out FOLDER.")
        if whole and not self.count("json") and not self.others:
            raise BadRecord("missing member", f"{self.path}: none of its {whole} samples has a .json member.")
        return super().sizes

    def locate(self, row: int) -> Record:
        """A sample, unread. Raises BadRecord: it has no .json."""
        record = super().locate(row)
        if record.problem is None and "json" not in record.members and not self.others:
            raise BadRecord("missing member", f"{record.where}: has no .json member.")
        return record


def open_file(path: Path, format: str, others: Mapping[str, Sequence[str]] | None = None,
              options: Mapping[str, Any] | None = None) -> RecordFile:
    """The records of one file: tar, jsonl, json, parquet, folder or a registered format; nothing is read yet.

    Args:
        others: of a tar, members to be found beside the json (`JsonTar`). options: of a registered format.
    """
    if format == "tar":
        return JsonTar(path, others)
    if format == "parquet":
        return ParquetFile(path)
    if format in ("json", "jsonl"):
        return JsonFile(path, lines=format == "jsonl")
    return open_registered(format, path, options or {}) if format in registered() else PictureFolder(path)


def open_records(
    files: str | Path | Sequence[str | Path] | None,
    *,
    format: str = "auto",
    name: str = "",
    index_folder: str | Path | None = None,
    others: Mapping[str, Sequence[str]] | None = None,
    options: Mapping[str, Any] | None = None,
) -> FileRecords:
    """The records of files, patterns (braces, wildcards) and folders (searched recursively), in the order written.

    Args:
        format: tar, jsonl, json or parquet; auto goes by each file's suffix, and by the kind of file a folder holds.
            `folder`: pictures with their captions in .txt files beside them. Or a registered one (`registry`).
        name: name of the source in logs and counts; default: what was given as `files`.
        index_folder: of the files' indexes, see `index_store.IndexStore`.
        others: as of `open_file`.
        options: of a registered format.

    Raises:
        ConfigError: an unknown format. DataError: nothing matches, or a folder holds several kinds of files.
    """
    given = [files] if isinstance(files, str | Path) else list(files or ())
    if format in registered():
        return FileRecords([open_registered(format, one, options or {}) for one in given or (None,)], name or format)
    found = [(Path(one), format) for one in given] if format == "folder" else find_files(given, format)
    return FileRecords([open_file(path, format, others) for path, format in found], name or ", ".join(map(str, given)),
                       IndexStore(index_folder))


class FileRecords:
    """The records of several files, numbered through.

    Args:
        store: where their indexes are kept; None: each is made when it is needed.
    """

    def __init__(self, parts: Sequence[RecordFile], name: str = "", store: IndexStore | None = None) -> None:
        self.parts, self.name, self._store = parts, name, store
        self.files = [part.path for part in parts]
        self.open_files = OpenFiles()

    @cached_property
    def _ends(self) -> list[int]:
        if self._store is not None:
            self._store.fill([part for part in self.parts if isinstance(part, IndexedFile)])
        ends = list(accumulate(sum(map(int, part.sizes)) for part in self.parts))
        damages = [part.damage for part in self.parts if isinstance(part, TarFile) and part.damage]
        if ends[-1] == len(damages) > 0:
            raise BadRecord("damaged file", damages[0])
        if not ends[-1]:
            others = f", nor do the other {len(self.parts) - 1} files" if len(self.parts) > 1 else ""
            raise DataError(f"{self.files[0]}: holds no record{others}.")
        return ends

    @cached_property
    def shard_sizes(self) -> np.ndarray:
        """Records of each file (of each row group of parquet), int64; empty files are left out."""
        sizes = np.array([int(size) for part in self.parts for size in part.sizes], np.int64)
        return sizes[sizes > 0]

    def __len__(self) -> int:
        return self._ends[-1]

    def locate(self, index: int) -> Record:
        """One record, unread where that is possible. Raises DataError as `read`."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: there is no record {index} among {len(self)}")
        number = bisect_right(self._ends, index)
        return self.parts[number].locate(index - (self._ends[number - 1] if number else 0))

    def read(self, index: int) -> Record:
        """One record, read by seek, with `messages` if it is a conversation.

        Raises:
            DataError: one sentence with file and line, item, row or sample, when it is broken or no longer there.
        """
        record = self.locate(index).parsed(self.open_files)
        record.fields = with_messages(record.fields, record.where)
        return record

    def close(self) -> None:
        """Close this process's open files and drop rows kept in memory; reading opens them again."""
        self.open_files.close()
