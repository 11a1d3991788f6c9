"""The input of pre-tokenization, in our keys or an original file, and its shards.

Each tar, or block of records of other formats, becomes one output shard.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from seed_multimodal.config import as_mapping, from_compat, load_yaml
from seed_multimodal.data.formats.record import JsonObject, RecordFields, RecordFile
from seed_multimodal.data.formats.records import FileRecords, open_records
from seed_multimodal.data.formats.storage import is_remote, stat_files
from seed_multimodal.data.formats.tar import TarFile
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.settings import positive, read_settings, setting

Stat = tuple[int, str]  # size and version, see `storage.stat`


@dataclass
class InputSettings:
    """The input and its filters (`shape_problem`, `similarity_problem` of `formats.pairs`.

    None: off).
    """

    # folders, patterns with braces; optional for a registered format
    files: str | list[str] | None = None
    format: str = "auto"  # as in `formats.records.open_records`
    format_options: JsonObject = setting(factory=dict)  # of a registered format
    # folder of the listed images; None: that of the list, then the current one
    image_root: str | None = None
    # content -> key, over the record type's defaults; or a preset's name
    fields: str | JsonObject = setting(factory=dict)
    use_caption_in_metadata: bool = False  # in tars: caption from KEY.json instead of KEY.txt
    caption_key_in_metadata: str = "top_caption"
    similarity_thr: int | float | None = None
    min_resolution: int | float | None = None
    min_aspect_ratio: int | float | None = setting(None, above=0, maximum=1)
    num_frames: int = positive(4)  # frames sampled from each video
    num_images: int | None = positive(5)  # images of a story; None: 2 or more


def read_input_settings(
    config: RecordFields | str | Path, fields: str | dict[str, str] | None = None
) -> InputSettings:
    """Settings from a mapping, a YAML file (ours or original), or the name of a folder, file or
    pattern; overridden by `fields` of the command line.

    Raises ConfigError: an unknown target, key or value.
    """
    label = "data"
    plain: object = config
    if isinstance(config, str | Path):
        label = str(config)
        plain = load_yaml(config) if label.endswith((".yaml", ".yml")) else {"files": label}
    values = as_mapping(plain, label)
    if "_target_" in values:
        values = from_compat("data_files:input_keys")(values, label)
    if fields is not None:
        values["fields"] = fields
    return read_settings(InputSettings, values, label)


def parse_fields(text: str | None) -> str | dict[str, str] | None:
    """Parse `--fields vqa` or `--fields image=file,question=q`.

    Raises ConfigError: a pair without `=`.
    """
    if text is None or "=" not in text:
        return text
    pairs = [piece.split("=") for piece in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise ConfigError(
            f"--fields {text!r} must be a preset's name or comma-separated NAME=KEY pairs."
        )
    return dict(pairs)


class InputStates:
    """What inputs were like when shards were made of them: number, bytes and a digest of the
    versions of the files that an input reads, and a checksum of the contents of local ones.

    Not seen are changes of images that a list names, of remote files whose server lists no sizes,
    and of single files of equal size among many whose contents `FileRecords.checksum` does not
    sample.
    """

    def __init__(self) -> None:
        self._listings: dict[str, dict[str, Stat]] = {}  # of remote folders, read once
        self._states: dict[str, JsonObject] = {}  # by path, without checksums
        self._checksums: dict[str, int | None] = {}

    def state(self, file: RecordFile) -> JsonObject:
        """The state of an input, as JSON values."""
        return {**self._state(file), "checksum": self._checksum(file)}

    def is_same(self, file: RecordFile, before: JsonObject) -> bool:
        """Whether an input is as it was; copies have other times, so then contents are compared."""
        now = self._state(file)
        if any(before.get(key) != now[key] for key in ("files", "bytes")):
            return False
        if before.get("version") == now["version"]:
            return True
        return before.get("checksum") is not None and before["checksum"] == self._checksum(file)

    def _state(self, file: RecordFile) -> JsonObject:
        key = str(file.path)
        if key not in self._states:
            paths = _paths(file)
            stats = [*filter(None, map(self._stat, paths))]
            self._states[key] = {
                "files": len(paths),
                "bytes": sum(size for size, _ in stats),
                "version": f"{zlib.crc32(repr(stats).encode()):08x}",
            }
        return self._states[key]

    def _stat(self, path: str) -> Stat | None:
        folder, name = os.path.split(path)
        if not is_remote(path):
            return stat_files(folder, [name]).get(name)
        if folder not in self._listings:
            self._listings[folder] = stat_files(folder, [])
        return self._listings[folder].get(name)

    def _checksum(self, file: RecordFile) -> int | None:
        key = str(file.path)
        if key not in self._checksums:
            is_local = not any(map(is_remote, _paths(file)))
            self._checksums[key] = FileRecords([file], key).checksum if is_local else None
        return self._checksums[key]


def _paths(file: RecordFile) -> list[str]:
    """The files that an input reads; of registered formats there may be none."""
    return [*map(str, getattr(file, "files", ()))]


@dataclass(frozen=True)
class Shard:
    """Records `start` to `stop` (None: all) of a file."""

    name: str  # output path below `save_dir`, without suffix
    file: RecordFile
    start: int = 0
    stop: int | None = None


def list_shards(settings: InputSettings, block: int) -> list[Shard]:
    """All shards of the inputs, in order, of `block` records for other formats than tar.

    Raises DataError: no record; and as `find_inputs`.
    """
    files = find_inputs(settings)
    base = os.path.commonpath([os.path.dirname(os.path.abspath(file.path)) for file in files])
    shards = []
    for file in files:
        name = os.path.relpath(file.path, base).replace(":", "-")
        if isinstance(file, TarFile):
            shards.append(Shard(os.path.splitext(name)[0], file))
            continue
        total = sum(file.sizes)
        for index, start in enumerate(range(0, total, block)):
            stop = min(total, start + block)
            shards.append(Shard(f"{name}-{index:05d}", file, start, stop))
    if not shards:
        raise DataError(f"{settings.files}: contains no record.")
    return shards


def find_inputs(settings: InputSettings) -> Sequence[RecordFile]:
    """The files, or folders of images. Raises DataError: nothing matches, or several formats."""
    records = open_records(
        settings.files, format=settings.format, options=settings.format_options, in_order=True
    )
    return records.record_files
