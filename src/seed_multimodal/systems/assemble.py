"""Parts that trainings made, joined into one folder with `system.json`: `seed assemble`, and the last stage of nano-x
and nano-lavit.

Parts are copied under the names that `system.json` gives them; what only a training needs (optimiser, its state) stays
behind. `tower.json` and `vae.json`, which name files of other systems, are written anew for their new place.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seed_multimodal.detokenizers.autoencoder import ELSEWHERE as VAE
from seed_multimodal.disk import making_folder, output_folder, read_json_object, replace_text
from seed_multimodal.errors import CheckpointError, ConfigError, SeedError
from seed_multimodal.language.prompts import template_for
from seed_multimodal.systems.lavit_files import find_lavit
from seed_multimodal.systems.parts import PARTS
from seed_multimodal.systems.seed_x_spec import find_seed_x
from seed_multimodal.systems.system_spec import BICUBIC, find_system
from seed_multimodal.tokenizers.lavit_files import ELSEWHERE as TOWER

FIND: dict[str, Any] = {"seed_llama": find_system, "seed_x": find_seed_x, "lavit": find_lavit}
OF_TRAINING = shutil.ignore_patterns("optimizer*", "trainer_state.json", "data_state.json", "ema.safetensors",
                                     "manifest.json", ".*")
DRAWING = ("detokenizer", "decoder", "pixels")  # without which a system cannot draw
VISUAL = "visual_weight.safetensors"


def assemble_system(kind: str, out: str | Path, parts: Mapping[str, str | Path],
                    settings: Mapping[str, Any] | None = None, *, force: bool = False) -> Path:
    """Make a system folder, complete or not at all.

    Args:
        kind: a key of `PARTS`; parts: of its parts the folder or file of each that is given.
        settings: of `system.json`, over the defaults.
        force: replace a folder that is not empty.

    Raises:
        CheckpointError: a part that is not there, or is needed and not given. ConfigError: settings that mean nothing,
            or `out` is not empty.
    """
    given = {name: Path(source).expanduser() for name, source in parts.items()}
    for name, source in given.items():
        if not source.exists():
            raise CheckpointError(f"{source}: there is no such folder for --{name}.")
    target = output_folder(out, force=force, what="the system", read=given.values())
    with making_folder(target, out, ConfigError) as folder:
        join(kind, folder, _found(kind, given), settings or {})
        try:
            FIND[kind](folder)
        except SeedError as error:
            raise type(error)(str(error).replace(str(folder), str(out))) from error
    return target


def join(kind: str, folder: Path, parts: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """Copy parts into a system's folder (their names there, which may be below a part; what is there already stays) and
    write its `system.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in parts.items():
        _copy(source, folder / name)
    if kind == "lavit" and (folder / "llm" / VISUAL).is_file():
        (folder / "llm" / VISUAL).replace(folder / "tokenizer" / VISUAL)
    shutil.rmtree(folder / "pixels" / "decoder", ignore_errors=True)  # the part `decoder`
    if kind == "seed_x":
        for file in (folder / "sdxl" / "unet").glob("*.safetensors"):  # its weights are the adapter's
            file.unlink()
    named = {name: name if (folder / name).exists() else None for name in PARTS[kind]
             if name in DRAWING or (folder / name).exists()}
    replace_text(folder / "system.json", json.dumps(
        {"system": kind, **named, **_of_weights(kind, folder), **settings}, indent=1))


def _found(kind: str, given: dict[str, Path]) -> dict[str, Path]:
    """The parts, with those that lie inside others."""
    found = dict(given)
    if kind == "lavit":
        exported, drawn = given.get("tokenizer"), given.get("pixels")
        decoders = [place / "decoder" for place in (drawn, exported) if place is not None]
        if "decoder" not in given and (decoder := next(filter(Path.is_dir, decoders), None)):
            found["decoder"] = decoder
        if exported is not None and (exported / "tokenizer").is_dir():
            found["tokenizer"] = exported / "tokenizer"
    return found


def _of_weights(kind: str, folder: Path) -> dict[str, Any]:
    """Settings that the weights decide."""
    if kind == "lavit" and (folder / "decoder" / "config.json").is_file():
        return {"head": read_json_object(folder / "decoder" / "config.json").get("head", "highres")}
    if kind == "seed_llama":
        sizes, llm = (read_json_object(folder / name / "config.json") for name in ("tokenizer", "llm"))
        found = {"template": template_for(llm.get("hidden_size")), "transform": dict(BICUBIC),
                 "image_size": sizes.get("vit", {}).get("image_size", 224)}
        inside = Path("tokenizer", "diffusion_model")
        if (folder / inside).is_dir() and not (folder / "detokenizer").is_dir():
            found["detokenizer"] = inside.as_posix()
        return found
    return {}


def _copy(source: Path, place: Path) -> None:
    """A folder's files, or one file into the folder `place`."""
    if source.resolve() == place.resolve():
        return
    if source.is_file():
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, place / source.name)
        return
    shutil.copytree(source, place, dirs_exist_ok=True, ignore=OF_TRAINING)
    for name, key in ((TOWER, "file"), (VAE, "folder")):
        if (source / name).is_file():
            values = read_json_object(source / name)
            values[key] = Path(os.path.relpath((source / values[key]).resolve(), place.resolve())).as_posix()
            replace_text(place / name, json.dumps(values) + "\n")
