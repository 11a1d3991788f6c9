"""The original's pickled shards: read as data, converted once by `seed data convert OLD... --out DIR`.

A pickle is a program that may call any function by name. Here the names of numpy's own array pickles lead to inert
stand-ins that only collect numbers, and every other name is refused before it is looked up. Tuples and integer arrays
become lists, UTF-8 bytes texts. Read are pickles of protocol 3 and later. This is the one file of the project that may
import `pickle`, and it takes `Unpickler` alone.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickletools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import Unpickler, UnpicklingError
from typing import Any

import numpy as np

from seed_multimodal.data.formats.open_files import OpenFiles
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.data.formats.sources import find_files, in_processes
from seed_multimodal.data.formats.tar import PICKLED, TarFile
from seed_multimodal.disk import writable_folder, writing
from seed_multimodal.errors import DataError, SeedError, first_line

MAX_NODES = 5_000_000  # of one record: a few bytes of pickle can describe a structure of any size
_BROKEN = (UnpicklingError, AttributeError, EOFError, IndexError, KeyError, TypeError, ValueError, OverflowError,
           MemoryError, RecursionError)


def read_pickle(data: bytes, where: str) -> dict[str, Any]:
    """The dict in a sample's .pkl member, in json's types. Raises BadRecord, which names what is refused: a global (a
    function or class by name), a type, or a pickle that is broken or claims more than it holds."""
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if "PUT" in opcode.name and int(argument or 0) > count + 256:  # it would allocate a huge list at once
                raise ValueError(f"it numbers an object {argument}")
        value: dict[str, Any] = _plain(_PlainUnpickler(io.BytesIO(data)).load(), "", [0])
        if type(value) is not dict:
            raise BadRecord("wrong type", f"holds a {type(value).__name__}, not a dict.")
        return value
    except BadRecord as error:
        raise BadRecord(error.kind, f"{where}: {error}") from None
    except _BROKEN as error:
        raise BadRecord("damaged pickle", f"{where}: cannot be read as a pickle ({first_line(error)}).") from None


class _PlainUnpickler(Unpickler):
    """An unpickler that resolves names to the stand-ins below only."""

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a name of numpy's pickles; called for every global, before anything is imported."""
        known = STAND_INS.get((module.replace("numpy._core.", "numpy.core."), name))
        if known is None:
            raise BadRecord("refused global", f"asks for {module}.{name}; only plain values and integer numpy arrays "
                           "are read, and nothing is run.")
        return known


class _StandIn:
    """A function for pickles, which they cannot change."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise UnpicklingError("it changes a function")


class _Dtype:
    """An integer type by its code ("i8") and byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or code.lstrip("<>|=")[:1] not in ("i", "u", "b") or len(code) > 4:
            raise BadRecord("wrong type", f"holds an array of numpy type {str(code)[:20]!r}; only integers are read.")
        self.code, self.order = code.lstrip("<>|="), "<"

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise UnpicklingError("a numpy type has another state")
        self.order = state[1].replace("|", "=")


class _Array:
    """An integer array while its parts arrive: nested lists of ints (a bare int for shape ())."""

    __slots__ = ("value", "size")

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray) or not isinstance(shape, tuple):
            raise UnpicklingError("a numpy array has another state")
        flat = np.frombuffer(bytes(data), dtype.order + dtype.code)
        if len(shape) > 8 or math.prod(shape) != len(flat) or min(shape, default=0) < 0:
            raise UnpicklingError("an array's shape does not fit its numbers")
        self.value, self.size = flat.reshape(shape, order="F" if fortran else "C").tolist(), len(data)


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any = "C", *_: Any) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


STAND_INS: dict[tuple[str, str], _StandIn] = {
    ("numpy", "ndarray"): _StandIn(lambda: None),  # a type, of which `_reconstruct` makes an array
    ("numpy", "dtype"): _StandIn(_Dtype),
    ("numpy.core.multiarray", "_reconstruct"): _StandIn(lambda *_: _Array()),
    ("numpy.core.multiarray", "scalar"): _StandIn(lambda dtype, data: _from_buffer(data, dtype, ()).value),
    ("numpy.core.numeric", "_frombuffer"): _StandIn(_from_buffer)}


