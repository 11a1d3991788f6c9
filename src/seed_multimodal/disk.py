"""Files on disk: replaced whole or not at all, locks between processes, disk errors as sentences."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import filelock

from seed_multimodal.errors import CheckpointError, ConfigError, SeedError, first_line

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EROFS)  # of file systems without locks


@contextlib.contextmanager
def folder_lock(folder: Path, kind: type[SeedError], busy: str = "", timeout: float = 0.0, name: str = ".lock"
                ) -> Iterator[None]:
    """Hold the lock of a folder (file `name` in it), which is made if it is not there; the file is gone at the end.

    Args:
        busy: what another run that holds it is doing, for the sentence.
        timeout: seconds to wait for it; negative: without end.

    Raises:
        kind: another run holds it, or the disk refuses.
    """
    held = filelock.FileLock(folder / name)
    with contextlib.ExitStack() as stack:
        with writing(folder, kind):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(held.acquire(timeout=timeout))
            except TimeoutError:
                raise kind(f"{folder}: another run is {busy}; let it end first.") from None
            except NotImplementedError:
                pass
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (folder / name).unlink()


def disk_reason(error: OSError) -> str:
    """Why a file could not be written, in words."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"the disk or quota is full ({reason})" if disk_is_full(error) else reason


def disk_is_full(error: Exception) -> bool:
    """Whether an error says that the disk or a quota is full; safetensors has the number in its text only."""
    return getattr(error, "errno", None) in _FULL or any(f"(os error {number})" in str(error) for number in _FULL)


@contextlib.contextmanager
def writing(place: str | Path, kind: type[SeedError] = CheckpointError) -> Iterator[None]:
    """An `OSError` inside becomes `kind`: "FILE: cannot be written (reason).", naming the system's file if it names
    one, else `place`."""
    try:
        yield
    except OSError as error:
        raise kind(f"{error.filename or place}: cannot be written ({disk_reason(error)}).") from error


def writable_folder(folder: str | Path, kind: type[SeedError]) -> Path:
    """The folder, made if need be and tried with a byte, before long work for it. Raises `kind`: the disk refuses."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:  # it names a file that nobody knows
        raise kind(f"{folder}: cannot be written ({disk_reason(error)}).") from error
    return Path(folder)


@contextlib.contextmanager
def replacing_path(file: str | Path) -> Iterator[Path]:
    """As `replacing`, for libraries that write by path: the file made at the path given takes the name of `file`."""
    file = Path(file)
    # In containers processes of several machines have the same numbers, and may share the disk.
    scratch = file.with_name(f".{file.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield scratch
        with open(scratch, "r+b") as handle:
            os.fsync(handle.fileno())
        os.replace(scratch, file)
        flush_folder(file.parent)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename == str(scratch):
            error.filename = str(file)  # sentences name the file that was to be written
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replacing(file: str | Path, mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """A handle (as of `open`; texts are UTF-8) whose content takes the name of `file` at the end, flushed to the disk,
    whole or not at all. Raises OSError: the disk refuses; what was there stays."""
    if "b" not in mode:
        options = {"encoding": "utf-8", **options}
    with replacing_path(file) as scratch, open(scratch, mode, **options) as handle:
        yield handle


def flush_folder(folder: str | Path) -> None:
    """Make the names in a folder survive a power cut (a file's own `fsync` covers its content only)."""
    if os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(file: Path, text: str, errors: str = "strict") -> None:
    """Put a text into a file, flushed, whole or not at all; `errors` as of `open`. Raises OSError."""
    with replacing(file, "w", errors=errors) as handle:
        handle.write(text)


def replace_folder(temporary: Path, target: Path) -> None:
    """A finished folder gets its name; what stood there is removed last, and put back if the renaming fails.

    Raises OSError.
    """
    if not (target.is_dir() and any(target.iterdir())):
        os.replace(temporary, target)
        return
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    os.replace(target, old)
    try:
        os.replace(temporary, target)
    except OSError:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def output_folder(out: str | Path, *, force: bool, what: str, read: Iterable[str | Path | None] = ()) -> Path:
    """The folder that `--out` names for a result (`what`), refused before long work is done for it.

    Args:
        force: it may hold something, which will be replaced.
        read: files and folders that the work reads, which must not be in a folder that is replaced.

    Raises:
        ConfigError: it is a file, is not empty, or replacing it would take away what is read.
    """
    target = Path(out).resolve()
    if target.is_file():
        raise ConfigError(f"{out}: is a file; {what} needs a folder.")
    if target.is_dir() and any(target.iterdir()):
        if not force:
            raise ConfigError(f"{out}: exists already and is not empty (--force replaces it).")
        lost = next((one for one in (*read, Path.cwd()) if one and Path(one).resolve().is_relative_to(target)), None)
        if lost is not None:
            raise ConfigError(f"{out}: holds {lost}, which is used here and would be gone; choose another folder.")
    return target


@contextlib.contextmanager
def making_folder(target: Path, shown: str | Path, kind: type[SeedError] = CheckpointError) -> Iterator[Path]:
    """A new folder that takes the name of `target` at the end, complete or not at all; if the disk refuses, `kind` is
    raised about `shown`."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with writing(shown, kind):
            temporary.mkdir(parents=True)
            yield temporary
            replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def set_default_mode(file: str | Path) -> None:
    """The permissions that any new file has here; safetensors makes files that only their owner may read."""
    mask = os.umask(0o022)  # can only be read by setting it
    os.umask(mask)
    os.chmod(file, 0o666 & ~mask)


def read_json_object(file: Path, kind: type[SeedError] = CheckpointError, advice: str = "") -> dict[str, Any]:
    """A JSON file that holds an object; raises `kind` if it is missing (with `advice`) or holds something else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise kind(f"{file}: there is no such file{advice and f'; {advice}'}.") from error
    except OSError as error:
        raise kind(f"{file}: cannot be read ({disk_reason(error)}).") from error
    except (ValueError, RecursionError) as error:  # also undecodable bytes, and brackets nested without end
        raise kind(f"{file}: not valid json ({first_line(error)}).") from error
    if not isinstance(values, dict):
        raise kind(f"{file}: must hold a json object.")
    return values
