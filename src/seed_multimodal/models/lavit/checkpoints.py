"""LaVIT's dynamic tokenizer on disk: the original layout, and our own folder.

    original
      visual_tokenizer/eva_vitg_psz14.bin     vision encoder
      visual_tokenizer/tokenizer_encoder.bin  token selector, token merger, codebook and the layers
                                              before it
      language_model/visual_weight.bin        for understanding: a second token merger, and the
                                              projector
    ours
      config.json, model.safetensors          everything, `encoder.*` included
      visual_weight.safetensors               for understanding; without it model.safetensors serves
                                              for both

Each `.bin` may be a `.safetensors`. Sizes: `config.json` (original: in `visual_tokenizer/`), else
the original ones.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from seed_multimodal.models.lavit.modeling import (
    DynamicTokenizer,
    LavitTokenizerConfig,
    TokenMerger,
)
from seed_multimodal.nn.layers import cast_layers
from seed_multimodal.nn.pretrained import CONFIG, WEIGHTS
from seed_multimodal.state_dicts import assign_strictly, load_state_dict
from seed_multimodal.weights.catalogue import VISUAL_WEIGHTS, download_advice
from seed_multimodal.weights.find import find_file, first_file

State = dict[str, Tensor]
ENCODER = "encoder."  # beginning of the vision encoder's names
CODEC_FILES = ("tokenizer_encoder.safetensors", "tokenizer_encoder.bin")
ENCODER_FILES = ("eva_vitg_psz14.safetensors", "eva_vitg_psz14.bin")
VISUAL_WEIGHT_FILES = (VISUAL_WEIGHTS, "visual_weight.bin")
TRAINING_STATE = ("quantize.*", "decoder.*")  # next to the codebook's rows


def load_dynamic_tokenizer(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> DynamicTokenizer:
    """The tokenizer that computes codes, in eval mode and frozen, from an original folder or ours.

    Args:
        dtype: of linear and convolution layers; the others stay as stored (fp32 in the original).

    Raises:
        CheckpointError: missing, unsafe or damaged files, or tensors that are missing or of another
            size.
        ConfigError: a damaged config.json.
    """
    # 1. The files of the layout. Our folder has its vision encoder in model.safetensors.
    folder = Path(folder).expanduser()
    encoder_file: Path | None = None
    is_ours = (folder / WEIGHTS).is_file()
    if is_ours:
        config_file = folder / CONFIG
        codec_file = folder / WEIGHTS
    else:
        # The original's folder of this part, or its whole repository.
        inner = folder / "visual_tokenizer"
        original = inner if inner.is_dir() else folder
        config_file = original / CONFIG
        codec_file = find_file(original, CODEC_FILES, download_advice("lavit"))
        encoder_file = find_file(original, ENCODER_FILES, download_advice("lavit"))
    config = LavitTokenizerConfig()
    if is_ours or config_file.is_file():
        config = DynamicTokenizer.read_config(config_file)

    # 2. Their tensors, under our names.
    state: State = {}
    if encoder_file is not None:
        for name, value in load_state_dict(encoder_file, mapped=True).items():
            state[ENCODER + name] = value
    state |= load_state_dict(codec_file, mapped=True)

    # 3. The network. Weights that only make codes have no projector.
    if "vit_proj.weight" not in state:
        config = replace(config, llm_width=0)
    return DynamicTokenizer.from_state_dict(
        config,
        state,
        folder,
        allow_unexpected=TRAINING_STATE,
        foreign=True,
        device=device,
        dtype=dtype,
    )


def load_tokenizer_pair(
    folder: str | Path,
    language_model: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[DynamicTokenizer, DynamicTokenizer | None]:
    """The tokenizers for codes and for understanding.

    They share all but token merger and projector. Without `visual_weight` the first serves for
    both; without a projector the second is None.

    language_model: an original's folder, or a run's checkpoint, which may have a `visual_weight`.
    """
    code_tokenizer = load_dynamic_tokenizer(folder, device=device, dtype=dtype)
    for source in (language_model, folder):
        file = source and first_file(Path(source).expanduser(), VISUAL_WEIGHT_FILES)
        if file:
            state = load_state_dict(file, mapped=True)
            return code_tokenizer, with_merger(code_tokenizer, state, file)
    if code_tokenizer.vit_proj is None:
        return code_tokenizer, None
    return code_tokenizer, code_tokenizer


def with_merger(
    model: DynamicTokenizer, state: Mapping[str, Tensor], source: str | Path
) -> DynamicTokenizer:
    """A tokenizer that shares `model` except token merger and projector, which `state` holds.

    source: for messages.
    """
    # 1. The two modules. The projector's weight or bias has one row for each of its outputs.
    llm_width = model.config.llm_width
    for name, value in state.items():
        if name.startswith("vit_proj."):
            llm_width = len(value)
            break
    with torch.device("meta"):
        parts = nn.ModuleDict(
            {
                "causal_encoder": TokenMerger(model.config, model.encoder.width),
                "vit_proj": nn.Linear(model.encoder.width, llm_width),
            }
        )
    cast_layers(parts, model.encode_task_layer[0].weight.dtype)
    assign_strictly(parts, state, source, foreign=True, device=model.device)
    parts.requires_grad_(False).eval()

    # 2. A shallow copy: the other modules are those of `model`.
    sharing = copy.copy(model)
    sharing._modules = {**model._modules, **parts._modules}
    return sharing


def copy_stage1_tokenizer(source: Path, target: Path) -> None:
    """Write our folder of a tokenizer as stage 1 leaves it, without the trained token merger."""
    load_dynamic_tokenizer(source).save_pretrained(target)
