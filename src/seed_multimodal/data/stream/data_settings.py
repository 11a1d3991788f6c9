"""What an LLM's training data is made of, as typed settings read from YAML.

    sources:                       # a list, or a mapping name -> source
      - name: captions
        files: dataset/captions    # folders (searched recursively), patterns, lists of them
        decoder: pretrain.caption
        options: {reverse_ratio: 0.5}
        weight: 5.0
    packing: true
    length: 2048
    rows: 4

A mapping with `datapipes` or a `_target_` is one of the released data files; `data.stream.released_settings` reads it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from seed_multimodal.settings import check_keys, nearest
from seed_multimodal.errors import ConfigError

TOO_LONG = ("skip", "truncate", "split")
CONCAT_TYPES = ("sample", "concat", "mux_longest")
Files = str | list[str]


@dataclass
class SourceSettings:
    """One source of sequences.

    Attributes:
        files: as `data.formats.records.open_records` takes them; `format` too.
        decoder: a name of `data.decoders.registry.get_decoder`; `options` go to it.
        weight: share of the draws, relative to the other sources'. A draw is one micro-batch of `batch_size` sequences
            without packing, as released. With packing it is one sequence, and the weight counts `batch_size`-fold if
            the sources have batch sizes: so the numbers of sequences per source are the released ones either way.
        cycles: times through the source until it is used up; None: without end.
        max_length: without packing: length of its padded rows. With packing it means nothing (`length` limits).
        batch_size: without packing: rows of a micro-batch; None: as many as fit into `rows` x `length` positions.
    """

    name: str
    files: Files
    decoder: str
    format: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    cycles: int | None = None
    max_length: int | None = None
    batch_size: int | None = None


@dataclass
class LlmDataSettings:
    """The mixture, and how sequences become batches.

    Attributes:
        packing: several sequences in each row of `length` positions; False: padded micro-batches of one source, as
            released.
        rows: rows of a rank's micro-step (packing).
        too_long: what happens to a sequence longer than `length` (packing): `skip`, `truncate` (the decoder's released
            cut on the right), or `split` (documents of the decoder `pretrain.text` become several pieces; others are
            skipped). Each is counted and named. Without packing sequences are cut, as released, and counted.
        max_bad_in_a_row: so many broken records one after another end the run.
        concat_type: `sample` (weighted draws), `concat` (one source after the other), `mux_longest` (in turn).
        lanes: independent streams of draws, see `data.stream.packed`; None: a number chosen at the first start.
        shuffle_block: samples of a source with several files that are shuffled among each other (reads stay near).
        buffer: tokens of sequences, in rows of `length`, that a lane looks ahead for packing.
    """

    sources: list[SourceSettings]
    packing: bool = True
    length: int = 2048
    rows: int = 1
    too_long: str = "skip"
    max_bad_in_a_row: int = 20
    seed: int = 0
    concat_type: str = "sample"
    lanes: int | None = None
    shuffle_block: int = 10_000
    buffer: float = 2.0

    def draw_weights(self) -> list[float]:
        """Weight of one draw of each source, summing to 1 (see `SourceSettings.weight`)."""
        sized = self.packing and all(source.batch_size is not None for source in self.sources)
        most = max(source.weight for source in self.sources)  # sums of huge weights would be infinite
        weights = [source.weight / most * (source.batch_size or 1 if sized else 1) for source in self.sources]
        return [weight / sum(weights) for weight in weights]


def read_data_settings(config: Mapping[str, Any] | DictConfig, where: str = "data") -> LlmDataSettings:
    """Check a mapping (ours, or a released data file) and give its settings.

    Raises:
        ConfigError: unknown, missing or contradictory keys; it names the key, and the nearest known one.
    """
    from seed_multimodal.data.stream.released_settings import is_released, released_data_config

    plain = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    if not isinstance(plain, Mapping):
        raise ConfigError(f"{where}: must be a mapping of keys to values.")
    settings = {str(key): value for key, value in plain.items()}
    if is_released(settings):
        settings = released_data_config(settings, where)
    check_keys(settings, [f.name for f in fields(LlmDataSettings)], where)
    if settings.get("packing") in ("on", "off"):  # YAML's words for true and false, which overrides leave as texts
        settings["packing"] = settings["packing"] == "on"
    sources = _read_sources(settings.pop("sources", None), where)
    read = LlmDataSettings(sources=sources, **settings)
    _check(read, where)
    return read


def _read_sources(given: Any, where: str) -> list[SourceSettings]:
    if isinstance(given, Mapping):
        given = [{"name": str(name), **_mapping(source, f"{where}: sources.{name}")} for name, source in given.items()
                 if source is not None]
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise ConfigError(f"{where}: sources must list at least one source of sequences.")
    sources: list[SourceSettings] = []
    for number, one in enumerate(given):
        here = f"{where}: sources[{number}]"
        one = _mapping(one, here)
        check_keys(one, [f.name for f in fields(SourceSettings)], here)
        for key in ("files", "decoder"):
            if not one.get(key):
                raise ConfigError(f"{here}: needs a value for {key!r}.")
        one["files"] = _files(one["files"], here)
        one["name"] = _unique(str(one.get("name") or _name(one["files"])), sources, explicit=bool(one.get("name")),
                              where=here)
        sources.append(SourceSettings(**one))
    return sources


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: must be a mapping of keys to values, not a {type(value).__name__}.")
    return {str(key): item for key, item in value.items()}


def _files(given: Any, where: str) -> Files:
    if isinstance(given, str | Path):
        return str(given)
    if isinstance(given, Sequence) and given and all(isinstance(item, str | Path) for item in given):
        return [str(item) for item in given]
    raise ConfigError(f"{where}: files must be a path, a pattern or a list of them, not {given!r}.")


def _name(files: Files) -> str:
    return Path(files if isinstance(files, str) else files[0]).name or "source"


def _unique(name: str, sources: list[SourceSettings], explicit: bool, where: str) -> str:
    """The name, numbered if it is taken; a name that the user wrote twice is an error."""
    taken = {source.name for source in sources}
    if name in taken and explicit:
        raise ConfigError(f"{where}: there are two sources named {name!r}.")
    number, free = 2, name
    while free in taken:
        free, number = f"{name}-{number}", number + 1
    return free


def _check(settings: LlmDataSettings, where: str) -> None:
    for name, options in (("too_long", TOO_LONG), ("concat_type", CONCAT_TYPES)):
        value = getattr(settings, name)
        if value not in options:
            raise ConfigError(f"{where}: {name} is {value!r}{nearest(str(value), options)}; "
                              f"use {', '.join(options)}.")
    if not isinstance(settings.packing, bool):
        raise ConfigError(f"{where}: packing must be true or false, not {settings.packing!r}.")
    for name in ("length", "rows", "max_bad_in_a_row", "lanes", "shuffle_block"):
        _positive(getattr(settings, name), f"{where}: {name}", optional=name == "lanes")
    if not isinstance(settings.seed, int) or isinstance(settings.seed, bool) or settings.seed < 0:
        raise ConfigError(f"{where}: seed must be a whole number, not negative, not {settings.seed!r}.")
    if settings.length < 2:
        raise ConfigError(f"{where}: length must be at least 2.")
    _number(settings.buffer, f"{where}: buffer")
    for number, source in enumerate(settings.sources):
        here = f"{where}: sources[{number}] ({source.name})"
        if not isinstance(source.options, Mapping):
            raise ConfigError(f"{here}: options must be a mapping of keys to values.")
        source.options = dict(source.options)
        _number(source.weight, f"{here}: weight")
        for name in ("cycles", "max_length", "batch_size"):
            _positive(getattr(source, name), f"{here}: {name}", optional=True)
    endless = next((source.name for source in settings.sources[:-1] if source.cycles is None), None)
    if settings.concat_type == "concat" and endless is not None:
        raise ConfigError(f"{where}: with concat_type concat source {endless!r} needs cycles: without end it would "
                          f"leave no turn to the sources after it.")
    sized = [source.name for source in settings.sources if source.batch_size is not None]
    if settings.packing and sized and len(sized) < len(settings.sources):
        other = next(source.name for source in settings.sources if source.batch_size is None)
        raise ConfigError(f"{where}: source {sized[0]!r} has a batch_size and {other!r} has none; with packing the "
                          f"weights count batch sizes, so give all or none.")


def _positive(value: Any, where: str, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{where} must be a positive whole number, not {value!r}.")


def _number(value: Any, where: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"{where} must be a positive number, not {value!r}.")
