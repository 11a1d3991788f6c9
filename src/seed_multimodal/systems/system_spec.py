"""Where the parts of a system lie: one folder with `system.json`, or the released models' separate folders.

`system.json` names the sub-folders and the settings that belong to the weights:

    {"tokenizer": "seed_tokenizer", "llm": "seed_llama", "detokenizer": "seed_tokenizer/diffusion_model",
     "template": "vicuna", "image_size": 64, "transform": {"type": "clip", "keep_ratio": false},
     "generation": {"max_new_tokens": 128}, "tasks": {"draw_response": "Here is the picture."}}
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seed_multimodal.config import nearest
from seed_multimodal.data.formats.files import nearest_path
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.language.tasks import NANO_TASKS, RELEASED_TASKS, TaskPrompts

# The released inference scripts' settings (top_k 50 is the library default they run under).
RELEASED_GENERATION = {"max_new_tokens": 512, "do_sample": True, "temperature": 1.0, "top_p": 0.5, "top_k": 50}
RELEASED_TRANSFORM = {"type": "clip", "keep_ratio": False, "interpolation": "bilinear"}
NANO_RUNS = "The shipped model runs now, under the name nano."
LLAMA2_WIDTH = 5120
_KNOWN = {"tokenizer", "llm", "detokenizer", "vision", "template", "image_size", "transform", "generation", "tasks"}


@dataclass(frozen=True)
class Released:
    """A released model by its short name: where it belongs, below `pretrained/`."""

    llm: str
    template: str


RELEASED = {"8b": Released("seed_llama_8b_sft", "vicuna"), "14b": Released("seed_llama_14b_sft", "llama2")}
NAMES = ("nano", *RELEASED)
# Where each released part belongs, and what to download.
PARTS = {
    "tokenizer": ("pretrained/seed_tokenizer", "AILab-CVC/seed-tokenizer-2 and eva_vit_g.pth"),
    "8b": ("pretrained/seed_llama_8b_sft", "AILab-CVC/seed-llama-8b-sft"),
    "14b": ("pretrained/seed_llama_14b_sft", "AILab-CVC/seed-llama-14b-sft"),
    "unclip": ("pretrained/stable-diffusion-2-1-unclip", "stabilityai/stable-diffusion-2-1-unclip (or a mirror)"),
}
_HUB_FOLDERS = {download.split()[0]: folder for folder, download in PARTS.values()}


@dataclass(frozen=True)
class SystemSpec:
    """Everything `SeedLlama` needs to know before it loads a tensor."""

    name: str
    tokenizer: Path
    llm: Path
    detokenizer: Path | None
    vision: Path | None = None
    template: str = "vicuna"
    image_size: int = 224
    transform: dict[str, Any] = field(default_factory=lambda: dict(RELEASED_TRANSFORM))
    generation: dict[str, Any] = field(default_factory=dict)
    tasks: TaskPrompts = NANO_TASKS


def find_system(
    name: str | Path | None = None, *, llm: str | Path | None = None, tokenizer: str | Path | None = None,
    detokenizer: str | Path | None = None, vision: str | Path | None = None, template: str | None = None,
) -> SystemSpec:
    """The parts of a system, checked to be there.

    Args:
        name: `nano`, `8b`, `14b`, a folder with `system.json`, or a released LLaMA folder; or give `llm`.
        llm, tokenizer, detokenizer, vision: replace single parts, or name them all.
        template: prompt template, by default the one that belongs to the weights.

    Raises:
        CheckpointError: a part that is not there: what to download and where to put it.
        ConfigError: a damaged `system.json`, or nothing named.
    """
    given = {"llm": llm, "tokenizer": tokenizer, "detokenizer": detokenizer, "vision": vision}
    parts = {key: Path(value) for key, value in given.items() if value is not None}
    if name is None and "llm" not in parts:
        raise ConfigError("Name a system ('nano', '8b', '14b' or a folder with system.json), or give llm=FOLDER.")
    short = str(name).lower() if name is not None else ""
    if short in RELEASED or name is None:
        return _released(short, parts, template)
    folder = locate("pretrained/nano" if short == "nano" else str(name))
    if folder is None:
        near = nearest_path(str(name)) if "/" in str(name) else nearest(short, NAMES)
        raise CheckpointError(f"{name}: there is no such folder{near}; give {', '.join(NAMES)} or a folder with "
                              f"system.json. {_how_to_get(str(name))}")
    if not (folder / "system.json").is_file() and (folder / "config.json").is_file():
        return _released("", {"llm": folder, **parts}, template)  # a released LLaMA folder by itself
    return _from_folder(folder, parts, template)


def locate(path: str | Path) -> Path | None:
    """`path` as it is, or relative to the repository root when that is where this code runs from."""
    plain = Path(path).expanduser()
    root = Path(__file__).resolve().parents[3]
    for candidate in (plain, root / plain):
        if candidate.exists():
            return candidate
    return None


def read_system_json(folder: Path) -> dict[str, Any]:
    """`system.json` of `folder`.

    Raises:
        CheckpointError: no such file; ConfigError: not JSON, or keys that mean nothing.
    """
    file = folder / "system.json"
    if not file.is_file():
        raise CheckpointError(f"{file}: there is no such file; a system folder names its parts there.")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid JSON ({error}).") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{file}: must hold a JSON object.")
    unknown = sorted(key for key in settings if key not in _KNOWN and not key.startswith("_"))
    if unknown:
        raise ConfigError(f"{file}: unknown key {unknown[0]!r}; known keys are {', '.join(sorted(_KNOWN))}.")
    return settings


def _from_folder(folder: Path, parts: dict[str, Path], template: str | None) -> SystemSpec:
    settings = read_system_json(folder)

    def part(key: str, default: str | None) -> Path | None:
        if key in parts:
            return parts[key]
        value = settings.get(key, default)
        return None if value is None else folder / value

    tokenizer, llm = part("tokenizer", "seed_tokenizer"), part("llm", "seed_llama")
    assert tokenizer is not None and llm is not None
    spec = SystemSpec(
        name=str(folder), tokenizer=tokenizer, llm=llm,
        detokenizer=part("detokenizer", "seed_tokenizer/diffusion_model"), vision=part("vision", None),
        template=template or settings.get("template", "vicuna"),
        image_size=int(settings.get("image_size", 224)),
        transform={**RELEASED_TRANSFORM, **settings.get("transform", {})},
        generation=dict(settings.get("generation", {})),
        tasks=TaskPrompts.from_dict(settings.get("tasks", {})),
    )
    for what, path in (("tokenizer", spec.tokenizer), ("language model", spec.llm)):
        if not path.exists():
            raise CheckpointError(f"{path}: the {what} of {folder} is not there; the folder is incomplete.")
    return spec


def _released(short: str, parts: dict[str, Path], template: str | None) -> SystemSpec:
    """The released layout: every part in its own folder below `pretrained/`."""
    known = RELEASED.get(short)
    llm = parts.get("llm") or Path("pretrained") / (known.llm if known else "")
    tokenizer = parts.get("tokenizer") or Path("pretrained/seed_tokenizer")
    detokenizer = parts.get("detokenizer") or Path("pretrained/stable-diffusion-2-1-unclip")
    model, words = locate(llm) or (llm if _is_hub_name(llm) else None), locate(tokenizer)
    if model is None or words is None:
        missing = [(kind, where) for kind, where, there in (
            ("tokenizer", tokenizer, words), (llm_kind(llm), llm, model), ("unclip", detokenizer, locate(detokenizer)))
            if there is None]
        raise CheckpointError(f"{short or missing[0][1]}: {not_on_disk(missing)}. {NANO_RUNS}")
    if template is None:
        template = known.template if known else _template_of(model)
    return SystemSpec(
        name=short or str(llm), tokenizer=words, llm=model,
        detokenizer=locate(detokenizer) or detokenizer,  # read later, and only when a picture is drawn
        vision=parts.get("vision"), template=template, generation=dict(RELEASED_GENERATION), tasks=RELEASED_TASKS)


def released_folder(name: str | Path) -> str:
    """Where a released part belongs that is named as on the hub; other names as they are."""
    return _HUB_FOLDERS.get(str(name), str(name))


def llm_kind(name: str | Path) -> str:
    """Key of `PARTS` for a language model's folder or hub name; `llm` for one of neither size."""
    return next((size for size in ("14b", "8b") if size in str(name).lower()), "llm")


