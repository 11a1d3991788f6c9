"""Typed settings of an LLM's training data, read from YAML: our keys, or an original data file (`released.py`).

    sources:                       # a list, or a mapping name -> source
      - name: captions
        files: dataset/captions    # folders (searched recursively), patterns, lists of them
        decoder: pretrain.caption
        options: {reverse_ratio: 0.5}
        weight: 5.0
    packing: true
    length: 2048
    rows: 4
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from seed_multimodal.data.decoders import DECODERS
from seed_multimodal.data.stream.released import is_released, mapping, released_data_config
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.prompts import TUNED_TEMPLATES
from seed_multimodal.settings import read_settings, setting


@dataclass
class SourceSettings:
    """One source of sequences.

    `weight`: share of the draws, relative to the other sources'. A draw is a padded micro-batch, as in the original, or
    with packing one sequence, and then the weight counts `batch_size`-fold.
    """

    name: str
    files: str | list[str]  # as `formats.sources.open_records` takes them, with the next two
    decoder: str  # of `decoders.get_decoder`
    format: str = "auto"
    format_options: dict[str, Any] = setting(factory=dict)
    options: dict[str, Any] = setting(factory=dict)  # of the decoder
    image_dir: str | None = None  # of the images that records name; None: the folder of their file
    weight: float = setting(1.0, above=0)
    cycles: int | None = setting(None, least=1)  # times through the source until it is used up; None: without end
    max_length: int | None = setting(None, least=1)  # of padded micro-batches, as the next
    batch_size: int | None = setting(None, least=1)  # None: they have `rows` x `length` positions


@dataclass
class LlmDataSettings:
    """The mixture, and how sequences become batches.

    `too_long`: a packed sequence longer than `length` is skipped, cut, or split (of `pretrain.text` alone, others are
    skipped); padded ones are cut. Each is counted and named.
    """

    sources: list[SourceSettings]
    packing: bool = True  # several sequences in each row; else padded micro-batches of one source
    length: int = setting(2048, least=2)
    rows: int = setting(1, least=1)  # packed rows of a rank's micro-step
    too_long: str = setting("skip", choices=("skip", "truncate", "split"))
    max_bad_in_a_row: int = setting(20, least=1)  # broken records of a source that end the run
    seed: int = setting(0, least=0)
    template: str | None = setting(None, choices=TUNED_TEMPLATES)  # for sources that set none; None: the model's
    # weighted draws, one source after the other, or round robin
    concat_type: str = setting("sample", choices=("sample", "concat", "mux_longest"))
    cache: str | None = None  # folder into which remote files are copied once; None: they are read by ranges

    def draw_weights(self) -> list[float]:
        """Weight of one draw of each source, summing to 1 (see `SourceSettings.weight`)."""
        weights = [source.weight * (source.batch_size or 1 if self.packing else 1) for source in self.sources]
        return [weight / sum(weights) for weight in weights]

    def padded_shape(self, source: int) -> tuple[int, int]:
        """Rows and positions of a padded micro-batch of a source, by its number."""
        length = self.sources[source].max_length or self.length
        return self.sources[source].batch_size or max(1, self.rows * self.length // length), length

    def shape(self, source: int) -> tuple[int, int]:
        """Sequences of a draw from a source, and how long each may be."""
        return (1, self.length) if self.packing else self.padded_shape(source)


def read_data_settings(config: Mapping[str, Any] | DictConfig, where: str = "data") -> LlmDataSettings:
    """Settings out of a mapping (ours, or an original data file). Raises ConfigError: an unknown or missing key."""
    plain: Any = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    given = mapping(plain, where)
    if is_released(given):
        given = released_data_config(given, [one.name for one in fields(LlmDataSettings)], where)
    settings = read_settings(LlmDataSettings, {**given, "sources": _sources(given.get("sources"), where)}, where)
    return with_template(settings, settings.template)


def prompted_sources(settings: LlmDataSettings) -> list[SourceSettings]:
    """The sources whose decoders have the option `template`."""
    return [source for source in settings.sources
            if source.decoder in DECODERS and "template" in DECODERS[source.decoder].option_names()]


def with_template(settings: LlmDataSettings, template: str | None) -> LlmDataSettings:
    """The settings with this template in the sources that have such an option and do not set it."""
    if template is None:
        return settings
    prompted = {source.name for source in prompted_sources(settings)}
    return replace(settings, sources=[
        replace(source, options={"template": template, **source.options}) if source.name in prompted else source
        for source in settings.sources])


def _sources(given: Any, where: str) -> list[SourceSettings]:
    """The sources; one without a name gets that of its first file or folder."""
    if isinstance(given, Mapping):
        given = [{"name": str(name), **source} for name, source in given.items() if source is not None]
    if not isinstance(given, list) or not given:
        raise ConfigError(f"{where}: sources must list at least one source of sequences.")
    sources: dict[str, SourceSettings] = {}
    for number, one in enumerate(given):
        source = mapping(one, f"{where}: sources[{number}]")
        files = source.get("files") or "source"
        stem = Path(files if isinstance(files, str) else files[0]).name
        others = sum(stem in (name, name.rpartition("-")[0]) for name in sources)
        name = str(source.get("name") or (f"{stem}-{others + 1}" if others else stem))
        if name in sources:
            raise ConfigError(f"{where}: sources[{number}]: there are two sources named {name!r}.")
        sources[name] = read_settings(SourceSettings, {**source, "name": name}, f"{where}: sources[{number}] ({name})")
    return list(sources.values())
