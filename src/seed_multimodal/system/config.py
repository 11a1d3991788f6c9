"""Description of a system: keys of `system.json`, location of its parts, sources of the originals.

    config = SystemConfig.find("nano")     # also 8b, seed-x-i, lavit …, a hub name, or a folder
    config.require("llm", "tokenizer")     # CheckpointError with download instructions

A folder has a `system.json` (paths of parts relative to it, defaults in `PARTS`; settings of the weights, defaults in
`SETTINGS`), or is a copy of an original SEED-X or LaVIT repository, a merged SEED-X agent (`llm` and
`agent`), a LLaMA for SEED-LLaMA, an image tokenizer, or a checkpoint of a language model's training, whose other parts
are those of the system that it was trained on (`base.json`).
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
from seed_multimodal.disk import read_json_object, replace_text
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
BILINEAR = {
    "type": "clip",
    "keep_ratio": False,
    "interpolation": "bilinear",
}  # of the original SEED-LLaMA
BICUBIC = {
    **BILINEAR,
    "interpolation": "bicubic",
}  # of a tokenizer without language model, as in its evaluation
# Keys of `system.json` with defaults: per system, and common ones.
SETTINGS: dict[str, dict[str, Any]] = {
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
ORIGINALS: dict[str, dict[str, Any]] = {
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
FILES = {
    "tokenizer": ("visual_tokenizer/eva_vitg_psz14.bin", "visual_tokenizer/tokenizer_encoder.bin")
}  # of LaVIT's
ALIASES = {
    "released": "8b",
    hub.ORIGINAL_PARTS["8b"].hub: "8b",
    hub.ORIGINAL_PARTS["14b"].hub: "14b",
    hub.SEED_X: "seed-x-i",
    hub.LAVIT: "lavit",
}
NAMES = (*hub.SHIPPED_SYSTEMS, *ORIGINALS)
SHIPPED_FAMILIES = {
    "seed_llama": "nano",
    "seed_x": "nano-x",
    "lavit": "nano-lavit",
}  # the small system of each


@dataclass(kw_only=True)
class SystemConfig:
    """All settings of a system before loading; `original`: short name of the original model with these files (LaVIT's
    `tokenizer` is then the complete folder, its `decoder` a file)."""

    system: str = "seed_llama"  # seed_llama, seed_x or lavit
    name: str = ""
    original: str = ""
    llm: Path | None = None
    tokenizer: Path | None = (
        None  # SEED-LLaMA: of images and text; SEED-X: of text; LaVIT: of images
    )
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
    transform: dict[str, Any] = field(
        default_factory=lambda: dict(BICUBIC)
    )  # keywords of `get_transform`
    tuned: bool = True  # instruction-tuned; otherwise SEED-X continues texts
    grids: tuple[str, ...] = SETTINGS["seed_x"]["grids"]  # tile grids of input images
    edit_grids: tuple[str, ...] = ("1x1",)
    head: Literal["highres", "lowres"] = "highres"  # which of LaVIT's pixel decoders
    selection: Literal["draw", "threshold"] = (
        "draw"  # of tokens: by their probability, or those above 0.5
    )
    generation: dict[str, Any] = field(
        default_factory=dict
    )  # defaults of generation; LaVIT: by task
    tasks: TaskPrompts = DEFAULT_TASKS
    answer_after: str = ""  # as `tasks.answer_after`
    previews: tuple[int, ...] = setting(
        (), minimum=1
    )  # after how many codes a stream shows an image
    notice: str = ""  # what people should know of the weights; logged when they are loaded
    known_words: Path | None = None  # JSON file of the words that it learned
    sizes: Mapping[str, Any] = field(default_factory=dict)  # of parts without `config.json`
    lora: Mapping[str, Any] | None = None  # fields of the LoRA whose weights are in `agent`

    @classmethod
    def find(
        cls, name: str | Path | None, *, system: str | None = None, **given: Any
    ) -> SystemConfig:
        """The config of a name or folder (None: of the given `llm`) of the kind `system`; `given`: parts (paths or hub
        names), `template`, `tuned` and `head`; `require` checks that parts exist."""
        given = {key: value for key, value in given.items() if value is not None}
        name, head = given.get("llm", "") if name is None else name, given.get("head")
        short = ALIASES.get(str(name), str(name).lower())
        config = (
            cls._original(short, head=head) if short in ORIGINALS else cls._of_folder(name, head)
        )
        if system not in (None, config.system):
            raise ConfigError(f"{name}: is a {config.system} system, not {system}.")
        check_keys(
            given, (*PARTS[config.system], "template", "tuned", "head"), f"Parts of {config.name}"
        )
        for key, value in given.items():
            setattr(
                config,
                key,
                hub.local_folder(value) or Path(value) if key in PARTS[config.system] else value,
            )
        if (
            config.original
            and config.system == "seed_llama"
            and config.tokenizer
            and "detokenizer" not in given
        ):
            config.detokenizer = (
                _existing(config.tokenizer / DETOKENIZER_FOLDER) or config.detokenizer
            )
        return config

    @classmethod
    def read(cls, folder: Path) -> SystemConfig:
        """Read the `system.json` of a folder; keys starting with `_` are comments. Raises ConfigError: invalid JSON, an
        unknown key (with the nearest) or a wrong value."""
        from seed_multimodal.images.transforms import get_transform

        file = folder / "system.json"
        values = {
            key: value
            for key, value in read_json_object(file, ConfigError).items()
            if not key.startswith("_")
        }
        kind = check_value(
            str, values.get("system", "seed_llama"), f"{file}: system", choices=tuple(PARTS)
        )
        check_keys(values, (*COMMON, *SETTINGS[kind], *PARTS[kind]), str(file))
        if isinstance(values.get("tasks"), dict):
            values["tasks"] = {**dataclasses.asdict(SETTINGS[kind]["tasks"]), **values["tasks"]}
        paths = {key: path for key, (_, path) in PARTS[kind].items() if path}
        config = read_settings(cls, {**SETTINGS[kind], **paths, **values}, str(file))
        check_keys(
            config.transform, inspect.signature(get_transform).parameters, f"{file}: transform"
        )
        if kind == "lavit":
            check_value(dict[str, dict[str, Any]], config.generation, f"{file}: generation")
        config.name, config.transform = str(folder), {**BILINEAR, **config.transform}
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
            near = "" if str(name).lower() in NAMES else nearest(str(name).lower(), NAMES)
            raise CheckpointError(
                f"{name}: no such folder{near}; give {', '.join(NAMES)} or a folder with "
                f"system.json ({', '.join(hub.SHIPPED_SYSTEMS)}: in the repository's pretrained/)."
            )
        model = (
            read_json_object(folder / "config.json") if (folder / "config.json").is_file() else {}
        )
        ours = model.get("model_type") in ("seed2_tokenizer", "seed1_tokenizer")
        if (folder / "system.json").is_file():
            config = cls.read(folder)
        elif any((folder / file).is_file() for file in (BASE, ADAPTER_CONFIG, AGENT_CONFIG)):
            config = cls._of_checkpoint(folder)
        elif (
            ours
            or folder.suffix in (".pt", ".pth", ".bin", ".safetensors")
            or any(any(folder.glob(f"{name}.*")) for name in ("seed_quantizer", "causal_qformer"))
        ):
            inside = (folder.parent if folder.is_file() else folder) / DETOKENIZER_FOLDER
            config = cls(
                tokenizer=folder,
                detokenizer=_existing(inside)
                or _existing(Path(hub.ORIGINAL_PARTS["unclip"].folder)),
            )
        elif any((folder / one).is_dir() for one in ("seed_x", "seed_x_i", "seed_x_edit", "agent")):
            config = cls._original("seed-x-i", folder)
        elif model:
            config = cls._original("8b")
            config.llm, config.template = folder, template_for(model.get("hidden_size"))
        elif any((folder / one).is_dir() for one in ("visual_tokenizer", "language_model")):
            config = cls._original("lavit", folder, head)
        else:
            steps = [
                int(path.name.removeprefix("checkpoint-"))
                for path in folder.glob("checkpoint-*")
                if path.name.removeprefix("checkpoint-").isdecimal()
            ]
            if steps:
                raise CheckpointError(
                    f"{folder}: is the folder of a run; name a checkpoint: "
                    f"{folder / f'checkpoint-{max(steps)}'}."
                )
            raise CheckpointError(
                f"{folder}: holds no system: neither system.json, nor the folders of an original "
                "model, nor a language model or an image tokenizer."
            )
        config.name = str(folder)
        return config

    @classmethod
    def _of_checkpoint(cls, folder: Path) -> SystemConfig:
        """A checkpoint's weights, with the other parts of the system that its language model was trained on."""
        record = read_base(folder)
        kind = record.pop("system")
        paths = {key: hub.local_folder(path) or Path(path) for key, path in record.items()}
        config = cls._base_system(kind, paths, folder)

        # The recorded parts that are on this disk, and the trained ones.
        for key, path in paths.items():
            if path.exists():
                setattr(config, key, path)
        trained = {
            "seed_llama": ("llm",),
            "seed_x": ("agent", "tokenizer"),
            "lavit": ("llm", "words"),
        }
        for key in trained[kind]:
            setattr(config, key, folder)
        config.notice, config.known_words = "", None  # they describe the base
        return config

    @classmethod
    def _base_system(cls, kind: str, paths: Mapping[str, Path], folder: Path) -> SystemConfig:
        """The system that a checkpoint was trained on: the folder with `system.json` that holds a recorded part, else
        the original."""
        for path in paths.values():
            for home in Path(os.path.abspath(path)).parents[:2]:
                if not (home / "system.json").is_file():
                    continue
                config = cls.read(home)
                if config.system == kind:
                    return config
        if kind == "lavit":
            visual = paths.get("tokenizer")
            if visual is not None and (visual / "config.json").is_file():
                return cls(
                    **SETTINGS[kind], system=kind
                )  # a tokenizer of one's own, without pixel decoder
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
        cls, short: str, home: Path | None = None, head: str | None = None
    ) -> SystemConfig:
        """An original model, in a copy of its repository (`home`) or below `pretrained/`."""
        kind = ORIGINALS[short]["system"]
        values = {
            **SETTINGS[kind],
            **ORIGINALS[short],
            "head": head or "highres",
            "name": short,
            "original": short,
        }
        config = cls(**values)
        for key, path in config._usual_places().items():
            place = path
            if home is not None:
                own = home / path.relative_to(_LAVIT if kind == "lavit" else "pretrained")
                place = own if kind == "lavit" or _existing(own) else path
            setattr(config, key, _existing(place) or place)
        if kind == "seed_x" and home is not None and (home / "llm").is_dir():  # a merged agent
            config.llm, config.agent = home / "llm", home / "agent"
            config.tokenizer = (
                config.llm if (config.llm / "tokenizer.model").is_file() else config.tokenizer
            )
        return config

    def _usual_places(self) -> dict[str, Path]:
        """Local paths of an original's parts, below the repository root."""
        low = self.head == "lowres"
        usual = ORIGINALS.get(self.original, {})
        return {
            key: Path(usual[key].replace("highres_", "") if low else usual[key])
            for key in PARTS[self.system]
            if key in usual
        }

    @property
    def can_draw(self) -> bool:
        """Whether all decoder parts exist."""
        return self.has(*(key for key in DECODER_PARTS if key in PARTS[self.system]))

    def has(self, *parts: str) -> bool:
        """Whether these parts exist."""
        return not any(self._missing(key) is not None for key in parts)

    def require(self, *parts: str) -> SystemConfig:
        """This config, with these parts available (an original's from the hub, if allowed). Raises CheckpointError with
        download instructions for missing parts."""
        origins = {key: _origin(place) for key, place in self._usual_places().items()}
        for key in parts:
            if (
                key in origins
                and not self.has(key)
                and getattr(self, key) == self._usual_places()[key]
            ):
                source, inside = origins[key]
                files = source.files if inside == "." else (inside, f"{inside}/*")
                cached = hub.try_fetch(
                    source.hub, FILES[key] if self.system == "lavit" and key in FILES else files
                )
                setattr(self, key, cached and _existing(cached / inside) or getattr(self, key))
        if self.has(*parts):
            return self
        if self.original:
            missing = [
                (source, place)
                for key, (source, _) in origins.items()
                if (place := self._missing(key)) and key != "safety"
            ]
            shipped = SHIPPED_FAMILIES[self.system]
            flags = (
                "LaVIT's evaluate.py: --model_path; the server"
                if self.system == "lavit"
                else "of the server"
            )
            raise CheckpointError(
                f"{self.name}: {hub.missing_weights_message(missing)}, or take --model {shipped} ({flags}: "
                f"--system {shipped}), which runs now."
            )
        texts = [
            f"its {PARTS[self.system][key][0]} is not there"
            + (f": put it at {place}" if place else " (seed assemble joins parts)")
            for key in parts
            if (place := self._missing(key)) is not None
        ]
        raise CheckpointError(f"{self.name}: {'; '.join(texts)}.")

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
        place = getattr(self, key)
        if place is None:
            return None if key == "words" else ""
        whole = FILES.get(key, ()) if self.original == "lavit" else ()
        return next(
            (str(one) for one in [place / file for file in whole] or [place] if not _existing(one)),
            None,
        )


