"""Base of our LAVIS models: sizes from the YAML, precision of the frozen tower, placing, numbers to log.

A model is both LAVIS's `BaseModel` and the library's own class, so its parameter names are the released ones.
`forward` takes LAVIS's `samples` (a mapping with `image` and `caption`) and returns a mapping with `loss`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from seed_lavis.compat import BaseModel
from seed_lavis.options import APPLICATION, ModelOptions
from seed_multimodal.device import DTYPES
from seed_multimodal.errors import ConfigError
from seed_multimodal.nn.eva import EvaConfig
from seed_multimodal.nn.layers import cast_layers, checkpoint_layers
from seed_multimodal.seed.configuration import QFormerConfig
from seed_multimodal.settings import read_settings

MODEL_CONFIG = str(APPLICATION / "lavis" / "configs" / "models" / "blip2" / "blip2_pretrain.yaml")


class SeedModel(BaseModel):
    """Mixed in before the library's class. `stage` names the state and log files of its training."""

    PRETRAINED_MODEL_CONFIG_DICT = {"pretrain": MODEL_CONFIG}
    stage = ""
    options_type: type[ModelOptions] = ModelOptions
    options: ModelOptions
    latest: Mapping[str, Tensor] = MappingProxyType({})
    """Numbers of the last `forward` for the log, detached; none before the first."""
    companions: tuple[str, ...] = ()
    """Names of frozen modules that are used beside the model and are no part of it or its checkpoints."""
    reads_captions = True
    """False: its data sets may hold pictures alone."""
    vision_file = ""
    """Where the frozen tower was read from; empty: it is in a checkpoint, or random."""
    shares_tower = False
    """The frozen tower is that of `clip_model`: its output gives the target embedding, too."""

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | DictConfig) -> SeedModel:
        """LAVIS's constructor: sizes and initial weights from the section `model` of the YAML."""
        model = cls(read_settings(cls.options_type, cfg, "model"))
        model.load_initial()
        return model

    def load_initial(self) -> None:
        """Fill the model with the weights that its options name; see `initial_weights`."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.query_tokens.device

    def place(self, device: torch.device) -> SeedModel:
        """Move to `device` in the precisions asked for, once all weights are in; then compile if asked."""
        self.to(device)
        for name in self.companions:
            if getattr(self, name) is not None:
                getattr(self, name).to(device)
        if self.options.freeze_vit:
            cast_layers(self.visual_encoder, self.tower_dtype(device))
        if self.options.use_grad_checkpoint:
            checkpoint_layers(self)
        if self.options.compile:
            for part in ("visual_encoder", "Qformer", "Reverse_Qformer"):
                if hasattr(self, part):
                    getattr(self, part).compile()
        return self

    def tower_dtype(self, device: torch.device) -> torch.dtype:
        """The frozen tower's precision; fp16 means fp32 on a CPU, which computes fp16 slowly."""
        dtype = DTYPES[self.options.vit_precision]
        return torch.float32 if device.type != "cuda" and dtype == torch.float16 else dtype

    def tower(self, images: Tensor) -> Tensor:
        """Pixels `[B, 3, S, S]` → vision-tower output `[B, N, W]`, computed in `vit_precision`."""
        dtype = self.tower_dtype(images.device)
        if dtype == torch.float32:
            return self.visual_encoder(images)
        with torch.autocast(images.device.type, dtype):
            return self.visual_encoder(images).float()

    def with_log(self, loss: Tensor, **numbers: Tensor | None) -> dict[str, Tensor]:
        """LAVIS's output mapping; keeps the numbers for the log."""
        self.latest = {name: value.detach() for name, value in numbers.items() if value is not None}
        return {"loss": loss, **self.latest}


def target_embeddings(clip: Any, images: Tensor, vit: Tensor | None = None) -> Tensor:
    """Pixels → image embeddings `[B, E]` of the frozen CLIP, in its own precision, without gradient; with the output
    `vit` `[B, N, W]` of its tower they are only projected."""
    dtype = next(clip.parameters()).dtype
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        if vit is None:
            return clip(images.to(dtype)).image_embeds.float()
        return clip.visual_projection(clip.vision_model.post_layernorm(vit[:, 0].to(dtype))).float()


def vit_sizes(options: ModelOptions) -> EvaConfig:
    """The vision tower's sizes; `vit` of the YAML overrides single ones."""
    if options.drop_path_rate:
        raise ConfigError("model.drop_path_rate must be 0, as in the released training.")
    return read_settings(EvaConfig, {"image_size": options.image_size, **options.vit}, "model.vit")


def qformer_sizes(options: ModelOptions) -> QFormerConfig:
    """The Q-Former's sizes; `qformer` of the YAML overrides single ones."""
    changes = {"cross_attention_freq": options.cross_attention_freq, **options.qformer}
    return read_settings(QFormerConfig, changes, "model.qformer")


def captions_of(samples: Mapping[str, Any]) -> Sequence[str]:
    """The captions of a batch, under SEED's key or LAVIS's."""
    for key in ("caption", "text_input"):
        if key in samples:
            return samples[key]
    raise ConfigError(f"The samples hold no 'caption' (they hold {', '.join(samples)}).")


def frozen_names(model: nn.Module) -> set[str]:
    """Parameters that are not trained, so not part of a training checkpoint."""
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
