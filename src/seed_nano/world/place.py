"""Where nano's drawings and fixed lists are."""

from __future__ import annotations

import os
from pathlib import Path

from seed_multimodal.errors import DataError

SHARD = "sprites.tar"
LISTS = "evaluation.json"  # the fixed lists of scenes, see `evaluation`
BUILD_HINT = "build it with: python -m seed_nano.world build --out data/nano"


def find_world(path: str | Path | None = None) -> Path:
    """Folder of the sprites: `path`, else $SEED_NANO_DATA, else data/nano of the project or the current folder.

    Raises:
        DataError: no manifest.json is there.
    """
    given = path or os.environ.get("SEED_NANO_DATA")
    project = Path(__file__).resolve().parents[3]
    places = [Path(given).expanduser()] if given else [project / "data" / "nano", Path.cwd() / "data" / "nano"]
    for place in places:
        if (place / "manifest.json").is_file():
            return place
    raise DataError(f"{places[-1]}: nano's drawings are not there (no manifest.json). They ship with the repository, "
                    f"in data/nano: run from its root, or name that folder in SEED_NANO_DATA; or {BUILD_HINT}")


def is_world(folder: Path) -> bool:
    """Whether a folder holds nano's drawings."""
    return (folder / SHARD).is_file() and (folder / "manifest.json").is_file()
