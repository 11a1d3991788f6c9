"""Settings of an LLM's training data, from YAML with our keys or an original data file.

    sources:                       # a list, or a mapping name -> source
      - name: captions
        files: dataset/captions    # folders (recursive), patterns, or a list
        decoder: pretrain.caption
        options: {reverse_ratio: 0.5}
        weight: 5.0
    packing: true
    length: 2048
    rows: 4

Original data files (`_target_: src.data.torchdata_train.build_...`) are read without importing anything, and have the
batch layout of `ORIGINAL_DEFAULTS`; keys unused by the original code are dropped, and our keys may be added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from seed_multimodal.data.decoders import DECODERS, FEATURE_DECODERS
from seed_multimodal.data.original_pipes import advice
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.prompts import TUNED_TEMPLATES
from seed_multimodal.settings import check_keys, nearest, read_settings, setting

_TRAIN, _SFT = "src.data.torchdata_train.build_", "src.data.torchdata_sft.build_"
_SEED_X = "src.data.sft_clm.build_"
BUILDERS: dict[str, tuple[str, str]] = {  # original builder -> our decoder and file suffixes
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
    "src.data.mmc4.build_mmc4_datapipes_for_llm": ("pretrain.interleaved", "tar"),
    "src.data.mmc4.build_obelisc_datapipes_for_llm": ("pretrain.interleaved", "tar"),
}
# What the original's files leave to its code, by the module of their builders. Six packed rows hold about
# the useful tokens of an original micro-batch of SEED-LLaMA; SEED-X has padded micro-batches.
_PACKED: dict[str, Any] = {"packing": True, "length": 2048, "rows": 6, "too_long": "split"}
ORIGINAL_DEFAULTS: dict[str, dict[str, Any]] = {
    "src.data.torchdata_train": _PACKED,
    "src.data.torchdata_sft": _PACKED,
    "src.data.mmc4": _PACKED,
    "src.data.sft_clm": {"packing": False},
    "src.data.image_text_pairs_clm": {"packing": False},
}
MIXERS = (_TRAIN + "multi_datapipes", _SFT + "multi_datapipes", _SEED_X + "multi_datapipes")
_HYDRA = ("_target_", "_recursive_", "_convert_")
_SOURCE_KEYS = ("data_dir", "max_length", "batch_size", "cycle_count", "recursive", *_HYDRA)
_NEVER_READ = (
    "caption_prompt",
    "reverse_ratio",
    "assure_text",
    "min_resolution",
    "min_aspect_ratio",
    "tokenizer",
    "image_processor",
    "image_transform",
)


@dataclass
class SourceSettings:
    """One source of sequences.

    `weight`: relative share of draws. A draw is a padded micro-batch, as in the original; with packing it is one
    sequence, and the weight is multiplied by `batch_size`.
    """

    name: str
    files: str | list[str]  # this and the next two as in `formats.sources.open_records`
    decoder: str  # name for `decoders.get_decoder`
    format: str = "auto"
    format_options: dict[str, Any] = setting(factory=dict)
    options: dict[str, Any] = setting(factory=dict)  # of the decoder
    image_dir: str | None = None  # folder of the listed images; None: that of the list
    weight: float = setting(1.0, above=0)
    cycles: int | None = setting(None, minimum=1)  # epochs of the source; None: endless
    max_length: int | None = setting(None, minimum=1)  # of padded micro-batches, like `batch_size`
    batch_size: int | None = setting(None, minimum=1)  # None: `rows` x `length` positions


@dataclass
class LlmDataSettings:
    """The mixture and the batch layout.

    `too_long`: packed sequences longer than `length` are skipped, truncated, or split (texts and interleaved documents,
    never inside an image; others are skipped); padded ones are truncated. All are counted and logged.
    """

    sources: list[SourceSettings]
    packing: bool = True  # several sequences per row; else padded micro-batches of one source
    length: int = setting(2048, minimum=2)
    rows: int = setting(1, minimum=1)  # packed rows per rank and micro-step
    too_long: str = setting("skip", choices=("skip", "truncate", "split"))
    max_bad_in_a_row: int = setting(
        20, minimum=1
    )  # consecutive broken records of a source that stop the run
    seed: int = setting(0, minimum=0)
    template: str | None = setting(
        None, choices=TUNED_TEMPLATES
    )  # default of the sources; None: the model's
    # weighted draws, sequential, or round robin
    concat_type: str = setting("sample", choices=("sample", "concat", "mux_longest"))
    # folder for copies of remote files (None: SEED_CACHE_DIR or ~/.cache; False: no copies, range requests)
    cache: str | bool | None = None

    def sampling_weights(self) -> list[float]:
        """Normalized draw weights of the sources (see `SourceSettings.weight`)."""
        weights = [
            source.weight * (source.batch_size or 1 if self.packing else 1)
            for source in self.sources
        ]
        return [weight / sum(weights) for weight in weights]

    def padded_shape(self, source: int) -> tuple[int, int]:
        """Rows and positions of a source's padded micro-batch."""
        length = self.sources[source].max_length or self.length
        return self.sources[source].batch_size or max(1, self.rows * self.length // length), length

    def chunk_shape(self, source: int) -> tuple[int, int]:
        """Sequences per draw of a source, and their maximum length."""
        return (1, self.length) if self.packing else self.padded_shape(source)


def read_data_settings(
    config: Mapping[str, Any] | DictConfig, where: str = "data"
) -> LlmDataSettings:
    """Settings from a mapping (ours or an original data file). Raises ConfigError: an unknown or missing key."""
    plain: Any = (
        OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    )
    given = _mapping(plain, where)
    if "datapipes" in given or "_target_" in given:
        given = _released(given, where)
    settings = read_settings(
        LlmDataSettings, {**given, "sources": _sources(given.get("sources"), where)}, where
    )
    return with_template(settings, settings.template)


def with_template(settings: LlmDataSettings, template: str | None) -> LlmDataSettings:
    """The settings, with `template` in the sources that accept it and do not set it."""
    if template is None:
        return settings
    return replace(
        settings,
        sources=[
            replace(source, options={"template": template, **source.options})
            if source.decoder in DECODERS and "template" in DECODERS[source.decoder].option_names()
            else source
            for source in settings.sources
        ],
    )


def read_once(settings: LlmDataSettings) -> LlmDataSettings:
    """The settings of held-out data: each record is read once."""
    return replace(settings, sources=[replace(source, cycles=1) for source in settings.sources])


def _sources(given: Any, where: str) -> list[SourceSettings]:
    """The sources; the default name is that of the first file or folder."""
    if isinstance(given, Mapping):
        given = [
            {"name": str(name), **source} for name, source in given.items() if source is not None
        ]
    if not isinstance(given, list) or not given:
        raise ConfigError(f"{where}: sources must list at least one source.")
    sources: dict[str, SourceSettings] = {}
    for number, one in enumerate(given):
        source = _mapping(one, f"{where}: sources[{number}]")
        files = source.get("files") or "source"
        stem = Path(files if isinstance(files, str) else files[0]).name
        others = sum(stem in (name, name.rpartition("-")[0]) for name in sources)
        name = str(source.get("name") or (f"{stem}-{others + 1}" if others else stem))
        if name in sources:
            raise ConfigError(f"{where}: sources[{number}]: duplicate source name {name!r}.")
        sources[name] = read_settings(
            SourceSettings, {**source, "name": name}, f"{where}: sources[{number}] ({name})"
        )
    return list(sources.values())


# ---- the original data files


def _released(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """An original data file (a mixture or a single source), converted to our keys."""
    own = [entry.name for entry in fields(LlmDataSettings) if entry.name != "sources"]
    target = str(config.get("_target_", MIXERS[0]))
    layout = {
        **ORIGINAL_DEFAULTS.get(target.rpartition(".")[0], {}),
        **{key: config[key] for key in own if key in config},
    }
    if target in BUILDERS:
        alone = {key: value for key, value in config.items() if key not in own}
        return {"sources": [_released_source(alone, 1.0, where)], **layout}
    if target not in MIXERS:
        raise _unknown(target, where)
    check_keys(
        config,
        ["datapipes", "sample_weights", "tokenizer", "image_transform", *_HYDRA, *own],
        where,
    )
    pipes = config.get("datapipes") or []
    weights = config.get("sample_weights") or [1.0] * len(pipes)
    if len(weights) != len(pipes):
        raise ConfigError(
            f"{where}: sample_weights must have one number for each of the {len(pipes)} datapipes."
        )
    sources = [
        _released_source(_mapping(pipe, where), weight, f"{where}: datapipes[{number}]")
        for number, (pipe, weight) in enumerate(zip(pipes, weights, strict=True))
    ]
    return {"sources": sources, **layout}


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{where}: must be a mapping of keys to values, not a {type(value).__name__}."
        )
    return {str(key): item for key, item in value.items()}


def _released_source(pipe: Mapping[str, Any], weight: Any, where: str) -> dict[str, Any]:
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
    source: dict[str, Any] = {
        "files": folders,
        "decoder": name,
        "format": format,
        "weight": weight,
        "options": {key: pipe[key] for key in options if pipe.get(key) is not None},
    }
    names = {
        "name": "dataset_name",
        "image_dir": "image_dir",
        "cycles": "cycle_count",
        "max_length": "max_length",
        "batch_size": "batch_size",
    }
    return {
        **source,
        **{ours: pipe[theirs] for ours, theirs in names.items() if pipe.get(theirs) is not None},
    }


def _unknown(target: Any, where: str) -> ConfigError:
    hint = advice(str(target)) or nearest(str(target), [*BUILDERS, *MIXERS])
    return ConfigError(
        f"{where}: _target_ {target!r} is not one of the original data builders{hint}."
    )
