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

Original data files (`_target_: src.data.torchdata_train.build_...`) are read without importing
anything, and have the batch layout of `ORIGINAL_DEFAULTS`; keys unused by the original code are
dropped, and our keys may be added.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from seed_multimodal.data.decoders import (
    find_decoders,
    opens_images,
)
from seed_multimodal.data.formats.record import FieldValue, JsonObject, RecordFields
from seed_multimodal.data.original_pipes import advice
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.prompts import TUNED_TEMPLATES
from seed_multimodal.settings import check_keys, nearest, read_settings, setting

_TRAIN = "src.data.torchdata_train.build_"
_SFT = "src.data.torchdata_sft.build_"
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
# What the original's files leave to its code, by the module of their builders. Six packed rows hold
# about the useful tokens of an original micro-batch of SEED-LLaMA; SEED-X has padded micro-batches.
_PACKED: JsonObject = {"packing": True, "length": 2048, "rows": 6, "too_long": "split"}
ORIGINAL_DEFAULTS: dict[str, JsonObject] = {
    "src.data.torchdata_train": _PACKED,
    "src.data.torchdata_sft": _PACKED,
    "src.data.mmc4": _PACKED,
    "src.data.sft_clm": {"packing": False},
    "src.data.image_text_pairs_clm": {"packing": False},
}
MIXERS = (_TRAIN + "multi_datapipes", _SFT + "multi_datapipes", _SEED_X + "multi_datapipes")
_HYDRA_KEYS = ("_target_", "_recursive_", "_convert_")
_SOURCE_KEYS = ("data_dir", "max_length", "batch_size", "cycle_count", "recursive", *_HYDRA_KEYS)
_UNUSED_KEYS = (  # by the original code
    "caption_prompt",
    "reverse_ratio",
    "assure_text",
    "min_resolution",
    "min_aspect_ratio",
    "tokenizer",
    "image_processor",
    "image_transform",
)
_ORIGINAL_KEYS = {  # ours -> the original's
    "name": "dataset_name",
    "image_dir": "image_dir",
    "cycles": "cycle_count",
    "max_length": "max_length",
    "batch_size": "batch_size",
}


@dataclass
class SourceSettings:
    """One source of sequences.

    `weight`: relative probability that the next chunk comes from this source. A chunk is a padded
        micro-batch, as in the original; with packing it is one sequence, and the weight is
        multiplied by `batch_size`.
    """

    name: str
    files: str | list[str]  # this and the next two as in `formats.sources.open_records`
    decoder: str  # name for `decoders.get_decoder`
    format: str = "auto"
    format_options: JsonObject = setting(factory=dict)
    options: JsonObject = setting(factory=dict)  # of the decoder
    image_dir: str | None = None  # folder of the listed images; None: that of the list
    weight: float = setting(1.0, above=0)
    cycles: int | None = setting(None, minimum=1)  # epochs of the source; None: endless
    max_length: int | None = setting(None, minimum=1)  # of padded micro-batches, like `batch_size`
    batch_size: int | None = setting(None, minimum=1)  # None: `rows` x `length` positions


