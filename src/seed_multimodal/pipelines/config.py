"""Configuration of a system: keys of `system.json`, and paths of its parts.

    config = SystemConfig.find("nano")     # also 8b, seed-x-i, lavit …, a hub name, or a folder
    config.require("llm", "tokenizer")     # CheckpointError with download instructions

A folder has a `system.json` (paths of parts relative to it or to the repository, and settings of
the weights), or is one of these:

* a folder that a family recognises (`recognise`): a copy of an original repository, a language
  model, an image tokenizer
* a LoRA of PEFT, whose other parts are those of the system that it was trained on

A family has a subclass: its parts are fields made by `part`, its settings the other fields.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

from seed_multimodal.disk import JsonObject, read_json_object, replace_json
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.language.prompts import DEFAULT_TASKS, TaskPrompts
from seed_multimodal.models.registry import Abilities, check_ability, families, find_family
from seed_multimodal.settings import check_keys, check_value, nearest, positive, read_settings
from seed_multimodal.weights.catalogue import (
    ADAPTER_CONFIG,
    SHIPPED_SYSTEMS,
    WEIGHT_PATTERNS,
    catalogue,
    original_name,
    part_of,
)
from seed_multimodal.weights.find import (
    find_folder,
    find_path,
    locate,
    locate_system,
    missing_weights_message,
    portable_path,
    recorded_path,
)

SYSTEM = "system.json"
DEFAULT_FAMILY = "seed_llama"  # of a checkpoint of PEFT, and of a system.json without `system`


@dataclass(frozen=True)
class Part:
    """A part of a system, a folder or file.

    label: in messages.
    folder: default path in a system's folder; None: none.
    flag: help of its flag in `seed assemble`; "": no flag.
    required: whether that flag is.
    draws: drawing needs it.
    optional: the system is complete without it.
    """

    label: str
    folder: str | None = None
    flag: str = ""
    required: bool = False
    draws: bool = False
    optional: bool = False


def part(label: str, folder: str | None = None, **options: Any) -> Any:
    """A dataclass field for the path of a part; `options` of `Part`."""
    return field(default=None, metadata={"part": Part(label, folder, **options)})


@dataclass(frozen=True)
class Found:
    """How a system was found: what no `system.json` holds.

    name: its folder, or the short name of an original.
    original: the short name, if its files are an original's, or its tokenizer.
    note: what a folder that does not say so itself was taken for, for messages.
    sizes: of parts without `config.json`; "lora": of the LoRA in a SEED-X's agent.
    """

    name: str = ""
    original: str = ""
    note: str = ""
    sizes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class SystemConfig:
    """The `system.json` of a system: what families have in common."""

    system: ClassVar[str] = ""  # name of the family
    shipped: ClassVar[str] = ""  # the small system of the family in this repository
    abilities: ClassVar[Abilities] = Abilities()
    model_flags: ClassVar[str] = "of the server"  # further programs that take it, for messages
    # Parts that a checkpoint holds; the others are its base's.
    trained_parts: ClassVar[tuple[str, ...]] = ("llm",)

    found: Found = field(default_factory=Found, metadata={"saved": False})
    llm: Path | None = part("language model", "llm", flag="language model", required=True)
    # of text; SEED-LLaMA: of images, too
    tokenizer: Path | None = part("tokenizer", "tokenizer", flag="text tokenizer", required=True)
    known_images: Path | None = part("network that notes unlike images", optional=True)
    # pixels a side that the tokenizer reads, if fixed; a setting of SEED-LLaMA
    image_size: int | None = field(default=None, metadata={"saved": False})
    tuned: bool = True  # instruction-tuned; otherwise it continues texts
    generation: JsonObject = field(default_factory=dict)  # defaults of generation
    tasks: TaskPrompts = DEFAULT_TASKS
    # after how many codes a stream shows an image
    previews: tuple[int, ...] = positive(())
    # denoising steps of the image that a stream shows; None: as of a drawing
    preview_inference_steps: int | None = positive(None)
    notice: str = ""  # what people should know of the weights; logged with the device
    known_words: Path | None = None  # JSON file of the words that it learned
    read_back: bool = False  # whether it describes its drawings, see `pipelines.world`

    @property
    def name(self) -> str:
        """Its folder, or the short name of an original."""
        return self.found.name

    def check_ability(self, ability: str) -> None:
        """Raise ConfigError, which names systems that have it, if its family lacks an ability."""
        check_ability(self.abilities, ability, self.name)

    # ---- keys

    @classmethod
    @cache
    def parts(cls) -> dict[str, Part]:
        """The parts by key."""
        return {
            entry.name: entry.metadata["part"]
            for entry in dataclasses.fields(cls)
            if "part" in entry.metadata
        }

    @classmethod
    @cache
    def settings(cls) -> tuple[str, ...]:
        """Keys of `system.json` that are no parts, without `system`."""
        return tuple(
            entry.name
            for entry in dataclasses.fields(cls)
            if "part" not in entry.metadata and entry.metadata.get("saved", True)
        )

    @classmethod
    def decoder_parts(cls) -> tuple[str, ...]:
        """The parts that drawing needs."""
        return tuple(key for key, part in cls.parts().items() if part.draws)

    # ---- finding a system

    @classmethod
    def find(cls, name: str | Path | None, **overrides: Any) -> Self:
        """The config of a name or folder; `require` checks that parts exist.

        name: None for the system of the `llm` in `overrides`.
        overrides: parts (paths or hub names) and settings; None: not overridden.

        Raises ConfigError: it is of another family than this class.
        """
        overrides = {key: value for key, value in overrides.items() if value is not None}
        if name is None:
            name = overrides.get("llm", "")
        short = original_name(str(name))
        config = SystemConfig.of_original(short) if short else _of_folder(name)
        if not isinstance(config, cls):
            expected = cls.system or "one whose prompts hold image codes"
            raise ConfigError(f"{name}: is a system of {config.system}, not {expected}.")
        config.override(**overrides)
        return config

    def override(self, **values: Any) -> None:
        """Replace parts (paths or hub names) and settings. Raises ConfigError: unknown key."""
        parts = self.parts()
        check_keys(values, (*parts, *self.settings()), f"Parts of {self.name}")
        for key, value in values.items():
            if key in parts:
                value = find_path(value) or Path(value)
            setattr(self, key, value)

    @staticmethod
    def read(folder: Path) -> SystemConfig:
        """Read the `system.json` of a folder; keys starting with `_` are comments.

        Raises ConfigError: invalid JSON, an unknown key (with the nearest), a wrong value, or no
        such `known_images`.
        """
        file = folder / SYSTEM
        content = read_json_object(file, ConfigError)
        values = {key: value for key, value in content.items() if not key.startswith("_")}
        label, note = str(file), ""
        if "system" not in values:
            note = f"has no key system, so it is read as {DEFAULT_FAMILY}; "
            label = f"{file} (without the key system, read as {DEFAULT_FAMILY})"
        config = _config_of(values, label)

        # Paths are relative to the folder; those of a checkpoint's base to the repository.
        for key, value in vars(config).items():
            if isinstance(value, Path):
                setattr(config, key, recorded_path(value, folder))
        if not config.has("known_images"):
            raise ConfigError(f"{label}: known_images: {config.known_images} is not there.")
        config.found = Found(str(folder), _original_of(config), note)
        return config

    @classmethod
    def of_original(cls, short: str, copy: Path | None = None, root: str = "pretrained") -> Self:
        """An original model.

        copy: a folder with some of its parts, laid out as in the folder `root`.

        Raises ConfigError: it is of another family than this class.
        """
        values = dict(catalogue().systems[short])
        values.pop("aliases", None)
        config = _config_of(values, short)
        assert isinstance(config, cls)
        config.found = Found(short, original=short)
        for key in config.parts():
            path: Path | None = getattr(config, key)
            if path is not None:
                inside = None if copy is None else locate(copy / path.relative_to(root))
                setattr(config, key, inside or locate(path) or path)
        return config

    # ---- defined by families

    def check(self, label: str) -> None:
        """Check and complete settings that were read. Raises ConfigError, prefixed with `label`."""

    @classmethod
    def recognise(cls, folder: Path) -> Self | None:
        """The system of a folder (or file) that has no `system.json`; None: not of this family."""
        return None

    @classmethod
    def base_system(cls, paths: Mapping[str, Path], checkpoint: Path) -> Self:
        """The system that a checkpoint was trained on, where no `system.json` is next to its parts.

        paths: those of its parts that the checkpoint names.
        """
        return cls()

    @classmethod
    def settings_of_weights(cls, paths: dict[str, Path]) -> JsonObject:
        """Settings that the parts of a new system determine; replaces folders of `seed assemble` in
        `paths` by those of the parts in them."""
        return {}

    @classmethod
    def arrange(cls, folder: Path, names: dict[str, str | None]) -> None:
        """Move files of a new system's folder; `names`: the paths for its `system.json`."""

    # ---- writing

    def parts_to_save(self) -> dict[str, Path]:
        """The parts that exist, for a system's folder of its own."""
        paths = {key: getattr(self, key) for key in self.parts() if self.has(key)}
        return {key: path for key, path in paths.items() if path is not None}

    def settings_to_save(self) -> JsonObject:
        """The settings, for a `system.json`."""
        settings: JsonObject = {}
        for key in self.settings():
            value = getattr(self, key)
            if value is not None:
                is_group = isinstance(value, TaskPrompts)
                settings[key] = dataclasses.asdict(value) if is_group else value
        return settings

    # ---- parts on disk

    @property
    def can_draw(self) -> bool:
        """Whether all decoder parts exist."""
        return self.has(*self.decoder_parts())

    def has(self, *parts: str) -> bool:
        """Whether these parts exist, or have no path and may be missing."""
        paths = {key: getattr(self, key) for key in parts}
        return all(
            self.parts()[key].optional if path is None else locate(path) is not None
            for key, path in paths.items()
        )

    def require(self, *parts: str) -> Self:
        """This config, with these parts available (an original's from the hub, if allowed).

        Raises CheckpointError with download instructions for missing parts.
        """
        for key in parts:
            path = getattr(self, key)
            if path is not None:
                setattr(self, key, find_path(path) or path)
        missing = [key for key in parts if not self.has(key)]
        if not missing:
            return self
        raise CheckpointError(f"{self.name}: {self.found.note}{self._missing_message(missing)}")

    def path(self, key: str) -> Path:
        """The path of a part that is there. Raises as `require`."""
        self.require(key)
        path: Path = getattr(self, key)
        return path

    def check_language_model(self) -> None:
        """Raise CheckpointError if the language model's folder lacks a file."""
        from seed_multimodal.state_dicts import missing_weights

        folder = self.llm
        if folder is None or not folder.is_dir() or (folder / ADAPTER_CONFIG).is_file():
            return
        missing = missing_weights(folder)
        if missing is not None:
            raise CheckpointError(
                f"{missing}: no such file, so the language model of {self.name} is not complete; "
                "download its folder again."
            )

    def _missing_message(self, keys: Sequence[str]) -> str:
        """How to get the missing ones of some parts; of an original, all that it lacks."""
        paths = {key: getattr(self, key) for key in self.parts()}
        originals = {
            key: path
            for key, path in paths.items()
            if path is not None and part_of(path) is not None
            if not self.parts()[key].optional and not self.has(key)
        }
        reasons: list[str] = []
        for key in keys:
            if key not in originals:
                target = paths[key] or "a path (seed assemble joins parts)"
                reasons.append(f"its {self.parts()[key].label} is not there: put it at {target}")
        if not originals.keys().isdisjoint(keys):
            instead = (
                f", or take --model {self.shipped} ({self.model_flags}: --system {self.shipped}), "
                "which runs now"
            )
            reasons.append(
                missing_weights_message(originals.values()) + (instead if self.shipped else "")
            )
        return f"{'; '.join(reasons)}."


