"""Atomic file writes, locks between processes, repeated reads, disk error messages."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import resource
import shutil
import stat
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from seed_multimodal.errors import CheckpointError, ConfigError, ReadError, SeedError, first_line

T = TypeVar("T")
JsonObject = dict[str, Any]  # an object of a JSON file, a state, or a record

# Errors of a file system without locks, and of a full one.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Errors that a path or its file causes; all others are faults of the machine.
_OF_THE_FILE = (
    errno.EACCES,
    errno.EINVAL,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENODEV,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENXIO,
    errno.EPERM,
)
BUSY = (408, 429, 500, 502, 503, 504)  # answers after which the same request may succeed
READ_PAUSES = (
    "1 2 4 8 16 32"  # seconds before a read is tried again; SEED_READ_PAUSES replaces them
)
MAX_STEM = 200  # bytes of 255; tags, numbers and suffixes take the others


def raise_file_limit() -> int:
    """Allow this process as many open files as the system does, and return their number."""
    _, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS allows less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, allowed))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


@contextlib.contextmanager
def try_lock(folder: Path, kind: type[SeedError], name: str = ".lock") -> Iterator[bool | None]:
    """Hold the lock of a folder (`flock` of the file `name` in it), created if missing.

    Yields False: another process has it; None: the file system has no locks, such as Lustre
    mounted without `flock`. The kernel releases the lock when the process ends, on whichever
    machine. Raises `kind`: the file cannot be created or locked.
    """
    import fcntl  # not on Windows

    with writing(folder, kind):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666)
    is_held: bool | None = True
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_held = False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                reason = disk_reason(error)
                raise kind(f"{folder / name}: cannot be locked ({reason}).") from error
            is_held = None
        yield is_held
    finally:
        # The file stays: removing it would let a third process lock a new file of this name next to
        # a waiting one. Closing is not enough while a forked process has the handle, too.
        if is_held:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


@contextlib.contextmanager
def folder_lock(
    folder: Path,
    kind: type[SeedError],
    busy: str = "",
    timeout: float = 0.0,
    name: str = ".lock",
    on_wait: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Hold `try_lock` of a folder; without locks nothing is locked.

    busy: what the other run does, for the message.
    timeout: seconds to wait; negative: forever.
    on_wait: called once, before waiting.

    Raises `kind`: locked by another run.
    """
    deadline = math.inf if timeout < 0 else time.monotonic() + timeout
    waits = False
    while True:
        with try_lock(folder, kind, name) as is_held:
            if is_held is not False:
                yield
                return
        if time.monotonic() >= deadline:
            raise kind(f"{folder}: another run is {busy}; wait until it ends.")
        if not waits:
            on_wait()
        waits = True
        time.sleep(0.05)


def status_of(error: Exception) -> int | None:
    """HTTP status of a failed request; None: there was no answer."""
    # Of httpx and requests, of aiohttp, and of Google's client.
    response = getattr(error, "response", None)
    for owner, name in ((response, "status_code"), (error, "status"), (error, "code")):
        status = getattr(owner, name, None)
        if isinstance(status, int):
            return status
    return None


def _reason(error: Exception) -> Exception:
    """The error for which fsspec's HTTP client calls a file missing, or the error itself."""
    cause = error.__cause__
    is_missing = isinstance(error, FileNotFoundError)
    return cause if is_missing and isinstance(cause, Exception) else error


def is_machine_fault(error: Exception) -> bool:
    """Whether reading the same file may succeed later: a busy server, a lost connection, no free
    file handle, an I/O error."""
    error = _reason(error)
    status = status_of(error)
    if status is not None:
        return status in BUSY
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError):
        return error.errno is not None and error.errno not in (*_OF_THE_FILE, *_FULL)
    # Else of a client library, whose errors of connections have no common base.
    return not isinstance(
        error, ImportError | LookupError | NotImplementedError | TypeError | ValueError
    )


def read_patiently(
    path: str | Path,
    read: Callable[[], T],
    failures: type[Exception] = OSError,
    before_retry: Callable[[], None] = lambda: None,
    action: str = "read",
) -> T:
    """The result of `read`, which is repeated after pauses at faults of the machine.

    failures: errors of reading. Those of the file itself are raised as they are.
    action: read or written, for messages.

    Raises ReadError: the fault remains.
    """
    pauses = os.environ.get("SEED_READ_PAUSES", READ_PAUSES).split()
    while True:
        try:
            return read()
        except SeedError:
            raise
        except failures as error:
            if not is_machine_fault(error):
                raise
            message = f"{path}: cannot be {action} ({reading_reason(error)})"
            if not pauses:
                raise ReadError(f"{message}; this is not a fault of the data.") from error
            pause = float(pauses.pop(0))
            sys.stderr.write(f"{message}; again in {pause:g} s\n")
            before_retry()
            time.sleep(pause)


def is_file(path: str | Path) -> bool:
    """Whether a file exists. Raises ReadError, where `os.path.isfile` returns False."""
    return path_type(path) == "file"


def path_type(path: str | Path) -> str:
    """`file`, `folder`, or "": neither, or missing. Raises ReadError."""
    try:
        mode = read_patiently(path, lambda: os.stat(path)).st_mode
    except (OSError, ValueError):  # no such file, or no valid name
        return ""
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else ""


def reading_reason(error: Exception) -> str:
    """Why a file could not be read."""
    error = _reason(error)
    return getattr(error, "strerror", None) or first_line(error)


