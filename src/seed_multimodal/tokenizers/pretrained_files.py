"""Where initial weights come from, a local path or a hub id, and how it is told what was taken from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seed_multimodal.errors import CheckpointError
from seed_multimodal.tokenizers.checkpoints import HUB_ID, download, grouped
from seed_multimodal.weights import LoadReport

Log = Callable[[str], None] | None
WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")


@dataclass
class InitialReport(LoadReport):
    """A `LoadReport` and the tensors that were fitted: name → what was done."""

    fitted: dict[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """One line: counts, then the names grouped by their first part."""
        parts = [str(self)]
        for what, names in (("not in the file", self.missing), ("ignored", self.ignored)):
            parts += [f"{what}: {grouped(names)}"] if names else []
        parts += [f"{name} {what}" for name, what in self.fitted.items()]
        return "; ".join(parts) + "."


def find_file(path_or_id: str | Path, names: tuple[str, ...], advice: str) -> Path:
    """The file itself, or one of `names` in a folder or hub repository.

    Raises:
        CheckpointError: not there; the sentence ends with `advice`.
    """
    place = Path(path_or_id)
    if place.is_file():
        return place
    folder = find_folder(path_or_id, names, advice)
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder}: holds no {' or '.join(names)}; {advice}.")
    return found


def find_folder(path_or_id: str | Path, files: tuple[str, ...], advice: str) -> Path:
    """A local folder, or the snapshot of a hub id that holds `files` (shell patterns); errors as `find_file`."""
    place = Path(path_or_id)
    if place.is_dir():
        return place
    is_id = HUB_ID.fullmatch(str(path_or_id)) and place.suffix not in WEIGHT_SUFFIXES and not place.parent.exists()
    if not is_id:
        raise CheckpointError(f"{place}: there is no such {'file' if place.suffix in WEIGHT_SUFFIXES else 'folder'}; "
                              f"{advice}.")
    return download(str(path_or_id), files, advice)


def read_json(file: Path, advice: str) -> dict[str, Any]:
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


def told(report: InitialReport, log: Log) -> InitialReport:
    """`report`, after saying it."""
    if log is not None:
        log(report.describe())
    return report