@dataclass(kw_only=True)
class CodeSystemConfig(SystemConfig):
    """Of systems whose images are codes in prompts of a template."""

    template: str = "vicuna"  # of prompts, see `language.prompts`


def _config_of(values: JsonObject, label: str) -> SystemConfig:
    """The config of a `system.json`'s keys, with defaults. Raises ConfigError, with `label`."""
    # 1. Its family.
    names = [spec.name for spec in families()]
    kind = values.pop("system", DEFAULT_FAMILY)
    family = find_family(check_value(str, kind, f"{label}: system", choices=names))
    config_class: type[SystemConfig] = family.config
    check_keys(values, ("system", *config_class.settings(), *config_class.parts()), label)

    # 2. Its values.
    if isinstance(values.get("tasks"), dict):
        values["tasks"] = {**dataclasses.asdict(config_class().tasks), **values["tasks"]}
    paths = {key: part.folder for key, part in config_class.parts().items() if part.folder}
    config = read_settings(config_class, {**paths, **values}, label)
    for key in ("previews", "preview_inference_steps"):
        if getattr(config, key):
            check_ability(config.abilities, "first_codes", f"{label}: {key}: {family.title}")
    config.check(label)
    return config


def _original_of(config: SystemConfig) -> str:
    """The original whose tokenizer a system reads, as a checkpoint of its training; "": none."""
    known = None if config.tokenizer is None else part_of(config.tokenizer)
    for short, values in catalogue().systems.items():
        original = part_of(values["tokenizer"])
        if known and original and known[0] == original[0] and values["system"] == config.system:
            return short
    return ""


