"""Base of the LAVIS models: sizes from the YAML, precision of the frozen vision encoder, device, numbers for the log.

A model is both LAVIS's `BaseModel` and the library's own class, so its parameter names are the released ones.
`forward` takes LAVIS's `samples` (a mapping with `image` and `caption`) and returns a mapping with `loss`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from seed_lavis.compat import BaseModel
from seed_lavis.initial_weights import load_initial
from seed_lavis.options import APPLICATION, CodebookOptions, ModelOptions
from seed_multimodal.device import DTYPES
from seed_multimodal.errors import ConfigError
from seed_multimodal.nn.eva import EvaConfig
from seed_multimodal.nn.layers import cast_layers, checkpoint_layers
from seed_multimodal.seed.configuration import QFormerConfig
from seed_multimodal.settings import read_settings


class SeedModel(BaseModel):
    """Mixed in before the library's class. `stage` names the log and checkpoint files of its training.

    Attributes:
        latest: numbers of the last `forward` for the log, detached.
        companions: names of frozen modules that are used beside the model and are not in its checkpoints.
        vision_file: where the vision encoder was read from; empty if it is in a checkpoint, or random.
        shares_encoder: the vision encoder is that of the target CLIP, which is then computed once.
    """

    PRETRAINED_MODEL_CONFIG_DICT = {"pretrain": str(APPLICATION / "lavis/configs/models/blip2/blip2_pretrain.yaml")}
    stage = ""
    options_type: type[ModelOptions] = ModelOptions
    options: ModelOptions
    latest: Mapping[str, Tensor] = MappingProxyType({})
    companions: tuple[str, ...] = ()
    reads_captions = True
    vision_file = ""
    shares_encoder = False

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | DictConfig) -> SeedModel:
        """LAVIS's constructor: sizes and initial weights from the section `model` of the YAML."""
        model = cls(read_settings(cls.options_type, cfg, "model"))
        load_initial(model)
        return model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def place(self, device: torch.device) -> SeedModel:
        """Move to `device` in the precisions asked for, once all weights are in; then compile if asked."""
        for module in (self, *(getattr(self, name) for name in self.companions)):
            if module is not None:
                module.to(device)
        if self.options.freeze_vit:
            cast_layers(self.visual_encoder, self.vision_dtype(device))
        if self.options.use_grad_checkpoint:
            checkpoint_layers(self)
        for part in ("visual_encoder", "Qformer", "Reverse_Qformer") if self.options.compile else ():
            if hasattr(self, part):
                getattr(self, part).compile()
        return self

    def vision_dtype(self, device: torch.device) -> torch.dtype:
        """The frozen vision encoder's precision; fp16 means fp32 on a CPU, which computes fp16 slowly."""
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
    """What `CodebookMaintenance` reads of both stage-2 models: codes and features of the last batch."""

    options: CodebookOptions
    use_codes = True
    codes: Tensor | None = None
    features: Tensor | None = None

    def prepare_codebook(self) -> None:
        """A moving-average codebook changes without gradient: it counts as trained, so that it is saved."""
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
        """Features of a batch before the quantiser `[B, 32, d]`."""
        return self.encode_task_layer(self.encoder_output(batch["image"]))  # type: ignore[attr-defined]

    def keep_codes(self, pre_quant: Tensor, indices: Tensor | None) -> None:
        """Remember the last batch's codes and features."""
        self.features, self.codes = pre_quant.detach().float(), indices


def stage2_sizes(options: CodebookOptions) -> dict[str, Any]:
    """Sizes in the configurations of both stage-2 models."""
    shared = ("decode_depth", "decode_heads", "reverse_depth", "normalize_codes", "codebook_sections")
    return {"vit": vit_sizes(options), "qformer": qformer_sizes(options), "num_query": options.num_query_token,
            "codebook_size": options.n_embed, "codebook_dim": options.codebook_embed_dim,
            **{name: getattr(options, name) for name in shared}}


def stage2_training(options: CodebookOptions) -> dict[str, Any]:
    """Options of the training that both stage-2 models take, besides loss weights and targets."""
    return {name: getattr(options, name) for name in ("freeze_qformer", "frozen_dropout", "corrupt", "nested",
                                                      "ema_decay")}


def vit_sizes(options: ModelOptions) -> EvaConfig:
    """The vision encoder's sizes; `vit` of the YAML overrides single ones."""
    return read_settings(EvaConfig, {"image_size": options.image_size, **options.vit}, "model.vit")


def qformer_sizes(options: ModelOptions) -> QFormerConfig:
    """The Q-Former's sizes; `qformer` of the YAML overrides single ones."""
    changes = {"cross_attention_freq": options.cross_attention_freq, **options.qformer}
    return read_settings(QFormerConfig, changes, "model.qformer")


def captions_of(samples: Mapping[str, Any]) -> Sequence[str]:
    """The captions of a batch, under SEED's key or LAVIS's."""
    captions = samples.get("caption", samples.get("text_input"))
    if captions is None:
        raise ConfigError(f"The samples hold no 'caption' (they hold {', '.join(samples)}).")
    return captions
