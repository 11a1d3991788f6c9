"""The original data files (`_target_: src.data.torchdata_train.build_...`) read as ours, without importing anything.

Keys that the original code never read are dropped. A file may also hold our keys (`packing`, `length`, `rows`, ...).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from seed_multimodal.data.decoders import DECODERS, FEATURE_DECODERS
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import check_keys, nearest

_TRAIN, _SFT = "src.data.torchdata_train.build_", "src.data.torchdata_sft.build_"
_SEED_X = "src.data.sft_clm.build_"
BUILDERS: dict[str, tuple[str, str]] = {  # original builder -> our decoder, and the files it reads
    _TRAIN + "caption_datapipes_for_llm": ("pretrain.caption", "tar"),
    _TRAIN + "mmc4_datapipes_for_llm": ("pretrain.interleaved", "tar"),
    _TRAIN + "video_caption_datapipes_for_llm": ("pretrain.video", "tar"),
    _TRAIN + "text_pretrain_datapipes_for_llm": ("pretrain.text", "jsonl"),
    _TRAIN + "edit_datapipes_for_llm": ("pretrain.edit", "tar"),
    _TRAIN + "visual_question_datapipes_for_llm": ("pretrain.visual_question", "tar"),
    _TRAIN + "text_conversation_datapipes_for_llm": ("pretrain.text_conversation", "jsonl"),
    _SFT + "qa_datapipes_for_llm": ("sft.qa", "tar"),
    _SFT + "edit_datapipes_for_llm": ("sft.edit", "tar"),
    _SFT + "edit_multi_datapipes_for_llm": ("sft.multi_edit", "tar"),
    _SFT + "story_datapipes_for_llm": ("sft.story", "tar"),
    _SFT + "difference_datapipes_for_llm": ("sft.difference", "tar"),
    _SFT + "conversation_datapipes_for_llm": ("sft.conversation", "tar"),
    _SFT + "video_datapipes_for_llm": ("sft.video", "tar"),
    _SFT + "video_conversation_datapipes_for_llm": ("sft.video_conversation", "tar"),
    _SFT + "visual_question_datapipes_for_llm": ("sft.visual_question", "tar"),
    _SFT + "interleaved_datapipes_for_llm": ("sft.interleaved", "tar"),
    _SFT + "text_conversation_datapipes_for_llm": ("sft.text_conversation", "jsonl"),
    _SEED_X + "llava_jsonl_datapipes": ("seed_x.conversation", "jsonl"),
    _SEED_X + "single_turn_edit_datapipes": ("seed_x.edit", "jsonl"),
    "src.data.image_text_pairs_clm.build_caption_datapipes_with_pixels": ("seed_x.caption", "tar"),
}
MIXERS = (_TRAIN + "multi_datapipes", _SFT + "multi_datapipes", _SEED_X + "multi_datapipes")
_HYDRA = ("_target_", "_recursive_", "_convert_")
_SOURCE_KEYS = ("data_dir", "max_length", "batch_size", "cycle_count", "recursive", *_HYDRA)
_NEVER_READ = ("caption_prompt", "reverse_ratio", "assure_text", "min_resolution", "min_aspect_ratio", "tokenizer",
               "image_processor", "image_transform")


def is_released(config: Mapping[str, Any]) -> bool:
    """Whether a data configuration is in the released form: it has `datapipes` or a `_target_`."""
    return "datapipes" in config or "_target_" in config


def released_data_config(config: Mapping[str, Any], settings: Sequence[str], where: str = "data") -> dict[str, Any]:
    """An original data file (a mixture, or one source alone) as a mapping of ours, whose keys are `settings`. Raises
    ConfigError: an unknown target or key (the nearest is named), not a weight for each source."""
    own = [key for key in settings if key != "sources"]
    target = config.get("_target_", MIXERS[0])
    if target in BUILDERS:
        alone = {key: value for key, value in config.items() if key not in own}
        return {"sources": [_source(alone, 1.0, where)], **{key: config[key] for key in own if key in config}}
    if target not in MIXERS:
        raise _unknown(target, where)
    check_keys(config, ["datapipes", "sample_weights", "tokenizer", "image_transform", *_HYDRA, *own], where)
    pipes = config.get("datapipes") or []
    weights = config.get("sample_weights") or [1.0] * len(pipes)
    if len(weights) != len(pipes):
        raise ConfigError(f"{where}: sample_weights must be one number for each of the {len(pipes)} datapipes.")
    sources = [_source(mapping(pipe, where), weight, f"{where}: datapipes[{number}]")
               for number, (pipe, weight) in enumerate(zip(pipes, weights, strict=True))]
    return {"sources": sources, **{key: config[key] for key in own if key in config}}


def mapping(value: Any, where: str) -> dict[str, Any]:
    """The value, if it is a mapping; raises ConfigError if it is not."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: must be a mapping of keys to values, not a {type(value).__name__}.")
    return {str(key): item for key, item in value.items()}


def _source(pipe: Mapping[str, Any], weight: Any, where: str) -> dict[str, Any]:
    target = pipe.get("_target_")
    if target not in BUILDERS:
        raise _unknown(target, where)
    name, format = BUILDERS[target]
    decoder = (DECODERS | FEATURE_DECODERS)[name]
    options = decoder.option_names()
    dropped = [key for key in _NEVER_READ if key not in options]
    own = ["image_dir", "dataset_name"] if name in FEATURE_DECODERS else []
    check_keys(pipe, [*_SOURCE_KEYS, *options, *dropped, *own], where)
    folders = pipe.get("data_dir")
    if not folders:
        raise ConfigError(f"{where}: needs a value for 'data_dir'.")
    if not pipe.get("recursive", True):
        folders = [folders] if isinstance(folders, str) else folders
        folders = [f"{str(folder).rstrip('/')}/*.{format}" for folder in folders]
    source: dict[str, Any] = {"files": folders, "decoder": name, "format": format, "weight": weight,
                              "options": {key: pipe[key] for key in options if pipe.get(key) is not None}}
    names = {"name": "dataset_name", "image_dir": "image_dir", "cycles": "cycle_count", "max_length": "max_length",
             "batch_size": "batch_size"}
    return {**source, **{ours: pipe[theirs] for ours, theirs in names.items() if pipe.get(theirs) is not None}}


def _unknown(target: Any, where: str) -> ConfigError:
    return ConfigError(f"{where}: _target_ {target!r} is none of the released data builders"
                       f"{nearest(str(target), [*BUILDERS, *MIXERS])}.")
