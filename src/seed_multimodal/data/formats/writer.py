"""Records on disk: webdataset shards (a tar, or tar.gz, of KEY.ext members) read and written.

Why not the webdataset library here: it imports torch and, on a torn archive, yields the half-read last sample as a
good one. The format is the same (a test reads our shards with the library); this reader names what is broken.

Peculiar: members are never unpickled; a bad sample is named, reported, skipped and counted, and `max_bad` of them in
a row stop the run. Shards are written byte for byte the same for the same records (no times, owners or gzip stamps).
"""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seed_multimodal.errors import DataError

FORBIDDEN = ("pkl", "pickle", "pyd", "pth", "pt")


@dataclass
class Record:
    """One sample of a shard: its key and the raw bytes of each of its members by extension."""

    key: str
    shard: str
    members: dict[str, bytes]

    @property
    def name(self) -> str:
        """`shard: sample`, as errors show it."""
        return f"{self.shard}: {self.key}"

    def bytes(self, extension: str) -> bytes:
        """Raw bytes of member KEY.extension. Raises DataError naming shard and sample when it is not there."""
        if extension not in self.members:
            have = ", ".join(sorted(self.members)) or "nothing"
            raise DataError(f"{self.name}: no .{extension} member (it has {have}).")
        return self.members[extension]

    def json(self, required: Iterable[str] = ()) -> dict[str, Any]:
        """The parsed .json member. Raises DataError for bad JSON or a missing key, naming shard and sample."""
        try:
            value = json.loads(self.bytes("json"))
        except ValueError as error:
            raise DataError(f"{self.name}: its .json member is not JSON ({error}).") from None
        if not isinstance(value, dict):
            raise DataError(f"{self.name}: its .json member holds a {type(value).__name__}, not an object.")
        for key in required:
            if key not in value:
                raise DataError(f"{self.name}: its .json member has no key {key!r}.")
        return value


@dataclass
class ReadCount:
    """What a reading of shards met: good samples, and one sentence for each bad one."""

    good: int = 0
    bad: list[str] = field(default_factory=list)
    in_a_row: int = 0


def read_shards(
    paths: Iterable[str | Path],
    *,
    required: Iterable[str] = (),
    max_bad: int = 1,
    log: Callable[[str], None] | None = print,
    count: ReadCount | None = None,
) -> Iterator[Record]:
    """Yield every record of webdataset shards, in the order on disk.

    Args:
        paths: .tar or .tar.gz files.
        required: extensions that each sample must have; a sample without one is bad.
        max_bad: so many bad samples in a row are fatal (1: the first one is).
        log: gets one sentence for each skipped sample.
        count: filled while reading, when given.

    Raises:
        DataError: naming shard and sample, for a missing file or when `max_bad` samples in a row are bad.
    """
    if max_bad < 1:
        raise DataError(f"max_bad is {max_bad}; it must be at least 1.")
    count = count if count is not None else ReadCount()
    required = tuple(required)
    for path in paths:
        for item in _read_one(Path(path)):
            problem = item if isinstance(item, str) else _problem(item, required)
            if problem is None:
                count.good, count.in_a_row = count.good + 1, 0
                yield item  # type: ignore[misc]
                continue
            count.bad.append(problem)
            count.in_a_row += 1
            if count.in_a_row >= max_bad:
                raise DataError(problem if max_bad == 1 else f"{problem} ({max_bad} bad samples in a row)")
            if log is not None:
                log(f"skipped: {problem}")


def _problem(record: Record, required: tuple[str, ...]) -> str | None:
    """Why a whole record cannot be used, or None."""
    for extension in record.members:
        if extension.rsplit(".", 1)[-1] in FORBIDDEN:
            return f"{record.name}: member .{extension} may hold code and is not read."
    for extension in required:
        if extension not in record.members:
            return f"{record.name}: no .{extension} member."
    return None


def _read_one(path: Path) -> Iterator[Record | str]:
    """Records of one shard; a str is the sentence about what is broken (then the shard ends)."""
    if not path.is_file():
        raise DataError(f"{path}: no such shard.")
    current: Record | None = None
    last = "its start"
    try:
        with tarfile.open(path, mode="r|*") as archive:
            for member in archive:
                if not member.isreg():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if not stem or not extension:
                    continue
                stream = archive.extractfile(member)
                last = member.name
                data = stream.read() if stream is not None else b""
                if len(data) != member.size:
                    raise tarfile.ReadError("unexpected end of data")
                if current is not None and key != current.key:
                    yield current
                    current = None
                if current is None:
                    current = Record(key, path.name, {})
                if extension.lower() in current.members:
                    yield f"{current.name}: member .{extension.lower()} is there twice."
                    continue
                current.members[extension.lower()] = data
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        # The sample being read when the archive tore is not whole: it is dropped, never yielded.
        yield f"{path.name}: torn or damaged at {last} ({error or type(error).__name__})."
        return
    if current is not None:
        yield current


def write_shard(path: str | Path, records: Iterable[tuple[str, dict[str, bytes]]]) -> int:
    """Write (key, {extension: bytes}) records as a webdataset shard; `.gz` names are compressed. Returns the count.

    The file appears whole or not at all, and equal records give equal bytes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    n = 0
    with open(scratch, "wb") as raw:
        packed = gzip.GzipFile("", "wb", 9, raw, mtime=0) if path.suffix == ".gz" else None
        with tarfile.open(fileobj=packed or raw, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for key, members in records:
                n += 1
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size, info.mode = len(data), 0o644
                    archive.addfile(info, io.BytesIO(data))
        if packed is not None:
            packed.close()
    os.replace(scratch, path)
    return n
