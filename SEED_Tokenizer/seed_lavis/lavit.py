"""LaVIT's stage 1 as the LAVIS model `lavit_tokenizer`: selector, merger, codebook and decoder, from pictures alone.

The model and its loss are `seed_multimodal.lavit.training`. One run trains without codes first
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
from seed_lavis.initial_weights import WITHOUT_TOWER, load_finetuned, load_tower
from seed_lavis.log import log
from seed_lavis.options import APPLICATION, LavitOptions
from seed_multimodal.errors import ConfigError
from seed_multimodal.lavit.decoder import CodeDecoder, LavitDecoderConfig
from seed_multimodal.lavit.export import Stage1Sizes
from seed_multimodal.lavit.modeling import DynamicTokenizer, LavitTokenizerConfig
from seed_multimodal.lavit.training import LavitStage1, LavitStage1Weights
from seed_multimodal.likeness import some_weights
from seed_multimodal.nn.eva import EvaVit
from seed_multimodal.settings import read_settings
from seed_multimodal.training.lavit.tokenizer_task import stage1_groups

LATER = ("tokenizer.vit_proj.", "decoder.unet_")
MODEL_CONFIG = str(APPLICATION / "lavis" / "configs" / "models" / "lavit" / "lavit_pretrain.yaml")


@registry.register_model("lavit_tokenizer")
class LavitTokenizer(SeedModel, LavitStage1):
    """`samples`: `image` `[B, 3, S, S]`; captions are not looked at."""

    PRETRAINED_MODEL_CONFIG_DICT = {"pretrain": MODEL_CONFIG}
    stage = "lavit-stage1"
    options_type = LavitOptions
    options: LavitOptions
    reads_captions = False
    skips_parameters = True  # the codebook follows averages, a frozen selector nothing

    def __init__(self, options: LavitOptions) -> None:
        if not options.freeze_vit:
            raise ConfigError("model.freeze_vit is false, but LaVIT's tokenizer learns to rebuild a frozen tower's "
                              "features: train the tower elsewhere.")
        sizes = lavit_sizes(options)
        LavitStage1.__init__(
            self, DynamicTokenizer(sizes.tokenizer), CodeDecoder(sizes.decoder),
            weights=read_settings(LavitStage1Weights, options.loss_weights, "model.loss_weights"),
            ema_decay=options.ema_decay, freeze_selector=options.freeze_selector)
        self.options, self.config = options, sizes
        self.start_share()
        # It changes without gradient, and counts as trained, so that it is saved.
        self.quantize.embedding.weight.requires_grad_(True)
        # For later trainings; random ones would make a run with another seed look like one with another tower.
        for name, one in self.named_parameters():
            if name.startswith(LATER):
                nn.init.zeros_(one)

    @property
    def visual_encoder(self) -> EvaVit:
        """The frozen tower, by the name that it has in the other models."""
        return self.tokenizer.encoder

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.tokenizer.device

    def load_initial(self) -> None:
        """The tower's file, and a checkpoint to start from if the options name one.

        Raises:
            CheckpointError: a file that is not there, damaged, of another model or size. ConfigError: no tower.
        """
        if self.options.vit_weights:
            load_tower(self, self.options.vit_weights)
        elif self.options.load_pretrained:
            raise ConfigError(f"The vision tower has no weights: {WITHOUT_TOWER}.")
        else:
            log("model.load_pretrained is false: the vision tower has random weights.")
        load_finetuned(self)
        self.config = replace(self.config, tower=tuple(some_weights(self.visual_encoder)))

    def optimizer_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The optimiser's groups; the selector has its own learning rate."""
        return stage1_groups(self, weight_decay, self.options.selector_lr_scale)

    def patch_features(self, batch: Tensor) -> Tensor:
        """As the library's, with the tower in `vit_precision`."""
        if batch.ndim == 3:
            return batch.float()
        with torch.no_grad():
            return self.tower(batch)[:, 1:].float()

    def codebook_points(self, batch: Mapping[str, Any] | Tensor) -> Tensor:
        """As the library's, of a batch of samples."""
        return super().codebook_points(batch if isinstance(batch, Tensor) else batch["image"])

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:  # type: ignore[override]
        """Loss of a batch, its parts, and what is kept of the patches."""
        out = LavitStage1.forward(self, samples["image"])
        return self.with_log(out.loss, **out.numbers())


def lavit_sizes(options: LavitOptions) -> Stage1Sizes:
    """Sizes of tokenizer and decoder; sections of the YAML override single ones. The released tower has 40 blocks, of
    which SEED's models leave out the last."""
    tower = vit_sizes(replace(options, vit={"depth": 40, **options.vit}))
    tokenizer = read_settings(LavitTokenizerConfig, {
        "codebook_size": options.n_embed, "codebook_dim": options.codebook_embed_dim, "vit_head": 0, **options.merger},
        "model.merger")
    tokenizer = replace(tokenizer, vit=tower)
    decoder = read_settings(LavitDecoderConfig, {
        "tokens": tokenizer.patches, "code_dim": options.codebook_embed_dim, "feature_dim": tower.width,
        **options.decoder}, "model.decoder")
    return Stage1Sizes(tokenizer, decoder)
