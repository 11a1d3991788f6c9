"""Settings of the input: a description in our keys, or one of the original pre-tokenisation files.

    files: data/unsplash/webdataset        # folders, patterns with braces, lists of them
    format: auto                           # tar, json (lists or an object per line), parquet, folder, a registered one
    fields: vqa                            # which keys hold what: a preset of the kind, or a mapping
    min_resolution: 180                    # filters; without a key nothing is dropped for it

The original files name a builder (`_target_`); one table leads from it to a kind, and nothing is imported from YAML.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from seed_multimodal.config import load_yaml
from seed_multimodal.data.formats.sources import registered
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import nearest, read_settings, setting


@dataclass
class InputSettings:
    """The input, and the filters on it.

    Attributes:
        files: folders, patterns or files; a registered format may do without.
        format_options: of a registered format (`formats.sources`).
        recursive: folders are searched at any depth.
        image_root: folder of the pictures that records name; without it: beside the list, then the current folder.
        fields: keys of the input by what they hold, merged over the kind's own (`kinds.py`); or a preset's name.
        use_caption_in_metadata, caption_key_in_metadata: of tars, take the caption from KEY.json instead of KEY.txt.
        similarity_thr, min_resolution, min_aspect_ratio: see `data.filters`; None: that filter is off.
        num_frames: pictures taken from each video.
        num_images: pictures of a story; None: any number from 2.
    """

    files: str | list[str] | None = None
    format: str = setting("auto", choices=("auto", "tar", "json", "jsonl", "parquet", "folder", *registered()))
    format_options: dict[str, Any] = setting(factory=dict)
    recursive: bool = True
    image_root: str | None = None
    fields: str | dict[str, Any] = setting(factory=dict)
    use_caption_in_metadata: bool = False
    caption_key_in_metadata: str = "top_caption"
    similarity_thr: int | float | None = None
    min_resolution: int | float | None = None
    min_aspect_ratio: int | float | None = setting(None, above=0, most=1)
    num_frames: int = setting(4, least=1)
    num_images: int | None = setting(5, least=1)


# The original input pipes of the two extraction tools: the kind of their records, and what they leave to defaults.
PIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "src.data.torchdata_preprocess.build_caption_datapipes_with_pixels": (
        "caption", {"format": "tar", "similarity_thr": 0.2, "min_resolution": 180, "min_aspect_ratio": 0.666}),
    "src.data.torchdata_eval.build_question_answer_datapipes": ("qa", {"format": "json"}),
}


def read_input_settings(config: Mapping[str, Any] | str | Path, kind: str, fields: str | dict[str, str] | None = None
                        ) -> InputSettings:
    """Settings from a mapping or a YAML file, ours or original, for the tool that writes `kind` records.

    Args:
        fields: of the command line, which win over the file's.

    Raises:
        ConfigError: an unknown target, key or value, or an original file of another kind; the nearest key is named.
    """
    where = "data"
    if isinstance(config, str | Path):
        where, config = str(config), load_yaml(config)
    plain: Any = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    given = {str(key): value for key, value in plain.items()}
    if "_target_" in given:
        given = _original(given, kind, where)
    if fields is not None:
        given["fields"] = fields
    settings = read_settings(InputSettings, given, where)
    if settings.format not in registered() and not settings.files:
        raise ConfigError(f"{where}: needs a value for 'files'.")
    root = settings.image_root and str(Path(settings.image_root).expanduser())
    return replace(settings, image_root=root)


def _original(given: dict[str, Any], kind: str, where: str) -> dict[str, Any]:
    """The settings of an original file; `max_length` changes nothing, since only texts are written."""
    target = str(given.pop("_target_"))
    if target not in PIPES:
        raise ConfigError(f"{where}: _target_ {target!r} is none of the original input pipes{nearest(target, PIPES)}.")
    of_kind, defaults = PIPES[target]
    if of_kind != kind:
        raise ConfigError(f"{where}: _target_ {target!r} reads {of_kind} data, but this tool writes {kind} records.")
    files = given.pop("data_dir", None)
    return {**defaults, **{key: value for key, value in given.items()
                           if key not in ("max_length", "_recursive_", "_convert_")}, "files": files}


def parse_fields(text: str | None) -> str | dict[str, str] | None:
    """`--fields vqa` or `--fields image=file,question=q` as the setting. Raises ConfigError: a piece without `=`."""
    if text is None or "=" not in text:
        return text
    pairs = [piece.partition("=") for piece in text.split(",")]
    for key, equals, value in pairs:
        if not equals or not key.strip() or not value.strip():
            raise ConfigError(f"--fields {text!r} must be a preset's name or NAME=KEY pairs joined by commas.")
    return {key.strip(): value.strip() for key, _, value in pairs}
