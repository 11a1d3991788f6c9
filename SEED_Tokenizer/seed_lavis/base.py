"""Base of the LAVIS models: sizes from the YAML, initial weights, precision of the frozen vision encoder.

A model is both LAVIS's `BaseModel` and the library's own class, so its parameter names are the original ones.
`forward` takes LAVIS's `samples` (a mapping with `image` and `caption`) and returns a mapping with `loss`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from seed_lavis import log
from seed_lavis.compat import BaseModel
from seed_lavis.options import APPLICATION, CodebookOptions, ModelOptions, locate
from seed_multimodal.device import DTYPES
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.nn.eva import EvaConfig, eva_from_clip
from seed_multimodal.nn.layers import cast_layers, checkpoint_layers
from seed_multimodal.seed.checkpoints import (
    VISION,
    VISION_URL,
    load_blip2,
    load_clip_vision,
    load_vision,
)
from seed_multimodal.seed.configuration import QFormerConfig
from seed_multimodal.settings import read_settings
from seed_multimodal.training.checkpoint import frozen_names
from seed_multimodal.weights import assign_strictly, load_state_dict


class SeedModel(BaseModel):
    """Mixin before the library's class. `stage`: prefix of training files; `latest`: numbers of the last `forward`;
    `companions`: frozen modules outside of the model."""

    PRETRAINED_MODEL_CONFIG_DICT = {
        "pretrain": str(APPLICATION / "lavis/configs/models/blip2/blip2_pretrain.yaml")
    }
    stage = ""
    options_type: type[ModelOptions] = ModelOptions
    options: ModelOptions
    latest: Mapping[str, Tensor] = MappingProxyType({})
    companions: tuple[str, ...] = ()
    reads_captions = True
    vision_file = ""  # empty: the vision encoder is in a checkpoint, or random
    shares_encoder = False  # with the target CLIP: computed once

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | DictConfig) -> SeedModel:
        """LAVIS's constructor: sizes and initial weights from the section `model` of the YAML."""
        model = cls(read_settings(cls.options_type, cfg, "model"))
        load_initial(model)
        return model

    def place(self, device: torch.device) -> SeedModel:
        """Move to `device` in the configured precisions, after loading all weights; then compile if configured."""
        for module in (self, *(getattr(self, name) for name in self.companions)):
            if module is not None:
                module.to(device)
        if self.options.freeze_vit:
            cast_layers(self.visual_encoder, self.vision_dtype(device))
        if self.options.use_grad_checkpoint:
            checkpoint_layers(self)
        for part in (
            ("visual_encoder", "Qformer", "Reverse_Qformer") if self.options.compile else ()
        ):
            if hasattr(self, part):
                getattr(self, part).compile()
        return self

    def vision_dtype(self, device: torch.device) -> torch.dtype:
        """The frozen vision encoder's precision; on a CPU fp32 instead of the slow fp16."""
        dtype = DTYPES[self.options.vit_precision]
        return torch.float32 if device.type != "cuda" and dtype == torch.float16 else dtype

    def encode_vision(self, images: Tensor) -> Tensor:
        """Pixels `[B, 3, S, S]` → output of the vision encoder `[B, N, W]`, computed in `vit_precision`."""
        dtype = self.vision_dtype(images.device)
        if dtype == torch.float32:
            return self.visual_encoder(images)
        with torch.autocast(images.device.type, dtype):
            return self.visual_encoder(images).float()

    def with_log(self, loss: Tensor, **numbers: Tensor | None) -> dict[str, Tensor]:
        """LAVIS's output mapping; keeps the numbers for the log."""
        self.latest = {name: value.detach() for name, value in numbers.items() if value is not None}
        return {"loss": loss, **self.latest}


class CodebookMixin:
    """Interface of stage-2 models to `CodebookTask`: codes and features of the last batch."""

    options: CodebookOptions
    use_codes = True
    codes: Tensor | None = None
    features: Tensor | None = None

    def prepare_codebook(self) -> None:
        """Count a moving-average codebook as trained, so that it is saved."""
        if self.options.ema_decay is not None:
            self.quantize.embedding.weight.requires_grad_(True)  # type: ignore[attr-defined]

    @property
    def skips_parameters(self) -> bool:
        """Whether some trained parameters get no gradient in some steps (an option of DistributedDataParallel)."""
        return self.options.ema_decay is not None or self.options.codebook_warmup > 0

    def encoder_output(self, images: Tensor | None, vit_features: Tensor | None = None) -> Tensor:
        """As the library's, with the vision encoder in `vit_precision`."""
        if vit_features is None:
            with torch.no_grad():
                vit_features = self.encode_vision(images)  # type: ignore[attr-defined]
        return super().encoder_output(None, vit_features)  # type: ignore[misc]

    def codebook_points(self, batch: Mapping[str, Any]) -> Tensor:
        """Features of a batch before the quantizer `[B, 32, d]`."""
        return self.encode_task_layer(self.encoder_output(batch["image"]))  # type: ignore[attr-defined]

    def keep_codes(self, pre_quant: Tensor, indices: Tensor | None) -> None:
        """Store the last batch's codes and features."""
        self.features, self.codes = pre_quant.detach().float(), indices