@dataclass
class LlmDataSettings:
    """The mixture and the batch layout.

    `too_long`: packed sequences longer than `length` are skipped, truncated, or split (texts and
        interleaved documents, never inside an image; others are skipped); padded ones are
        truncated. All are counted and logged.
    """

    sources: list[SourceSettings]
    packing: bool = True  # several sequences per row; else padded micro-batches of one source
    length: int = setting(2048, minimum=2)
    rows: int = setting(1, minimum=1)  # packed rows per rank and micro-step
    too_long: str = setting("skip", choices=("skip", "truncate", "split"))
    # consecutive broken records of a source that stop the run
    max_bad_in_a_row: int = setting(20, minimum=1)
    seed: int = setting(0, minimum=0)
    # default of the sources; None: the model's
    template: str | None = setting(None, choices=TUNED_TEMPLATES)
    # weighted sampling, sequential, or round robin
    concat_type: str = setting("sample", choices=("sample", "concat", "mux_longest"))
    # folder for copies of remote files (None: SEED_CACHE_DIR or ~/.cache; False: no copies, range
    # requests)
    cache: str | bool | None = None

    def sampling_weights(self) -> list[float]:
        """Normalized sampling weights of the sources (see `SourceSettings.weight`)."""
        weights = []
        for source in self.sources:
            weight = source.weight
            if self.packing:
                weight *= source.batch_size or 1
            weights.append(weight)
        total = sum(weights)
        return [weight / total for weight in weights]

    def padded_shape(self, source: int) -> tuple[int, int]:
        """Rows and positions of a source's padded micro-batch."""
        settings = self.sources[source]
        length = settings.max_length or self.length
        rows = settings.batch_size or max(1, self.rows * self.length // length)
        return rows, length

    def chunk_shape(self, source: int) -> tuple[int, int]:
        """Sequences that are read at once from a source, and their maximum length."""
        return (1, self.length) if self.packing else self.padded_shape(source)


def read_data_settings(config: RecordFields | DictConfig, label: str = "data") -> LlmDataSettings:
    """Settings from a mapping (ours or an original data file).

    Raises ConfigError: an unknown or missing key.

    label: name of the mapping in errors.
    """
    if isinstance(config, DictConfig):
        values = _mapping(OmegaConf.to_container(config, resolve=True), label)
    else:
        values = _mapping(config, label)
    if "datapipes" in values or "_target_" in values:
        values = _read_original(values, label)
    values = {**values, "sources": _read_sources(values.get("sources"), label)}
    settings = read_settings(LlmDataSettings, values, label)
    return with_template(settings, settings.template)


def with_template(settings: LlmDataSettings, template: str | None) -> LlmDataSettings:
    """The settings, with `template` in the sources that accept it and do not set it."""
    if template is None:
        return settings
    sources = []
    for source in settings.sources:
        decoder = find_decoders().get(source.decoder)
        if decoder is not None and "template" in decoder.option_names():
            source = replace(source, options={"template": template, **source.options})
        sources.append(source)
    return replace(settings, sources=sources)


def read_once(settings: LlmDataSettings) -> LlmDataSettings:
    """The settings of held-out data: each record is read once."""
    return replace(settings, sources=[replace(source, cycles=1) for source in settings.sources])


def _read_sources(values: FieldValue, label: str) -> list[SourceSettings]:
    """The sources; the default name is that of the first file or folder."""
    # 1. A list of mappings; a mapping name -> source may drop a source by None.
    if isinstance(values, Mapping):
        named = values.items()
        values = [{"name": str(name), **source} for name, source in named if source is not None]
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{label}: sources must list at least one source.")

    sources: dict[str, SourceSettings] = {}
    for index, value in enumerate(values):
        source_label = f"{label}: sources[{index}]"
        source = _mapping(value, source_label)

        # 2. Its name.
        name = str(source.get("name") or _default_name(source.get("files"), sources))
        if name in sources:
            raise ConfigError(f"{source_label}: duplicate source name {name!r}.")

        # 3. The settings.
        source["name"] = name
        sources[name] = read_settings(SourceSettings, source, f"{source_label} ({name})")
    return list(sources.values())


def _default_name(files: str | list[str] | None, taken: Iterable[str]) -> str:
    """The name of the first file or folder; if it is taken, with a number."""
    files = files or "source"
    stem = Path(files if isinstance(files, str) else files[0]).name
    n_equal = sum(stem in (name, name.rpartition("-")[0]) for name in taken)
    return f"{stem}-{n_equal + 1}" if n_equal else stem


def _mapping(value: FieldValue, label: str) -> JsonObject:
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{label}: must be a mapping of keys to values, not a {type(value).__name__}."
        )
    return {str(key): item for key, item in value.items()}


# ---- the original data files


def _read_original(config: RecordFields, label: str) -> JsonObject:
    """An original data file (a mixture or a single source), converted to our keys."""
    # 1. The batch layout: the original's defaults, and keys of ours.
    our_keys = [entry.name for entry in fields(LlmDataSettings) if entry.name != "sources"]
    target = str(config.get("_target_", MIXERS[0]))
    defaults = ORIGINAL_DEFAULTS.get(target.rpartition(".")[0], {})
    layout = {**defaults, **{key: config[key] for key in our_keys if key in config}}

    # 2. A single source.
    if target in BUILDERS:
        pipe = {key: value for key, value in config.items() if key not in our_keys}
        return {"sources": [_read_original_source(pipe, 1.0, label)], **layout}

    # 3. A mixture.
    if target not in MIXERS:
        raise _unknown_target(target, label)
    mixer_keys = ["datapipes", "sample_weights", "tokenizer", "image_transform"]
    check_keys(config, [*mixer_keys, *_HYDRA_KEYS, *our_keys], label)
    pipes = config.get("datapipes") or []
    weights = config.get("sample_weights") or [1.0] * len(pipes)
    if len(weights) != len(pipes):
        raise ConfigError(
            f"{label}: sample_weights must have one number for each of the {len(pipes)} datapipes."
        )
    sources = []
    for index, (pipe, weight) in enumerate(zip(pipes, weights, strict=True)):
        pipe_label = f"{label}: datapipes[{index}]"
        sources.append(_read_original_source(_mapping(pipe, label), weight, pipe_label))
    return {"sources": sources, **layout}


def _read_original_source(pipe: RecordFields, weight: float, label: str) -> JsonObject:
    """A source of an original data file, converted to the keys of `SourceSettings`."""
    # 1. The decoder, its options, and the keys that may stand in the file.
    target = pipe.get("_target_")
    if target not in BUILDERS:
        raise _unknown_target(target, label)
    name, format = BUILDERS[target]
    options = find_decoders()[name].option_names()
    unused = [key for key in _UNUSED_KEYS if key not in options]
    feature_keys = ["image_dir", "dataset_name"] if opens_images(name) else []
    check_keys(pipe, [*_SOURCE_KEYS, *options, *unused, *feature_keys], label)

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
    for key, original_key in _ORIGINAL_KEYS.items():
        if pipe.get(original_key) is not None:
            source[key] = pipe[original_key]
    return source


def _unknown_target(target: object, label: str) -> ConfigError:
    hint = advice(str(target)) or nearest(str(target), [*BUILDERS, *MIXERS])
    return ConfigError(
        f"{label}: _target_ {target!r} is not one of the original data builders{hint}."
    )
