"""Files on disk: replaced whole or not at all, locks between processes, hashes, permissions, error translation.

Every file that must survive a kill is written through `replacing`; every lock between processes is `lock`; every disk
error becomes a sentence through `writing`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
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

LOCK = ".lock"
PROBES, PROBE = 32, 4096  # places of a file that `sampled_hash` reads, bytes at each
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EROFS)


@contextlib.contextmanager
def lock(file: str | Path, timeout: float = -1.0, *, remove: bool = False) -> Iterator[None]:
    """Hold an exclusive lock between processes in a file, where the file system has locks.

    Args:
        timeout: seconds to wait for another process (then TimeoutError); negative: without end.
        remove: delete the file at the end, while it is still locked.
    """
    held = filelock.FileLock(str(file))
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held.acquire(timeout=timeout))
        except NotImplementedError:
            pass
        except OSError as error:  # filelock.Timeout is one, without errno
            if error.errno not in _NO_LOCKS:
                raise
        try:
            yield
        finally:
            if remove:
                with contextlib.suppress(OSError):
                    Path(file).unlink()


@contextlib.contextmanager
def folder_lock(folder: Path, kind: type[SeedError], busy: str = "", timeout: float = 0.0, name: str = LOCK
                ) -> Iterator[None]:
    """Hold the lock of a folder (file `name` in it), which is made if it is not there; the file is gone at the end.

    Args:
        busy: what another run is doing that holds it, for the sentence.
        timeout: as of `lock`.

    Raises:
        kind: another run holds it, or the disk refuses.
    """
    with contextlib.ExitStack() as held:
        with writing(folder, kind):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(lock(folder / name, timeout, remove=True))
            except TimeoutError:
                raise kind(f"{folder}: another run is {busy}; let it end first.") from None
        yield


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
    """A handle whose content takes the name of `file` at the end, flushed to the disk, whole or not at all.

    Args:
        mode, options: as of `open`; texts are UTF-8.

    Raises:
        OSError: the disk refuses; what was there stays, and nothing else is left behind.
    """
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
    """Put a text into a file, flushed, whole or not at all; raises OSError and leaves what was there. `errors`: what
    becomes of letters that UTF-8 does not have, as of `open`."""
    with replacing(file, "w", errors=errors) as handle:
        handle.write(text)


def replace_copy(source: Path, folder: Path) -> None:
    """Copy a file into a folder, in place of its namesake, whole or not at all."""
    with open(source, "rb") as original, replacing(folder / source.name) as handle:
        shutil.copyfileobj(original, handle, 1 << 20)


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
    """The folder that `--out` names for a result, refused before long work is done for it.

    Args:
        force: it may hold something, which will be replaced.
        what: the result, as in "the tokenizer".
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
    """A new folder that takes the name of `target` at the end, complete or not at all.

    Args:
        shown: the folder's name in the sentence if the disk refuses, which is raised as `kind`.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with writing(shown, kind):
            temporary.mkdir(parents=True)
            yield temporary
            replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256_of(file: str | Path) -> str:
    """The SHA-256 of a file's content in hex, read piece by piece; raises OSError."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sampled_hash(file: str | Path) -> str:
    """A hash of a file's content at `PROBES` places, which tells files of equal length apart without reading all of
    them; raises OSError."""
    with open(file, "rb") as handle:
        digest, last = hashlib.sha256(), max(0, os.fstat(handle.fileno()).st_size - PROBE)
        for place in sorted({last * number // (PROBES - 1) for number in range(PROBES)}):
            handle.seek(place)
            digest.update(handle.read(PROBE))
    return digest.hexdigest()[:16]


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
