"""`system.json` of a system's folder: which system it is, its sub-folders, and the settings that belong to the weights.

    {"tokenizer": "seed_tokenizer", "llm": "seed_llama", "detokenizer": "seed_tokenizer/diffusion_model",
     "template": "vicuna", "image_size": 64, "transform": {"type": "clip", "keep_ratio": false},
     "generation": {"max_new_tokens": 128}, "tasks": {"draw_response": "Here is the picture."}, "previews": [8, 16]}

    {"system": "seed_x", "llm": "llm", "agent": "agent", "tokenizer": "tokenizer", "vision": "vision",
     "sdxl": "sdxl", "detokenizer": "detokenizer", "tuned": true, "grids": ["1x1", "2x1", "1x2", "2x2"]}

    {"system": "lavit", "llm": "llm", "words": "../nano/words", "tokenizer": "tokenizer", "decoder": "decoder",
     "pixels": "pixels", "head": "highres"}

A file that names no system is SEED-LLaMA's.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.images.any_resolution import RELEASED_GRIDS
from seed_multimodal.language.tasks import DEFAULT_TASKS, SEED_X_TASKS, TaskPrompts
from seed_multimodal.settings import check_keys, check_value, read_settings, setting

RELEASED_TRANSFORM = {"type": "clip", "keep_ratio": False, "interpolation": "bilinear"}
SEED_X_GENERATION = {"max_new_tokens": 512, "do_sample": False}  # of the released scripts


@dataclass(frozen=True)
class Learned:
    """What the weights were trained on, see `systems.domain`; None: pictures and words of any kind."""

    domain: Path | None = None
    domain_threshold: float = 0.0
    known_words: Path | None = None


@dataclass(frozen=True)
class SystemFile(Learned):
    """`system.json`: paths relative to its folder, and the settings that belong to the weights.

    `previews`: after how many of a picture's codes a stream shows it, for weights trained on prefixes of the codes.
    """

    tokenizer: Path = Path("seed_tokenizer")
    llm: Path = Path("seed_llama")
    detokenizer: Path | None = Path("seed_tokenizer/diffusion_model")
    vision: Path | None = None
    template: str = "vicuna"
    image_size: int = setting(224, least=1)
    transform: dict[str, Any] = field(default_factory=lambda: dict(RELEASED_TRANSFORM))
    generation: dict[str, Any] = field(default_factory=dict)
    tasks: TaskPrompts = DEFAULT_TASKS
    previews: tuple[int, ...] = setting((), least=1)
    system: str = "seed_llama"


@dataclass(frozen=True)
class SeedXFile(Learned):
    """`system.json` of SEED-X: paths relative to its folder, and the settings that belong to the weights.

    Attributes:
        detokenizer: SDXL adapter of either stage; None: a system that cannot draw. sdxl: SDXL's diffusers folder.
        tuned: it follows instructions; False continues what it is given, and cannot chat or edit.
        grids: into which pictures are cut; `edit_grids`: those that are edited (released: in one piece).
        previews: none: a picture can be shown only when it is whole.
    """

    tokenizer: Path = Path("tokenizer")
    llm: Path = Path("llm")
    agent: Path = Path("agent")
    vision: Path = Path("vision")
    sdxl: Path = Path("sdxl")
    detokenizer: Path | None = Path("detokenizer")
    tuned: bool = True
    grids: tuple[str, ...] = RELEASED_GRIDS
    edit_grids: tuple[str, ...] = ("1x1",)
    generation: dict[str, Any] = field(default_factory=lambda: dict(SEED_X_GENERATION))
    tasks: TaskPrompts = SEED_X_TASKS
    system: str = "seed_x"
    previews: tuple[int, ...] = ()


@dataclass(frozen=True)
class LavitFile(Learned):
    """`system.json` of LaVIT: paths relative to its folder (also to another system's, `../nano/…`), and the settings
    that belong to the weights. Without `decoder` or `pixels` (`null`) the system cannot draw.

    Attributes:
        words: the text tokenizer; None: in the language model's folder.
        tokenizer: the dynamic tokenizer, with `visual_weight.safetensors` in it for understanding.
        decoder: codes to conditions. pixels: diffusers folder with U-Net, autoencoder and scheduler. safety: folder
            with `feature_extractor` and `safety_checker`.
        head: the decoder's, and with it the kind of U-Net.
        selection: how patches are chosen: drawn from the picture's seed, or those more likely kept than not.
        generation: settings of `describe`, `ask`, `draw` and `compose` over the released ones.
        answer_after: as of `TaskPrompts`.
    """

    llm: Path = Path("llm")
    words: Path | None = None
    tokenizer: Path = Path("tokenizer")
    decoder: Path | None = Path("decoder")
    pixels: Path | None = Path("pixels")
    safety: Path | None = None
    head: Literal["highres", "lowres"] = "highres"
    selection: Literal["draw", "threshold"] = "draw"
    generation: dict[str, dict[str, Any]] = field(default_factory=dict)
    answer_after: str = ""
    system: str = "lavit"
    previews: tuple[int, ...] = ()


FILES: dict[str, type[SystemFile | SeedXFile | LavitFile]] = {
    "seed_llama": SystemFile, "seed_x": SeedXFile, "lavit": LavitFile}


def read_system_json(folder: Path) -> SystemFile | SeedXFile | LavitFile:
    """`system.json` of `folder`, as the class of the system that it names; keys that begin with `_` are remarks.

    Raises:
        CheckpointError: no such file; ConfigError: not JSON, or keys or values that mean nothing.
    """
    from seed_multimodal.images.transforms import get_transform

    file = folder / "system.json"
    if not file.is_file():
        raise CheckpointError(f"{file}: there is no such file; a system folder names its parts there.")
    values = {key: value for key, value in read_json_object(file, ConfigError).items() if not key.startswith("_")}
    kind = check_value(str, values.get("system", "seed_llama"), f"{file}: system", choices=tuple(FILES))
    if kind == "seed_x" and isinstance(tasks := values.get("tasks"), dict):
        values["tasks"] = {**dataclasses.asdict(SEED_X_TASKS), **tasks}
    found = read_settings(FILES[kind], values, str(file))
    if isinstance(found, SystemFile):
        check_keys(found.transform, inspect.signature(get_transform).parameters, f"{file}: transform")
    return found
