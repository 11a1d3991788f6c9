"""Restricted reader of the original's pickled shards, for `seed data convert OLD... --out DIR`.

Pickles can call any function by name. Here the names in NumPy's array pickles resolve to inert
stand-ins that only collect numbers, and all others raise before lookup. Tuples and integer arrays
become lists, UTF-8 bytes become texts. Requires pickle protocol 3 or later. No other file of the
project may import `pickle`.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickletools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from pickle import Unpickler, UnpicklingError
from typing import Any

import numpy as np

from seed_multimodal.data.formats.contents import find_files
from seed_multimodal.data.formats.record import BadRecord, JsonObject, Record
from seed_multimodal.data.formats.records import run_in_processes
from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.data.formats.storage import DataFile
from seed_multimodal.data.formats.tar import IS_PICKLED, PICKLED, TarFile
from seed_multimodal.disk import writable_folder, writing
from seed_multimodal.errors import DataError, SeedError, first_line

MAX_LENGTH = 50_000_000  # of one record as JSON: a small pickle can expand to any size
# What unpickling of damaged data raises.
_DAMAGE_ERRORS = (
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


def read_pickle(data: bytes, location: str) -> JsonObject:
    """The dict in a sample's .pkl member, in JSON types.

    Raises BadRecord: a global (function or class by name), an unsupported type, or damage.
    """
    try:
        _check_memo(data)
        value = json.loads(
            _json_text(_PlainUnpickler(io.BytesIO(data)).load()),
            parse_constant=lambda name: None,  # NaN, which is in LAION's metadata
            parse_int=_integer,
        )
        if not isinstance(value, dict):
            raise BadRecord("wrong type", f"contains a {type(value).__name__}, not a dict.")
        return value
    except BadRecord as error:
        raise BadRecord(error.kind, f"{location}: {error}") from None
    except _DAMAGE_ERRORS as error:
        raise BadRecord(
            "damaged pickle", f"{location}: cannot be read as plain values ({first_line(error)})."
        ) from None


def _json_text(value: object) -> str:
    """A value as JSON, NaN included. Raises ValueError: longer than `MAX_LENGTH`."""
    chunks: list[str] = []
    length = 0
    for chunk in json.JSONEncoder(default=_plain).iterencode(value):
        length += len(chunk)
        if length > MAX_LENGTH:
            raise ValueError(f"longer than {MAX_LENGTH:,} letters")
        chunks.append(chunk)
    return "".join(chunks)


def _plain(value: object) -> object:
    """What JSON does not have: texts in UTF-8, and arrays."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, _Array):
        return value.value
    raise TypeError(f"a {type(value).__name__}")


def _integer(text: str) -> int:
    value = int(text)
    if abs(value) >= 1 << 64:
        raise ValueError("an integer of more than 64 bits")
    return value


def _check_memo(data: bytes) -> None:
    """Raise ValueError if an object has a number far above the number of operations.

    Unpickling would allocate a list of that length.
    """
    for n_operations, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if "PUT" in opcode.name and int(argument or 0) > n_operations + 256:
            raise ValueError(f"it numbers an object {argument}")


class _PlainUnpickler(Unpickler):
    """An unpickler that resolves names only to the stand-ins below."""

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a global; called before anything is imported."""
        stand_in = STAND_INS.get((module.replace("numpy._core.", "numpy.core."), name))
        if stand_in is None:
            raise BadRecord(
                "refused global",
                f"refers to {module}.{name}; only plain values and integer NumPy arrays "
                "are supported.",
            )
        # A pickle can change the objects that it gets, so each is a new one.
        return partial(stand_in)


class _Dtype:
    """An integer type by its code ("i8") and byte order."""

    def __init__(self, code: object, *_: object) -> None:
        if not re.fullmatch("[<>|=]?[iub][1248]", str(code)):
            raise BadRecord(
                "wrong type",
                f"contains an array of numpy type {str(code)[:20]!r}, not of integers.",
            )
        self.code = str(code)[-2:]
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        self.order = {"<": "<", ">": ">", "=": "=", "|": "="}[state[1]]


class _Array:
    """An integer array under construction: nested lists of ints (an int for shape ())."""

    value: object

    def __init__(self, *_: object) -> None:
        """The arguments are those of NumPy's `_reconstruct`."""

    def __setstate__(self, state: Any) -> None:
        # The state of a NumPy array: version, shape, type, order, content.
        _, shape, dtype, is_fortran, data = state
        # Rows without numbers are not in the file, but take memory.
        if math.prod(max(side, 1) for side in shape) > MAX_LENGTH // 10:
            raise ValueError("an array is too large")
        # Numbers only: the type is one of integers, so nothing is executed or resolved.
        flat = np.frombuffer(data, dtype.order + dtype.code)
        self.value = flat.reshape(shape, order="F" if is_fortran else "C").tolist()


