"""Finding weights: a local file or folder, or a hub id. Independent of the models' classes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from seed_multimodal.errors import CheckpointError, first_line
from seed_multimodal.hub import is_hub_name

Log = Callable[[str], None] | None
WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")


def first_file(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of `names` that is a file in the folder."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def find_file(path_or_id: str | Path, names: Sequence[str], advice: str) -> Path:
    """The file itself, or one of `names` in a folder or hub repository.

    Raises:
        CheckpointError: not there; the sentence ends with `advice`.
    """
    if Path(path_or_id).is_file():
        return Path(path_or_id)
    folder = find_folder(path_or_id, names, advice)
    found = first_file(folder, names)
    if found is None:
        raise CheckpointError(f"{folder}: holds no {' or '.join(names)}; {advice}.")
    return found


def find_folder(path_or_id: str | Path, files: Sequence[str], advice: str) -> Path:
    """A local folder, or the snapshot of a hub id that holds `files` (shell patterns); errors as `find_file`."""
    place = Path(path_or_id)
    if place.is_dir():
        return place
    kind = "file" if place.suffix in WEIGHT_SUFFIXES else "folder"
    if kind == "file" or not is_hub_name(path_or_id):
        raise CheckpointError(f"{place}: there is no such {kind}; {advice}.")
    return download(str(path_or_id), files, advice)


def download(hub_id: str, files: Sequence[str], advice: str) -> Path:
    """Snapshot folder of those `files` (shell patterns) of a hub repository, from the local cache when it is there.

    Raises:
        CheckpointError: not reachable, with `advice` on what to put where instead.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        if os.environ.get("HF_HUB_OFFLINE") == "1":
            reason = "downloads are off: set HF_HUB_OFFLINE=0 to allow them"
        raise CheckpointError(f"{hub_id}: neither a local folder nor reachable on the hub ({reason}); "
                              f"{advice}.") from error


def read_json(file: Path, advice: str = "put it there") -> dict[str, Any]:
    """A JSON mapping; `CheckpointError` when it is missing (with `advice`) or damaged."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: there is no such file; {advice}.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not a readable JSON file ({error}).") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: holds a {type(values).__name__}, not a mapping.")
    return values
