"""The original's pickled shards: read as data, converted once by `seed data convert OLD... --out DIR`.

A pickle is a program that may call any function by name. Here the names of numpy's own array pickles lead to inert
stand-ins that only collect numbers, every other name is refused before it is looked up, and the sizes that a pickle
claims are checked before it is read. What comes out is plain: dict, list, str, int, float, bool, None. Tuples and
integer arrays become lists, UTF-8 bytes become texts, as json writes them.

Each shard is converted by itself, written whole or not at all; shards that are there are skipped, so that the same
command resumes. This is the one file of the project that may import `pickle`, and it takes `Unpickler` alone.
"""

from __future__ import annotations

import glob
import io
import json
import math
import multiprocessing
import os
import pickletools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from pickle import Unpickler, UnpicklingError
from typing import Any

import numpy as np

from seed_multimodal.data.formats.open_files import OpenFiles
from seed_multimodal.data.formats.record import BadRecord, parse_object
from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.data.formats.sources import find_files
from seed_multimodal.data.formats.tar import PICKLED, TarFile
from seed_multimodal.disk import writable_folder, writing
from seed_multimodal.entry import end_with_parent, log_line
from seed_multimodal.errors import DataError, SeedError
from seed_multimodal.progress import Progress

MAX_NODES = 5_000_000  # of one record: a few bytes of pickle can describe a structure of any size
MAX_DEPTH = 64
_BROKEN = (UnpicklingError, AttributeError, EOFError, IndexError, KeyError, TypeError, ValueError, OverflowError,
           MemoryError, RecursionError)


class _Refused(Exception):
    """Something a pickle requests that is not allowed."""

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.kind = kind


def read_pickle(data: bytes, where: str) -> dict[str, Any]:
    """The dict in a released sample's .pkl member, in json's types.

    Raises:
        BadRecord: naming `where` and what is refused: a global (a function or class by name), a type, or a pickle that
            is broken or claims more than it holds.
    """
    try:
        _check_sizes(data)
        value = _Plain(io.BytesIO(data)).load()
    except _Refused as error:
        raise BadRecord(error.kind, f"{where}: {error}") from None
    except _BROKEN as error:
        raise BadRecord("damaged pickle", f"{where}: cannot be read as a pickle ({error or type(error).__name__}).") \
            from None
    if not isinstance(value, dict):
        raise BadRecord("wrong type", f"{where}: holds a {_named(value)}, not a dict.")
    return _Json(where).convert(value, "", 0)


def _check_sizes(data: bytes) -> None:
    """Walk the opcodes without running them; a memo index far beyond their number would allocate a huge list at
    once."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if "PUT" in opcode.name and int(argument or 0) > count + 256:
            raise ValueError(f"it numbers an object {argument}")
        if opcode.name in ("PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"it uses {opcode.name}, which refers to something outside it")


class _Plain(Unpickler):
    """An unpickler that resolves names to the stand-ins below only."""

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a name of numpy's pickles; called for every global, before anything is imported."""
        known = STAND_INS.get((module.replace("numpy._core.", "numpy.core."), name))
        if known is None:
            raise _Refused("refused global", f"asks for {module}.{name}; only plain values and integer numpy arrays "
                           "are read, and nothing is run.")
        return known


class _Inert:
    """Base of the stand-ins: at most callable, and immutable for the pickle."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any] | None = None) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        if self._call is None:
            raise UnpicklingError("it calls a type")
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise UnpicklingError("it changes a function")


class _Dtype:
    """A data type by its code ("i8") and byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any) -> None:
        if not isinstance(code, str) or code.lstrip("<>|=")[:1] not in ("i", "u", "b") or len(code) > 4:
            raise _Refused("wrong type", f"holds an array of numpy type {str(code)[:20]!r}; only integers are read.")
        self.code, self.order = code.lstrip("<>|="), "<"

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise UnpicklingError("a numpy type has another state")
        self.order = state[1]

    def numbers(self, data: Any, shape: Any, fortran: Any = False) -> Any:
        """Raw bytes as nested lists of ints (a bare int for shape ())."""
        if isinstance(data, str):  # pickled by python 2
            data = data.encode("latin-1")
        if not isinstance(data, bytes | bytearray):
            raise UnpicklingError("an array's numbers are no bytes")
        kind = np.dtype(self.order.replace("|", "=") + self.code)
        flat = np.frombuffer(bytes(data), kind)
        if not isinstance(shape, tuple) or len(shape) > 8 or math.prod(shape) != len(flat) or min(shape, default=0) < 0:
            raise UnpicklingError("an array's shape does not fit its numbers")
        return flat.reshape(shape, order="F" if fortran else "C").tolist()


