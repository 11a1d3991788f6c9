"""Finding the parts of a SEED-LLaMA system: one folder with `system.json` (`system_file`), or the released models'
separate folders.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seed_multimodal.data.formats.files import nearest_path
from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.hub import (
    PARTS,
    SYSTEMS,
    download,
    first_file,
    is_hub_name,
    llm_kind,
    local_folder,
    locate,
    locate_system,
    not_on_disk,
    runs_now,
    where_shipped,
)
from seed_multimodal.language.prompts import template_for
from seed_multimodal.language.tasks import RELEASED_TASKS
from seed_multimodal.settings import nearest
from seed_multimodal.systems.system_file import RELEASED_TRANSFORM, Learned, SystemFile, read_system_json
from seed_multimodal.tokenizers.released import LAYOUTS

# The released inference scripts' settings (top_k 50 is the library default they run under).
RELEASED_GENERATION = {"max_new_tokens": 512, "do_sample": True, "temperature": 1.0, "top_p": 0.5, "top_k": 50}
BICUBIC = {**RELEASED_TRANSFORM, "interpolation": "bicubic"}  # of a tokenizer alone
TEMPLATES = {"8b": "vicuna", "14b": "llama2"}  # of the released models by their short names
TOKENIZERS = ("seed2_tokenizer", "seed1_tokenizer")
RELEASED_NAMES = ("released", *TEMPLATES)


@dataclass(frozen=True, kw_only=True)
class SystemSpec(SystemFile):
    """Everything `SeedLlama` needs to know before it loads a tensor: the file's settings, with the parts' own paths."""

    name: str


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
    if short in TEMPLATES or name is None:
        return _released(short, parts, template)
    folder = locate_system(name)
    if folder is None:
        near = nearest_path(str(name)) if "/" in str(name) else "" if short in SYSTEMS else nearest(short, SYSTEMS)
        raise CheckpointError(f"{name}: there is no such folder{near}; give {', '.join(SYSTEMS)} or a folder with "
                              f"system.json. {_how_to_get(str(name))}")
    if is_tokenizer(folder):
        raise CheckpointError(f"{folder}: is an image tokenizer without a language model, which seed tokenize, seed "
                              "reconstruct and seed eval tokenizer take as it is; `seed assemble seed-llama` makes a "
                              "system of both.")
    if not (folder / "system.json").is_file() and (folder / "config.json").is_file():
        return _released("", {"llm": folder, **parts}, template)  # a released LLaMA folder by itself
    return _from_folder(folder, parts, template)


@dataclass(frozen=True)
class PictureParts:
    """The picture half of a SEED-LLaMA system, or an image tokenizer alone; `transform` may lack the size, which is
    then the tokenizer's."""

    tokenizer: str | Path
    vision: Path | None
    detokenizer: Path | None
    transform: dict[str, Any]
    learned: Learned = Learned()


def find_pictures(name: str | Path) -> PictureParts:
    """The parts that read and draw pictures, without a language model.

    Args:
        name: as of `find_system`, or a tokenizer alone: a folder that `seed export-tokenizer` made, a file, or a hub
            name. That resizes as the released evaluation does: squash, bicubic; it draws with the `diffusion_model` in
            its folder, else with the released one where it fits and is on this disk.

    Raises:
        CheckpointError, ConfigError: as `find_system`.
    """
    if str(name).lower() in RELEASED_NAMES:
        folder = local_folder(PARTS["tokenizer"].folder)
        if folder is None:
            missing = not_on_disk([("tokenizer", PARTS["tokenizer"].folder)])
            raise CheckpointError(f"{missing}; `--model nano` runs now.")
        return PictureParts(folder, None, _decoder_of(folder), dict(RELEASED_TRANSFORM))
    place = locate_system(name)
    if place is None and is_hub_name(name):
        return PictureParts(name, None, None, dict(BICUBIC))
    if place is not None and is_tokenizer(place):
        return PictureParts(place, None, _decoder_of(place if place.is_dir() else place.parent), dict(BICUBIC))
    spec = find_system(name)
    return PictureParts(spec.tokenizer, spec.vision, spec.detokenizer,
                        {**spec.transform, "image_size": spec.image_size}, spec)


def is_tokenizer(place: Path) -> bool:
    """Whether a place is an image tokenizer alone: a file, ours by its `config.json`, or one in a released layout."""
    if place.is_file():
        return True
    if (place / "system.json").is_file():
        return False
    config = place / "config.json"
    ours = config.is_file() and read_json_object(config).get("model_type") in TOKENIZERS
    return ours or any(first_file(place, names) for layout in LAYOUTS for names in layout.files)


def _decoder_of(folder: Path) -> Path | None:
    inside = folder / "diffusion_model"
    return inside if inside.is_dir() else locate(PARTS["unclip"].folder)


def _from_folder(folder: Path, parts: dict[str, Path], template: str | None) -> SystemSpec:
    file = read_system_json(folder)
    if not isinstance(file, SystemFile):
        raise ConfigError(f"{folder}: its system.json describes another system, {file.system}: open_system opens any.")
    own = {key: folder / value for key, value in vars(file).items() if isinstance(value, Path)}
    spec = SystemSpec(**{**vars(file), **own, **parts, "name": str(folder), "template": template or file.template,
                         "transform": {**RELEASED_TRANSFORM, **file.transform}})
    for what, path in (("tokenizer", spec.tokenizer), ("language model", spec.llm)):
        if not os.path.exists(path):  # Path.exists raises for a name too long
            raise CheckpointError(f"{path}: the {what} of {folder} is not there; the folder is incomplete.")
    return spec


def _released(short: str, parts: dict[str, Path], template: str | None) -> SystemSpec:
    """The released layout: every part in its own folder below `pretrained/`."""
    llm = parts.get("llm") or Path(PARTS[short].folder)
    tokenizer = parts.get("tokenizer") or Path(PARTS["tokenizer"].folder)
    detokenizer = parts.get("detokenizer") or Path(PARTS["unclip"].folder)
    model, words = locate(llm) or (llm if is_hub_name(llm) else None), locate(tokenizer)
    if model is None or words is None:
        missing = [(kind, where) for kind, where, there in (
            ("tokenizer", tokenizer, words), (llm_kind(llm), llm, model), ("unclip", detokenizer, locate(detokenizer)))
            if there is None]
        raise CheckpointError(f"{short or missing[0][1]}: {not_on_disk(missing)}. {_nano_runs()}")
    return SystemSpec(
        name=short or str(llm), tokenizer=words, llm=model,
        detokenizer=locate(detokenizer) or detokenizer,  # read later, and only when a picture is drawn
        vision=parts.get("vision"), template=template or TEMPLATES.get(short) or _template_of(model),
        generation=dict(RELEASED_GENERATION), tasks=RELEASED_TASKS)


def _template_of(llm: Path) -> str:
    config = llm / "config.json"
    return template_for(read_json_object(config, ConfigError).get("hidden_size") if config.is_file() else None)


def _how_to_get(path: str) -> str:
    if shipped := where_shipped(path):
        return shipped
    kind = llm_kind(path)
    advice = f"Download huggingface.co/{download(kind)} into it. " if kind in PARTS else ""
    return advice + _nano_runs()


def _nano_runs() -> str:
    return "The shipped model runs now, under the name nano." if runs_now("nano") else where_shipped("nano")