def read_sizes(folder: Path | None) -> JsonObject:
    """The `config.json` of a part; empty where there is none."""
    if folder is None or not (folder / "config.json").is_file():
        return {}
    return read_json_object(folder / "config.json")


# ---- systems by name and folder


def system_names() -> tuple[str, ...]:
    """Names of the shipped and of the original systems."""
    return (*SHIPPED_SYSTEMS, *catalogue().systems)


def _of_folder(name: str | Path) -> SystemConfig:
    """A shipped system, or the system in a folder or hub repository."""
    short = str(name).lower()
    names = system_names()
    near = "" if short in names else nearest(short, names)
    advice = (
        f"give {', '.join(names)}{near} or a folder with {SYSTEM} ({', '.join(SHIPPED_SYSTEMS)}: "
        "in the repository's pretrained/)"
    )
    folder = locate_system(name) or find_folder(name, WEIGHT_PATTERNS, advice)
    if (folder / SYSTEM).is_file():
        return SystemConfig.read(folder)

    # The first family knows single language models, those after it their own layouts, which may
    # hold a language model, too.
    config: SystemConfig | None = None
    if (folder / ADAPTER_CONFIG).is_file():
        config = _of_checkpoint(folder)
    for spec in reversed(families()):
        config = config or spec.config.recognise(folder)
    if config is not None:
        config.found = dataclasses.replace(config.found, name=str(folder))
        return config

    # Of a run's folder, its last checkpoint.
    checkpoints = [*folder.glob("checkpoint-[0-9]*")]
    if checkpoints:
        last = max(checkpoints, key=lambda path: (len(path.name), path.name))
        raise CheckpointError(f"{folder}: is the folder of a run; name a checkpoint: {last}.")
    raise CheckpointError(
        f"{folder}: holds no system: neither {SYSTEM}, nor the folders of an original model, nor a "
        "language model or an image tokenizer."
    )