def stage2_sizes(options: CodebookOptions) -> dict[str, Any]:
    """Sizes in the configurations of both stage-2 models."""
    shared = (
        "decode_depth",
        "decode_heads",
        "reverse_depth",
        "normalize_codes",
        "codebook_sections",
    )
    return {
        "vit": vit_sizes(options),
        "qformer": qformer_sizes(options),
        "num_query": options.num_query_token,
        "codebook_size": options.n_embed,
        "codebook_dim": options.codebook_embed_dim,
        **{name: getattr(options, name) for name in shared},
    }


def stage2_training(options: CodebookOptions) -> dict[str, Any]:
    """Common training options of both stage-2 models, without loss weights and targets."""
    names = ("freeze_qformer", "frozen_dropout", "corrupt", "nested", "ema_decay")
    return {name: getattr(options, name) for name in names}


def vit_sizes(options: ModelOptions) -> EvaConfig:
    """The vision encoder's sizes; `vit` of the YAML overrides single ones."""
    return read_settings(EvaConfig, {"image_size": options.image_size, **options.vit}, "model.vit")


def qformer_sizes(options: ModelOptions) -> QFormerConfig:
    """The Q-Former's sizes; `qformer` of the YAML overrides single ones."""
    changes = {"cross_attention_freq": options.cross_attention_freq, **options.qformer}
    return read_settings(QFormerConfig, changes, "model.qformer")


# ---- initial weights


def load_initial(model: Any) -> None:
    """Load BLIP-2's Q-Former or a stage-1 checkpoint (`pretrained`), the vision encoder (`vit_weights`) where that has
    none, and a checkpoint of the same stage (`finetuned`)."""
    options, has_vision = model.options, False
    if not options.load_pretrained:
        log(f"model.load_pretrained is false: {model.stage} starts at random weights.")
    elif model.stage in ("stage2", "seed1-stage2"):
        file = locate(str(options.pretrained))
        if not Path(file).is_file():
            raise CheckpointError(
                f"{file}: no such stage-1 checkpoint; train stage 1 first "
                "(sh train_scripts/causal_qformer.sh), or give model.pretrained=FILE."
            )
        state = load_state_dict(file)
        has_vision = any(name.startswith(f"{VISION}blocks") for name in state)
        log(
            f"{file}: {len(model.load_stage1(state, file).loaded)} tensors loaded into the encoder."
        )
    elif model.stage == "stage1" and options.pretrained:
        load_blip2(model, locate(options.pretrained), log)
    if options.vit_weights and not has_vision:
        model.vision_file = locate(options.vit_weights)
        load_vision(model.visual_encoder, model.vision_file, log)
    elif options.freeze_vit and options.load_pretrained and not has_vision:
        raise ConfigError(
            f"The frozen vision encoder has no weights: give its file as model.vit_weights (download "
            f"{VISION_URL}), or start at random with model.load_pretrained=False."
        )
    if options.load_finetuned:
        file = locate(str(options.finetuned))
        log(
            assign_strictly(
                model, load_state_dict(file), file, allow_missing=frozen_names(model), foreign=True
            ).describe()
        )
    clip = getattr(model, "clip", None) or getattr(model, "clip_model", None)
    model.shares_encoder = options.freeze_vit and is_encoder_of(model.visual_encoder, clip)


def is_encoder_of(vision: nn.Module, clip: Any) -> bool:
    """Whether a vision encoder computes what that of a CLIP does, by its sizes and weights."""
    if (
        clip is None
        or not vision.config.pre_norm
        or vision.config.depth != clip.config.num_hidden_layers
    ):
        return False
    theirs = eva_from_clip(clip.state_dict(), vision.config)
    return all(
        value.shape == theirs[name].shape and torch.equal(value, theirs[name].to(value))
        for name, value in vision.state_dict().items()
    )


def clip_target(source: str | None, precision: str, width: int | None) -> Any:
    """The frozen CLIP vision encoder whose embeddings, `width` wide, are the target; fp16 only where there is a GPU."""
    if not source:
        raise ConfigError("The target embedding needs a CLIP folder: give it as model.clip_model.")
    clip = load_clip_vision(locate(source), dtype=frozen_dtype(precision), log=log)
    if width not in (None, clip.config.projection_dim):
        raise ConfigError(
            f"model.clip_model: {source} has embeddings {clip.config.projection_dim} wide, not {width}."
        )
    return clip


def frozen_dtype(precision: str) -> torch.dtype:
    """The precision of a frozen target model."""
    return (
        torch.float32
        if precision == "fp16" and not torch.cuda.is_available()
        else DTYPES[precision]
    )


def target_embeddings(clip: Any, images: Tensor, vit: Tensor | None = None) -> Tensor:
    """Pixels → image embeddings `[B, E]` of the frozen CLIP, in its own precision, without gradient; with the output
    `vit` `[B, N, W]` of its vision encoder they are only projected."""
    dtype = next(clip.parameters()).dtype
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        if vit is None:
            return clip(images.to(dtype)).image_embeds.float()
        return clip.visual_projection(clip.vision_model.post_layernorm(vit[:, 0].to(dtype))).float()