def disk_reason(error: OSError) -> str:
    """Why a file could not be written."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"the disk or quota is full ({reason})" if disk_is_full(error) else reason


def disk_is_full(error: Exception) -> bool:
    """Whether an error means a full disk or quota; safetensors has the errno only in its text."""
    if getattr(error, "errno", None) in _FULL:
        return True
    return any(f"(os error {code})" in str(error) for code in _FULL)


@contextlib.contextmanager
def writing(path: str | Path, kind: type[SeedError] = CheckpointError) -> Iterator[None]:
    """Context that converts `OSError` to `kind`: "FILE: cannot be written (reason).", with the
    error's file, else `path`."""
    try:
        yield
    except OSError as error:
        file = error.filename or path
        raise kind(f"{file}: cannot be written ({disk_reason(error)}).") from error


def writable_folder(folder: str | Path, kind: type[SeedError]) -> Path:
    """Create the folder if missing and check that it is writable. Raises `kind`: not writable."""
    with writing(folder, kind):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    return Path(folder)


@contextlib.contextmanager
def atomic_path(file: str | Path) -> Iterator[Path]:
    """As `atomic_open`, for libraries that write by path: the temporary path is renamed to `file`,
    or to the target of a symbolic link."""
    target = Path(os.path.realpath(file))
    scratch = temporary_name(target)
    try:
        yield scratch
        flush(scratch)
        os.replace(scratch, target)
        flush(target.parent)
    except OSError as error:
        if error.filename == str(scratch):
            error.filename = str(file)  # messages name the target file
        raise
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_open(file: str | Path) -> Iterator[BinaryIO]:
    """A handle that replaces `file` atomically at the end. Raises OSError: disk error; the old file
    stays."""
    with atomic_path(file) as scratch, open(scratch, "wb") as handle:
        yield handle


def temporary_name(path: Path) -> Path:
    """A hidden random name next to a path; machines that share a disk may have equal process
    ids."""
    return path.with_name(f".{file_stem(path.name)}.{uuid.uuid4().hex[:12]}.tmp")


def file_stem(text: str) -> str:
    """Any text as the stem of a file's name: printable, in letters of the file system's encoding,
    of at most `MAX_STEM` bytes."""
    # Line breaks, and bytes of names that are not UTF-8, are not printable.
    letters = [letter if letter.isprintable() and letter != "/" else "_" for letter in text]
    encoding = sys.getfilesystemencoding()
    content = "".join(letters).encode(encoding, "ignore")[:MAX_STEM]
    return content.decode(encoding, "ignore") or "image"


def text_stem(text: str) -> str:
    """As `file_stem`, of a text for a model: its beginning, without blanks and punctuation."""
    letters = [letter if letter.isalnum() or letter in "-_." else "_" for letter in text]
    return file_stem("".join(letters).strip("._")[:60])


def flush(path: str | Path) -> None:
    """Make a file's content, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def strict_json(value: object, **options: Any) -> str:
    """A value as JSON, with options of `json.dumps`; numbers that are not finite become null."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        finite = json.loads(json.dumps(value), parse_constant=lambda name: None)
        return json.dumps(finite, **options)


def replace_text(file: Path, text: str) -> None:
    """Write a text file in UTF-8 (names that are not: escaped) atomically and flush it to the disk.
    Raises OSError."""
    with atomic_open(file) as handle:
        handle.write(text.encode(errors="backslashreplace"))


def replace_json(file: Path, value: object) -> None:
    """Write a JSON file, as `replace_text`."""
    replace_text(file, strict_json(value, indent=1) + "\n")


def replace_folder(temporary: Path, target: Path) -> None:
    """Rename a finished folder to `target`, then remove the old one. Raises OSError."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.is_dir():
        os.replace(target, old)
    os.replace(temporary, target)
    shutil.rmtree(old, ignore_errors=True)


def output_folder(
    out: str | Path, *, force: bool, label: str, inputs: Iterable[str | Path | None] = ()
) -> Path:
    """The folder that `--out` names for a result, checked before long work; with `force` it will be
    replaced.

    Raises ConfigError: it is a file, is not empty, or replacing it would remove an input.
    """
    target = Path(out).resolve()
    if target.is_file():
        raise ConfigError(f"{out}: is a file; {label} needs a folder.")
    if target.is_dir() and any(target.iterdir()):
        if not force:
            raise ConfigError(
                f"{out}: exists already and is not empty (--force, where there is one, replaces "
                "it)."
            )
        # Replacing it must remove neither an input nor the working directory.
        for path in (*inputs, Path.cwd()):
            if path and Path(path).resolve().is_relative_to(target):
                raise ConfigError(
                    f"{out}: holds {path}, which is used here and would be gone; choose another "
                    "folder."
                )
    return target


@contextlib.contextmanager
def atomic_folder(
    target: Path, label: str | Path, kind: type[SeedError] = CheckpointError
) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `target` on success and removed on failure.

    label: the folder in messages, such as the relative path that the user gave.

    Raises `kind`: disk error.
    """
    temporary = temporary_name(target)
    try:
        with writing(label, kind):
            temporary.mkdir(parents=True)
            yield temporary
            replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_json_object(
    file: Path, kind: type[SeedError] = CheckpointError, advice: str = ""
) -> JsonObject:
    """A JSON file that holds an object; raises `kind` if it is missing (with `advice`) or holds
    something else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        next_step = f"; {advice}" if advice else ""
        raise kind(f"{file}: no such file{next_step}.") from error
    except OSError as error:
        raise kind(f"{file}: cannot be read ({disk_reason(error)}).") from error
    except (ValueError, RecursionError) as error:
        # Also undecodable bytes, and brackets nested without end.
        raise kind(f"{file}: not valid json ({first_line(error)}).") from error
    if not isinstance(values, dict):
        raise kind(f"{file}: must hold a json object.")
    return values
