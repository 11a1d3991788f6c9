"""Description of a system: keys of `system.json`, location of its parts, sources of the originals.

    config = SystemConfig.find("nano")     # also 8b, seed-x-i, lavit …, a hub name, or a folder
    config.require("llm", "tokenizer")     # CheckpointError with download instructions

A folder has a `system.json` (paths of parts relative to it, defaults in `PARTS`; settings of the
weights, defaults in `SETTINGS`), or is one of these:

* a copy of an original SEED-X or LaVIT repository, or a merged SEED-X agent (`llm` and `agent`)
* a LLaMA for SEED-LLaMA, or an image tokenizer
* a checkpoint of a language model's training, whose other parts are those of the system that it was
  trained on (`base.json`)
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from seed_multimodal import hub
from seed_multimodal.disk import JsonObject, read_json_object, replace_text
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.hub import ADAPTER_CONFIG, AGENT_CONFIG, VISUAL_WEIGHTS
from seed_multimodal.language.prompts import (
    DEFAULT_TASKS,
    ORIGINAL_TASKS,
    SEED_X_TASKS,
    TaskPrompts,
    template_for,
)
from seed_multimodal.settings import check_keys, check_value, nearest, read_settings, setting

DETOKENIZER_FOLDER = "diffusion_model"  # of a tokenizer's folder
BASE = "base.json"  # of a checkpoint: see `record_base`
# Parts of each system: description, and path in a system's folder.
PARTS: dict[str, dict[str, tuple[str, str | None]]] = {
    "seed_llama": {
        "llm": ("language model", "seed_llama"),
        "tokenizer": ("image tokenizer", "seed_tokenizer"),
        "detokenizer": ("diffusion model", f"seed_tokenizer/{DETOKENIZER_FOLDER}"),
        "vision": ("vision encoder", None),
    },
    "seed_x": {
        "llm": ("language model", "llm"),
        "agent": ("agent (resamplers)", "agent"),
        "tokenizer": ("text tokenizer", "tokenizer"),
        "vision": ("vision encoder", "vision"),
        "sdxl": ("SDXL (unet/config.json, vae and scheduler)", "sdxl"),
        "detokenizer": ("SDXL adapter", "detokenizer"),
    },
    "lavit": {
        "llm": ("language model", "llm"),
        "words": ("text tokenizer", None),
        "tokenizer": ("dynamic tokenizer", "tokenizer"),
        "decoder": ("decoder of codes", "decoder"),
        "pixels": ("pixel decoder (unet, vae and scheduler)", "pixels"),
        "safety": ("safety checker", None),
    },
}
DECODER_PARTS = ("detokenizer", "sdxl", "decoder", "pixels")
# Preprocessing of the original SEED-LLaMA.
BILINEAR = {"type": "clip", "keep_ratio": False, "interpolation": "bilinear"}
# Of a tokenizer without language model, as in its evaluation.
BICUBIC = {**BILINEAR, "interpolation": "bicubic"}
# Keys of `system.json` with defaults: per system, and common ones.
SETTINGS: dict[str, JsonObject] = {
    "seed_llama": {
        "template": "vicuna",
        "image_size": 224,
        "transform": {},
        "generation": {},
        "tasks": DEFAULT_TASKS,
    },
    "seed_x": {
        "tuned": True,
        "grids": ("1x1", "1x2", "1x3", "2x1", "3x1", "1x4", "4x1", "2x2"),
        "edit_grids": ("1x1",),
        "generation": {"max_new_tokens": 512, "do_sample": False},
        "tasks": SEED_X_TASKS,
    },
    "lavit": {"head": "highres", "selection": "draw", "generation": {}, "answer_after": ""},
}
COMMON = ("system", "notice", "previews", "known_words")

# Settings of the originals' inference scripts (top_k 50: library default).
ORIGINAL_GENERATION = {
    "max_new_tokens": 512,
    "do_sample": True,
    "temperature": 1.0,
    "top_p": 0.5,
    "top_k": 50,
}
_SEED_LLAMA = {
    "system": "seed_llama",
    "tokenizer": hub.ORIGINAL_PARTS["tokenizer"].folder,
    "detokenizer": hub.ORIGINAL_PARTS["unclip"].folder,
    "transform": BILINEAR,
    "generation": ORIGINAL_GENERATION,
    "tasks": ORIGINAL_TASKS,
}
_SEED_X = {
    "system": "seed_x",
    "tokenizer": "pretrained/cvlm_llama2_tokenizer_100img_and_224loc_addpatch",
    "vision": hub.ORIGINAL_PARTS["qwen-vit"].folder,
    "sdxl": hub.ORIGINAL_PARTS["sdxl"].folder,
    "detokenizer": "pretrained/seed_detokenizer/first_stage",
}
_LAVIT = hub.ORIGINAL_PARTS["lavit"].folder
# The original models, as a `system.json` in the repository's root would describe them.
ORIGINALS: dict[str, JsonObject] = {
    "8b": {**_SEED_LLAMA, "llm": hub.ORIGINAL_PARTS["8b"].folder},
    "14b": {**_SEED_LLAMA, "llm": hub.ORIGINAL_PARTS["14b"].folder, "template": "llama2"},
    "seed-x": {
        **_SEED_X,
        "llm": "pretrained/seed_x/llm",
        "agent": "pretrained/seed_x/agent",
        "tuned": False,
    },
    "seed-x-i": {**_SEED_X, "llm": "pretrained/seed_x_i/llm", "agent": "pretrained/seed_x_i/agent"},
    "seed-x-edit": {
        **_SEED_X,
        "llm": "pretrained/seed_x_edit/llm",
        "agent": "pretrained/seed_x_edit/agent",
        "detokenizer": "pretrained/seed_detokenizer/second_stage",
        "grids": ("1x1",),
    },
    "lavit": {
        "system": "lavit",
        "llm": f"{_LAVIT}/language_model",
        "tokenizer": _LAVIT,
        "decoder": f"{_LAVIT}/visual_tokenizer/highres_tokenizer_decoder.bin",
        "pixels": f"{_LAVIT}/highres_pixel_decoding",
        "safety": f"{_LAVIT}/pixel_decoding",
    },
}
# Files of LaVIT's parts.
FILES = {
    "tokenizer": ("visual_tokenizer/eva_vitg_psz14.bin", "visual_tokenizer/tokenizer_encoder.bin")
}
ALIASES = {
    "released": "8b",
    hub.ORIGINAL_PARTS["8b"].hub: "8b",
    hub.ORIGINAL_PARTS["14b"].hub: "14b",
    hub.SEED_X: "seed-x-i",
    hub.LAVIT: "lavit",
}
NAMES = (*hub.SHIPPED_SYSTEMS, *ORIGINALS)
# The small system of each family.
SHIPPED_FAMILIES = {"seed_llama": "nano", "seed_x": "nano-x", "lavit": "nano-lavit"}
# Parts that a checkpoint of each family holds; the others are its base's.
TRAINED_PARTS = {
    "seed_llama": ("llm",),
    "seed_x": ("agent", "tokenizer"),
    "lavit": ("llm", "words"),
}


@dataclass(kw_only=True)
class SystemConfig:
    """All settings of a system before loading.

    original: short name of the original model with these files. LaVIT's `tokenizer` is then the
    complete folder, and its `decoder` a file.
    """

    system: str = "seed_llama"  # seed_llama, seed_x or lavit
    name: str = ""
    original: str = ""
    llm: Path | None = None
    # SEED-LLaMA: of images and text; SEED-X: of text; LaVIT: of images
    tokenizer: Path | None = None
    detokenizer: Path | None = None
    vision: Path | None = None
    agent: Path | None = None
    sdxl: Path | None = None
    words: Path | None = None  # None: LaVIT's text tokenizer is in `llm`
    decoder: Path | None = None
    pixels: Path | None = None
    safety: Path | None = None
    template: str = "vicuna"  # of prompts: vicuna or llama2
    image_size: int | None = setting(None, minimum=1)  # pixels a side that the tokenizer reads
    # keywords of `get_transform`
    transform: JsonObject = field(default_factory=lambda: dict(BICUBIC))
    tuned: bool = True  # instruction-tuned; otherwise SEED-X continues texts
    grids: tuple[str, ...] = SETTINGS["seed_x"]["grids"]  # tile grids of input images
    edit_grids: tuple[str, ...] = ("1x1",)
    head: Literal["highres", "lowres"] = "highres"  # which of LaVIT's pixel decoders
    # of tokens: by their probability, or those above 0.5
    selection: Literal["draw", "threshold"] = "draw"
    # defaults of generation; LaVIT: by task
    generation: JsonObject = field(default_factory=dict)
    tasks: TaskPrompts = DEFAULT_TASKS
    answer_after: str = ""  # as `tasks.answer_after`
    # after how many codes a stream shows an image
    previews: tuple[int, ...] = setting((), minimum=1)
    notice: str = ""  # what people should know of the weights; logged when they are loaded
    known_words: Path | None = None  # JSON file of the words that it learned
    sizes: Mapping[str, Any] = field(default_factory=dict)  # of parts without `config.json`
    lora: Mapping[str, Any] | None = None  # fields of the LoRA whose weights are in `agent`

    @classmethod
    def find(
        cls,
        name: str | Path | None,
        *,
        system: str | None = None,
        template: str | None = None,
        tuned: bool | None = None,
        head: Literal["highres", "lowres"] | None = None,
        **parts: str | Path | None,
    ) -> SystemConfig:
        """The config of a name or folder; `require` checks that parts exist.

        name: None for the system of the `llm` in `parts`.
        system: raise ConfigError if it is of another kind.
        template, tuned, head: override the system's.
        parts: paths or hub names of other parts than the system's; None: its own.
        """
        if name is None:
            name = parts.get("llm") or ""
        short = ALIASES.get(str(name), str(name).lower())
        if short in ORIGINALS:
            config = cls._original(short, head=head)
        else:
            config = cls._of_folder(name, head)
        if system not in (None, config.system):
            raise ConfigError(f"{name}: is a {config.system} system, not {system}.")

        # What the caller overrides.
        paths = {key: path for key, path in parts.items() if path is not None}
        allowed = (*PARTS[config.system], "template", "tuned", "head")
        check_keys(paths, allowed, f"Parts of {config.name}")
        for key, path in paths.items():
            setattr(config, key, hub.local_folder(path) or Path(path))
        config.template = template or config.template
        config.head = head or config.head
        if tuned is not None:
            config.tuned = tuned

        # An original tokenizer's folder may have its own copy of the diffusion model.
        if config.original in ("8b", "14b") and config.tokenizer and "detokenizer" not in paths:
            copy = _existing(config.tokenizer / DETOKENIZER_FOLDER)
            config.detokenizer = copy or config.detokenizer
        return config

    @classmethod
    def read(cls, folder: Path) -> SystemConfig:
        """Read the `system.json` of a folder; keys starting with `_` are comments.

        Raises ConfigError: invalid JSON, an unknown key (with the nearest) or a wrong value.
        """
        from seed_multimodal.images.transforms import get_transform

        # 1. Its keys.
        file = folder / "system.json"
        content = read_json_object(file, ConfigError)
        values = {key: value for key, value in content.items() if not key.startswith("_")}
        kind = _kind(values.get("system", "seed_llama"), file)
        check_keys(values, (*COMMON, *SETTINGS[kind], *PARTS[kind]), str(file))

        # 2. Its values, with defaults.
        if isinstance(values.get("tasks"), dict):
            values["tasks"] = {**dataclasses.asdict(SETTINGS[kind]["tasks"]), **values["tasks"]}
        paths = {key: path for key, (_, path) in PARTS[kind].items() if path}
        config = read_settings(cls, {**SETTINGS[kind], **paths, **values}, str(file))
        transform_keys = inspect.signature(get_transform).parameters
        check_keys(config.transform, transform_keys, f"{file}: transform")
        if kind == "lavit":
            check_value(dict[str, JsonObject], config.generation, f"{file}: generation")

        # 3. What follows from them.
        config.name = str(folder)
        config.transform = {**BILINEAR, **config.transform}
        config.answer_after = config.answer_after or config.tasks.answer_after
        for key, value in vars(config).items():
            if isinstance(value, Path):
                setattr(config, key, folder / value)
        return config

    @classmethod
    def _of_folder(cls, name: str | Path, head: str | None) -> SystemConfig:
        """A shipped system, or the system in a folder or hub repository."""
        folder = hub.locate_system(name) or hub.local_folder(name)
        if folder is None or not str(name):
            short = str(name).lower()
            near = "" if short in NAMES else nearest(short, NAMES)
            raise CheckpointError(
                f"{name}: no such folder{near}; give {', '.join(NAMES)} or a folder with "
                f"system.json ({', '.join(hub.SHIPPED_SYSTEMS)}: in the repository's pretrained/)."
            )

        # The kind of folder, from its files. LLaMAs and image tokenizers have a `config.json`.
        llama: JsonObject = {}
        if (folder / "config.json").is_file():
            llama = read_json_object(folder / "config.json")
        if (folder / "system.json").is_file():
            config = cls.read(folder)
        elif hub.first_file(folder, (BASE, ADAPTER_CONFIG, AGENT_CONFIG)) is not None:
            config = cls._of_checkpoint(folder)
        elif _is_image_tokenizer(folder, llama.get("model_type")):
            parent = folder.parent if folder.is_file() else folder
            unclip = Path(hub.ORIGINAL_PARTS["unclip"].folder)
            detokenizer = _existing(parent / DETOKENIZER_FOLDER) or _existing(unclip)
            config = cls(tokenizer=folder, detokenizer=detokenizer)
        elif _has_folder(folder, "seed_x", "seed_x_i", "seed_x_edit", "agent"):
            config = cls._original("seed-x-i", folder)
        elif llama:
            config = cls._original("8b")
            config.llm = folder
            config.template = template_for(llama.get("hidden_size"))
        elif _has_folder(folder, "visual_tokenizer", "language_model"):
            config = cls._original("lavit", folder, head)
        else:
            raise CheckpointError(f"{folder}: {_no_system(folder)}")
        config.name = str(folder)
        return config

    @classmethod
    def _of_checkpoint(cls, folder: Path) -> SystemConfig:
        """A checkpoint's weights, with the other parts of the system that it was trained on."""
        record = read_base(folder)
        kind = record.pop("system")
        paths = {key: hub.local_folder(path) or Path(path) for key, path in record.items()}
        config = cls._base_system(kind, paths, folder)

        # The recorded parts that are on this disk, and the trained ones.
        for key, path in paths.items():
            if path.exists():
                setattr(config, key, path)
        for key in TRAINED_PARTS[kind]:
            setattr(config, key, folder)

        # These describe the base.
        config.notice = ""
        config.known_words = None
        return config

    @classmethod
    def _base_system(cls, kind: str, paths: Mapping[str, Path], folder: Path) -> SystemConfig:
        """The system that a checkpoint was trained on.

        The folder with `system.json` that holds a recorded part, else the original system.
        """
        for path in paths.values():
            for parent in Path(os.path.abspath(path)).parents[:2]:
                if not (parent / "system.json").is_file():
                    continue
                config = cls.read(parent)
                if config.system == kind:
                    return config
        if kind == "lavit":
            visual = paths.get("tokenizer")
            if visual is not None and (visual / "config.json").is_file():
                # a tokenizer that is not the original, without pixel decoder
                return cls(**SETTINGS[kind], system=kind)
            return cls._original("lavit", visual)
        if kind == "seed_x":
            return cls._original("seed-x-i")
        config = cls._original("8b")
        sizes = paths.get("llm", folder) / "config.json"
        if sizes.is_file():
            config.template = template_for(read_json_object(sizes).get("hidden_size"))
        return config

    @classmethod
    def _original(
        cls, short: str, folder: Path | None = None, head: str | None = None
    ) -> SystemConfig:
        """An original model, in a copy of its repository (`folder`) or below `pretrained/`."""
        kind = ORIGINALS[short]["system"]
        values = {**SETTINGS[kind], **ORIGINALS[short]}
        values |= {"head": head or "highres", "name": short, "original": short}
        config = cls(**values)

        # 1. Its parts: LaVIT's are all in one repository, SEED-X's may be.
        for key, default in config._default_paths().items():
            path = default
            if folder is not None and kind == "lavit":
                path = folder / default.relative_to(_LAVIT)
            elif folder is not None:
                copy = folder / default.relative_to("pretrained")
                path = copy if _existing(copy) else default
            setattr(config, key, _existing(path) or path)

        # 2. A merged agent of SEED-X has its language model next to it.
        if kind == "seed_x" and folder is not None and (folder / "llm").is_dir():
            config.llm = folder / "llm"
            config.agent = folder / "agent"
            if (config.llm / "tokenizer.model").is_file():
                config.tokenizer = config.llm
        return config

    def _default_paths(self) -> dict[str, Path]:
        """Local paths of an original's parts, below the repository root."""
        original = ORIGINALS.get(self.original, {})
        paths: dict[str, Path] = {}
        for key in PARTS[self.system]:
            if key in original:
                path = original[key]
                # LaVIT's repository has the files of both pixel decoders.
                if self.head == "lowres":
                    path = path.replace("highres_", "")
                paths[key] = Path(path)
        return paths

    @property
    def can_draw(self) -> bool:
        """Whether all decoder parts exist."""
        return self.has(*(key for key in DECODER_PARTS if key in PARTS[self.system]))

    def has(self, *parts: str) -> bool:
        """Whether these parts exist."""
        return all(self._missing(key) is None for key in parts)

    def require(self, *parts: str) -> SystemConfig:
        """This config, with these parts available (an original's from the hub, if allowed).

        Raises CheckpointError with download instructions for missing parts.
        """
        for key in parts:
            self._fetch(key)
        if self.has(*parts):
            return self

        # Only an original's parts can be downloaded.
        if self.original:
            raise CheckpointError(self._missing_original_message())
        reasons: list[str] = []
        for key in parts:
            path = self._missing(key)
            if path is not None:
                label = PARTS[self.system][key][0]
                advice = f": put it at {path}" if path else " (seed assemble joins parts)"
                reasons.append(f"its {label} is not there{advice}")
        raise CheckpointError(f"{self.name}: {'; '.join(reasons)}.")

    def _fetch(self, key: str) -> None:
        """Get a missing part of an original from the hub, unless another path was given for it."""
        default = self._default_paths().get(key)
        if default is None or self.has(key) or getattr(self, key) != default:
            return

        # The files of this part: LaVIT's folder holds more, SEED-X's repository all models.
        source, path_in_repository = _origin(default)
        files = source.files
        if self.system == "lavit" and key in FILES:
            files = FILES[key]
        elif path_in_repository != ".":
            files = (path_in_repository, f"{path_in_repository}/*")
        repository = hub.try_fetch(source.hub, files)
        if repository is not None:
            setattr(self, key, _existing(repository / path_in_repository) or default)

    def _missing_original_message(self) -> str:
        """How to get the missing parts of an original model."""
        # LaVIT works without its safety checker.
        missing: list[tuple[hub.OriginalPart, str]] = []
        for key, default in self._default_paths().items():
            path = self._missing(key)
            if path and key != "safety":
                missing.append((_origin(default)[0], path))
        shipped = SHIPPED_FAMILIES[self.system]
        flags = "of the server"
        if self.system == "lavit":
            flags = "LaVIT's evaluate.py: --model_path; the server"
        return (
            f"{self.name}: {hub.missing_weights_message(missing)}, or take --model {shipped} "
            f"({flags}: --system {shipped}), which runs now."
        )

    def check_language_model(self) -> None:
        """Raise CheckpointError if the language model's folder lacks a file."""
        from seed_multimodal.weights import missing_weights

        folder = self.llm
        if folder is None or not folder.is_dir() or (folder / ADAPTER_CONFIG).is_file():
            return
        missing = missing_weights(folder)
        if missing is not None:
            raise CheckpointError(
                f"{missing}: no such file, so the language model of {self.name} is not complete; "
                "download its folder again."
            )

    def _missing(self, key: str) -> str | None:
        """The first missing path of a part ("": no path); None: complete."""
        part: Path | None = getattr(self, key)
        if part is None:
            return None if key == "words" else ""
        paths = [part]
        # An original LaVIT's tokenizer is the complete folder.
        if self.original == "lavit" and key in FILES:
            paths = [part / file for file in FILES[key]]
        for path in paths:
            if not _existing(path):
                return str(path)
        return None


