"""Reading SEED-2 tokenizers: our folder, the released layout, or single files; and writing our folder.

    our folder        config.json + model.safetensors
    released folder   seed_quantizer.pt (no vision tower) + eva_vit_g.pth (40 blocks, the first 39 are used)
    a file            seed_quantizer.pt, vision tower by `vision=`; or model.safetensors with config.json beside it
    a hub id          `owner/name`, downloaded with huggingface_hub, then a released or our folder

The released quantiser file holds 146 further tensors of training-only branches: names on a list are ignored and
reported, anything else unknown or missing is refused. The vision tower may also lie in the same file.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.errors import CheckpointError, first_line
from seed_multimodal.tokenizers.seed2 import MODEL_TYPE, Seed2Config, Seed2Tokenizer
from seed_multimodal.tokenizers.tokenizer_config import TokenizerConfig
from seed_multimodal.vision.eva import EvaVit, resize_positions
from seed_multimodal.weights import LoadReport, assign_strictly, load_state_dict, save_state_dict

OURS = "model.safetensors"
QUANTIZER_FILES = ("seed_quantizer.safetensors", "seed_quantizer.pt")
VISION_FILES = ("eva_vit_g.safetensors", "eva_vit_g.pth")
SEED1_FILES = (("causal_qformer.safetensors", "causal_qformer.pth"),
               ("seed_tokenizer.safetensors", "seed_tokenizer.pth"))  # of the layout that seed1_loading reads
VISION_URL = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth"
WHERE = (f"put {QUANTIZER_FILES[-1]} (from AILab-CVC/seed-tokenizer-2 on the Hugging Face hub) and {VISION_FILES[-1]} "
         f"(from {VISION_URL}) into a folder such as pretrained/seed_tokenizer and give its path")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TOWER = "visual_encoder."
QUERY_LAYER = "Qformer.bert.encoder.layer.*"
# Training-only tensors that a released or training checkpoint may carry.
IGNORED: tuple[str, ...] = (
    "Reverse_Qformer_text.*", "reverse_tokens_text", "distill_text_proj.*", "blocks_text.*", "pos_embed_text",
    "text_proj.*", "vision_proj.*", "itm_head.*", "temp", "text_encoder.*", "clip_model.*", "embedding_head.*",
    "Qformer.cls.*", "Qformer.bert.embeddings.word_embeddings.*", "Qformer.bert.embeddings.position_embeddings.*",
    f"{QUERY_LAYER}.intermediate.*", f"{QUERY_LAYER}.output.*", "quantize.ema_*")
IGNORED_BESIDE_IMAGE_DOWN = ("Reverse_Qformer.*", "reverse_tokens")
IGNORED_WITHOUT_RECON = ("pos_embed", "blocks.*")
IGNORED_IN_TOWER = ("norm.*", "fc_norm.*", "head.*", "mask_token", "rel_pos_bias.*", "lm_head.*")


@dataclass(frozen=True)
class Sources:
    """Files to read: `vision` is None when the tower must be in `weights`; `config` when there is no config.json."""

    weights: Path
    vision: Path | None
    config: Path | None


def load_tokenizer(source: str | Path, *, vision: str | Path | None = None, config: Seed2Config | None = None,
                   image_size: int | None = None, device: str | torch.device = "cpu",
                   dtype: torch.dtype = torch.float32,
                   log: Callable[[str], None] | None = None) -> Seed2Tokenizer:
    """Load a tokenizer in eval mode, its parameters frozen, its `load_report` filled.

    Args:
        source: folder, file or hub id, see the module's docstring.
        vision: file of the vision tower, if it is not in or beside `source`.
        config: sizes, where no config.json gives them and the weights' widths are not the released ones.
        image_size: resize the position table (bicubic) so that images of this size can be encoded.
        log: receives one line per file that says what was loaded and what was ignored.

    Raises:
        CheckpointError: nothing there, damaged or unsafe file, another model's weights, missing tensors: one
            sentence that names them and, for the vision tower, says where to get it.
    """
    files = find_sources(source, vision)
    state = load_state_dict(files.weights)
    if "distill_text_proj.weight" in state and "distill_image_proj.weight" not in state:
        raise CheckpointError(f"{files.weights}: this is a SEED-1 tokenizer (it ends in 'distill_text_proj', text-like "
                              f"embeddings); load it with Seed1Tokenizer.")
    tower, tower_source = _tower(state, files)
    state = {name: value for name, value in state.items() if not name.startswith(TOWER)}
    if config is None:
        config = Seed2Config.read(files.config) if files.config is not None else Seed2Config.infer(
            {**state, **{TOWER + name: value for name, value in tower.items()}}, files.weights)
    if image_size is not None:
        config = config.with_image_size(image_size)
    model = build(config, state, tower, files.weights, tower_source, device=device, dtype=dtype)
    if log is not None and model.load_report is not None:
        log(describe(model.load_report))
    return model


def build(config: Seed2Config, state: Mapping[str, Tensor], tower: Mapping[str, Tensor], source: str | Path,
          tower_source: str | Path, *, device: str | torch.device = "cpu",
          dtype: torch.dtype = torch.float32) -> Seed2Tokenizer:
    """A tokenizer in eval mode from tensors, every name of which is accounted for in its `load_report`.

    Args:
        state: everything but the vision tower; training-only tensors are ignored by name.
        tower: the vision tower's tensors by their names in the tower.

    Raises:
        CheckpointError: another size, or anything else missing or unknown.
    """
    model = empty_model(Seed2Tokenizer, config, device, dtype)
    model.load_report = assign_parts(model, state, tower, source, tower_source, _ignored(config))
    return model


def save_folder(model: Any, folder: str | Path) -> Path:
    """Write `config.json` and `model.safetensors`; each file appears complete or not at all."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    save_state_dict(model.state_dict(), place / OURS, {"model_type": model.config.model_type})
    temporary = place / f".config.json.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(model.config.to_dict(), indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, place / "config.json")
    return place