def _from_buffer(data: object, dtype: object, shape: object, order: str = "C") -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


def _scalar(dtype: object, data: object) -> object:
    return _from_buffer(data, dtype, ()).value


STAND_INS: dict[tuple[str, str], Callable[..., object]] = {
    ("numpy", "ndarray"): _Array,  # an argument of `_reconstruct`
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
}


# ---- conversion of shards


@dataclass
class ConvertReport:
    """Counts of shards and samples; a message for each skipped one."""

    converted: int = 0  # shards
    existing: int = 0  # shards
    samples: int = 0
    refused: list[str] = field(default_factory=list)  # messages of shards
    skipped: list[str] = field(default_factory=list)  # messages of samples


def convert_shards(tars: Sequence[str | Path], out: str | Path, workers: int = 1) -> ConvertReport:
    """Convert tars (patterns, folders) into `out`; existing outputs are skipped.

    Their folders below the common one are kept. Raises DataError.
    """
    # 1. The shards, without earlier outputs.
    out = writable_folder(Path(out).absolute(), DataError)
    candidates = [Path(name).absolute() for name, _ in find_files(tars, "tar")]
    paths = [path for path in candidates if not path.is_relative_to(out)]
    if not paths:
        raise DataError(f"{out}: contains the shards to be converted; use another --out.")

    # 2. Their outputs.
    folders = [Path(path).absolute() for path in tars if Path(path).is_dir()]
    base = os.path.commonpath([*folders, *(path.parent for path in paths)])
    jobs = [(path, out / path.relative_to(base)) for path in paths]
    missing = [(path, target) for path, target in jobs if not target.is_file()]

    # 3. The conversion.
    report = ConvertReport(existing=len(jobs) - len(missing))
    for samples, skipped, refusal in run_in_processes(_convert, missing, workers, "convert"):
        report.samples += samples
        report.skipped += skipped
        if refusal:
            report.refused.append(refusal)
        else:
            report.converted += 1
    return report


def _convert(job: tuple[Path, Path]) -> tuple[int, list[str], str]:
    """Convert a shard (source, target).

    Returns the number of samples, the messages of skipped ones, and the error of the shard or "".
    """
    path, target = job
    skipped: list[str] = []
    try:
        samples = _samples(TarFile(DataFile(path)), skipped)
        with writing(target, DataError):
            return write_shard(target, samples), skipped, ""
    except SeedError as error:  # the shard cannot be read or written
        return 0, [], str(error)
    except ValueError as error:  # a name too long for a tar header
        return 0, [], f"{target}: cannot be written ({error})."


def _samples(tar: TarFile, skipped: list[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members) of each sample, with a .json for the pickle; images are copied.

    skipped: receives the messages of samples that cannot be converted.
    """
    n_converted = 0
    for row in range(sum(tar.sizes)):
        record = tar.locate(row)
        try:
            yield record.key, _members(record)
            n_converted += 1
        except BadRecord as error:
            if error.kind == "damaged file":  # of the shard, not of a sample
                raise
            skipped.append(str(error))
    if not n_converted:
        raise DataError(f"{tar.path}: has no convertible sample; the first: {skipped[0]}")


def _members(record: Record) -> dict[str, bytes]:
    """The members of a sample with a .json in place of the pickle. Raises BadRecord."""
    if record.problem is not None and record.problem[0] != IS_PICKLED:
        raise BadRecord(*record.problem)
    # A sample has one pickle, and images that are copied.
    pickles = [extension for extension in record.members if extension in PICKLED]
    if len(pickles) != 1 or "json" in record.members:
        raise BadRecord(
            "missing member",
            f"{record.location}: has {', '.join(sorted(record.members))}; expected one .pkl "
            "member.",
        )
    members = {name: record.member(name) or b"" for name in record.members}
    value = read_pickle(members.pop(pickles[0]), f"{record.location}.{pickles[0]}")
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return {"json": text.encode("utf-8", "replace"), **members}