def record_base(folder: Path, system: str, **parts: str | Path | None) -> None:
    """Write a checkpoint's `base.json`: the system's kind, and the parts that were not trained or trained on, below the
    repository relative to its root."""
    paths = {key: hub.portable_path(path) for key, path in parts.items() if path is not None}
    replace_text(folder / BASE, json.dumps({"system": system, **paths}, indent=1) + "\n")


def read_base(folder: Path) -> dict[str, str]:
    """A checkpoint's `base.json`, or what older files and PEFT's tell. Raises ConfigError: a wrong file."""
    if (folder / BASE).is_file():
        values = read_json_object(folder / BASE, ConfigError)
        kind = check_value(
            str, values.get("system"), f"{folder / BASE}: system", choices=tuple(PARTS)
        )
        check_keys(values, ("system", *PARTS[kind]), str(folder / BASE))
        return check_value(dict[str, str], values, str(folder / BASE))
    if (folder / AGENT_CONFIG).is_file():
        kind, key, file = "seed_x", "base", folder / AGENT_CONFIG
    else:
        kind = "lavit" if (folder / VISUAL_WEIGHTS).is_file() else "seed_llama"
        key, file = "base_model_name_or_path", folder / ADAPTER_CONFIG
    base = read_json_object(file).get(key)
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"{file}: {key} is {base!r}: name there the base model that the checkpoint was trained on, "
            "or merge it with --base_model (MultiModalLLM/src/tools/merge_lora_weights.py)."
        )
    return {"system": kind, "llm": base}


def _origin(place: Path) -> tuple[hub.OriginalPart, str]:
    """The hub repository of an original's part, and the part's path in it."""
    source = max(
        (part for part in hub.ORIGINAL_PARTS.values() if place.is_relative_to(part.folder)),
        key=lambda part: len(part.folder),
    )
    return source, place.relative_to(source.folder).as_posix()


def _existing(place: Path) -> Path | None:
    """A path as is or below the repository root; `.safetensors` may replace `.bin`."""
    return hub.locate(place) or (
        hub.locate(place.with_suffix(".safetensors")) if place.suffix == ".bin" else None
    )
