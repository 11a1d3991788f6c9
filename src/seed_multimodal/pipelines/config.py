"""Configuration of a system: keys of `system.json`, paths of its parts, sources of the originals.

    config = SystemConfig.find("nano")     # also 8b, seed-x-i, lavit …, a hub name, or a folder
    config.require("llm", "tokenizer")     # CheckpointError with download instructions

A folder has a `system.json` (paths of parts relative to it, and settings of the weights), or is one
of these:

* a folder that a family recognises (`recognise`): a copy of an original repository, a language
  model, an image tokenizer
* a checkpoint of a language model's training, whose other parts are those of the system that it was
  trained on (`base.json`)

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

from seed_multimodal import hub
from seed_multimodal.disk import JsonObject, read_json_object
from seed_multimodal.downloads import WantedPart, is_unfinished
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.hub import ADAPTER_CONFIG
from seed_multimodal.language.prompts import DEFAULT_TASKS, TaskPrompts
from seed_multimodal.models.registry import families, find_family
from seed_multimodal.originals import OriginalPart, origin
from seed_multimodal.pipelines.base_record import (
    DEFAULT_FAMILY,
    family_name,
    is_checkpoint,
    read_base,
)
from seed_multimodal.pipelines.parts import (
    Original,
    Part,
    existing_path,
    not_saved,
    part,
)
from seed_multimodal.settings import check_keys, nearest, read_settings, setting


@dataclass(kw_only=True)
class SystemConfig:
    """All settings of a system before loading: what families have in common.

    original: short name of the original model with these files.
    """

    system: ClassVar[str] = ""  # name of the family
    originals: ClassVar[Mapping[str, Original]] = {}
    shipped: ClassVar[str] = ""  # the small system of the family in this repository
    model_flags: ClassVar[str] = "of the server"  # further programs that take it, for messages
    # Parts that a checkpoint holds; the others are its base's.
    trained_parts: ClassVar[tuple[str, ...]] = ("llm",)
    # Files of an original's parts whose folder holds more.
    original_files: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    name: str = not_saved("")
    original: str = not_saved("")
    # The copy of an original's repository with these parts; None: `pretrained/`.
    copy: Path | None = not_saved()
    # What a folder was taken for that does not say so itself, for messages.
    read_as: str = not_saved("")
    image_size: int | None = not_saved()  # pixels a side that the tokenizer reads, if fixed
    sizes: Mapping[str, Any] = not_saved(factory=dict)  # of parts without `config.json`
    llm: Path | None = part("language model", "llm")
    tokenizer: Path | None = part("tokenizer", "tokenizer")  # of text; SEED-LLaMA: of images, too
    tuned: bool = True  # instruction-tuned; otherwise it continues texts
    generation: JsonObject = field(default_factory=dict)  # defaults of generation
    tasks: TaskPrompts = DEFAULT_TASKS
    # after how many codes a stream shows an image
    previews: tuple[int, ...] = setting((), minimum=1)
    # denoising steps of the image that a stream shows; None: as of a drawing
    preview_inference_steps: int | None = setting(None, minimum=1)
    notice: str = ""  # what people should know of the weights; logged when they are loaded
    known_words: Path | None = None  # JSON file of the words that it learned

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
        config = _original_by_name(str(name)) or _of_folder(name)
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
                value = hub.local_folder(value) or Path(value)
            setattr(self, key, value)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the `system.json` of a folder; keys starting with `_` are comments.

        Raises ConfigError: invalid JSON, an unknown key (with the nearest) or a wrong value, or
        another family than this class.
        """
        # 1. Its keys.
        file = folder / "system.json"
        content = read_json_object(file, ConfigError)
        values = {key: value for key, value in content.items() if not key.startswith("_")}
        label = str(file)
        read_as = ""
        if "system" not in values:
            read_as = f"has no key system, so it is read as {DEFAULT_FAMILY}; "
            label = f"{file} (without the key system, read as {DEFAULT_FAMILY})"
        kind = family_name(values.pop("system", DEFAULT_FAMILY), f"{file}: system")
        config_class = find_family(kind).config
        if not issubclass(config_class, cls):
            raise ConfigError(f"{file}: is a {kind} system, not {cls.system}.")
        check_keys(values, ("system", *config_class.settings(), *config_class.parts()), label)

        # 2. Its values, with defaults.
        if isinstance(values.get("tasks"), dict):
            default_tasks = dataclasses.asdict(config_class().tasks)
            values["tasks"] = {**default_tasks, **values["tasks"]}
        paths = {key: part.folder for key, part in config_class.parts().items() if part.folder}
        config = read_settings(config_class, {**paths, **values}, label)
        config.check(label)

        # 3. What follows from them.
        config.name = str(folder)
        config.read_as = read_as
        for key, value in vars(config).items():
            if isinstance(value, Path):
                setattr(config, key, folder / value)
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
    def locate_parts(cls, paths: dict[str, Path]) -> None:
        """Replace paths for `seed assemble` by those of the parts in them."""

    @classmethod
    def settings_of_weights(cls, paths: Mapping[str, Path]) -> JsonObject:
        """Settings that the parts of a new system determine."""
        return {}

    @classmethod
    def arrange(cls, folder: Path, names: dict[str, str | None]) -> None:
        """Move files of a new system's folder; `names`: the paths for its `system.json`."""

    def parts_to_save(self) -> dict[str, Path]:
        """The parts that exist, for a system's folder of its own."""
        parts: dict[str, Path] = {}
        for key in self.parts():
            path = getattr(self, key)
            if path is not None and self.has(key):
                parts[key] = path
        return parts

    # ---- original models

    @classmethod
    def of_original(cls, short: str, copy: Path | None = None) -> Self:
        """An original model, in a copy of its repository or below `pretrained/`."""
        settings = cls.originals[short].settings
        config = cls(**settings, name=short, original=short, copy=copy)
        config.locate_original()
        return config

    def locate_original(self) -> None:
        """Set the paths of an original's parts."""
        for key, default in self.original_paths().items():
            path = default if self.copy is None else self.path_in_copy(default)
            setattr(self, key, existing_path(path) or path)

    def original_paths(self) -> dict[str, Path]:
        """Local paths of an original's parts, below the repository root."""
        if not self.original:
            return {}
        return {key: Path(path) for key, path in self.originals[self.original].parts.items()}

    def path_in_copy(self, default: Path) -> Path:
        """The path of a part in the copy of an original's repository."""
        assert self.copy is not None
        path = self.copy / default.relative_to("pretrained")
        return path if existing_path(path) else default

    # ---- parts on disk

    @property
    def can_draw(self) -> bool:
        """Whether all decoder parts exist."""
        return self.has(*self.decoder_parts())

    def has(self, *parts: str) -> bool:
        """Whether these parts exist."""
        return all(self._is_complete(key) for key in parts)

    def require(self, *parts: str) -> Self:
        """This config, with these parts available (an original's from the hub, if allowed).

        Raises CheckpointError with download instructions for missing parts.
        """
        for key in parts:
            self._fetch(key)
        if self.has(*parts):
            return self
        if self.original:
            message = self._missing_original_message()
        else:
            message = self._missing_parts_message(parts)
        raise CheckpointError(f"{self.name}: {self.read_as}{message}")

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

    def _fetch(self, key: str) -> None:
        """Get a missing part of an original from the hub, unless another path was given for it."""
        default = self.original_paths().get(key)
        if default is None or getattr(self, key) not in (default, existing_path(default)):
            return
        source, path_in_repository = origin(default)
        folder = existing_path(Path(source.folder))
        if self.has(key) and not (folder is not None and is_unfinished(source, folder)):
            return

        # The files of this part: its repository may hold more.
        files = self.original_files.get(key) or _files_of(source, path_in_repository)
        snapshot = hub.cached_snapshot(source.hub)
        if snapshot is not None:
            setattr(self, key, existing_path(snapshot / path_in_repository) or default)
        if snapshot is None or not self.has(key):
            folder = hub.download_part(source, files)
            if folder is not None:
                setattr(self, key, existing_path(folder / path_in_repository) or default)

    def wanted_parts(self) -> list[WantedPart]:
        """What `seed fetch` downloads of an original model."""
        wanted: dict[tuple[str, tuple[str, ...]], WantedPart] = {}
        for default in self.original_paths().values():
            source, path_in_repository = origin(default)
            files = _files_of(source, path_in_repository)
            wanted[source.name, files] = WantedPart(source, files)
        # Files are downloaded once: a whole repository has all that is named of it.
        for source_name, files in [*wanted]:
            whole = wanted[source_name, files].part.files
            if files != whole and (source_name, whole) in wanted:
                del wanted[source_name, files]
        return list(wanted.values())

    def _is_complete(self, key: str) -> bool:
        """Whether a part exists, or has no path and may be missing."""
        if getattr(self, key) is None:
            return self.parts()[key].optional
        return not self._missing_paths(key)

    def _missing_paths(self, key: str) -> list[Path]:
        """The paths of a part that do not exist; none where it has no path."""
        path: Path | None = getattr(self, key)
        if path is None:
            return []
        paths = [path]
        if self.original and key in self.original_files:
            paths = [path / file for file in self.original_files[key]]
        return [path for path in paths if not existing_path(path)]

    def _missing_parts_message(self, keys: Sequence[str]) -> str:
        """Where to put the missing ones of some parts."""
        reasons: list[str] = []
        for key in keys:
            if self._is_complete(key):
                continue
            advice = " (seed assemble joins parts)"
            for path in self._missing_paths(key):
                advice = f": put it at {path}"
            reasons.append(f"its {self.parts()[key].label} is not there{advice}")
        return f"{'; '.join(reasons)}."

    def _missing_original_message(self) -> str:
        """How to get the missing parts of an original model."""
        missing: list[tuple[OriginalPart, str]] = []
        for key, default in self.original_paths().items():
            if self.parts()[key].optional:
                continue
            for path in self._missing_paths(key)[:1]:
                missing.append((origin(default)[0], str(path)))
        return (
            f"{hub.missing_weights_message(missing)}, or take --model {self.shipped} "
            f"({self.model_flags}: --system {self.shipped}), which runs now."
        )