def _kind(value: object, file: Path) -> str:
    """The kind of system that a file names. Raises ConfigError: none of ours."""
    kind: str = check_value(str, value, f"{file}: system", choices=tuple(PARTS))
    return kind


def _has_folder(folder: Path, *names: str) -> bool:
    """Whether one of these is a folder in `folder`."""
    return any((folder / name).is_dir() for name in names)


def _is_image_tokenizer(path: Path, model_type: str | None) -> bool:
    """Whether a folder or file is an image tokenizer of SEED-LLaMA."""
    if model_type in ("seed2_tokenizer", "seed1_tokenizer"):
        return True
    if path.suffix in (".pt", ".pth", ".bin", ".safetensors"):
        return True
    return any(any(path.glob(f"{name}.*")) for name in ("seed_quantizer", "causal_qformer"))


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


def record_base(folder: Path, system: str, **parts: str | Path | None) -> None:
    """Write a checkpoint's `base.json`: the system's kind, and the parts that it was trained with.

    Paths below the repository are relative to its root.
    """
    paths = {key: hub.portable_path(path) for key, path in parts.items() if path is not None}
    replace_text(folder / BASE, json.dumps({"system": system, **paths}, indent=1) + "\n")


def read_base(folder: Path) -> dict[str, str]:
    """A checkpoint's `base.json`, or the same from older files and PEFT's.

    Raises ConfigError: a wrong file.
    """
    file = folder / BASE
    if file.is_file():
        record = read_json_object(file, ConfigError)
        kind = _kind(record.get("system"), file)
        check_keys(record, ("system", *PARTS[kind]), str(file))
        paths: dict[str, str] = check_value(dict[str, str], record, str(file))
        return paths

    # Older checkpoints name their language model only.
    if (folder / AGENT_CONFIG).is_file():
        kind = "seed_x"
        key = "base"
        file = folder / AGENT_CONFIG
    else:
        kind = "lavit" if (folder / VISUAL_WEIGHTS).is_file() else "seed_llama"
        key = "base_model_name_or_path"
        file = folder / ADAPTER_CONFIG
    base = read_json_object(file).get(key)
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"{file}: {key} is {base!r}: name there the base model that the checkpoint was trained "
            "on, or merge it with --base_model (MultiModalLLM/src/tools/merge_lora_weights.py)."
        )
    return {"system": kind, "llm": base}


def _origin(path: Path) -> tuple[hub.OriginalPart, str]:
    """The hub repository of an original's part, and the part's path in it."""
    parts = [part for part in hub.ORIGINAL_PARTS.values() if path.is_relative_to(part.folder)]
    source = max(parts, key=lambda part: len(part.folder))
    return source, path.relative_to(source.folder).as_posix()


def _existing(path: Path) -> Path | None:
    """A path as is or below the repository root; `.safetensors` may replace `.bin`."""
    existing = hub.locate(path)
    if existing is None and path.suffix == ".bin":
        existing = hub.locate(path.with_suffix(".safetensors"))
    return existing
