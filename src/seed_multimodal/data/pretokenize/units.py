"""Input shards as units of work, and where the samples of a unit lie.

A unit is one tar, or a block of records of a json file, of a folder of pictures or of the nano set. Units are numbered
in the order of the inputs, and each becomes one output folder; nothing of one depends on another.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from seed_multimodal.data.pretokenize.nano import nano_references
from seed_multimodal.data.pretokenize.samples import IMAGE_KEYS, SampleReference
from seed_multimodal.data.pretokenize.input_settings import InputSettings
from seed_multimodal.data.formats.json_lines import index_array, index_lines, is_lines
from seed_multimodal.data.formats.files import expand_pattern, nearest_path
from seed_multimodal.data.formats.tar_headers import Damaged, split_name, tar_members
from seed_multimodal.errors import DataError

JSON_ENDINGS = (".json", ".jsonl", ".ndjson")
PICTURE_ENDINGS = (*(f".{key}" for key in IMAGE_KEYS), ".bmp", ".gif", ".tif", ".tiff", ".avif")
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")
TEXT_MEMBERS = ("txt", "json")


@dataclass(frozen=True)
class Unit:
    """One piece of work: samples `start` to `stop` (None: all) of a file; `size`: bytes of the file or its records.

    `weight` says how much work it is compared with the others.
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
        """What a finished part must have been made of to count as this unit's."""
        return {"file": Path(self.path).name, "size": self.size, "start": self.start, "stop": self.stop}


@dataclass
class UnitSamples:
    """The samples of a unit, unread, and a sentence about damage of its file (empty: none)."""

    references: Sequence[SampleReference]
    damage: str = field(default="")


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
            units.append(Unit(len(units), format, str(path), size=path.stat().st_size))
            continue
        total = _count(path, format, settings)
        size = path.stat().st_size if format == "json" else total
        for start in range(0, total, block):
            units.append(Unit(len(units), format, str(path), start, min(total, start + block), size))
    if not units:
        raise DataError(f"{settings.files}: there is not one record.")
    return units


def locate(unit: Unit, settings: InputSettings) -> UnitSamples:
    """Where the unit's samples lie; nothing of a picture is read yet.

    Raises:
        DataError: the file cannot be opened, or is compressed.
    """
    if unit.format == "tar":
        return _in_tar(Path(unit.path))
    part = slice(unit.start, unit.stop)
    if unit.format == "json":
        starts, ends, numbers = _json_index(Path(unit.path))
        name = "item" if numbers is None else "line"
        places = range(len(starts)) if numbers is None else numbers
        return UnitSamples([SampleReference(f"{unit.path}: {name} {places[i]}", unit.path,
                            {"json": (unit.path, int(starts[i]), int(ends[i] - starts[i]))})
                        for i in range(len(starts))[part]])
    if unit.format == "folder":
        return UnitSamples([_of_picture(path) for path in _pictures_in(Path(unit.path))[part]])
    return UnitSamples(nano_references(unit.path, settings)[part])


# ---- which files


def _inputs(settings: InputSettings) -> list[tuple[Path, str]]:
    """Files (folders of pictures, the nano set) with their format, in the order written."""
    if settings.format == "nano":
        from seed_multimodal.data.formats.nano import find_nano

        return [(find_nano(settings.files if isinstance(settings.files, str) else None), "nano")]
    wanted = [settings.files] if isinstance(settings.files, str) else list(settings.files or ())
    found: dict[Path, str] = {}
    for one in wanted:
        place = Path(one).expanduser()
        if place.is_dir():
            found |= _in_folder(place, settings)
        else:
            found |= {path: _format_of(path, settings.format) for path in expand_pattern(str(place))}
    return list(found.items())


def _in_folder(folder: Path, settings: InputSettings) -> dict[Path, str]:
    tars = sorted(folder.rglob("*.tar") if settings.recursive else folder.glob("*.tar"))
    jsons = sorted(path for path in folder.iterdir() if path.suffix.lower() in JSON_ENDINGS)
    for format, files in (("tar", tars), ("json", jsons)):
        if files and settings.format in ("auto", format):
            return {path: format for path in files if path.is_file() and not path.name.startswith(".")}
    if settings.format in ("auto", "folder") and _pictures_in(folder):
        return {folder: "folder"}
    wanted = "tars, json files or pictures" if settings.format == "auto" else f"files of format {settings.format}"
    raise DataError(f"{folder}: this folder holds no {wanted}.")


def _format_of(path: Path, format: str) -> str:
    if format != "auto":
        return format
    if path.suffix.lower() in JSON_ENDINGS:
        return "json"
    if path.suffix.lower() == ".tar":
        return "tar"
    if path.suffix.lower() in COMPRESSED:
        raise DataError(f"{path}: compressed files cannot be read at random positions; unpack it first.")
    raise DataError(f"{path}: neither a .tar nor a json file; say what it is by format.")


def _count(path: Path, format: str, settings: InputSettings) -> int:
    if format == "json":
        return len(_json_index(path)[0])
    return len(_pictures_in(path)) if format == "folder" else len(nano_references(str(path), settings))


@functools.lru_cache(maxsize=2)
def _json_index(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    if path.suffix.lower() != ".json" or is_lines(path):
        return index_lines(path)
    return (*index_array(path), None)


# ---- where samples lie


def _in_tar(path: Path) -> UnitSamples:
    references: list[SampleReference] = []
    current: SampleReference | None = None
    wanted = {*IMAGE_KEYS, *TEXT_MEMBERS}
    try:
        for name, offset, size in tar_members(path):
            key, extension = split_name(name)
            if extension not in wanted:
                continue
            where = f"{path}: sample {key}"
            if current is None or current.where != where:
                current = SampleReference(where, str(path))
                references.append(current)
            if extension in current.spans:  # two samples of one name, which of their members belong together?
                current.broken = f"{where}: has two .{extension} members."
            current.spans[extension] = (str(path), offset, size)
    except Damaged as error:  # the sample being read where the tar tears is not whole
        kept = references[:-1]
        return UnitSamples(kept, f"{path}: torn or damaged after {len(kept)} whole samples ({error}); they are used.")
    return UnitSamples(references)


@functools.lru_cache(maxsize=2)
def _pictures_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_ENDINGS
                  and path.is_file() and not path.name.startswith("."))


def _of_picture(path: Path) -> SampleReference:
    """A picture with its caption in a .txt file of the same name."""
    raw = SampleReference(str(path), str(path), fields={"image": str(path.resolve())})
    text = path.with_suffix(".txt")
    if text.is_file():
        raw.spans["txt"] = (str(text), 0, text.stat().st_size)
    return replace(raw)
