"""The index of one data file, kept in a file of its own: a line of json, and arrays that are mapped into memory.

It belongs to a file of the same size, time of change and kind; any other (torn, foreign, of another version) counts as
none.
"""

from __future__ import annotations

import json
import mmap
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from seed_multimodal.disk import replacing
from seed_multimodal.errors import DataError

VERSION = 1
MAP_FROM = 1 << 16  # bytes: smaller indexes are read, since a process may map some 65,000 files only
_MAGIC, _ALIGN = b"seed index ", 64

Arrays = Mapping[str, np.ndarray]
Scan = Callable[[], Arrays]


class IndexedFile:
    """A file whose records are found by an index; base of the readers.

    Attributes:
        path: the file. kind: what its index depends on beside its content.
    """

    kind: str

    def __init__(self, path: Path) -> None:
        self.path, self._name = path, str(path)
        self._arrays: Arrays | None = None
        self._kept: Path | None = None  # the file of its index
        self._stamp: tuple[int, int] | None = None  # of the file, as the index in `_kept` has it

    def scans(self) -> Sequence[Scan]:
        """Calls (picklable) whose results `join` makes the index of; several can run beside each other.

        Raises:
            DataError: the file cannot be opened.
        """
        raise NotImplementedError

    def join(self, found: Sequence[Arrays]) -> Arrays:
        """The index out of the results of `scans`, in their order."""
        (only,) = found
        return only

    @property
    def arrays(self) -> Arrays:
        """The index, from a store or made now.

        Raises:
            DataError: the file cannot be read, or was changed on the way to this process, where others count its
                records as they were.
        """
        if self._arrays is None and self._kept is not None:  # it came from another process
            if self._stamp != stamp_of(self.path):
                raise DataError(f"{self.path}: has changed since it was indexed; do not change files in use.")
            self.take(self._kept)
        if self._arrays is None:
            self._arrays = self.join([scan() for scan in self.scans()])
        return self._arrays

    @property
    def indexed(self) -> bool:
        """Whether the index is here."""
        return self._arrays is not None

    def take(self, kept: Path) -> bool:
        """Use the index in this file; False: it does not belong to the file as it is now."""
        stamp = stamp_of(self.path)
        arrays = read_index(kept, stamp, self.kind)
        if arrays is not None:
            self._arrays, self._kept, self._stamp = arrays, kept, stamp
        return arrays is not None

    def __getstate__(self) -> dict[str, Any]:
        if self._kept is None:
            return self.__dict__
        own = {name: value for name, value in self.__dict__.items()
               if not isinstance(getattr(type(self), name, None), cached_property)}
        return {**own, "_arrays": None}  # mapped anew where it arrives


def stamp_of(path: Path) -> tuple[int, int]:
    """Size in bytes and time of change in ns of a file. Raises DataError: it cannot be opened."""
    try:
        about = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror}).") from None
    return about.st_size, about.st_mtime_ns


def write_index(place: Path, stamp: tuple[int, int], kind: str, arrays: Arrays) -> None:
    """Write an index, whole or not at all. Raises OSError."""
    offset, layout = 0, {}
    for name, array in arrays.items():
        layout[name] = [np.lib.format.dtype_to_descr(array.dtype), list(array.shape), offset]
        offset += -(-array.nbytes // _ALIGN) * _ALIGN
    head = json.dumps({"version": VERSION, "kind": kind, "file": stamp, "arrays": layout, "bytes": offset}).encode()
    start = b"%s%08x %010d\n" % (_MAGIC, zlib.crc32(head), len(head))
    with replacing(place) as file:
        file.write(start + head)
        file.write(b"\0" * (-file.tell() % _ALIGN))
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            file.write(b"\0" * (-array.nbytes % _ALIGN))


def read_index(place: Path, stamp: tuple[int, int], kind: str) -> Arrays | None:
    """The arrays of an index, large ones mapped into memory; None: there is none, or not of this file as it is now."""
    try:
        with open(place, "rb") as file:
            start = file.read(len(_MAGIC) + 20)
            length = int(start[-11:]) if start.startswith(_MAGIC) else -1
            head = file.read(length) if 0 <= length < 1 << 20 else b""
            if int(start[len(_MAGIC):len(_MAGIC) + 8], 16) != zlib.crc32(head):
                return None
            about: dict[str, Any] = json.loads(head)
            first = -(-(len(start) + length) // _ALIGN) * _ALIGN
            total = os.fstat(file.fileno()).st_size
            if (about["version"], about["kind"], tuple(about["file"])) != (VERSION, kind, stamp):
                return None
            if total != first + about["bytes"]:
                return None
            data = _mapped(file.fileno()) if total >= MAP_FROM else None
            data = start + head + file.read() if data is None else data
        return {name: _view(data, np.lib.format.descr_to_dtype(_tuples(descr)), shape, first + offset)
                for name, (descr, shape, offset) in about["arrays"].items()}
    except (OSError, ValueError, KeyError, TypeError):  # there is none; it is something else
        return None


def _mapped(file: int) -> Any:
    """The content of a file, mapped; None: this process has too many, or the disk cannot."""
    try:
        return mmap.mmap(file, 0, access=mmap.ACCESS_READ)
    except OSError:
        return None


def _view(data: Any, dtype: np.dtype, shape: Sequence[int], offset: int) -> np.ndarray:
    if not np.prod(shape):
        return np.empty(shape, dtype)
    return np.frombuffer(data, dtype, int(np.prod(shape)), offset).reshape(shape)


def _tuples(descr: Any) -> Any:
    """json's lists as the tuples that numpy describes fields with."""
    return [tuple(one) for one in descr] if isinstance(descr, list) else descr
