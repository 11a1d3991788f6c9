"""Files of images that lists name: also below other folders, with backslashes, ignoring case."""

from __future__ import annotations

import os
import unicodedata
from functools import lru_cache
from pathlib import Path

from seed_multimodal.disk import is_file, read_patiently


def find_image(
    path: str, root: str | Path | None = None, list_file: str | Path | None = None
) -> Path | None:
    """The file of an image, or None.

    root: folder of the images; by default the folder of `list_file`, then the current one.

    As in SEED-X's lists, a leading slash may mean that folder.
    """
    if root is not None:
        folders = [Path(root).expanduser()]
    else:
        folders = [Path(list_file).parent if list_file else Path(), Path()]
    path = os.path.expanduser(path)
    # Lists of Windows have backslashes.
    for name in dict.fromkeys((path, path.replace("\\", "/"))):
        candidates = [folder / name.lstrip("/") for folder in folders]
        if Path(name).is_absolute():
            candidates.insert(0, Path(name))
        for candidate in candidates:
            if is_file(candidate):
                return candidate
    # Windows and macOS ignore case. An image as base64 text has no full stop.
    if "." not in path:
        return None
    matches = filter(None, map(_ignoring_case, candidates))
    return next(filter(is_file, matches), None)


def _ignoring_case(path: Path) -> Path | None:
    """The path whose names differ at most in case."""
    found = Path(path.anchor)
    for name in path.relative_to(path.anchor).parts:
        if not os.path.exists(found / name):
            name = _names(found).get(_comparable(name), "")
            if not name:
                return None
        found /= name
    return found


@lru_cache(64)
def _names(folder: Path) -> dict[str, str]:
    """The names in a folder by their `_comparable` form."""
    try:
        names = read_patiently(folder, lambda: os.listdir(folder))
        return {_comparable(name): name for name in names}
    except OSError:
        return {}


def _comparable(name: str) -> str:
    """A name in lower case; macOS writes accents as characters of their own."""
    return unicodedata.normalize("NFC", name.lower())