# ---- checkpoints


def write_checkpoint_system(folder: Path, system: str, **parts: str | Path | None) -> None:
    """Write the `system.json` of a checkpoint of a language model's training.

    parts: what it was trained with; the other parts are those of the system that these are of.
    """
    config = _with_checkpoint(system, parts, folder)
    values: JsonObject = {"system": system, **config.settings_to_save()}
    for key in config.parts():
        path: Path | None = getattr(config, key)
        values[key] = None if path is None else "." if path == folder else portable_path(path)
    replace_json(folder / SYSTEM, values)


def _of_checkpoint(folder: Path) -> SystemConfig:
    """A LoRA of PEFT, such as the original SEED-LLaMA's, which names the language model alone."""
    file = folder / ADAPTER_CONFIG
    base = read_json_object(file).get("base_model_name_or_path")
    is_lost = isinstance(base, str) and Path(base).is_absolute() and not Path(base).exists()
    if not isinstance(base, str) or not base or is_lost:
        raise ConfigError(
            f"{file}: base_model_name_or_path is {base!r}: name there the base model that the "
            "checkpoint was trained on, or merge it with --base_model "
            "(MultiModalLLM/src/tools/merge_lora_weights.py)."
        )
    return _with_checkpoint(DEFAULT_FAMILY, {"llm": base}, folder)


def _with_checkpoint(
    system: str, parts: Mapping[str, str | Path | None], checkpoint: Path
) -> SystemConfig:
    """The system that a checkpoint was trained on, with its parts (paths or hub names)."""
    config_class = find_family(system).config
    paths = {key: find_path(path) or Path(path) for key, path in parts.items() if path is not None}

    # 1. The system whose folder holds one of these parts, else what the family knows.
    config: SystemConfig | None = None
    for path in paths.values():
        folder = Path(os.path.abspath(path))
        for parent in (folder, *folder.parents[:2]):
            if config is None and (parent / SYSTEM).is_file():
                candidate = SystemConfig.read(parent)
                config = candidate if isinstance(candidate, config_class) else None
    config = config or config_class.base_system(paths, checkpoint)

    # 2. The recorded parts that are on this disk, and the trained ones.
    for key, path in paths.items():
        if path.exists():
            setattr(config, key, path)
    for key in config_class.trained_parts:
        setattr(config, key, checkpoint)

    # 3. These describe the base.
    config.notice = ""
    config.known_words = None
    config.known_images = None
    return config
