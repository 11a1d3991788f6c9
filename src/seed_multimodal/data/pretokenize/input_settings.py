"""Settings of the input: a description in our keys, or one of the released pre-tokenisation files.

    files: data/unsplash/webdataset        # folders, patterns with braces, lists of them
    format: auto                           # tar, json (lists or an object per line), parquet, folder, a registered one
    fields: vqa                            # which keys hold what: a preset of the kind, or a mapping
    min_resolution: 180                    # filters; without a key nothing is dropped for it

The released files name a builder (`_target_`); one table leads from it to a kind, and nothing is imported from YAML.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from seed_multimodal.config import load_yaml
from seed_multimodal.data.formats.sources import registered
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import check_keys, nearest, read_settings, setting

_HYDRA = ("_target_", "_recursive_", "_convert_")


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

    def identity(self) -> dict[str, Any]:
        """Settings that the output depends on, for the manifest."""
        return {key: value for key, value in asdict(self).items() if key not in ("files", "image_root", "recursive")}


@dataclass(frozen=True)
class Pipe:
    """What a released builder stands for: the kind of records, its defaults, keys that change nothing here."""

    kind: str
    defaults: dict[str, Any]
    ignored: tuple[str, ...] = ("max_length",)  # only texts are written, so nothing is cut


# The released input pipes of the two extraction tools.
PIPES = {
    "src.data.torchdata_preprocess.build_caption_datapipes_with_pixels": Pipe(
        "caption", {"format": "tar", "similarity_thr": 0.2, "min_resolution": 180, "min_aspect_ratio": 0.666}),
    "src.data.torchdata_eval.build_question_answer_datapipes": Pipe("qa", {"format": "json"}),
}


def read_input_settings(config: Mapping[str, Any] | str | Path, kind: str, **replaced: Any) -> InputSettings:
    """Settings from a mapping or a YAML file, ours or released, for the tool that writes `kind` records.

    Args:
        replaced: values from the command line that win over the file's (None: not given).

    Raises:
        ConfigError: an unknown target, key or value, or a released file of another kind; the nearest key is named.
    """
    where = "data"
    if isinstance(config, str | Path):
        where, config = str(config), load_yaml(config)
    plain: Any = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    given = {str(key): value for key, value in plain.items()}
    if "_target_" in given:
        given = _released(given, kind, where)
    given |= {key: value for key, value in replaced.items() if value is not None}
    settings = read_settings(InputSettings, given, where)
    if settings.format not in registered() and not settings.files:
        raise ConfigError(f"{where}: needs a value for 'files'.")
    if settings.image_root == "":
        raise ConfigError(f"{where}: image_root must be a folder, not ''.")
    root = settings.image_root and str(Path(settings.image_root).expanduser())
    return replace(settings, image_root=root)


def _released(given: dict[str, Any], kind: str, where: str) -> dict[str, Any]:
    target = str(given["_target_"])
    pipe = PIPES.get(target)
    if pipe is None:
        raise ConfigError(f"{where}: _target_ {target!r} is none of the released input pipes{nearest(target, PIPES)}.")
    if pipe.kind != kind:
        raise ConfigError(f"{where}: _target_ {target!r} reads {pipe.kind} data, but this tool writes {kind} records.")
    own = [f.name for f in fields(InputSettings) if f.name != "files"]
    check_keys(given, [*own, "data_dir", *pipe.ignored, *_HYDRA], where)
    files = given.get("data_dir")
    if not files:
        raise ConfigError(f"{where}: needs a value for 'data_dir'.")
    return {**pipe.defaults, **{key: value for key, value in given.items() if key in own}, "files": files}


def parse_fields(text: str | None) -> str | dict[str, str] | None:
    """`--fields vqa` or `--fields image=file,question=q` as the setting.

    Raises:
        ConfigError: a piece without `=` among several.
    """
    if text is None or "=" not in text:
        return text
    pairs = [piece.partition("=") for piece in text.split(",")]
    for key, equals, value in pairs:
        if not equals or not key.strip() or not value.strip():
            raise ConfigError(f"--fields {text!r} must be a preset's name or NAME=KEY pairs joined by commas.")
    return {key.strip(): value.strip() for key, _, value in pairs}
