"""Files that last: replaced whole or not at all, folders' names on the disk, usual permissions, JSON objects read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from seed_multimodal.errors import CheckpointError


def flush_folder(folder: str | Path) -> None:
    """Make the names in a folder survive a power cut (a file's own `fsync` covers its content only)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(file: Path, text: str, errors: str = "strict") -> None:
    """Put a text into a file, flushed, whole or not at all; raises OSError and leaves what was there.

    Args:
        errors: what becomes of letters that UTF-8 does not have, as of `open`.
    """
    scratch = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with open(scratch, "w", encoding="utf-8", errors=errors) as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(scratch, file)
    except OSError:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise


def replace_copy(source: Path, folder: Path) -> None:
    """Copy a file into a folder, in place of its namesake, whole or not at all."""
    scratch = folder / f".{source.name}.{os.getpid()}.tmp"
    shutil.copyfile(source, scratch)
    os.replace(scratch, folder / source.name)


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


def sha256_of(file: str | Path) -> str:
    """The SHA-256 of a file's content in hex, read piece by piece; raises OSError."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def give_usual_mode(file: str | Path) -> None:
    """The permissions that any new file has here; safetensors makes files that only their owner may read."""
    mask = os.umask(0o022)  # can only be read by setting it
    os.umask(mask)
    os.chmod(file, 0o666 & ~mask)


def read_json_object(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: it is not JSON, or holds something else.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid json ({error}).") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: must hold a json object.")
    return values
