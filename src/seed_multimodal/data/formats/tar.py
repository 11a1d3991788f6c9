"""Random access to webdataset shards: where each sample of a .tar lies, found by reading its headers once.

Why: sample order must be a function of (seed, step), which a stream cannot give. About 41 bytes per sample are kept, in
arrays. Neighbouring members with the same key are one sample, as for the webdataset library.

Peculiar: plain .tar only, since a position inside a .tar.gz cannot be read without unpacking all before it. With an
`index_folder` the index of a shard is kept between runs; a shard that changed is indexed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from seed_multimodal.data.formats.packed import PackedStrings
from seed_multimodal.data.formats.tar_headers import Damaged, split_name, tar_members
from seed_multimodal.errors import DataError

# Byte offset and size of the picture and of the caption's member; offset -1: the sample has none.
SPAN = np.dtype([("image", "<i8"), ("image_size", "<u4"), ("text", "<i8"), ("text_size", "<u4")])


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard in the order on disk: `spans` of type SPAN [N] and their keys."""

    spans: np.ndarray
    keys: PackedStrings


class TarIndex:
    """The samples of many shards, numbered through; `sizes`: samples per shard, int64 [shards]."""

    def __init__(self, shards: Sequence[Path], parts: Sequence[ShardIndex]) -> None:
        self.shards, self.parts = list(shards), list(parts)
        self.sizes = np.array([len(part.spans) for part in parts], np.int64)
        self._ends = np.cumsum(self.sizes)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, index: int) -> tuple[int, int]:
        """(shard number, sample number inside it) of a sample."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard] - self.sizes[shard])


def index_shards(
    shards: Sequence[Path],
    image_keys: Sequence[str],
    text_key: str,
    *,
    keep_torn: bool = False,
    index_folder: str | Path | None = None,
    log: Callable[[str], None] | None = print,
) -> TarIndex:
    """Index shards in the order given.

    Args:
        image_keys: extensions of a picture, the preferred first; `text_key`: the extension of the caption's member.
        keep_torn: use the whole samples before the damage of a torn shard, and `log` its sentence.
        index_folder: where indexes of earlier runs are found and new ones written (each whole or not at all).

    Raises:
        DataError: naming the tar that cannot be opened, is compressed, torn or no tar, or names a member twice.
    """
    parts = []
    for shard in shards:
        kept = _kept_file(shard, (*image_keys, text_key), Path(index_folder)) if index_folder else None
        part = _read_kept(kept) if kept else None
        if part is None:
            part, damage = scan_shard(shard, image_keys, text_key)
            if damage and not keep_torn:
                raise DataError(damage)
            if damage and log is not None:
                log(f"{damage} The {len(part.keys)} whole samples before that are used.")
            if kept and not damage:
                _write_kept(kept, part)
        parts.append(part)
    return TarIndex(shards, parts)


def scan_shard(path: Path, image_keys: Sequence[str], text_key: str) -> tuple[ShardIndex, str]:
    """Index one shard. Returns what is whole, and a sentence about its damage (empty: none).

    Raises:
        DataError: it cannot be opened, is compressed, or a sample has two members of one extension.
    """
    wanted = {*image_keys, text_key}
    keys: list[str] = []
    spans: list[tuple[int, int, int, int]] = []
    current = ""
    found: dict[str, tuple[int, int]] = {}
    damage = ""
    try:
        for name, offset, size in tar_members(path):
            key, extension = split_name(name)
            if key and key != current:
                if current:
                    keys.append(current)
                    spans.append(_span(found, image_keys, text_key))
                current, found = key, {}
            if extension in wanted:
                if extension in found:
                    raise DataError(f"{path}: sample {key} has two .{extension} members.")
                found[extension] = (offset, size)
    except Damaged as error:  # the sample being read where the tar tears is not whole: it is dropped
        after = f"after sample {keys[-1]}" if keys else "in its first sample"
        damage, current = f"{path}: torn or damaged {after} ({error}).", ""
    if current:
        keys.append(current)
        spans.append(_span(found, image_keys, text_key))
    return ShardIndex(np.array(spans, SPAN), PackedStrings.of(keys)), damage


def _span(found: dict[str, tuple[int, int]], image_keys: Sequence[str], text_key: str) -> tuple[int, int, int, int]:
    image = next((found[key] for key in image_keys if key in found), (-1, 0))
    return (*image, *found.get(text_key, (-1, 0)))


def _kept_file(shard: Path, extensions: Sequence[str], folder: Path) -> Path:
    """The file of a shard's index; its name changes with the shard's place, size and time."""
    try:
        about = shard.stat()
    except OSError as error:
        raise DataError(f"{shard}: cannot be opened ({error.strerror}).") from None
    mark = repr((str(shard.resolve()), about.st_size, about.st_mtime_ns, tuple(extensions)))
    return folder / f"{shard.name}.{hashlib.sha256(mark.encode()).hexdigest()[:16]}.npz"


def _read_kept(file: Path) -> ShardIndex | None:
    try:
        with np.load(file, allow_pickle=False) as kept:
            return ShardIndex(kept["spans"], PackedStrings(kept["data"], kept["ends"]))
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):  # none yet, or damaged: the shard is read instead
        return None


def _write_kept(file: Path, part: ShardIndex) -> None:
    scratch = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(scratch, "wb") as handle:
            np.savez(handle, spans=part.spans, data=part.keys.data, ends=part.keys.ends)
        os.replace(scratch, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise DataError(f"{file.parent}: the index of a shard cannot be written there ({error.strerror}).") from None


class ShardFiles:
    """Reads pieces of shards; at most `limit` files stay open, and each process (a forked worker) opens its own."""

    def __init__(self, limit: int = 64) -> None:
        self.limit = limit
        self._owner = os.getpid()
        self._open: OrderedDict[Path, int] = OrderedDict()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """`size` bytes of a file from `offset`. Raises DataError when they are no longer there."""
        if self._owner != os.getpid():
            self.close()
            self._owner = os.getpid()
        try:
            if path not in self._open:
                self._open[path] = os.open(path, os.O_RDONLY)
            self._open.move_to_end(path)
            while len(self._open) > self.limit:
                os.close(self._open.popitem(last=False)[1])
            data = b""
            while len(data) < size:
                piece = os.pread(self._open[path], size - len(data), offset + len(data))
                if not piece:
                    raise DataError(f"{path}: it is shorter than when it was indexed; do not change shards in use.")
                data += piece
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
        return data

    def close(self) -> None:
        """Close what this process holds open."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[ShardFiles], tuple[int]]:
        return ShardFiles, (self.limit,)  # open files stay behind when a worker is spawned
