"""The shards of the input: each becomes one output shard of the same name.

A tar is a shard; lists, tables, folders of images and registered formats are cut into blocks of records.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from seed_multimodal.data.formats.images import PictureFolder
from seed_multimodal.data.formats.record import Record, RecordFile
from seed_multimodal.data.formats.sources import find_files, nearest_path, open_file, open_registered, registered
from seed_multimodal.data.formats.tar import TarFile
from seed_multimodal.data.pretokenize.input_settings import InputSettings
from seed_multimodal.errors import DataError


@dataclass(frozen=True)
class Shard:
    """Records `start` to `stop` (None: all) of a file; `name`: of the output below `save_dir`, without suffix."""

    name: str
    path: str
    format: str
    start: int = 0
    stop: int | None = None

    @property
    def key(self) -> str:
        """The beginning of its records' keys, in letters that every tar keeps."""
        return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in Path(self.name).name)[-50:]


def list_shards(settings: InputSettings, block: int) -> list[Shard]:
    """All shards of the inputs, in their order; of `block` records where the input is no tar.

    Raises:
        DataError: no record, two inputs of one name, a list that is none; and as `find_inputs`.
    """
    found = find_inputs(settings)
    base = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path, _ in found])
    shards: list[Shard] = []
    for path, format in found:
        name = os.path.splitext(os.path.relpath(path, base))[0].replace(":", "-")
        if format == "tar":
            shards.append(Shard(name, path, format))
            continue
        total = sum(_open(path, format, settings).sizes)
        shards += [Shard(f"{name}-{number:05d}", path, format, start, min(total, start + block))
                   for number, start in enumerate(range(0, total, block))]
    if not shards:
        raise DataError(f"{settings.files}: there is not one record.")
    names: dict[str, Shard] = {}
    for shard in shards:
        other = names.setdefault(shard.name, shard)
        if other is not shard:
            raise DataError(f"{shard.path} and {other.path} would both become {shard.name}.tar: rename one, or use two "
                            "--save_dir.")
    return shards


def find_inputs(settings: InputSettings) -> list[tuple[str, str]]:
    """Files (or folders of images) with their format.

    Raises:
        DataError: nothing matches, files of several formats, no folder of images.
    """
    root = settings.image_root
    if root is not None and not Path(root).is_dir():
        raise DataError(f"image_root: there is no folder {root}{nearest_path(root)}.")
    given = [settings.files] if isinstance(settings.files, str) else settings.files or []
    if settings.format in registered():
        return [(str(open_registered(settings.format, one, settings.format_options).path), settings.format)
                for one in given or (None,)]
    return find_files([os.path.expanduser(one) for one in given], settings.format, pictures=True,
                      recursive=settings.recursive)


def open_shard(shard: Shard, settings: InputSettings) -> tuple[Callable[[int], Record], range]:
    """What gives a record, unread, by its number in the file, and the shard's numbers. Raises DataError: the file
    cannot be opened, or is compressed."""
    if shard.stop is None:
        tar = TarFile(shard.path)
        return tar.locate, range(sum(tar.sizes))
    return _open(shard.path, shard.format, settings).locate, range(shard.start, shard.stop)


@functools.lru_cache(maxsize=2)
def _opened(path: str, format: str, recursive: bool) -> RecordFile:
    return PictureFolder(Path(path), recursive) if format == "folder" else open_file(path, format)


def _open(path: str, format: str, settings: InputSettings) -> RecordFile:
    if format in registered():
        return open_registered(format, path, settings.format_options)
    return _opened(path, format, settings.recursive)
