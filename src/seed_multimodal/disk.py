"""Files that last: a folder's names flushed to the disk, the usual permissions, JSON objects read with one sentence."""

from __future__ import annotations

import json
import os
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
