"""Reading SEED-1 tokenizers: our folder, the released layout, or a training checkpoint; and writing our folder.

    our folder        config.json + model.safetensors
    released folder   causal_qformer.pth + seed_tokenizer.pth (`{"model": …}` each) + eva_vit_g.pth
    a file            model.safetensors; seed_tokenizer.pth with causal_qformer.pth beside it; or everything but the
                      vision tower in one file, which `vision=` or an eva_vit_g.pth beside it completes

As released, both files are laid over each other and the second wins; unlike there, every tensor is accounted for.
The published training code holds this decoder as its text branch beside SEED-2's image branch: names that end in
`_text` are translated, and what they would collide with (the image branch) is left out and reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from seed_multimodal.errors import CheckpointError
from seed_multimodal.tokenizers.checkpoints import (
    OURS,
    SEED1_FILES,
    TOWER,
    VISION_FILES,
    VISION_URL,
    assign_parts,
    describe,
    empty_model,
    first_file,
    our_config,
    read_tower,
)
from seed_multimodal.tokenizers.seed1 import MODEL_TYPE, Seed1Config, Seed1Tokenizer
from seed_multimodal.tokenizers.tokenizer_config import QUERY_LAYERS
from seed_multimodal.weights import load_state_dict

QFORMER_FILES, TOKENIZER_FILES = SEED1_FILES
# The training code's names of the text branch → the released ones.
TEXT_BRANCH = {"Reverse_Qformer_text.": "Reverse_Qformer.", "reverse_tokens_text": "reverse_tokens"}
IMAGE_BRANCH = ("distill_image_proj.*", "image_down.*", "blocks_image.*", "pos_embed_image")
# Tensors that only training uses: stage 1's text path and projections, stage 2's reconstruction of the queries.
IGNORED = (*IMAGE_BRANCH, "pos_embed", "blocks.*", "text_proj.*", "vision_proj.*", "itm_head.*", "temp",
           "text_encoder.*", "clip_model.*", "embedding_head.*", "quantize.ema_*", "Qformer.cls.*",
           "Qformer.bert.embeddings.word_embeddings.*", "Qformer.bert.embeddings.position_embeddings.*",
           f"{QUERY_LAYERS}.*.intermediate.*", f"{QUERY_LAYERS}.*.output.*")


@dataclass(frozen=True)
class Seed1Sources:
    """Files to read, later ones over earlier ones; `vision`, `config`: None where there is none."""

    weights: tuple[Path, ...]
    vision: Path | None
    config: Path | None

    def __str__(self) -> str:
        return " and ".join(map(str, self.weights))


def load_seed1(source: str | Path, *, vision: str | Path | None = None, config: Seed1Config | None = None,
               image_size: int | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
               log: Callable[[str], None] | None = None) -> Seed1Tokenizer:
    """Load a tokenizer in eval mode, its parameters frozen, its `load_report` filled.

    Args:
        source: folder or file, see the module's docstring.
        vision: file of the vision tower, if it is not in or beside `source`.
        config: sizes, where no config.json gives them and the weights' widths are not the released ones.
        image_size: resize the position table (bicubic) so that images of this size can be encoded.
        log: receives a line that says what was loaded and ignored, and one if tensors of one file replace another's.

    Raises:
        CheckpointError: nothing there, damaged or unsafe file, another model's weights (SEED-2's too), missing
            tensors: one sentence that names them and says what to put where.
    """
    files = find_seed1(source, vision)
    state, replaced = _overlay([load_state_dict(file) for file in files.weights])
    if replaced and log is not None:
        log(f"{files.weights[-1]}: {replaced} of its tensors are in {files.weights[0].name} too; its own are used.")
    state, left_out = rename_training(state)
    _refuse_others(state, files)
    tower, tower_source = _tower(state, files)
    state = {name: value for name, value in state.items() if not name.startswith(TOWER)}
    if config is None:
        config = Seed1Config.read(files.config) if files.config is not None else Seed1Config.infer(
            {**state, **{TOWER + name: value for name, value in tower.items()}}, str(files))
    if image_size is not None:
        config = config.with_image_size(image_size)
    model = build_seed1(config, state, tower, str(files), tower_source, device=device, dtype=dtype)
    assert model.load_report is not None
    model.load_report.ignored += left_out
    if log is not None:
        log(describe(model.load_report))
    return model


def build_seed1(config: Seed1Config, state: Mapping[str, Tensor], tower: Mapping[str, Tensor], source: str | Path,
                tower_source: str | Path, *, device: str | torch.device = "cpu",
                dtype: torch.dtype = torch.float32) -> Seed1Tokenizer:
    """As `checkpoints.build`, for SEED-1 and its released names."""
    model: Seed1Tokenizer = empty_model(Seed1Tokenizer, config, device, dtype)
    model.load_report = assign_parts(model, state, tower, source, tower_source, IGNORED)
    return model


def advice(folder: str | Path) -> str:
    """What to download for `folder`, without a full stop."""
    return (f"put {QFORMER_FILES[-1]} and {TOKENIZER_FILES[-1]} (the two files that SEED-1.md of "
            f"github.com/AILab-CVC/SEED links to) and {VISION_FILES[-1]} ({VISION_URL}) into {folder}")


# ---- which files


def find_seed1(source: str | Path, vision: str | Path | None = None) -> Seed1Sources:
    """The files a source stands for; `CheckpointError` says what is missing and where to put it."""
    place = Path(source).expanduser()
    if vision is not None and not Path(vision).is_file():
        raise CheckpointError(f"{vision}: there is no such vision-tower file; download it from {VISION_URL}.")
    if not place.exists():
        raise CheckpointError(f"{place}: there is no such SEED-1 tokenizer; {advice(place)}.")
    folder = place if place.is_dir() else place.parent
    ours = our_config(folder, MODEL_TYPE)
    if place.is_file():
        first = first_file(folder, QFORMER_FILES) if place.name in TOKENIZER_FILES else None
        weights: tuple[Path, ...] = (place,) if first is None else (first, place)
    elif (folder / OURS).is_file() and ours is not None:
        weights = (folder / OURS,)
    else:
        weights = _released(folder)
    tower = Path(vision) if vision is not None else first_file(folder, VISION_FILES) or first_file(
        Path(torch.hub.get_dir()) / "checkpoints", VISION_FILES)  # where the original programs cache it
    return Seed1Sources(weights, tower, ours)


def _released(folder: Path) -> tuple[Path, ...]:
    found = [(first_file(folder, names), names[-1]) for names in (QFORMER_FILES, TOKENIZER_FILES)]
    missing = " and ".join(name for file, name in found if file is None)
    if missing:
        raise CheckpointError(f"{folder}: holds no SEED-1 tokenizer ({missing} missing); {advice(folder)}.")
    return tuple(file for file, _ in found if file is not None)


# ---- which tensors


def _overlay(states: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], int]:
    """All tensors, later files over earlier ones, and how many were replaced that way."""
    merged: dict[str, Tensor] = {}
    for state in states:
        merged.update(state)
    return merged, sum(map(len, states)) - len(merged)


def rename_training(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The published training code's names → the released ones, and the names left out.

    With a text branch present, unsuffixed `Reverse_Qformer`/`reverse_tokens` belong to the image branch.
    """
    if not any(name.startswith(tuple(TEXT_BRANCH)) for name in state):
        return dict(state), []
    renamed, left_out = {}, []
    for name, value in state.items():
        if name.startswith(tuple(TEXT_BRANCH)):
            own = next(prefix for prefix in TEXT_BRANCH if name.startswith(prefix))
            renamed[TEXT_BRANCH[own] + name.removeprefix(own)] = value
        elif name.startswith(tuple(TEXT_BRANCH.values())):
            left_out.append(name)
        else:
            renamed[name] = value
    return renamed, left_out