def not_on_disk(missing: Iterable[tuple[str, str | Path]]) -> str:
    """The sentence, without its end, for parts that are not there: what to download and where to put it.

    Args:
        missing: of each part its key in `PARTS` (`llm`: some language model) and its folder or hub name.
    """
    advice = ", ".join(f"{PARTS[kind][1] if kind in PARTS else 'a LLaMA folder'} into {released_folder(where)}"
                       for kind, where in missing)
    return f"the released weights are not on this disk: download {advice} (details in pretrained/README.md)"


def template_for(hidden_size: int) -> str:
    """LLaMA-2's template for the 14B (built on LLaMA-2-chat 13B), Vicuna's for all others."""
    return "llama2" if hidden_size == LLAMA2_WIDTH else "vicuna"


def _template_of(llm: Path) -> str:
    config = llm / "config.json"
    if not config.is_file():
        return "vicuna"
    try:
        hidden = json.loads(config.read_text(encoding="utf-8")).get("hidden_size")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{config}: not valid JSON ({error}).") from error
    return template_for(hidden)


def _is_hub_name(path: Path) -> bool:
    """`owner/name`, which the hub client may have cached; `pretrained/…` is always a folder."""
    owner = path.parts[0] if len(path.parts) == 2 else ""
    return owner not in ("", "pretrained", ".", "..", "~", "/") and not path.parent.exists()


def _how_to_get(path: str) -> str:
    if path.rstrip("/").endswith("nano"):
        return "The nano weights ship with the repository: run from its root, or give the path to pretrained/nano."
    kind = llm_kind(path)
    advice = f"Download huggingface.co/{PARTS[kind][1]} into it. " if kind in PARTS else ""
    return f"{advice}{NANO_RUNS}"
