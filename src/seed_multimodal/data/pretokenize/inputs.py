"""The input: a description in our keys, or one of the original pre-tokenisation files; and its shards.

    files: data/unsplash/webdataset        # folders, patterns with braces, lists of them
    format: auto                           # tar, json (lists or an object per line), parquet, folder, a registered one
    fields: vqa                            # which keys hold what: a preset of the kind, or a mapping
    min_resolution: 180                    # filters; without a key nothing is dropped for it

Each shard becomes one output shard of the same name: a tar, or a block of records of anything else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from seed_multimodal.config import load_yaml
from seed_multimodal.data.formats.record import RecordFile
from seed_multimodal.data.formats.sources import find_files, nearest_path, open_file, open_registered, registered
from seed_multimodal.data.formats.tar import TarFile
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.settings import nearest, read_settings, setting

# The original input pipes of the two extraction tools: the kind of their records, and what they leave to defaults.
PIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "src.data.torchdata_preprocess.build_caption_datapipes_with_pixels": (
        "caption", {"format": "tar", "similarity_thr": 0.2, "min_resolution": 180, "min_aspect_ratio": 0.666}),
    "src.data.torchdata_eval.build_question_answer_datapipes": ("qa", {"format": "json"}),
}


@dataclass
class InputSettings:
    """The input, and the filters on it (`data.filters`; None: that filter is off)."""

    files: str | list[str] | None = None  # a registered format may do without
    format: str = setting("auto", choices=("auto", "tar", "json", "jsonl", "parquet", "folder", *registered()))
    format_options: dict[str, Any] = setting(factory=dict)  # of a registered format
    image_root: str | None = None  # of the images that records name; None: beside the list, then the current folder
    fields: str | dict[str, Any] = setting(factory=dict)  # by what they hold, over the kind's own; or a preset's name
    use_caption_in_metadata: bool = False  # of tars: the caption from KEY.json instead of KEY.txt
    caption_key_in_metadata: str = "top_caption"
    similarity_thr: int | float | None = None
    min_resolution: int | float | None = None
    min_aspect_ratio: int | float | None = setting(None, above=0, most=1)
    num_frames: int = setting(4, least=1)  # images taken from each video
    num_images: int | None = setting(5, least=1)  # of a story; None: any number from 2


def read_input_settings(config: Mapping[str, Any] | str | Path, kind: str, fields: str | dict[str, str] | None = None
                        ) -> InputSettings:
    """Settings from a mapping or a YAML file, ours or original, for the tool that writes `kind` records; `fields` of
    the command line win. Raises ConfigError: an unknown target, key or value, or an original file of another kind."""
    where = "data"
    if isinstance(config, str | Path):
        where, config = str(config), load_yaml(config)
    plain: Any = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    given = {str(key): value for key, value in plain.items()}
    if "_target_" in given:
        target = str(given.pop("_target_"))
        if target not in PIPES:
            raise ConfigError(f"{where}: _target_ {target!r} is none of the original input pipes"
                              f"{nearest(target, PIPES)}.")
        of_kind, defaults = PIPES[target]
        if of_kind != kind:
            raise ConfigError(f"{where}: _target_ {target!r} reads {of_kind} data, not {kind} data.")
        unused = ("data_dir", "max_length", "recursive", "_recursive_", "_convert_")
        given = {**defaults, **{key: value for key, value in given.items() if key not in unused},
                 "files": given.get("data_dir")}
    if fields is not None:
        given["fields"] = fields
    settings = read_settings(InputSettings, given, where)
    if settings.format not in registered() and not settings.files:
        raise ConfigError(f"{where}: needs a value for 'files'.")
    return replace(settings, image_root=settings.image_root and os.path.expanduser(settings.image_root))


def parse_fields(text: str | None) -> str | dict[str, str] | None:
    """`--fields vqa` or `--fields image=file,question=q` as the setting. Raises ConfigError: a piece without `=`."""
    if text is None or "=" not in text:
        return text
    pairs = [piece.partition("=") for piece in text.split(",")]
    if not all(key.strip() and value.strip() for key, _, value in pairs):
        raise ConfigError(f"--fields {text!r} must be a preset's name or NAME=KEY pairs joined by commas.")
    return {key.strip(): value.strip() for key, _, value in pairs}


# ---- shards


@dataclass(frozen=True)
class Shard:
    """Records `start` to `stop` (None: all) of a file; `name`: of the output below `save_dir`, without suffix."""

    name: str
    file: RecordFile
    start: int = 0
    stop: int | None = None


def list_shards(settings: InputSettings, block: int) -> list[Shard]:
    """All shards of the inputs, in their order; of `block` records where the input is no tar. Raises DataError: no
    record, two inputs of one name; and as `find_inputs`."""
    found = find_inputs(settings)
    base = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path, _ in found])
    shards: dict[str, Shard] = {}
    for path, format in found:
        name = os.path.splitext(os.path.relpath(path, base))[0].replace(":", "-")
        if format == "tar":
            made = [Shard(name, TarFile(path))]
        else:
            file = _open(path, format, settings)
            total = sum(file.sizes)
            made = [Shard(f"{name}-{number:05d}", file, start, min(total, start + block))
                    for number, start in enumerate(range(0, total, block))]
        for shard in made:
            other = shards.setdefault(shard.name, shard)
            if other is not shard:
                raise DataError(f"{path} and {other.file.path} would both become {shard.name}.tar: rename one, or use "
                                "two --save_dir.")
    if not shards:
        raise DataError(f"{settings.files}: there is not one record.")
    return list(shards.values())


def find_inputs(settings: InputSettings) -> list[tuple[str, str]]:
    """Files (or folders of images) with their format. Raises DataError: nothing matches, files of several formats, no
    folder of images."""
    root = settings.image_root
    if root is not None and not Path(root).is_dir():
        raise DataError(f"image_root: there is no folder {root}{nearest_path(root)}.")
    given = [settings.files] if isinstance(settings.files, str) else settings.files or []
    if settings.format in registered():
        return [(str(_open(one, settings.format, settings).path), settings.format) for one in given or (None,)]
    return find_files([os.path.expanduser(one) for one in given], settings.format, pictures=True)


def _open(path: str | None, format: str, settings: InputSettings) -> RecordFile:
    return open_registered(format, path, settings.format_options) if format in registered() else \
        open_file(str(path), format)
