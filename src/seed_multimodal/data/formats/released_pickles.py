"""Restricted reader of the original's pickled shards, for `seed data convert OLD... --out DIR`.

Pickles can call any function by name. Here the names in NumPy's array pickles resolve to inert stand-ins that only
collect numbers, and all others raise before lookup. Tuples and integer arrays become lists, UTF-8 bytes become texts.
Requires pickle protocol 3 or later. No other file of the project may import `pickle`.
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
from seed_multimodal.data.formats.sources import find_files, run_in_processes
from seed_multimodal.data.formats.tar import PICKLED, TarFile
from seed_multimodal.disk import writable_folder, writing
from seed_multimodal.errors import DataError, SeedError, first_line

MAX_NODES = 5_000_000  # limit of one record: a small pickle can expand to any size
_BROKEN = (
    UnpicklingError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
    OverflowError,
    MemoryError,
    RecursionError,
)


def read_pickle(data: bytes, where: str) -> dict[str, Any]:
    """The dict in a sample's .pkl member, in JSON types. Raises BadRecord: a global (function or class by name), an
    unsupported type, or a damaged pickle."""
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if (
                "PUT" in opcode.name and int(argument or 0) > count + 256
            ):  # would allocate a huge list
                raise ValueError(f"it numbers an object {argument}")
        value: dict[str, Any] = _plain(_PlainUnpickler(io.BytesIO(data)).load(), "", [0])
        if type(value) is not dict:
            raise BadRecord("wrong type", f"contains a {type(value).__name__}, not a dict.")
        return value
    except BadRecord as error:
        raise BadRecord(error.kind, f"{where}: {error}") from None
    except _BROKEN as error:
        raise BadRecord(
            "damaged pickle", f"{where}: cannot be read as a pickle ({first_line(error)})."
        ) from None


class _PlainUnpickler(Unpickler):
    """An unpickler that resolves names only to the stand-ins below."""

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a global; called before anything is imported."""
        known = STAND_INS.get((module.replace("numpy._core.", "numpy.core."), name))
        if known is None:
            raise BadRecord(
                "refused global",
                f"refers to {module}.{name}; only plain values and integer NumPy arrays "
                "are supported.",
            )
        return known


class _StandIn:
    """A callable whose state pickles cannot change."""

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
        if (
            not isinstance(code, str)
            or code.lstrip("<>|=")[:1] not in ("i", "u", "b")
            or len(code) > 4
        ):
            raise BadRecord(
                "wrong type",
                f"contains an array of numpy type {str(code)[:20]!r}, not of integers.",
            )
        self.code, self.order = code.lstrip("<>|="), "<"

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise UnpicklingError("a numpy type has another state")
        self.order = state[1].replace("|", "=")


class _Array:
    """An integer array under construction: nested lists of ints (an int for shape ())."""

    __slots__ = ("value", "size")

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if (
            not isinstance(dtype, _Dtype)
            or not isinstance(data, bytes | bytearray)
            or not isinstance(shape, tuple)
        ):
            raise UnpicklingError("a numpy array has another state")
        flat = np.frombuffer(bytes(data), dtype.order + dtype.code)
        if len(shape) > 8 or math.prod(shape) != len(flat) or min(shape, default=0) < 0:
            raise UnpicklingError("an array's shape does not fit its numbers")
        self.value, self.size = (
            flat.reshape(shape, order="F" if fortran else "C").tolist(),
            len(data),
        )


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any = "C", *_: Any) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


STAND_INS: dict[tuple[str, str], _StandIn] = {
    ("numpy", "ndarray"): _StandIn(lambda: None),  # type argument of `_reconstruct`
    ("numpy", "dtype"): _StandIn(_Dtype),
    ("numpy.core.multiarray", "_reconstruct"): _StandIn(lambda *_: _Array()),
    ("numpy.core.multiarray", "scalar"): _StandIn(
        lambda dtype, data: _from_buffer(data, dtype, ()).value
    ),
    ("numpy.core.numeric", "_frombuffer"): _StandIn(_from_buffer),
}