def _refuse_others(state: Mapping[str, Tensor], files: Seed1Sources) -> None:
    if "distill_text_proj.weight" in state and "reverse_tokens" in state:
        return
    if "distill_image_proj.weight" in state:
        raise CheckpointError(f"{files}: this is a SEED-2 tokenizer (it ends in 'distill_image_proj', one image "
                              f"embedding); load it with Seed2Tokenizer.")
    if "patch_embed.proj.weight" in state:
        raise CheckpointError(f"{files}: this is the vision tower alone; give it as vision= and the tokenizer's own "
                              f"folder as the source.")
    missing = next(name for name in ("distill_text_proj.weight", "reverse_tokens") if name not in state)
    raise CheckpointError(f"{files}: not a complete SEED-1 tokenizer: it holds no {missing!r} "
                          f"(its first tensor is {next(iter(state))!r}).")


def _tower(state: Mapping[str, Tensor], files: Seed1Sources) -> tuple[dict[str, Tensor], str]:
    """Vision-tower tensors without prefix, and where they come from: bundled ones win over a separate file."""
    bundled = {name.removeprefix(TOWER): value for name, value in state.items() if name.startswith(TOWER)}
    if bundled:
        return bundled, str(files)
    if files.vision is None:
        folder = files.weights[-1].parent
        raise CheckpointError(f"{files}: the vision tower is stored apart and missing; download {VISION_URL} to "
                              f"{folder / VISION_FILES[-1]}, or give vision=FILE.")
    return read_tower(files.vision), str(files.vision)
