"""Input files as units of work, and the records of a unit.

A unit is one tar, or a block of records of a list, a table, a folder of pictures or a registered format. Units are
numbered in the order of the inputs, and each becomes one output folder; nothing of one depends on another.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seed_multimodal.data.formats.images import IMAGE_KEYS, PictureFolder
from seed_multimodal.data.formats.record import Record, RecordFile
from seed_multimodal.data.formats.sources import find_files, nearest_path, open_file, open_registered, registered
from seed_multimodal.data.formats.storage import is_remote, stat
from seed_multimodal.data.formats.tar import COMPRESSED, TarFile
from seed_multimodal.data.pretokenize.input_settings import InputSettings
from seed_multimodal.errors import DataError

TAR_MEMBERS = (*IMAGE_KEYS, "txt", "json")  # the members read from a tar


@dataclass(frozen=True)
class Unit:
    """One piece of work: samples `start` to `stop` (None: all) of a file; `size`: bytes of the file or its records.

    `weight`: amount of work, relative to the others.
    """

    number: int
    format: str
    path: str
    start: int = 0
    stop: int | None = None
    size: int = 0

    @property
    def weight(self) -> int:
        """Bytes of a tar, records of a block."""
        return (self.size if self.stop is None else self.stop - self.start) or 1

    @property
    def stem(self) -> str:
        """The file's name without suffixes, in letters that any tar keeps; part of every key."""
        name = Path(self.path).name.split(".")[0] or "data"
        return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in name)[:40]

    def identity(self) -> dict[str, Any]:
        """Identity of the unit's input, which a finished part must match."""
        return {"file": Path(self.path).name, "size": self.size, "start": self.start, "stop": self.stop}


def list_units(settings: InputSettings, block: int) -> list[Unit]:
    """All units of the inputs, numbered.

    Args:
        block: records of a unit where the input is no tar.

    Raises:
        DataError: nothing matches, files of several formats, a file that is no json list, or no folder of pictures.
    """
    root = settings.image_root
    if root is not None and not Path(root).is_dir():
        raise DataError(f"image_root: there is no folder {root}{nearest_path(root)}.")
    units: list[Unit] = []
    for path, format in _inputs(settings):
        if format == "tar":
            units.append(Unit(len(units), format, path, size=stat(path)[0]))
            continue
        total, _ = _numbered(path, format, settings)
        size = total if os.path.isdir(path) else stat(path)[0]
        for start in range(0, total, block):
            units.append(Unit(len(units), format, path, start, min(total, start + block), size))
    if not units:
        raise DataError(f"{settings.files}: there is not one record.")
    return units


def unit_records(unit: Unit, settings: InputSettings) -> tuple[list[Record], str]:
    """The unit's records, unread, and a sentence about damage of its file (empty: none).

    Raises:
        DataError: the file cannot be opened, or is compressed.
    """
    if unit.stop is not None:
        _, locate = _numbered(unit.path, unit.format, settings)
        return [locate(row) for row in range(unit.start, unit.stop)], ""
    shard = TarFile(unit.path, {name: (name,) for name in TAR_MEMBERS})
    found = [shard.locate(row) for row in range(len(shard.arrays["keys"]))]
    return [record for record in found if record.members], shard.damage


def _numbered(path: str, format: str, settings: InputSettings) -> tuple[int, Callable[[int], Record]]:
    """How many records an input other than a tar has, and what gives one by its number."""
    if format in registered():
        file = open_registered(format, path, settings.format_options)
    else:
        file = _opened(path, format, settings.recursive)
    return sum(file.sizes), file.locate


@functools.lru_cache(maxsize=2)
def _opened(path: str, format: str, recursive: bool) -> RecordFile:
    return PictureFolder(path, recursive) if format == "folder" else open_file(path, format)


def _inputs(settings: InputSettings) -> list[tuple[str, str]]:
    """Files (or folders) with their format, in the order written."""
    wanted = [settings.files] if isinstance(settings.files, str) else settings.files or []
    if settings.format in registered():
        return [(str(open_registered(settings.format, one, settings.format_options).path), settings.format)
                for one in wanted or (None,)]
    wanted = [one if is_remote(one) else str(Path(one).expanduser()) for one in wanted]
    found = find_files(wanted, settings.format, pictures=True, recursive=settings.recursive)
    packed = next((path for path, _ in found if path.lower().endswith(COMPRESSED)), None)
    if packed is not None:
        raise DataError(f"{packed}: compressed files cannot be read at random positions; unpack it first.")
    return found