def _plain(value: Any, path: str, seen: list[int]) -> Any:
    """The value in JSON types; `seen`: number of values so far."""
    seen[0] += 1 + (
        len(value) >> 8
        if isinstance(value, str | bytes)
        else value.size
        if isinstance(value, _Array)
        else 0
    )
    if seen[0] > MAX_NODES:
        raise BadRecord("wrong type", f"has more than {MAX_NODES:,} values.")
    kind = type(value)
    if kind is str or kind is bool or value is None or (kind is int and abs(value) < 1 << 64):
        return value
    if kind is float:
        return value if math.isfinite(value) else None  # JSON has no NaN; LAION's metadata does
    if kind is list or kind is tuple:
        return [_plain(one, f"{path}[{place}]", seen) for place, one in enumerate(value)]
    if kind is dict and all(type(key) is str for key in value):
        return {key: _plain(one, f"{path}.{key}", seen) for key, one in value.items()}
    if kind is _Array:
        return value.value
    if kind is bytes:
        return value.decode("utf-8")
    raise BadRecord(
        "wrong type", f"{path[1:] or 'it'} contains a {kind.__name__}, not a plain value."
    )


@dataclass
class ConvertReport:
    """Counts of converted and existing shards and converted samples; a message per skipped shard or sample."""

    converted: int = 0
    existing: int = 0
    samples: int = 0
    refused: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def convert_shards(tars: Sequence[str | Path], out: str | Path, workers: int = 1) -> ConvertReport:
    """Convert tars (patterns, folders) into `out`, keeping their folders below the common one; existing outputs are
    skipped. Raises DataError."""
    out = writable_folder(Path(out).absolute(), DataError)
    paths = [
        path
        for name, _ in find_files(tars, "tar")
        if not (path := Path(name).absolute()).is_relative_to(out)
    ]
    if not paths:
        raise DataError(f"{out}: contains the shards to be converted; use another --out.")
    folders = [Path(one).absolute() for one in tars if Path(one).is_dir()]
    base = os.path.commonpath([*folders, *(path.parent for path in paths)])
    jobs = [(path, out / path.relative_to(base)) for path in paths]
    left = [(path, target) for path, target in jobs if not target.is_file()]
    report = ConvertReport(existing=len(jobs) - len(left))
    for samples, skipped, refusal in run_in_processes(_convert, left, workers, "convert"):
        report.converted += not refusal
        report.samples += samples
        report.skipped += skipped
        report.refused += [refusal] if refusal else []
    return report


def _convert(job: tuple[Path, Path]) -> tuple[int, list[str], str]:
    """(sample count, messages of skipped samples, error of the shard) for (source, target)."""
    path, target = job
    skipped: list[str] = []
    try:
        with writing(target, DataError):
            return write_shard(target, _samples(TarFile(path), skipped)), skipped, ""
    except (SeedError, ValueError) as error:  # ValueError: a name too long for a tar header
        return (
            0,
            [],
            str(error)
            if isinstance(error, SeedError)
            else f"{target}: cannot be written ({error}).",
        )


def _samples(tar: TarFile, skipped: list[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {"json": bytes}) of each sample; other members (images) are copied."""
    files, written = OpenFiles(limit=1), 0
    for row in range(sum(tar.sizes)):
        record = tar.locate(row)
        try:
            if record.problem is not None:
                raise BadRecord(*record.problem)
            members = {
                extension: record.member(extension, files=files) or b""
                for extension in record.members
            }
            yield record.key, _converted(members, record.location)
            written += 1
        except BadRecord as error:
            if error.kind == "damaged file":
                raise
            skipped.append(str(error))
    if not written:
        raise DataError(f"{tar.path}: has no convertible sample; the first: {skipped[0]}")


def _converted(members: dict[str, bytes], where: str) -> dict[str, bytes]:
    pickles = [extension for extension in members if extension in PICKLED]
    if len(pickles) != 1 or "json" in members:
        raise BadRecord(
            "missing member",
            f"{where}: has {', '.join(sorted(members))}; expected one .pkl member.",
        )
    value = read_pickle(members.pop(pickles[0]), f"{where}.{pickles[0]}")
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return {"json": text.encode("utf-8", "replace"), **members}
