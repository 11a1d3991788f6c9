"""Weights that training starts from: BLIP-2's Q-Former, the EVA tower, the CLIP target, the unCLIP folder.

Each is a local file or folder, or a hub id (`owner/name`); each is checked, and its report names the tensors that were
loaded, missing in the file, or ignored. Weights of another size are refused with the first tensor's name and both
shapes. Files: `blip2_pretrained.pth` and `eva_vit_g.pth` of LAVIS, `CLIP-ViT-H-14-laion2B-s32B-b79K`,
`stable-diffusion-2-1-unclip`.
Note: BERT has 30522 word pieces and BLIP-2 one more (`[DEC]`); files differ in which of their word tables were
enlarged, so a table of one row more or less than the model's is fitted (a new last row keeps its start value).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError
from seed_multimodal.hub import UNCLIP_WHERE, find_file, find_folder
from seed_multimodal.nn.eva import EvaConfig, EvaVit, eva_from_clip
from seed_multimodal.tokenizers.checkpoints import State, fill_tower, read_tower
from seed_multimodal.tokenizers.clip_weights import load_clip_vision
from seed_multimodal.tokenizers.released import TOWER, VISION_FILES, VISION_URL
from seed_multimodal.tokenizers.stage1 import Stage1Model
from seed_multimodal.weights import LoadReport, assign_strictly, load_state_dict

Log = Callable[[str], None] | None

BLIP2_FILES = ("blip2_pretrained.safetensors", "blip2_pretrained.pth")
BLIP2_URL = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/blip2_pretrained.pth"
BLIP2_WHERE = f"download {BLIP2_URL} and give its path, for example pretrained/{BLIP2_FILES[-1]}"
EVA_WHERE = f"download {VISION_URL} and give its path, for example pretrained/{VISION_FILES[-1]}"
# Parts of the files that training does not start from.
BLIP2_IGNORED = ("itm_head.*", "visual_encoder.*")
UNCLIP_PARTS = ("image_normalizer", "image_noising_scheduler", "scheduler", "unet", "vae")
UNCLIP_OPTIONAL = ("text_encoder", "tokenizer")
WORDS = "Qformer.bert.embeddings.word_embeddings.weight"
HEAD = "Qformer.cls.predictions."


def load_blip2(model: Stage1Model, path_or_id: str | Path, log: Log = print) -> LoadReport:
    """Start stage 1 from BLIP-2: Q-Former (queries and text), `ln_vision`, projections and temperature.

    Args:
        path_or_id: `blip2_pretrained.pth` (`{"model": …}`), a folder with it, or a hub id.
        log: gets the report as one line.

    Raises:
        CheckpointError: not there (names the download), damaged, another model's, or of another size; the vision
            tower is never taken from this file (`load_tower` does that).
    """
    file = find_file(path_or_id, BLIP2_FILES, BLIP2_WHERE)
    state = load_state_dict(file)
    own = model.state_dict()
    if "query_tokens" not in state:
        raise CheckpointError(f"{file}: not a BLIP-2 stage-1 checkpoint: it holds no 'query_tokens' (its first tensor "
                              f"is {next(iter(state))!r}); {BLIP2_WHERE}.")
    tower = [name for name in state if name.startswith(TOWER)]
    state = {name: value for name, value in state.items() if not name.startswith(TOWER)}
    ignored = BLIP2_IGNORED if hasattr(model.Qformer, "cls") else (*BLIP2_IGNORED, "Qformer.cls.*")
    fitted = _fit_words(state, own)
    report = assign_strictly(
        model, state, file, allow_unexpected=ignored,
        allow_missing=("visual_encoder.*", "embedding_head.*", "*position_ids", "Qformer.cls.*"), foreign=True)
    report.ignored += tower
    report.fitted = fitted
    if log is not None:
        log(report.describe())
    return report


def load_tower(vit: EvaVit, source: str | Path, log: Log = print) -> LoadReport:
    """Start the vision tower from what `tower_tensors` reads, positions resized to its grid.

    Raises:
        CheckpointError: not there (names the download), damaged, another model's, or of another size.
    """
    report = fill_tower(vit, tower_tensors(source, vit.config), source)
    if log is not None:
        log(report.describe())
    return report


def tower_tensors(source: str | Path, sizes: EvaConfig | None = None) -> State:
    """Vision-tower tensors by their names in the tower: of `eva_vit_g.pth` (a file, its folder or a hub id), or (ours)
    of a transformers CLIP folder, of which `sizes` (None: all of it) says how much is used.

    Raises:
        CheckpointError: not there (names the download), damaged, or another model's.
    """
    config = Path(source) / "config.json"
    if not config.is_file() or not str(read_json_object(config).get("model_type", "")).startswith("clip"):
        return read_tower(find_file(source, VISION_FILES, EVA_WHERE))
    clip = load_clip_vision(source, log=None)
    return eva_from_clip(clip.state_dict(), sizes or EvaConfig(depth=clip.config.num_hidden_layers, pre_norm=True))


def check_unclip(path_or_id: str | Path, embedding_dim: int, log: Log = print) -> LoadReport:
    """Whether a diffusers folder can draw image embeddings of width `embedding_dim`; reads sizes, loads no network.

    Returns:
        The report: parts that are there, optional parts that are not (a text encoder), parts that are never used.

    Raises:
        CheckpointError: not there (names what to put where), incomplete, or made for another width.
    """
    folder = find_folder(path_or_id, ("*.json", "*/*.json", "image_normalizer/*"), UNCLIP_WHERE)
    index = read_json_object(folder / "model_index.json", advice=UNCLIP_WHERE)
    parts = {name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None}
    for name in UNCLIP_PARTS:
        if name not in parts or not (folder / name).is_dir():
            raise CheckpointError(f"{folder}: not a complete stable-unCLIP folder: it holds no {name!r}; "
                                  f"{UNCLIP_WHERE}.")
    _check_normaliser(folder / "image_normalizer", embedding_dim)
    unet = read_json_object(folder / "unet" / "config.json", advice=UNCLIP_WHERE)
    wide = unet.get("projection_class_embeddings_input_dim")
    if wide != 2 * embedding_dim:
        raise CheckpointError(f"{folder / 'unet'}: its class embedding takes {wide} numbers, image embeddings of "
                              f"width {embedding_dim} with their noise level are {2 * embedding_dim}.")
    report = LoadReport(str(folder), sorted(parts & {*UNCLIP_PARTS, *UNCLIP_OPTIONAL}),
                           [name for name in UNCLIP_OPTIONAL if name not in parts],
                           sorted(parts - {*UNCLIP_PARTS, *UNCLIP_OPTIONAL}))
    if log is not None:
        log(f"{folder}: draws embeddings of width {embedding_dim}; parts: {', '.join(report.loaded)}"
            + (f"; without {', '.join(report.missing)}" if report.missing else "")
            + (f"; not used: {', '.join(report.ignored)}" if report.ignored else "") + ".")
    return report


def _fit_words(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, str]:
    """Word tables of `state` with one row more or less than the model's, fitted in place; name → what was done."""
    fitted = {}
    for name in (WORDS, f"{HEAD}bias", f"{HEAD}decoder.weight", f"{HEAD}decoder.bias"):
        if name not in state or name not in own:
            continue
        value, wanted = state[name], own[name]
        if value.shape[1:] == wanted.shape[1:] and abs(len(value) - len(wanted)) == 1:
            state[name] = torch.cat([value, wanted[len(value):].to(value)]) if len(value) < len(wanted) else value[:-1]
            fitted[name] = f"fitted from {len(value)} to {len(wanted)} rows"
    # One tensor in the model: whatever a file holds for the copies, the words decide.
    for copy, original in ((f"{HEAD}decoder.weight", WORDS), (f"{HEAD}decoder.bias", f"{HEAD}bias")):
        if copy in state and original in state:
            state[copy] = state[original]
    return fitted


def _check_normaliser(folder: Path, embedding_dim: int) -> None:
    """Refuse a normaliser of another width, told by its tensor or, where that is not there, by its config."""
    shape: tuple[int, ...] | None = None
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        mean = load_state_dict(file).get("mean")
        shape = shape if mean is None else tuple(mean.shape)
    if shape is None:
        shape = (1, int(read_json_object(folder / "config.json", advice=UNCLIP_WHERE).get("embedding_dim", 0)))
    if shape != (1, embedding_dim):
        raise CheckpointError(f"{folder}: weights of another size: 'mean' has {shape}, the tokenizer's image "
                              f"embeddings need {(1, embedding_dim)}.")
