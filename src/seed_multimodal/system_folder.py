"""A system folder joined from parts: for `seed assemble`, and the last stage of nano-x and nano-lavit.

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

from seed_multimodal.disk import read_json_object, replace_text

# Part → what it is; of the parts in brackets a system can do without.
PARTS: dict[str, dict[str, str]] = {
    "seed_llama": {"llm": "language model", "tokenizer": "folder that seed export-tokenizer made, with words",
                   "detokenizer": "[stable-unCLIP folder; default: the tokenizer's diffusion_model]"},
    "seed_x": {"llm": "language model", "agent": "resamplers: of a merged agent, or a checkpoint of the tuning",
               "tokenizer": "words", "vision": "vision tower", "sdxl": "[SDXL's unet/config.json, vae and scheduler]",
               "detokenizer": "[adapter of either stage]"},
    "lavit": {"llm": "[checkpoint of stage 2]", "words": "[text tokenizer; default: in the language model's folder]",
              "tokenizer": "what seed export-tokenizer --lavit made, with its decoder",
              "decoder": "[decoder of codes; default: the one trained with the pixels, else the tokenizer's]",
              "pixels": "[result of the pixel decoder's training, OUTPUT_DIR/pixels]"},
}
OF_TRAINING = shutil.ignore_patterns("optimizer*", "trainer_state.json", "data_state.json", "ema.safetensors",
                                     "manifest.json", ".*")
DRAWING = ("detokenizer", "decoder", "pixels")  # without which a system cannot draw
INSIDE, VISUAL = "diffusion_model", "visual_weight.safetensors"


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
    if kind == "seed_llama" and named["detokenizer"] is None and (folder / "tokenizer" / INSIDE).is_dir():
        named["detokenizer"] = f"tokenizer/{INSIDE}"
    replace_text(folder / "system.json", json.dumps({**settings, "system": kind, **named}, indent=1))


def _copy(source: Path, place: Path) -> None:
    """A folder's files, or one file into the folder `place`."""
    if source.resolve() == place.resolve():
        return
    if source.is_file():
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, place / source.name)
        return
    shutil.copytree(source, place, dirs_exist_ok=True, ignore=OF_TRAINING)
    for name, key in (("tower.json", "file"), ("vae.json", "folder")):
        for file in source.rglob(name):
            values = read_json_object(file)
            named, copied = (file.parent / values[key]).resolve(), place / file.relative_to(source)
            if not named.is_relative_to(source.resolve()):
                values[key] = Path(os.path.relpath(named, copied.parent.resolve())).as_posix()
                replace_text(copied, json.dumps(values) + "\n")
