"""Initial weights of each stage, through the library's checked loaders; one log line for each file.

Stage 1: BLIP-2's Q-Former (`pretrained`) and the EVA tower (`vit_weights`). Stage 2: a stage-1 checkpoint
(`pretrained`), the tower if that left it out, and the CLIP target. `load_pretrained: False` starts at random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seed_lavis.base import frozen_names
from seed_lavis.log import log
from seed_lavis.options import Stage2Options, locate
from seed_multimodal.device import DTYPES
from seed_multimodal.diffusion.layout import LabelHeads
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.nn.eva import eva_from_clip
from seed_multimodal.seed.checkpoints import VISION, VISION_URL, load_blip2, load_clip_vision, load_vision
from seed_multimodal.weights import assign_strictly, load_state_dict

WITHOUT_TOWER = (f"give its file as model.vit_weights (download {VISION_URL}), train it (model.freeze_vit=False), or "
                 "start at random with model.load_pretrained=False")


def start_stage1(model: Any) -> None:
    """Load the initial weights that the options of a stage-1 model name.

    Raises:
        CheckpointError: a file that is not there, damaged, of another model or size.
        ConfigError: a frozen tower without weights.
    """
    options = model.options
    if options.load_pretrained and options.pretrained:
        load_blip2(model, locate(options.pretrained), log)
    elif not options.load_pretrained:
        log("model.load_pretrained is false: the Q-Former starts at random weights.")
    if options.vit_weights:
        load_tower(model, options.vit_weights)
    elif options.freeze_vit and options.load_pretrained:
        raise ConfigError(f"model.freeze_vit is true, but the vision tower has no weights: {WITHOUT_TOWER}.")
    load_finetuned(model)
    model.shares_tower = is_tower_of(model.visual_encoder, model.clip) and options.freeze_vit


def start_stage2(model: Any) -> None:
    """Load the initial weights of a stage-2 model (SEED-2's or SEED-1's); errors as `start_stage1`."""
    options = model.options
    if options.load_pretrained:
        if not options.pretrained:
            raise ConfigError("model.pretrained is not given: stage 2 starts from a stage-1 checkpoint "
                              "(or at random with model.load_pretrained=False).")
        file = locate(options.pretrained)
        if not Path(file).is_file():
            raise CheckpointError(f"{file}: there is no such stage-1 checkpoint; train stage 1 first "
                                  "(sh train_scripts/causal_qformer.sh), or give model.pretrained=FILE.")
        state = load_state_dict(file)
        report = model.load_stage1(state, file)
        log(f"{file}: {len(report.loaded)} tensors loaded into the encoder.")
        if not any(name.startswith(f"{VISION}blocks") for name in state):
            if not options.vit_weights:
                raise ConfigError(f"{file} holds no vision tower: {WITHOUT_TOWER}.")
            load_tower(model, options.vit_weights)
    else:
        log("model.load_pretrained is false: stage 2 starts at random weights.")
        if options.vit_weights:
            load_tower(model, options.vit_weights)
    load_finetuned(model)
    model.shares_tower = is_tower_of(model.visual_encoder, getattr(model, "clip_model", None))


def load_finetuned(model: Any) -> None:
    """With `load_finetuned`, a checkpoint of the same stage on top of the initial weights."""
    options = model.options
    if not options.load_finetuned:
        return
    if not options.finetuned:
        raise ConfigError("model.load_finetuned is true, but model.finetuned names no checkpoint.")
    file = locate(options.finetuned)
    log(str(assign_strictly(model, load_state_dict(file), file, allow_missing=sorted(frozen_names(model)),
                            foreign=True)))


def load_tower(model: Any, source: str) -> None:
    """The tower's weights from a file or folder that the YAML names."""
    model.vision_file = locate(source)
    load_vision(model.visual_encoder, model.vision_file, log)


def is_tower_of(tower: nn.Module, clip: Any) -> bool:
    """Whether a vision tower computes what that of a CLIP does, by its sizes and weights."""
    if clip is None or not tower.config.pre_norm or tower.config.depth != clip.config.num_hidden_layers:
        return False
    theirs, own = eva_from_clip(clip.state_dict(), tower.config), tower.state_dict()
    return all(value.shape == theirs[name].shape and torch.equal(value, theirs[name].to(value))
               for name, value in own.items())


def clip_target(source: str | None, precision: str, wanted_by: str) -> Any:
    """The frozen CLIP vision tower whose embeddings are the target; fp16 only where there is a GPU."""
    if not source:
        raise ConfigError(f"{wanted_by} needs the target tower: give a CLIP folder as model.clip_model.")
    dtype = DTYPES[precision]
    if dtype == torch.float16 and not torch.cuda.is_available():
        dtype = torch.float32
    return load_clip_vision(locate(source), dtype=dtype, log=log)


def label_heads(options: Stage2Options) -> LabelHeads:
    """The heads of `model.label_heads`.

    Raises:
        ConfigError: no file is given. CheckpointError: it holds no heads, or heads on embeddings of another width.
    """
    if not options.label_heads:
        raise ConfigError("model.label_weight needs the heads: give their safetensors file as model.label_heads.")
    file = locate(options.label_heads)
    heads = LabelHeads.load(file)
    if heads.width != options.image_features_dim:
        raise CheckpointError(f"{file}: its heads read embeddings {heads.width} wide, model.image_features_dim is "
                              f"{options.image_features_dim}.")
    return heads


def readout_matrix(path: str, width: int) -> Tensor:
    """`[M, width]` from a safetensors file with one tensor: a linear read-out of image embeddings."""
    file = locate(path)
    tensors = load_state_dict(file)
    matrix = next(iter(tensors.values()))
    if len(tensors) != 1 or matrix.ndim != 2 or matrix.shape[1] != width:
        raise CheckpointError(f"{file}: must hold one matrix with {width} columns (the embedding's width), it holds "
                              f"{', '.join(f'{name} {tuple(value.shape)}' for name, value in tensors.items())}.")
    return matrix.float()
