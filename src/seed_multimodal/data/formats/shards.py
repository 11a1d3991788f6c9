"""Writes webdataset shards: tars of KEY.ext members, byte-equal for equal records."""

from __future__ import annotations

import glob
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO

from seed_multimodal.disk import atomic_open


class ShardWriter:
    """Adds records to an open file with webdataset's `TarWriter`, without times and owners."""

    def __init__(self, file: IO[bytes]) -> None:
        from webdataset import TarWriter  # imports torch

        self._tar = TarWriter(
            file,
            user="",
            group="",
            mode=0o644,
            mtime=0,
            encoder=False,
            compress=False,
            keep_meta=True,
        )
        # `TarWriter` ignores its argument `format`.
        self._tar.tarstream.format = tarfile.USTAR_FORMAT
        self.count = 0

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Write a record's members in order. Raises ValueError: a name is too long for a tar."""
        for extension, data in members.items():  # separately, since `write` would sort them
            self._tar.write({"__key__": key, extension: data})
        self.count += 1

    def close(self) -> None:
        """Write the end marker; the file stays open."""
        self._tar.close()


@contextmanager
def open_shard(path: str | Path) -> Iterator[ShardWriter]:
    """A writer that creates the shard atomically; leftovers of killed runs are removed.

    Only one process may write it at a time.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        leftover.unlink()
    with atomic_open(path) as file, closing(ShardWriter(file)) as writer:
        yield writer


def write_shard(path: str | Path, records: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    """Write (key, {extension: bytes}) records as a shard; returns their number."""
    with open_shard(path) as writer:
        for key, members in records:
            writer.add(key, members)
    return writer.count
