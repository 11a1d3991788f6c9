"""Base of the LAVIS models: sizes from the YAML, initial weights, the vision encoder's precision.

A model is both LAVIS's `BaseModel` and the library's class, so its parameter names are the original
ones. `forward` takes LAVIS's `samples` (a mapping with `image` and `caption`) and returns a mapping
with `loss`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from seed_lavis import log
from seed_lavis.compat import BaseModel
from seed_lavis.options import (
    APPLICATION,
    CodebookOptions,
    ModelOptions,
    locate,
    vit_sizes,
    with_derived,
)
from seed_multimodal.device import DTYPES
from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.models.seed.checkpoints import (
    VISION,
    load_blip2,
    load_vision,
)
from seed_multimodal.models.seed.configuration import QFormerConfig, TokenizerConfig
from seed_multimodal.models.seed.losses import Stage2TrainingOptions, clip_preprocessing
from seed_multimodal.nn.layers import cast_layers, checkpoint_layers
from seed_multimodal.nn.vision.base import VisionEncoder
from seed_multimodal.nn.vision.clip import eva_from_clip, load_clip_vision
from seed_multimodal.nn.vision.eva import EvaVit
from seed_multimodal.settings import read_settings
from seed_multimodal.state_dicts import assign_strictly, load_state_dict
from seed_multimodal.training.task import frozen_names
from seed_multimodal.weights.catalogue import download_advice

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection


class SeedModel(BaseModel):
    """Mixin before the library's class."""

    PRETRAINED_MODEL_CONFIG_DICT = {
        "pretrain": str(APPLICATION / "lavis/configs/models/blip2/blip2_pretrain.yaml")
    }
    stage = ""  # prefix of training files
    options_type: type[ModelOptions] = ModelOptions
    options: ModelOptions
    latest: Mapping[str, Tensor] = MappingProxyType({})  # losses of the last `forward`
    reads_captions = True
    contrasts = False  # an image with those of the other images in its batch
    vision_file = ""  # empty: the vision encoder is in a checkpoint, or random
    clip_model: CLIPVisionModelWithProjection | None  # whose image embeddings are the target
    shares_encoder = False  # with the target CLIP: computed once

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | DictConfig) -> SeedModel:
        """LAVIS's constructor: sizes and initial weights from the section `model` of the YAML."""
        model: Any = cls(read_settings(cls.options_type, cfg, "model"))
        if getattr(model.options, "ema_decay", None) is not None:
            # Updated without gradient; counts as trained, so that it is saved.
            model.quantize.embedding.weight.requires_grad_(True)
        load_initial(model)
        return model

    def place(self, device: torch.device) -> SeedModel:
        """Move to `device` in the configured precisions, after loading; compile if configured."""
        self.to(device)
        if self.options.freeze_vit:
            dtype = frozen_dtype(self.options.vit_precision, device.type == "cuda")
            cast_layers(self.visual_encoder, dtype)
        if self.options.use_grad_checkpoint:
            checkpoint_layers(self)
        if self.options.compile:
            for name in ("visual_encoder", "Qformer", "Reverse_Qformer"):
                if hasattr(self, name):
                    getattr(self, name).compile()
        return self

    def vit_autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Context in which the vision encoder computes in `vit_precision`."""
        dtype = frozen_dtype(self.options.vit_precision, device.type == "cuda")
        return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)

    def vit_features(self, images: Tensor) -> Tensor:
        """As the library's, in `vit_precision`."""
        with self.vit_autocast(images.device):
            return self.visual_encoder(images).float()

    def features_and_target(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pixels → output of the vision encoder `[B, N, W]`, and the target embedding `[B, E]`.

        The target is the encoder's own feature, or that of the CLIP, if there is one.
        """
        # 1. The encoder's own.
        if self.options.alignment_target == "encoder":
            with self.vit_autocast(images.device):
                features, pooled = self.visual_encoder.features_and_pooled(images)
            return features.float(), pooled.detach().float()

        # 2. The CLIP's, in its precision.
        features = self.vit_features(images)
        clip = self.clip_model
        if clip is None:
            return features, None
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            if self.shares_encoder:
                pooled = clip.vision_model.post_layernorm(features[:, 0].to(clip.dtype))
                target = clip.visual_projection(pooled)
            else:
                preprocessing = self.visual_encoder.preprocessing
                pixels = preprocessing.convert(images, clip_preprocessing(clip))
                target = clip(pixels.to(clip.dtype)).image_embeds
        return features, target.float()

    def with_log(self, loss: Tensor, **losses: Tensor | None) -> dict[str, Tensor]:
        """LAVIS's output mapping; stores the losses of a training batch for the log."""
        values = {name: value.detach() for name, value in losses.items() if value is not None}
        if self.training:
            self.latest = values
        return {"loss": loss, **values}


class CodebookMixin:
    """Interface of stage-2 models to `CodebookTask`."""

    options: CodebookOptions
    use_codes = True

    @property
    def skips_parameters(self) -> bool:
        """Whether some trained parameters get no gradient in some steps (an option of DDP)."""
        return self.options.ema_decay is not None or self.options.codebook_warmup > 0

    def codebook_points(self, batch: Mapping[str, Any]) -> Tensor:
        """Features of a batch before the quantizer `[B, 32, d]`."""
        return self.pre_quant(batch["image"])  # type: ignore[attr-defined]


def stage2_sizes(options: CodebookOptions) -> dict[str, Any]:
    """Sizes in the configurations of both stage-2 models."""
    return {
        "vit": vit_sizes(options),
        "qformer": qformer_sizes(options),
        "num_query": options.num_query_token,
        "codebook_size": options.n_embed,
        "codebook_dim": options.codebook_embed_dim,
        "decode_depth": options.decode_depth,
        "decode_heads": options.decode_heads,
        "reverse_depth": options.reverse_depth,
        "normalize_codes": options.normalize_codes,
        "codebook_sections": options.codebook_sections,
    }


def stage2_training(options: CodebookOptions) -> Stage2TrainingOptions:
    """Common training options of both stage-2 models, without loss weights and targets."""
    return {
        "ema_decay": options.ema_decay,
        "freeze_qformer": options.freeze_qformer,
        "frozen_dropout": options.frozen_dropout,
        "corrupt": options.corrupt,
        "nested": options.nested,
    }


def qformer_sizes(options: ModelOptions) -> QFormerConfig:
    """The Q-Former's sizes; `qformer` of the YAML overrides some of them."""
    values = {"cross_attention_freq": options.cross_attention_freq, **options.qformer}
    if values.get("causal_queries") != 0:  # 0: not causal
        values = with_derived(values, {"causal_queries": options.num_query_token}, "model.qformer")
    return read_settings(QFormerConfig, values, "model.qformer")


def check_stage1_sizes(file: str, config: TokenizerConfig) -> None:
    """Raise ConfigError if stage 1 had other sizes that no tensor's shape shows."""
    stage1_config = Path(file).with_name("config.json")
    if not stage1_config.is_file():
        return
    stage1 = read_json_object(stage1_config)
    stage2 = config.to_dict()
    for part, key in (("qformer", "heads"), ("qformer", "causal_queries"), ("vit", "heads")):
        trained, wanted = (sizes.get(part, {}).get(key) for sizes in (stage1, stage2))
        if trained != wanted:
            raise ConfigError(
                f"model.{part}.{key} is {wanted}, but {file} was trained with {trained}."
            )


# ---- initial weights


def load_initial(model: Any) -> None:
    """Load the weights with which a stage starts.

    These are BLIP-2's Q-Former or a stage-1 checkpoint (`pretrained`), the vision encoder
    (`vit_weights`) unless that has one, and a checkpoint of the same stage (`finetuned`).
    """
    options = model.options

    # 1. The stage before.
    has_vision = False
    if not options.load_pretrained:
        log(f"model.load_pretrained is false: {model.stage} starts at random weights.")
    elif model.stage in ("stage2", "seed1-stage2"):
        file = locate(str(options.pretrained))
        if not Path(file).is_file():
            raise CheckpointError(
                f"{file}: no such stage-1 checkpoint; train stage 1 first "
                "(sh train_scripts/causal_qformer.sh), or give model.pretrained=FILE."
            )
        check_stage1_sizes(file, model.config)
        state = load_state_dict(file)
        has_vision = any(name.startswith(VISION) for name in state)
        report = model.load_stage1(state, file)
        log(f"{file}: {len(report.loaded)} tensors loaded into the encoder.")
    elif model.stage == "stage1" and options.pretrained:
        load_blip2(model, locate(options.pretrained), log)

    # 2. The vision encoder.
    vit_weights = options.vit_weights or model.visual_encoder.config.default_weights
    if vit_weights and not has_vision:
        model.vision_file = locate(vit_weights)
        load_vision(model.visual_encoder, model.vision_file, log)
    elif options.freeze_vit and options.load_pretrained and not has_vision:
        raise ConfigError(
            f"The frozen vision encoder has no weights: give its file as model.vit_weights "
            f"({download_advice('tokenizer')}), or start at random with "
            "model.load_pretrained=False."
        )

    # 3. The same stage.
    if options.load_finetuned:
        file = locate(str(options.finetuned))
        state = load_state_dict(file)
        report = assign_strictly(
            model, state, file, allow_missing=frozen_names(model), foreign=True
        )
        log(report.describe())

    # 4. The target CLIP may have the same vision encoder, which then runs once.
    clip = getattr(model, "clip_model", None)
    model.shares_encoder = options.freeze_vit and is_encoder_of(model.visual_encoder, clip)


def is_encoder_of(vision: VisionEncoder, clip: CLIPVisionModelWithProjection | None) -> bool:
    """Whether a vision encoder is EVA's network with the sizes and weights of a CLIP's."""
    if clip is None or not isinstance(vision, EvaVit):
        return False
    config = vision.config
    if not config.pre_norm or config.depth != clip.config.num_hidden_layers:
        return False
    clip_weights = eva_from_clip(clip.state_dict(), config.depth)
    for name, value in vision.state_dict().items():
        clip_value = clip_weights[name]
        if value.shape != clip_value.shape or not torch.equal(value, clip_value.to(value)):
            return False
    return True


def clip_target(
    source: str | None, precision: str, width: int | None
) -> CLIPVisionModelWithProjection:
    """The frozen CLIP vision encoder whose embeddings are the target.

    width: of the embeddings; None: any.
    """
    if not source:
        raise ConfigError("The target embedding needs a CLIP folder: give it as model.clip_model.")
    dtype = frozen_dtype(precision, torch.cuda.is_available())
    clip = load_clip_vision(locate(source), dtype=dtype, log=log)
    if width not in (None, clip.config.projection_dim):
        raise ConfigError(
            f"model.clip_model: {source} has embeddings {clip.config.projection_dim} wide, not "
            f"{width}."
        )
    return clip


def frozen_dtype(precision: str, on_gpu: bool) -> torch.dtype:
    """The precision of a frozen model; on a CPU fp32 instead of the slow fp16."""
    return torch.float32 if precision == "fp16" and not on_gpu else DTYPES[precision]
