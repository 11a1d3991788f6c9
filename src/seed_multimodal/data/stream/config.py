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

Original data files (`_target_: src.data.torchdata_train.build_...`) are translated by
`compat.data_files`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from omegaconf import DictConfig

from seed_multimodal.config import as_mapping, from_compat
from seed_multimodal.data.decoders import find_decoder
from seed_multimodal.data.formats.record import FieldValue, JsonObject, RecordFields
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.prompts import TUNED_TEMPLATES
from seed_multimodal.settings import non_negative, positive, read_settings, setting


@dataclass
class SourceSettings:
    """One source of sequences.

    `weight`: relative probability that the next unit comes from this source. A unit is a padded
        micro-batch, as in the original; with packing it is one sequence, and the weight is
        multiplied by `batch_size`.
    """

    name: str
    files: str | list[str]  # this and the next two as in `formats.records.open_records`
    decoder: str  # name for `decoders.get_decoder`
    format: str = "auto"
    format_options: JsonObject = setting(factory=dict)
    options: JsonObject = setting(factory=dict)  # of the decoder
    image_dir: str | None = None  # folder of the listed images; None: that of the list
    weight: float = setting(1.0, above=0)
    cycles: int | None = positive(None)  # epochs of the source; None: endless
    max_length: int | None = positive(None)  # of padded micro-batches, like `batch_size`
    batch_size: int | None = positive(None)  # None: `rows` x `length` positions


@dataclass
class LlmDataSettings:
    """The mixture and the batch layout.

    `too_long`: packed sequences longer than `length` are skipped, truncated, or split (where
        the decoder can: texts and documents, never inside an image; others are skipped); padded
        ones are truncated. All are counted and logged.
    """

    sources: list[SourceSettings]
    packing: bool = True  # several sequences per row; else padded micro-batches of one source
    length: int = setting(2048, minimum=2)
    rows: int = positive(1)  # packed rows per rank and micro-step
    too_long: str = setting("skip", choices=("skip", "truncate", "split"))
    # consecutive broken records of a source that stop the run
    max_bad_in_a_row: int = positive(20)
    seed: int = non_negative(0)
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

    def check_reachable(self) -> None:
        """Raise ConfigError: a source comes after an endless one."""
        if self.concat_type != "concat":
            return
        for source, next_source in pairwise(self.sources):
            if source.cycles is None:
                raise ConfigError(
                    f"data: concat_type concat never draws from source {next_source.name}, since "
                    f"source {source.name} before it is endless; set its cycles."
                )

    def chunk_shape(self, source: int) -> tuple[int, int]:
        """Sequences that are read at once from a source, and their maximum length."""
        if self.packing:
            return 1, self.length
        settings = self.sources[source]
        length = settings.max_length or self.length
        return settings.batch_size or max(1, self.rows * self.length // length), length


def read_data_settings(config: RecordFields | DictConfig, label: str = "data") -> LlmDataSettings:
    """Settings from a mapping (ours or an original data file).

    Raises ConfigError: an unknown or missing key.

    label: name of the mapping in errors.
    """
    values = as_mapping(config, label)
    if "datapipes" in values or "_target_" in values:
        values = from_compat("data_files:mixture_keys")(values, label)
    values = {**values, "sources": _read_sources(values.get("sources"), label)}
    settings = read_settings(LlmDataSettings, values, label)
    return with_option(settings, "template", settings.template)


def with_option(settings: LlmDataSettings, name: str, value: FieldValue) -> LlmDataSettings:
    """The settings, with an option in the sources whose decoder has it and that do not set it.

    value: None: the settings as they are.
    """
    if value is None:
        return settings
    sources = []
    for source in settings.sources:
        if name in find_decoder(source.decoder).option_names():
            source = replace(source, options={name: value, **source.options})
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
        source = as_mapping(value, source_label)

        # 2. Its name.
        name = str(source.get("name") or _default_name(source.get("files"), sources))
        if name in sources:
            raise ConfigError(f"{source_label}: duplicate source name {name!r}.")

        # 3. The settings.
        source["name"] = name
        sources[name] = read_settings(SourceSettings, source, f"{source_label} ({name})")
        find_decoder(sources[name].decoder)  # raises if the name is unknown
    return list(sources.values())


def _default_name(files: str | list[str] | None, taken: Iterable[str]) -> str:
    """The name of the first file or folder; if it is taken, with a number."""
    files = files or "source"
    stem = Path(files if isinstance(files, str) else files[0]).name
    n_equal = sum(stem in (name, name.rpartition("-")[0]) for name in taken)
    return f"{stem}-{n_equal + 1}" if n_equal else stem
