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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from seed_multimodal.data.decoders import DECODERS
from seed_multimodal.data.stream.released import is_released, released_data_config
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.prompts import TUNED_TEMPLATES
from seed_multimodal.settings import read_settings, setting


@dataclass
class SourceSettings:
    """One source of sequences.

    `weight`: share of the draws, relative to the other sources'. A draw is a padded micro-batch, as in the original, or
    with packing one sequence; there the weight counts `batch_size`-fold if the sources have one.
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

    `too_long`: treatment of a packed sequence longer than `length`: `skip`, `truncate`, or `split` (documents of
    `pretrain.text` become several pieces; others are skipped). Padded ones are cut. Each is counted and named.
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
        sized = self.packing and all(source.batch_size is not None for source in self.sources)
        most = max(source.weight for source in self.sources)  # sums of huge weights would be infinite
        weights = [source.weight / most * (source.batch_size or 1 if sized else 1) for source in self.sources]
        return [weight / sum(weights) for weight in weights]

    def padded_shape(self, source: int) -> tuple[int, int]:
        """Rows and positions of a padded micro-batch of a source, by its number."""
        length = self.sources[source].max_length or self.length
        return self.sources[source].batch_size or max(1, self.rows * self.length // length), length

    def shape(self, source: int) -> tuple[int, int]:
        """Sequences of a draw from a source, and how long each may be."""
        return (1, self.length) if self.packing else self.padded_shape(source)


def read_data_settings(config: Mapping[str, Any] | DictConfig, where: str = "data") -> LlmDataSettings:
    """Settings out of a mapping (ours, or an original data file). Raises ConfigError: unknown, missing or contradictory
    keys; it names the key, and the nearest known one."""
    plain: Any = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    given = _mapping(plain, where)
    if is_released(given):
        given = released_data_config(given, [one.name for one in fields(LlmDataSettings)], where)
    if given.get("packing") in ("on", "off"):  # overrides leave YAML's true and false as texts
        given["packing"] = given["packing"] == "on"
    settings = read_settings(LlmDataSettings, {**given, "sources": _sources(given.get("sources"), where)}, where)
    endless = next((source.name for source in settings.sources[:-1] if source.cycles is None), None)
    if settings.concat_type == "concat" and endless is not None:
        raise ConfigError(f"{where}: with concat_type concat source {endless!r} needs cycles: without end it would "
                          f"leave no turn to the sources after it.")
    if settings.packing and len({source.batch_size is None for source in settings.sources}) > 1:
        raise ConfigError(f"{where}: some sources have a batch_size and some have none; with packing the weights count "
                          "batch sizes, so give all or none.")
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
    if isinstance(given, Mapping):
        given = [{"name": str(name), **_mapping(source, f"{where}: sources.{name}")} for name, source in given.items()
                 if source is not None]
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise ConfigError(f"{where}: sources must list at least one source of sequences.")
    sources: list[SourceSettings] = []
    for number, one in enumerate(given):
        source = {key: value for key, value in _mapping(one, f"{where}: sources[{number}]").items()
                  if value or key not in ("name", "files", "decoder")}
        files, name, taken = source.get("files", ""), source.get("name"), [other.name for other in sources]
        if name in taken:
            raise ConfigError(f"{where}: sources[{number}]: there are two sources named {name!r}.")
        stem = Path(files[0] if isinstance(files, list) and files else str(files)).name or "source"
        free = next(one for one in (stem, *(f"{stem}-{more}" for more in range(2, number + 3))) if one not in taken)
        source["name"] = str(name or free)
        sources.append(read_settings(SourceSettings, source, f"{where}: sources[{number}] ({source['name']})"))
    return sources


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: must be a mapping of keys to values, not a {type(value).__name__}.")
    return {str(key): item for key, item in value.items()}
