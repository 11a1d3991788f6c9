"""LaVIT's dynamic tokenizer on disk: the original layout, and our own folder.

    original  visual_tokenizer/eva_vitg_psz14.bin     vision encoder
              visual_tokenizer/tokenizer_encoder.bin  token selector, token merger, codebook and the layers before it
              language_model/visual_weight.bin        for understanding: a second token merger, and the projector
    ours      config.json, model.safetensors          everything, `encoder.*` included
              visual_weight.safetensors               for understanding; without it model.safetensors serves for both
              tower.json                              {"file": …, "prefix": …}: `encoder.*` is in that file of another
                                                      system, under names with this prefix

Each `.bin` may be a `.safetensors`. Sizes: `config.json` (original: in `visual_tokenizer/`), else the original ones.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.disk import replace_text
from seed_multimodal.hub import LAVIT_DOWNLOAD, VISUAL_WEIGHTS, find_file, first_file
from seed_multimodal.lavit.modeling import DynamicTokenizer, LavitTokenizerConfig, TokenMerger
from seed_multimodal.nn.layers import cast_layers
from seed_multimodal.nn.pretrained import (
    CONFIG,
    WEIGHTS,
    fill_buffers,
    read_encoder_link,
    write_encoder_link,
)
from seed_multimodal.weights import assign_strictly, load_state_dict, save_state_dict

State = dict[str, Tensor]
ENCODER, READER = "encoder.", ("causal_encoder.", "vit_proj.")
ORIGINAL = tuple(
    (f"{name}.safetensors", f"{name}.bin") for name in ("tokenizer_encoder", "eva_vitg_psz14")
)
VISUAL_WEIGHT_FILES = (VISUAL_WEIGHTS, "visual_weight.bin")
TRAINING_STATE = ("quantize.*", "decoder.*")  # next to the codebook's rows


def load_dynamic_tokenizer(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: LavitTokenizerConfig | None = None,
) -> DynamicTokenizer:
    """The tokenizer that computes codes, in eval mode and frozen, from an original folder or ours.

    Args:
        dtype: of linear and convolution layers; the rest stays as stored (fp32 in the original).
        config: sizes if there is no config.json; None: the original ones.

    Raises:
        CheckpointError: missing, unsafe or damaged files, or tensors that are missing or of another size.
        ConfigError: a damaged config.json.
    """
    place, prefix = Path(folder).expanduser(), ""
    if ours := (place / WEIGHTS).is_file():
        sizes, codec = place / CONFIG, place / WEIGHTS
        encoder, prefix = read_encoder_link(place) or (None, "")
    else:
        visual = place / "visual_tokenizer"
        sizes, codec, encoder = (
            visual / CONFIG,
            *(find_file(visual, names, LAVIT_DOWNLOAD) for names in ORIGINAL),
        )
    if ours or sizes.is_file():
        config = DynamicTokenizer.read_config(sizes)
    state = (
        {}
        if encoder is None
        else {
            ENCODER + name.removeprefix(prefix): value
            for name, value in load_state_dict(encoder, mapped=True).items()
            if name.startswith(prefix)
        }
    )
    state |= load_state_dict(codec, mapped=True)
    config = config or LavitTokenizerConfig()
    with torch.device("meta"):
        model = DynamicTokenizer(
            config if "vit_proj.weight" in state else replace(config, llm_width=0)
        )
    assign_strictly(
        cast_layers(model, dtype),
        state,
        place,
        allow_unexpected=TRAINING_STATE,
        foreign=True,
        device=device,
    )
    return fill_buffers(model, device).requires_grad_(False).eval()


def load_tokenizer_pair(
    folder: str | Path, language_model: str | Path | None = None, **options: Any
) -> tuple[DynamicTokenizer, DynamicTokenizer | None]:
    """(for codes, for understanding): they share all but token merger and projector.

    The second is the first where that has a projector and there is no `visual_weight`, and None without a projector;
    `language_model`: the folder of an original `visual_weight`; `options` as of `load_dynamic_tokenizer`.
    """
    coding = load_dynamic_tokenizer(folder, **options)
    file = first_file(Path(language_model or folder).expanduser(), VISUAL_WEIGHT_FILES)
    if file is None:
        return coding, None if coding.vit_proj is None else coding
    return coding, with_merger(coding, load_state_dict(file, mapped=True), file)


def with_merger(
    model: DynamicTokenizer, state: Mapping[str, Tensor], source: str | Path
) -> DynamicTokenizer:
    """A tokenizer that shares all of `model` except token merger and projector, which are loaded from `state`."""
    width = next(
        (len(value) for name, value in state.items() if name.startswith("vit_proj.")),
        model.config.llm_width,
    )
    with torch.device("meta"):
        parts = nn.ModuleDict(
            {
                "causal_encoder": TokenMerger(model.config),
                "vit_proj": nn.Linear(model.config.vit.width, width),
            }
        )
    cast_layers(parts, model.encode_task_layer[0].weight.dtype)
    assign_strictly(parts, state, source, foreign=True, device=model.device)
    other = copy.copy(model)
    other._modules = {**model._modules, **parts.requires_grad_(False).eval()._modules}
    return other


def save_dynamic_tokenizer(
    model: DynamicTokenizer,
    folder: str | Path,
    understanding: DynamicTokenizer | None = None,
    shared_encoder: tuple[str | Path, str] | None = None,
) -> Path:
    """Write our own folder, without training state. Token merger and projector of `understanding` go into a file of
    their own; a vision encoder in `shared_encoder` (file, prefix of its names) is referred to, not stored again."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    left_out = ("quantize.ema_", *((ENCODER,) if shared_encoder else ()))
    if shared_encoder:
        write_encoder_link(place, *shared_encoder)
    save_state_dict(
        {
            name: value
            for name, value in model.state_dict().items()
            if not name.startswith(left_out)
        },
        place / WEIGHTS,
    )
    if understanding is not None:
        save_state_dict(visual_weight_state(understanding), place / VISUAL_WEIGHT_FILES[0])
    sizes = {"model_type": model.model_type, **asdict(model.config)}
    replace_text(place / CONFIG, json.dumps(sizes, indent=2) + "\n")
    return place


def visual_weight_state(model: DynamicTokenizer) -> State:
    """Tensors of `visual_weight`: the token merger and the projector."""
    return {name: value for name, value in model.state_dict().items() if name.startswith(READER)}