# ---- which files


def find_sources(source: str | Path, vision: str | Path | None = None) -> Sources:
    """The files a source stands for; `CheckpointError` says what is missing and where to put it."""
    place = Path(source)
    if vision is not None and not Path(vision).is_file():
        raise CheckpointError(f"{vision}: there is no such vision-tower file; download it from {VISION_URL}.")
    if not place.exists():
        if not HUB_ID.fullmatch(str(source)) or place.parent.exists():
            raise CheckpointError(f"{place}: there is no such tokenizer; {WHERE}.")
        place = download(str(source), ("config.json", OURS, *QUANTIZER_FILES, *VISION_FILES), WHERE)
    folder = place if place.is_dir() else place.parent
    if place.is_file():
        weights: Path | None = place
    else:
        weights = first_file(folder, (OURS, *QUANTIZER_FILES))
    if weights is None:
        other = [file.name for names in SEED1_FILES if (file := first_file(folder, names)) is not None]
        if other:
            raise CheckpointError(f"{folder}: this is a SEED-1 tokenizer ({' and '.join(other)}); load it with "
                                  f"Seed1Tokenizer, or draw with it: python demo_recon.py --model {folder}.")
        names = " or ".join((OURS, QUANTIZER_FILES[-1]))
        raise CheckpointError(f"{folder}: holds no tokenizer weights ({names}).")
    tower = Path(vision) if vision is not None else first_file(folder, VISION_FILES) or _hub_cached_tower()
    return Sources(weights, tower, our_config(folder))


def first_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of `names` that is a file in the folder."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def our_config(folder: Path, model_type: str = MODEL_TYPE) -> Path | None:
    """`config.json` if it is ours: a released folder may hold the text tokenizer's or the LLM's."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not a readable JSON file ({error}).") from error
    return file if isinstance(values, dict) and values.get("model_type") == model_type else None


def _hub_cached_tower() -> Path | None:
    """Where the original programs cache their download of the vision tower."""
    return first_file(Path(torch.hub.get_dir()) / "checkpoints", VISION_FILES)


def download(hub_id: str, files: Sequence[str], advice: str) -> Path:
    """Snapshot folder of those `files` (shell patterns) of a hub repository, from the local cache when it is there.

    Raises:
        CheckpointError: not reachable, with `advice` on what to put where instead.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        if os.environ.get("HF_HUB_OFFLINE") == "1":
            reason = "downloads are off: set HF_HUB_OFFLINE=0 to allow them"
        raise CheckpointError(f"{hub_id}: neither a local folder nor reachable on the hub ({reason}); "
                              f"{advice}.") from error


# ---- which tensors


