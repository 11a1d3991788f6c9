"""Finding the parts of a LaVIT: the released folder as it was published, or one of ours with `system.json`.

    language_model/                   LLaMA, its tokenizer, and visual_weight.bin (merger and projector of stage 2)
    visual_tokenizer/                 eva_vitg_psz14.bin, tokenizer_encoder.bin, [highres_]tokenizer_decoder.bin
    highres_pixel_decoding/           U-Net, autoencoder and scheduler of SDXL's kind
    pixel_decoding/                   those of Stable Diffusion 1's kind, the null text, and the safety checker

A folder need not hold all of it: what is left out can only be missed when it is asked for (`LavitSpec.require`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seed_multimodal.detokenizers.autoencoder import autoencoder_folder
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.hub import (
    LAVIT,
    PARTS,
    fetch,
    first_file,
    local_folder,
    locate,
    locate_system,
    or_take,
    where_shipped,
)
from seed_multimodal.settings import check_keys
from seed_multimodal.systems.system_file import LavitFile, read_system_json

LLM, VISUAL, HIGHRES, LOWRES = "language_model", "visual_tokenizer", "highres_pixel_decoding", "pixel_decoding"
TOWER, ENCODER, STAGE_2 = "eva_vitg_psz14", "tokenizer_encoder", "visual_weight"  # .bin, or .safetensors
DECODERS = {"highres": "highres_tokenizer_decoder", "lowres": "tokenizer_decoder"}
NAME = "lavit"
FOLDER = PARTS["lavit"].folder
# What a part is in words, and what cannot be done without it.
MEANING = {"llm": ("language model", "describe, answer or draw words"), "words": ("text tokenizer", "read words"),
           "tokenizer": ("dynamic tokenizer (tower, selector, merger and codebook)", "read pictures or draw"),
           "understanding": ("merger and projector of the second stage", "describe pictures or answer"),
           "decoder": ("decoder of codes", "draw"), "pixels": ("pixel decoder (unet, vae, scheduler)", "draw")}


@dataclass(frozen=True, kw_only=True)
class LavitSpec(LavitFile):
    """Everything `Lavit` needs to know before it loads a tensor, with the parts' own paths.

    Attributes:
        released: whether the files are the published ones (`.bin`, without sizes beside them); `tokenizer` is then the
            whole folder, and a `decoder` that is None in it.
        sizes: of the parts "tokenizer" and "decoder" where no `config.json` gives them; released ones by default.
    """

    name: str
    released: bool = False
    sizes: Mapping[str, Any] = field(default_factory=dict)

    def has(self, *parts: str) -> bool:
        """Whether all these parts are there."""
        return not any(self._missing(part) for part in parts)

    def require(self, *parts: str) -> None:
        """Raises `CheckpointError` for the first of these parts that is not there: what to put where."""
        for part in parts:
            place = self._missing(part)
            if place is None:
                continue
            what, use = MEANING[part]
            where = f"put it at {place}" if place else "its system.json names none"
            source = f" ({LAVIT} on the hub has it)" if self.released else ""
            raise CheckpointError(f"{self.name}: its {what} is not there, so it cannot {use}: {where}{source}.")

    def _missing(self, part: str) -> str | None:
        """The first file or folder of a part that is not there ("": none is named); None: it is complete."""
        visual = self.tokenizer / VISUAL
        files = {"tokenizer": [visual / TOWER, visual / ENCODER], "understanding": [self.llm / STAGE_2],
                 "decoder": [visual / DECODERS[self.head]] if self.decoder is None else []}
        if self.released and files.get(part):
            return next((f"{file}.bin" for file in files[part] if weights_file(file) is None), None)
        place = self.tokenizer if part == "understanding" else getattr(self, part)  # ours: in one folder
        if place is None:
            return None if part == "words" else ""
        needed = [place]
        if part == "pixels":
            needed += [place / "unet", place / "scheduler", autoencoder_folder(place)]
        return next((str(one) for one in needed if not one.exists()), None)


def weights_file(place: Path) -> Path | None:
    """A published file by its name without the ending: as it was published, or converted."""
    return first_file(place.parent, (f"{place.name}.safetensors", f"{place.name}.bin"))


def is_released_lavit(name: str | Path) -> bool:
    """Whether a name stands for the published weights."""
    return str(name).lower() == NAME or str(name) == LAVIT


def is_lavit_layout(folder: Path) -> bool:
    """Whether a folder has the published layout, or a part of it."""
    return (folder / VISUAL).is_dir() and not (folder / "config.json").is_file()


def find_lavit(name: str | Path | None = None, *, head: str | None = None, llm_folder: str = LLM,
               local_only: bool = False, **parts: str | Path | None) -> LavitSpec:
    """The parts of a LaVIT.

    Args:
        name: `lavit`, `nano-lavit`, a released folder, one with `system.json`, or the hub's name.
        head: "highres" or "lowres", of a folder with both; None: what `system.json` says, or highres.
        llm_folder: the language model's, of a released folder with several.
        local_only: the hub client's copy does not do.
        parts: `llm`, `words`, `tokenizer`, `decoder`, `pixels`, `safety` replace single parts.

    Raises:
        CheckpointError: no such folder: what to put where. ConfigError: a damaged `system.json`, or of another system.
    """
    check_keys(parts, ("llm", "words", "tokenizer", "decoder", "pixels", "safety"), "Parts of a LaVIT")
    given: dict[str, Any] = {key: Path(value) for key, value in parts.items() if value is not None}
    if head is not None and head not in DECODERS:
        raise ConfigError(f"The pixel decoder is {' or '.join(DECODERS)}, not {head!r}.")
    if name is None:
        raise ConfigError("Name a system: lavit, nano-lavit or a folder.")
    if is_released_lavit(name):
        folder = _snapshot(local_only)
    else:
        folder = locate_system(name) or local_folder(name, cache=not local_only)
    if folder is None:
        if shipped := where_shipped(name):
            raise CheckpointError(f"{name}: there is no such folder. {shipped}")
        advice = f"download {LAVIT} (26 GB) into {FOLDER}"
        other = or_take("nano-lavit", "nano")
        missing = "its weights are" if is_released_lavit(name) else "this folder is"
        raise CheckpointError(f"{name}: {missing} not on this disk: {advice}{other}.")
    if not (folder / "system.json").is_file():
        return _released(folder, head or "highres", llm_folder, given)
    file = read_system_json(folder)
    if not isinstance(file, LavitFile):
        raise ConfigError(f"{folder}: its system.json describes another system, {file.system}, no LaVIT.")
    own = {key: folder / value for key, value in vars(file).items() if isinstance(value, Path)}
    if head not in (None, file.head):
        raise ConfigError(f"{folder}: its pixel decoder is {file.head}, not {head}.")
    return LavitSpec(**{**vars(file), **own, **given, "name": str(folder)})


def _released(folder: Path, head: str, llm_folder: str, given: dict[str, Any]) -> LavitSpec:
    """The published layout."""
    if not is_lavit_layout(folder) and not (folder / llm_folder).is_dir():
        raise CheckpointError(f"{folder}: holds no LaVIT: neither a system.json nor the folders {llm_folder} and "
                              f"{VISUAL} of {LAVIT}.")
    pixels = folder / (HIGHRES if head == "highres" else LOWRES)
    parts = {"llm": folder / llm_folder, "tokenizer": folder, "decoder": None, "pixels": pixels,
             "safety": folder / LOWRES}
    return LavitSpec(**{**parts, **given, "head": head, "name": str(folder), "released": True})


def _snapshot(local_only: bool) -> Path | None:
    """The released folder below `pretrained/`, else in the hub client's cache; None: not there."""
    found = locate(FOLDER)
    if found is not None or local_only:
        return found
    try:
        return fetch(LAVIT)
    except CheckpointError:
        return None