class _Array:
    """An integer array while its parts arrive."""

    __slots__ = ("value", "size")

    def __init__(self) -> None:
        self.value: Any = None
        self.size = 0

    def fill(self, dtype: Any, data: Any, shape: Any, fortran: bool) -> None:
        """Set the numbers from a pickle's state."""
        if not isinstance(dtype, _Dtype):
            raise UnpicklingError("an array has no numpy type")
        self.value, self.size = dtype.numbers(data, shape, fortran), len(data)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise UnpicklingError("a numpy array has another state")
        _, shape, dtype, fortran, data = state
        self.fill(dtype, data, shape, bool(fortran))


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any = "C", *_: Any) -> _Array:
    array = _Array()
    array.fill(dtype, data, shape, order == "F")
    return array


def _encode(text: Any, encoding: Any) -> bytes:
    """`_codecs.encode(text, "latin1")`: how protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise UnpicklingError("it encodes something else than bytes")
    return text.encode("latin-1")


STAND_INS: dict[tuple[str, str], _Inert] = {
    ("numpy", "ndarray"): _Inert(),
    ("numpy", "dtype"): _Inert(lambda code, *_: _Dtype(code)),
    ("numpy.core.multiarray", "_reconstruct"): _Inert(lambda *_: _Array()),
    ("numpy.core.multiarray", "scalar"): _Inert(lambda dtype, data: _from_buffer(data, dtype, ()).value),
    ("numpy.core.numeric", "_frombuffer"): _Inert(_from_buffer),
    ("_codecs", "encode"): _Inert(_encode),
    ("__builtin__", "bytes"): _Inert(lambda: b"")}  # how protocol 2 writes no bytes at all


class _Json:
    """Converts the result to json's types and counts the items."""

    def __init__(self, where: str) -> None:
        self.where, self.nodes = where, 0

    def convert(self, value: Any, path: str, depth: int) -> Any:
        """`value` in json's types; `path` names it in a refusal."""
        self.nodes += 1 + (len(value) >> 8 if isinstance(value, str | bytes) else
                           value.size if isinstance(value, _Array) else 0)
        if self.nodes > MAX_NODES or depth > MAX_DEPTH:
            raise BadRecord("wrong type", f"{self.where}: is larger than {MAX_NODES:,} values or nested deeper than "
                            f"{MAX_DEPTH}.")
        kind = type(value)
        if kind is str or kind is bool or value is None or (kind is int and abs(value) < 1 << 64):
            return value
        if kind is float:
            return value if math.isfinite(value) else None  # json has no NaN; LAION's metadata does
        if kind is list or kind is tuple:
            return [self.convert(one, f"{path}[{place}]", depth + 1) for place, one in enumerate(value)]
        if kind is dict:
            for key in value:
                if type(key) is not str:
                    raise BadRecord("wrong type", f"{self.where}: a key{' of ' + path if path else ''} is the "
                                    f"{_named(key)} {str(key)[:40]!r}, not a text.")
            return {key: self.convert(one, f"{path}.{key}" if path else key, depth + 1) for key, one in value.items()}
        if kind is _Array and value.value is not None:
            return value.value
        if kind is bytes:
            try:
                return value.decode("utf-8")
            except UnicodeDecodeError:
                raise BadRecord("wrong type", f"{self.where}: {path} holds bytes that are no text.") from None
        raise BadRecord("wrong type", f"{self.where}: {path or 'it'} holds a {_named(value)}, which is no plain value.")


def _named(value: Any) -> str:
    return {_Array: "numpy array", _Dtype: "numpy type"}.get(type(value), type(value).__name__)


