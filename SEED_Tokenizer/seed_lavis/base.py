"""Base of the LAVIS models: sizes from the YAML, initial weights, the vision encoder's precision.

A model is both LAVIS's `BaseModel` and the library's class, so its parameter names are the original
ones. `forward` takes LAVIS's `samples` (a mapping with `image` and `caption`) and returns a mapping
with `loss`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from seed_lavis import log
from seed_lavis.compat import BaseModel
from seed_lavis.options import APPLICATION, ModelOptions, locate
from seed_multimodal.device import DTYPES, autocast
from seed_multimodal.errors import ConfigError
from seed_multimodal.models.seed.checkpoints import load_vision
from seed_multimodal.models.seed.losses import clip_preprocessing
from seed_multimodal.nn.layers import cast_layers, checkpoint_layers
from seed_multimodal.nn.vision.clip import load_clip_vision
from seed_multimodal.nn.vision.eva import EvaConfig
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
    reads_captions = True
    contrasts = False  # an image with those of the other images in its batch
    vision_file = ""  # empty: the vision encoder is in a checkpoint, or random
    clip_model: CLIPVisionModelWithProjection | None  # computes the target embeddings
    shares_encoder = False  # with the target CLIP: computed once
    # Of the last `forward`: the losses in training, and the codes.
    latest: Mapping[str, Tensor] = MappingProxyType({})
    codes: Tensor | None = None

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | DictConfig) -> SeedModel:
        """LAVIS's constructor: sizes and initial weights from the section `model` of the YAML."""
        model: Any = cls(read_settings(cls.options_type, cfg, "model"))
        if getattr(model.options, "ema_decay", None) is not None:
            # Updated without gradient; counts as trained, so that it is saved.
            model.quantize.embedding.weight.requires_grad_(True)
        model.load_initial()
        return model

    def load_initial(self) -> None:
        """Load the weights with which a stage starts.

        These are the stage before (`pretrained`), the vision encoder (`vit_weights`) unless that
        has one, and a checkpoint of the same stage (`finetuned`).
        """
        options = self.options

        # 1. The stage before.
        has_vision = False
        if options.load_pretrained:
            has_vision = self.load_stage_before()
        else:
            log(f"model.load_pretrained is false: {self.stage} starts at random weights.")

        # 2. The vision encoder.
        vit_weights = options.vit_weights or self.visual_encoder.config.default_weights
        if vit_weights and not has_vision:
            self.vision_file = locate(vit_weights)
            load_vision(self.visual_encoder, self.vision_file, log)
        elif options.freeze_vit and options.load_pretrained and not has_vision:
            raise ConfigError(
                f"The frozen vision encoder has no weights: give its file as model.vit_weights "
                f"({download_advice('tokenizer')}), or start at random with "
                "model.load_pretrained=False."
            )

        # 3. The same stage.
        if options.load_finetuned:
            file = locate(str(options.finetuned))
            report = assign_strictly(
                self, load_state_dict(file), file, allow_missing=frozen_names(self), foreign=True
            )
            log(report.describe())

        # 4. The target CLIP may be the vision encoder, which then runs once.
        clip = getattr(self, "clip_model", None)
        vision = self.visual_encoder.config
        if clip is not None and options.freeze_vit and isinstance(vision, EvaConfig):
            is_same_folder = self.vision_file == locate(options.clip_model)
            sizes = (vision.pre_norm, vision.depth, vision.image_size)
            clip_sizes = (True, clip.config.num_hidden_layers, clip.config.image_size)
            self.shares_encoder = is_same_folder and sizes == clip_sizes

    def load_stage_before(self) -> bool:
        """Load `pretrained`; returns whether it has the vision encoder, too."""
        return False

    def place(self, device: torch.device) -> SeedModel:
        """Move to `device` in the configured precisions, after loading; compile if configured."""
        self.to(device)
        if self.options.freeze_vit:
            cast_layers(self.visual_encoder, DTYPES[self.vit_precision])
        for name in ("clip_model", "text_encoder"):
            target = getattr(self, name, None)
            if target is not None:
                target.to(DTYPES[frozen_precision(self.options.clip_precision, device)])
        if self.options.use_grad_checkpoint:
            checkpoint_layers(self)
        if self.options.compile:
            for name in ("visual_encoder", "Qformer", "Reverse_Qformer"):
                if hasattr(self, name):
                    getattr(self, name).compile()
        return self

    @property
    def vit_precision(self) -> str:
        """In which the vision encoder computes."""
        return frozen_precision(self.options.vit_precision, self.device)

    def vit_features(self, images: Tensor) -> Tensor:
        """As the library's, in `vit_precision`."""
        with autocast(images.device, self.vit_precision):
            return self.visual_encoder(images).float()

    def features_and_target(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pixels → output of the vision encoder `[B, N, W]`, and the target embedding `[B, E]`.

        The target is the encoder's own feature, or that of the CLIP, if there is one.
        """
        # 1. The encoder's own.
        if self.options.alignment_target == "encoder":
            with autocast(images.device, self.vit_precision):
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

    def with_log(
        self, loss: Tensor, codes: Tensor | None = None, **losses: Tensor | None
    ) -> dict[str, Tensor]:
        """LAVIS's output mapping; stores the losses of a training batch for the log, and codes."""
        values = {name: value.detach() for name, value in losses.items() if value is not None}
        self.codes = codes
        if self.training:
            self.latest = values
        return {"loss": loss, **values}


def clip_target(source: str | None, width: int | None) -> CLIPVisionModelWithProjection:
    """The frozen CLIP vision encoder whose embeddings are the target.

    width: of the embeddings; None: any.
    """
    if not source:
        raise ConfigError("The target embedding needs a CLIP folder: give it as model.clip_model.")
    clip = load_clip_vision(locate(source), log=log)
    if width not in (None, clip.config.projection_dim):
        raise ConfigError(
            f"model.clip_model: {source} has embeddings {clip.config.projection_dim} wide, not "
            f"{width}."
        )
    return clip


def frozen_precision(precision: str, device: torch.device) -> str:
    """The precision of a frozen model; on a CPU fp32 instead of the slow fp16."""
    return "fp32" if precision == "fp16" and device.type != "cuda" else precision