def _tower(state: dict[str, Tensor], files: Sources) -> tuple[dict[str, Tensor], Path]:
    """Vision-tower tensors without prefix, and the file they come from: bundled ones win over a separate file."""
    bundled = {name.removeprefix(TOWER): value for name, value in state.items() if name.startswith(TOWER)}
    if bundled:
        return bundled, files.weights
    if "patch_embed.proj.weight" in state and "query_tokens" not in state:
        raise CheckpointError(f"{files.weights}: this is the vision tower alone; give it as vision= and the "
                              f"tokenizer's own weights ({QUANTIZER_FILES[-1]}) as the source.")
    if "query_tokens" not in state:
        raise CheckpointError(f"{files.weights}: not a SEED-2 tokenizer: it holds no 'query_tokens' "
                              f"(its first tensor is {next(iter(state))!r}).")
    if files.vision is None:
        raise CheckpointError(
            f"{files.weights}: the vision tower (511 'visual_encoder.*' tensors at released size) is stored apart and "
            f"missing; download it from {VISION_URL} to {files.weights.parent / VISION_FILES[-1]}, "
            f"or give vision=FILE.")
    return read_tower(files.vision), files.vision


def read_tower(file: Path) -> dict[str, Tensor]:
    """Vision-tower tensors of a file by their names in the tower; of a whole checkpoint, its `visual_encoder.*`.

    Raises:
        CheckpointError: not an EVA tower, or a damaged file.
    """
    state = load_state_dict(file)
    tower = {name.removeprefix(TOWER): value for name, value in state.items() if name.startswith(TOWER)} or state
    if "patch_embed.proj.weight" not in tower:
        raise CheckpointError(f"{file}: not an EVA vision tower: it holds no 'patch_embed.proj.weight' "
                              f"(its first tensor is {next(iter(state))!r}).")
    return tower


def fill_tower(vit: EvaVit, tower: Mapping[str, Tensor], source: str | Path) -> LoadReport:
    """Copy tower tensors into `vit`: positions resized to its grid, a file's block after the last used one left out.

    Raises:
        CheckpointError: another size, or anything else missing or unknown.
    """
    fitted = dict(tower)
    positions = fitted.get("pos_embed")
    if positions is not None and positions.ndim == 3:
        fitted["pos_embed"] = resize_positions(positions, vit.config.grid)
    return assign_strictly(vit, fitted, source, allow_unexpected=[*IGNORED_IN_TOWER, f"blocks.{vit.config.depth}.*"])


def empty_model(kind: type[Any], config: TokenizerConfig, device: str | torch.device, dtype: torch.dtype) -> Any:
    """A `kind` with memory for its weights but no start values: a billion random numbers take long."""
    with torch.device("meta"):
        model = kind(config)
    model = model.to(dtype).to_empty(device=device)
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[1], device=buffer.device)[None])
        else:
            buffer.zero_()
    return model.requires_grad_(False).eval()


def _ignored(config: Seed2Config) -> tuple[str, ...]:
    """Names that checkpoints hold beside this configuration's own."""
    names = IGNORED if config.use_qformer_image else IGNORED + IGNORED_BESIDE_IMAGE_DOWN
    return names if config.recon_s else names + IGNORED_WITHOUT_RECON


def assign_parts(model: Any, state: Mapping[str, Tensor], tower: Mapping[str, Tensor], source: str | Path,
                 tower_source: str | Path, ignored: Sequence[str]) -> LoadReport:
    """Fill a tokenizer from its own tensors and its tower's, accounting for every name of all files.

    Args:
        ignored: patterns of names that the files may hold beside the model's.
    """
    rest = [name for name in model.state_dict() if name.startswith(TOWER)]
    report = assign_strictly(model, state, source, allow_missing=[*rest, "*position_ids"], allow_unexpected=ignored)
    seen = fill_tower(model.visual_encoder, tower, tower_source)
    report.loaded += [TOWER + name for name in seen.loaded]
    report.missing = [name for name in report.missing if not name.startswith(TOWER)]
    report.ignored += [TOWER + name for name in seen.ignored]
    if tower_source != source:
        report.source = f"{source} and {tower_source}"
    return report


def describe(report: LoadReport) -> str:
    """One line: counts, and the ignored tensors grouped by their first name."""
    ignored = grouped(report.ignored)
    return f"{report}" + (f": {ignored}" if ignored else "") + "."


def grouped(names: Iterable[str]) -> str:
    """`Qformer (255), temp (1)`: how many names begin with which first part."""
    return ", ".join(f"{name} ({count})" for name, count in Counter(name.split(".")[0] for name in names).items())
