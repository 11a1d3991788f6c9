"""The originals' data files, with the keys of ours.

    _target_: src.data.torchdata_train.build_multi_datapipes    the data of a training
    _target_: src.data.torchdata_preprocess.build_…             the input of pre-tokenization

They are read without importing anything. Those of a training have the originals' batch layout;
keys unused by the original code are dropped, and our keys may be added.
"""

from __future__ import annotations

import re
from dataclasses import fields

from seed_multimodal.compat.targets import arguments_of
from seed_multimodal.config import as_mapping, read_table
from seed_multimodal.data.decoders import find_decoder, opens_images
from seed_multimodal.data.formats.record import JsonObject, RecordFields
from seed_multimodal.data.stream.config import LlmDataSettings
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import check_keys, nearest

# What the originals name; the file says what each table is.
_TABLES = read_table(__file__)

# ---- the data of a training

BUILDERS: dict[str, str] = _TABLES["builders"]
MIXERS: list[str] = _TABLES["mixers"]
_PADDED_MODULES = ("src.data.sft_clm.", "src.data.image_text_pairs_clm.")


def mixture_keys(config: RecordFields, label: str) -> JsonObject:
    """Our keys for an original data file, a mixture or a single source. Raises ConfigError."""
    # 1. The batch layout: the original's defaults, and keys of ours.
    our_keys = [entry.name for entry in fields(LlmDataSettings) if entry.name != "sources"]
    target = str(config.get("_target_", MIXERS[0]))
    layout = dict(_TABLES["padded" if target.startswith(_PADDED_MODULES) else "packed"])
    layout |= {key: config[key] for key in our_keys if key in config}

    # 2. A single source.
    if target in BUILDERS:
        pipe = {key: value for key, value in config.items() if key not in our_keys}
        return {"sources": [_source_keys(pipe, 1.0, label)], **layout}

    # 3. A mixture.
    if target not in MIXERS:
        raise _unknown_target(target, label)
    mixer_keys = ("datapipes", "sample_weights", "tokenizer", "image_transform")
    check_keys(arguments_of(config), [*mixer_keys, *our_keys], label)
    pipes = config.get("datapipes") or []
    weights = config.get("sample_weights") or [1.0] * len(pipes)
    if len(weights) != len(pipes):
        raise ConfigError(
            f"{label}: sample_weights must have one number for each of the {len(pipes)} datapipes."
        )
    sources = []
    for index, (pipe, weight) in enumerate(zip(pipes, weights, strict=True)):
        pipe_label = f"{label}: datapipes[{index}]"
        sources.append(_source_keys(as_mapping(pipe, label), weight, pipe_label))
    return {"sources": sources, **layout}


def _source_keys(pipe: RecordFields, weight: float, label: str) -> JsonObject:
    """Our keys (`SourceSettings`) for a source of an original data file."""
    # 1. The decoder, its options, and the keys that may stand in the file.
    target = pipe.get("_target_")
    if target not in BUILDERS:
        raise _unknown_target(target, label)
    name = BUILDERS[target]
    format = "jsonl" if name in _TABLES["of_lines"] else "tar"
    options = find_decoder(name).option_names()
    unused = [key for key in _TABLES["unused_keys"] if key not in options]
    feature_keys = ["image_dir", "dataset_name"] if opens_images(name) else []
    known_keys = [*_TABLES["source_keys"], *options, *unused, *feature_keys]
    check_keys(arguments_of(pipe), known_keys, label)

    # 2. The files: the original searches folders for one suffix.
    folders = pipe.get("data_dir")
    if not folders:
        raise ConfigError(f"{label}: needs a value for 'data_dir'.")
    if not pipe.get("recursive", True):
        if isinstance(folders, str):
            folders = [folders]
        folders = [f"{str(folder).rstrip('/')}/*.{format}" for folder in folders]

    source: JsonObject = {
        "files": folders,
        "decoder": name,
        "format": format,
        "weight": weight,
        "options": {key: pipe[key] for key in options if pipe.get(key) is not None},
    }
    for key, original_key in _TABLES["our_keys"].items():
        if pipe.get(original_key) is not None:
            source[key] = pipe[original_key]
    return source


def _unknown_target(target: object, label: str) -> ConfigError:
    hint = _advice(str(target)) or nearest(str(target), [*BUILDERS, *MIXERS])
    return ConfigError(
        f"{label}: _target_ {target!r} is not one of the original data builders{hint}."
    )


# ---- the input of pre-tokenization

PIPES: dict[str, JsonObject] = _TABLES["pipes"]
# Other input pipes: the tool decides which fields are read, the suffix the file's format.
ENCODED = re.compile(
    r"src\.data\.torchdata_(eval|preprocess|train)\.build_"
    r"(caption|coco_caption|edit|video|mmc4|llava|question_answer)_datapipes"
    r"(_with_pixels|_with_pixel_values)?$"
)


def input_keys(config: JsonObject, label: str) -> JsonObject:
    """Our keys for an original input. Raises ConfigError: an unknown pipe."""
    target = str(config["_target_"])
    if target not in PIPES and not ENCODED.match(target):
        raise ConfigError(
            f"{label}: _target_ {target!r} is not one of the original input pipes"
            f"{_advice(target) or nearest(target, PIPES)}."
        )
    converted = {**PIPES.get(target, {}), **arguments_of(config), "files": config.get("data_dir")}
    unused = _TABLES["unused_input_keys"]
    return {key: value for key, value in converted.items() if key not in unused}


# ---- pipes without counterpart


def _advice(target: str) -> str:
    """What to use in place of an original pipe, as the end of a message ("; here: …"), or ""."""
    if not target.startswith("src.data."):
        return ""
    for part, text in _TABLES["advice"].items():
        if part in target:
            return f"; here: {text}"
    return ""