def _plain(value: Any, path: str, seen: list[int]) -> Any:
    """The value in json's types; `seen`: how many values that makes so far."""
    seen[0] += 1 + (len(value) >> 8 if isinstance(value, str | bytes) else
                    value.size if isinstance(value, _Array) else 0)
    if seen[0] > MAX_NODES:
        raise BadRecord("wrong type", f"is larger than {MAX_NODES:,} values.")
    kind = type(value)
    if kind is str or kind is bool or value is None or (kind is int and abs(value) < 1 << 64):
        return value
    if kind is float:
        return value if math.isfinite(value) else None  # json has no NaN; LAION's metadata does
    if kind is list or kind is tuple:
        return [_plain(one, f"{path}[{place}]", seen) for place, one in enumerate(value)]
    if kind is dict and all(type(key) is str for key in value):
        return {key: _plain(one, f"{path}.{key}", seen) for key, one in value.items()}
    if kind is _Array:
        return value.value
    if kind is bytes:
        return value.decode("utf-8")
    raise BadRecord("wrong type", f"{path[1:] or 'it'} holds a {kind.__name__}, which is no plain value.")


@dataclass
class ConvertReport:
    """Shards converted now and already there, samples converted now; a sentence for each shard or sample left out."""

    converted: int = 0
    kept: int = 0
    samples: int = 0
    refused: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def convert_shards(tars: Sequence[str | Path], out: str | Path, workers: int = 1) -> ConvertReport:
    """Convert tars (patterns, folders) into `out`, keeping their folders below the common one; those that are there
    are skipped. Raises DataError."""
    out = writable_folder(Path(out).absolute(), DataError)
    paths = [path for name, _ in find_files(tars, "tar") if not (path := Path(name).absolute()).is_relative_to(out)]
    if not paths:
        raise DataError(f"{out}: holds all the shards that are to be converted; give another --out.")
    folders = [Path(one).absolute() for one in tars if Path(one).is_dir()]
    base = os.path.commonpath([*folders, *(path.parent for path in paths)])
    jobs = [(path, out / path.relative_to(base)) for path in paths]
    left = [(path, target) for path, target in jobs if not target.is_file()]
    report = ConvertReport(kept=len(jobs) - len(left))
    for samples, skipped, refusal in in_processes(_convert, left, workers, "convert"):
        report.converted += not refusal
        report.samples += samples
        report.skipped += skipped
        report.refused += [refusal] if refusal else []
    return report


def _convert(job: tuple[Path, Path]) -> tuple[int, list[str], str]:
    """(samples, sentences about those left out, why the shard was refused) of (its file, the new one)."""
    path, target = job
    skipped: list[str] = []
    try:
        with writing(target, DataError):
            return write_shard(target, _samples(TarFile(path), skipped)), skipped, ""
    except (SeedError, ValueError) as error:  # ValueError: a name that does not fit a tar's header
        return 0, [], str(error) if isinstance(error, SeedError) else f"{target}: cannot be written ({error})."


def _samples(tar: TarFile, skipped: list[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {"json": bytes}) of each sample; other members (images) are carried along as they are."""
    files, written = OpenFiles(limit=1), 0
    for row in range(sum(tar.sizes)):
        record = tar.locate(row)
        try:
            if record.problem is not None:
                raise BadRecord(*record.problem)
            members = {extension: record.member(extension, files=files) or b"" for extension in record.members}
            yield record.key, _converted(members, record.where)
            written += 1
        except BadRecord as error:
            if error.kind == "damaged file":
                raise
            skipped.append(str(error))
    if not written:
        raise DataError(f"{tar.path}: holds no sample that can be converted; the first: {skipped[0]}")


def _converted(members: dict[str, bytes], where: str) -> dict[str, bytes]:
    pickles = [extension for extension in members if extension in PICKLED]
    if len(pickles) != 1 or "json" in members:
        raise BadRecord("missing member", f"{where}: has {', '.join(sorted(members))}; one .pkl member was expected.")
    value = read_pickle(members.pop(pickles[0]), f"{where}.{pickles[0]}")
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return {"json": text.encode("utf-8", "replace"), **members}