@dataclass(kw_only=True)
class CodeSystemConfig(SystemConfig):
    """Of a `CodeSystem`: images are codes in prompts of a template."""

    template: str = "vicuna"  # of prompts, see `language.prompts`


def _files_of(source: OriginalPart, path: str) -> tuple[str, ...]:
    """Shell patterns of the files at a path in a repository; ".": of all that is needed of it."""
    if path == ".":
        return source.files
    return path, f"{path}/*"


# ---- systems by name and folder


def system_names() -> tuple[str, ...]:
    """Names of the shipped and of the original systems."""
    return (*hub.SHIPPED_SYSTEMS, *original_systems())


def original_systems() -> dict[str, type[SystemConfig]]:
    """The families' configs by the short names of their original systems."""
    return {name: spec.config for spec in families() for name in spec.config.originals}


def _original_by_name(name: str) -> SystemConfig | None:
    """The original model with a short name or hub name."""
    for short, config in original_systems().items():
        if name.lower() == short or name in config.originals[short].aliases:
            return config.of_original(short)
    return None


def _of_folder(name: str | Path) -> SystemConfig:
    """A shipped system, or the system in a folder or hub repository."""
    folder = hub.locate_system(name) or hub.local_folder(name)
    if folder is None or not str(name):
        short = str(name).lower()
        names = system_names()
        near = "" if short in names else nearest(short, names)
        raise CheckpointError(
            f"{name}: no such folder{near}; give {', '.join(names)} or a folder with "
            f"system.json ({', '.join(hub.SHIPPED_SYSTEMS)}: in the repository's pretrained/)."
        )
    if (folder / "system.json").is_file():
        return SystemConfig.read(folder)
    config = _of_checkpoint(folder) if is_checkpoint(folder) else _recognise(folder)
    config.name = str(folder)
    return config


