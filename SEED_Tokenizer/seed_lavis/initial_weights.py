"""Initial weights of each stage, through the library's checked loaders; one log line for each file.

Stage 1: BLIP-2's Q-Former (`pretrained`) and the vision encoder (`vit_weights`, EVA's file or a CLIP folder). Stage 2:
a stage-1 checkpoint (`pretrained`), the vision encoder if that left it out, and the CLIP of the target.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seed_lavis import log
from seed_lavis.options import Stage2Options, locate
from seed_multimodal.device import DTYPES
from seed_multimodal.diffusion.layout import LabelHeads
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.nn.eva import eva_from_clip
from seed_multimodal.seed.checkpoints import VISION, VISION_URL, load_blip2, load_clip_vision, load_vision
from seed_multimodal.training.label_heads import load_label_heads
from seed_multimodal.weights import assign_strictly, load_state_dict


def load_initial(model: Any) -> None:
    """Load the files that a model's options name.

    Raises:
        CheckpointError: a file that is missing, damaged, of another model or size. ConfigError: a file that is needed
            is not named.
    """
    options, has_vision = model.options, False
    if not options.load_pretrained:
        log(f"model.load_pretrained is false: {model.stage} starts at random weights.")
    elif model.stage in ("stage2", "seed1-stage2"):
        has_vision = _load_stage1(model)
    elif model.stage == "stage1" and options.pretrained:
        load_blip2(model, locate(options.pretrained), log)
    if options.vit_weights and not has_vision:
        model.vision_file = locate(options.vit_weights)
        load_vision(model.visual_encoder, model.vision_file, log)
    elif options.freeze_vit and options.load_pretrained and not has_vision:
        raise ConfigError(f"The frozen vision encoder has no weights: give its file as model.vit_weights (download "
                          f"{VISION_URL}), or start at random with model.load_pretrained=False.")
    if options.load_finetuned:
        if not options.finetuned:
            raise ConfigError("model.load_finetuned is true, but model.finetuned names no checkpoint.")
        file = locate(options.finetuned)
        log(str(assign_strictly(model, load_state_dict(file), file, allow_missing=sorted(frozen_names(model)),
                                foreign=True)))
    clip = getattr(model, "clip", None) or getattr(model, "clip_model", None)
    model.shares_encoder = options.freeze_vit and is_encoder_of(model.visual_encoder, clip)


def _load_stage1(model: Any) -> bool:
    """Start stage 2 from a stage-1 checkpoint; returns whether that holds the vision encoder."""
    if not model.options.pretrained:
        raise ConfigError("model.pretrained is not given: stage 2 starts from a stage-1 checkpoint (or at random with "
                          "model.load_pretrained=False).")
    file = locate(model.options.pretrained)
    if not Path(file).is_file():
        raise CheckpointError(f"{file}: there is no such stage-1 checkpoint; train stage 1 first "
                              "(sh train_scripts/causal_qformer.sh), or give model.pretrained=FILE.")
    state = load_state_dict(file)
    report = model.load_stage1(state, file)
    log(f"{file}: {len(report.loaded)} tensors loaded into the encoder.")
    return any(name.startswith(f"{VISION}blocks") for name in state)


def frozen_names(model: nn.Module) -> set[str]:
    """Parameters that are not trained, so not part of a training checkpoint."""
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}


def is_encoder_of(vision: nn.Module, clip: Any) -> bool:
    """Whether a vision encoder computes what that of a CLIP does, by its sizes and weights."""
    if clip is None or not vision.config.pre_norm or vision.config.depth != clip.config.num_hidden_layers:
        return False
    theirs = eva_from_clip(clip.state_dict(), vision.config)
    return all(value.shape == theirs[name].shape and torch.equal(value, theirs[name].to(value))
               for name, value in vision.state_dict().items())


def clip_target(source: str | None, precision: str, width: int | None) -> Any:
    """The frozen CLIP vision encoder whose embeddings, `width` wide, are the target; fp16 only where there is a GPU."""
    if not source:
        raise ConfigError("The target embedding needs a CLIP folder: give it as model.clip_model.")
    clip = load_clip_vision(locate(source), dtype=frozen_dtype(precision), log=log)
    if width not in (None, clip.config.projection_dim):
        raise ConfigError(f"The YAML says that image embeddings are {width} wide (model.image_features_dim, or "
                          f"embedding_dim in stage 1), but those of {source} are {clip.config.projection_dim} wide.")
    return clip


def frozen_dtype(precision: str) -> torch.dtype:
    """The precision of a frozen target model."""
    return torch.float32 if precision == "fp16" and not torch.cuda.is_available() else DTYPES[precision]


def target_embeddings(clip: Any, images: Tensor, vit: Tensor | None = None) -> Tensor:
    """Pixels → image embeddings `[B, E]` of the frozen CLIP, in its own precision, without gradient; with the output
    `vit` `[B, N, W]` of its vision encoder they are only projected."""
    dtype = next(clip.parameters()).dtype
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        if vit is None:
            return clip(images.to(dtype)).image_embeds.float()
        return clip.visual_projection(clip.vision_model.post_layernorm(vit[:, 0].to(dtype))).float()


def label_heads(options: Stage2Options) -> LabelHeads:
    """The frozen classifiers of `model.label_heads`."""
    if not options.label_heads:
        raise ConfigError("model.label_weight needs the heads: give their safetensors file as model.label_heads.")
    heads = load_label_heads(file := locate(options.label_heads))
    if heads.width != options.image_features_dim:
        raise CheckpointError(f"{file}: its heads read embeddings {heads.width} wide, model.image_features_dim is "
                              f"{options.image_features_dim}.")
    return heads


def readout_matrix(path: str) -> Tensor:
    """`[M, E]` from a safetensors file with one tensor: a linear read-out of image embeddings."""
    return next(iter(load_state_dict(locate(path)).values())).float()