@dataclass
class ConvertReport:
    """Shards converted now and already there, shards refused and samples left out (a sentence each), samples
    converted now."""

    converted: int = 0
    kept: int = 0
    samples: int = 0
    refused: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def convert_shards(tars: Sequence[str | Path], out: str | Path, *, skip_bad: bool = False, force: bool = False,
                   workers: int = 1, progress: bool = True) -> ConvertReport:
    """Convert tars (patterns, folders) into `out`, keeping their folders below the common one.

    Args:
        skip_bad: leave out refused samples (they are named and counted) instead of their whole shard.
        force: convert also what is there already.
        workers: processes.

    Raises:
        DataError: no such tars, or a process was killed.
    """
    out = writable_folder(Path(out).absolute(), DataError)
    paths = [Path(path).absolute() for path, _ in find_files(tars, "tar")]
    paths = [path for path in paths if not path.is_relative_to(out)]
    if not paths:
        raise DataError(f"{out}: holds all the shards that are to be converted; give another --out.")
    folders = [Path(one).absolute() for one in tars if Path(one).is_dir()]
    base = os.path.commonpath([*folders, *(path.parent for path in paths
                                           if not any(map(path.is_relative_to, folders)))])
    jobs = {path: out / path.relative_to(base) for path in paths}
    left = [(path, target, skip_bad) for path, target in jobs.items()
            if force or not target.is_file() or target.stat().st_mtime < path.stat().st_mtime]
    report = ConvertReport(kept=len(jobs) - len(left))
    with Progress("convert", len(left), "shard", log=log_line if progress else None) as bar:
        for samples, skipped, refusal in _results(left, workers):
            report.converted += not refusal
            report.samples += samples
            report.skipped += skipped
            report.refused += [refusal] if refusal else []
            bar.update()
    report.refused.sort()
    return report


_Result = tuple[int, list[str], str]  # samples, sentences about those left out, why the shard was refused


def _results(jobs: Sequence[tuple[Path, Path, bool]], workers: int) -> Iterator[_Result]:
    if workers <= 1 or len(jobs) <= 1:
        yield from (_convert(*job) for job in jobs)
        return
    # Spawned processes: this one may hold threads, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=end_with_parent) as pool:
        try:
            for future in as_completed([pool.submit(_convert, *job) for job in jobs]):
                yield future.result()
        except BrokenProcessPool:
            raise DataError("A conversion process was killed (often because memory ran out); the same command "
                            "resumes.") from None


def _convert(path: Path, target: Path, skip_bad: bool) -> _Result:
    skipped: list[str] = []
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):  # of a run that was killed
        left.unlink()
    try:
        with writing(target, DataError):
            samples = write_shard(target, _samples(TarFile(path), skipped if skip_bad else None))
        return samples, skipped, ""
    except SeedError as error:
        return 0, [], str(error)
    except ValueError as error:  # a name that does not fit a tar's header
        return 0, [], f"{target}: cannot be written ({error})."


def _samples(tar: TarFile, skipped: list[str] | None) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {"json": bytes}) of each sample; other members (images) are carried along as they are."""
    files = OpenFiles(limit=1)
    written = 0
    for row in range(sum(tar.sizes)):
        record = tar.locate(row)
        try:
            if record.problem is not None:
                raise BadRecord(*record.problem)
            yield record.key, _converted({extension: record.member(extension, files=files) or b""
                                          for extension in record.members}, record.where)
            written += 1
        except BadRecord as error:
            if skipped is None or error.kind == "damaged file":
                raise
            skipped.append(str(error))
    files.close()
    if not written:
        raise DataError(f"{tar.path}: holds no sample that can be converted.")


def _converted(members: dict[str, bytes], where: str) -> dict[str, bytes]:
    pickles = [extension for extension in members if extension in PICKLED]
    if not pickles and "json" in members:  # a shard that was converted before
        parse_object(members["json"], where)
        return members
    if len(pickles) != 1 or "json" in members:
        raise BadRecord("missing member", f"{where}: has {', '.join(sorted(members))}; one .pkl member was expected.")
    value = read_pickle(members[pickles[0]], f"{where}.{pickles[0]}")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        raise BadRecord("wrong type", f"{where}: a text holds half of a surrogate pair.") from None
    return {"json": text} | {extension: data for extension, data in members.items() if extension not in PICKLED}