def _recognise(folder: Path) -> SystemConfig:
    """The system of a folder without `system.json`.

    The first family knows single language models, those after it their own layouts, which may hold
    a language model, too.
    """
    for spec in reversed(families()):
        config = spec.config.recognise(folder)
        if config is not None:
            return config
    raise CheckpointError(f"{folder}: {_no_system(folder)}")


def _no_system(folder: Path) -> str:
    """Why a folder is no system; of a run's folder, its last checkpoint."""
    steps: list[int] = []
    for path in folder.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdecimal():
            steps.append(int(step))
    if steps:
        checkpoint = folder / f"checkpoint-{max(steps)}"
        return f"is the folder of a run; name a checkpoint: {checkpoint}."
    return (
        "holds no system: neither system.json, nor the folders of an original model, nor a "
        "language model or an image tokenizer."
    )


# ---- checkpoints


def _of_checkpoint(folder: Path) -> SystemConfig:
    """A checkpoint's weights, with the other parts of the system that it was trained on."""
    record = read_base(folder)
    config_class = find_family(record.pop("system")).config
    paths = {key: hub.local_folder(path) or Path(path) for key, path in record.items()}
    config = _system_of_parts(config_class, paths) or config_class.base_system(paths, folder)

    # The recorded parts that are on this disk, and the trained ones.
    for key, path in paths.items():
        if path.exists():
            setattr(config, key, path)
    for key in config_class.trained_parts:
        setattr(config, key, folder)

    # These describe the base.
    config.notice = ""
    config.known_words = None
    return config


def _system_of_parts(
    config_class: type[SystemConfig], paths: Mapping[str, Path]
) -> SystemConfig | None:
    """The system whose folder holds one of these parts; None: no folder with a `system.json`."""
    for path in paths.values():
        for parent in Path(os.path.abspath(path)).parents[:2]:
            if not (parent / "system.json").is_file():
                continue
            config = SystemConfig.read(parent)
            if isinstance(config, config_class):
                return config
    return None
