"""LaVIT's stage 1 as the LAVIS model `lavit_tokenizer`: token selector, merger, codebook and decoder; no captions.

The model and its loss are in `seed_multimodal.lavit.training`. One run trains without codes first
(`model.codebook_warmup`), then with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from seed_lavis.base import SeedModel, vit_sizes
from seed_lavis.compat import registry
from seed_lavis.options import APPLICATION, LavitOptions
from seed_multimodal.lavit.decoder import CodeDecoder, LavitDecoderConfig
from seed_multimodal.lavit.export import Stage1Sizes
from seed_multimodal.lavit.modeling import DynamicTokenizer, LavitTokenizerConfig
from seed_multimodal.lavit.training import LavitStage1, LavitStage1Weights
from seed_multimodal.nn.eva import EvaVit
from seed_multimodal.settings import read_settings
from seed_multimodal.training.lavit.tokenizer_task import stage1_groups
from seed_multimodal.weights import some_weights


@registry.register_model("lavit_tokenizer")
class LavitTokenizer(SeedModel, LavitStage1):
    """`samples`: `image` `[B, 3, S, S]`; captions are not read."""

    PRETRAINED_MODEL_CONFIG_DICT = {"pretrain": str(APPLICATION / "lavis/configs/models/lavit/lavit_pretrain.yaml")}
    stage = "lavit-stage1"
    options_type = LavitOptions
    options: LavitOptions
    reads_captions = False
    skips_parameters = True  # the codebook follows averages, a frozen selector nothing

    def __init__(self, options: LavitOptions) -> None:
        sizes = lavit_sizes(options)
        LavitStage1.__init__(
            self, DynamicTokenizer(sizes.tokenizer), CodeDecoder(sizes.decoder),
            weights=read_settings(LavitStage1Weights, options.loss_weights, "model.loss_weights"),
            ema_decay=options.ema_decay, freeze_selector=options.freeze_selector)
        self.options, self.config = options, sizes
        self.start_share()
        # It changes without gradient, and counts as trained, so that it is saved.
        self.quantize.embedding.weight.requires_grad_(True)
        # For later trainings; random values would differ between seeds, as another vision encoder's do.
        for name, parameter in self.named_parameters():
            if name.startswith(("tokenizer.vit_proj.", "decoder.unet_")):
                nn.init.zeros_(parameter)

    @classmethod
    def from_config(cls, cfg: Any) -> SeedModel:
        """As the base's; the configuration records some weights of the vision encoder, which the export compares."""
        model: Any = super().from_config(cfg)
        model.config = replace(model.config, tower=tuple(some_weights(model.visual_encoder)))
        return model

    @property
    def visual_encoder(self) -> EvaVit:
        """The frozen vision encoder, by the name that it has in the other models."""
        return self.tokenizer.encoder

    def optimizer_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The optimiser's groups; the token selector has its own learning rate."""
        return stage1_groups(self, weight_decay, self.options.selector_lr_scale)

    def patch_features(self, batch: Tensor) -> Tensor:
        """As the library's, with the vision encoder in `vit_precision`."""
        if batch.ndim == 3:
            return batch.float()
        with torch.no_grad():
            return self.encode_vision(batch)[:, 1:].float()

    def codebook_points(self, batch: Mapping[str, Any] | Tensor) -> Tensor:
        """As the library's, of a batch of samples."""
        return super().codebook_points(batch if isinstance(batch, Tensor) else batch["image"])

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:  # type: ignore[override]
        """Loss of a batch, its parts, and the share of patches that are kept."""
        out = LavitStage1.forward(self, samples["image"])
        return self.with_log(out.loss, **out.numbers())


def lavit_sizes(options: LavitOptions) -> Stage1Sizes:
    """Sizes of tokenizer and decoder; sections of the YAML override single ones. The released vision encoder has 40
    blocks, of which SEED's models leave out the last."""
    vit = vit_sizes(replace(options, vit={"depth": 40, **options.vit}))
    tokenizer = read_settings(LavitTokenizerConfig, {
        "codebook_size": options.n_embed, "codebook_dim": options.codebook_embed_dim, "vit_head": 0, **options.merger},
        "model.merger")
    tokenizer = replace(tokenizer, vit=vit)
    decoder = read_settings(LavitDecoderConfig, {
        "tokens": tokenizer.patches, "code_dim": options.codebook_embed_dim, "feature_dim": vit.width,
        **options.decoder}, "model.decoder")
    return Stage1Sizes(tokenizer, decoder)
