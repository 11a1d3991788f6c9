"""SEED-1's stage 2 as the LAVIS model `seed1_codebook_text`: codes towards Stable Diffusion's text features.

The model and its losses are in `seed_multimodal.seed.training`. It starts from the same stage 1 as SEED-2.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_lavis import log
from seed_lavis.base import CodebookMixin, SeedModel, captions_of, stage2_sizes, stage2_training
from seed_lavis.compat import registry
from seed_lavis.initial_weights import frozen_dtype
from seed_lavis.options import Seed1Options, locate
from seed_multimodal.errors import CheckpointError, first_line
from seed_multimodal.seed.configuration import Seed1Config
from seed_multimodal.seed.training import Seed1Stage2Model, Seed1Stage2Weights
from seed_multimodal.settings import read_settings


@registry.register_model("seed1_codebook_text")
class Seed1CodebookText(CodebookMixin, SeedModel, Seed1Stage2Model):
    """Stage 2 of SEED-1. `samples`: `image` `[B, 3, S, S]`, and `caption` or `target`
    `[B, text_tokens, text_features_dim]`."""

    stage = "seed1-stage2"
    options_type = Seed1Options
    options: Seed1Options

    def __init__(self, options: Seed1Options) -> None:
        encoder, self_words = text_encoder(options) if options.text_encoder else (None, None)
        config = Seed1Config(
            **stage2_sizes(options), text_tokens=options.text_tokens, text_features_dim=options.text_features_dim)
        Seed1Stage2Model.__init__(
            self, config, weights=read_settings(Seed1Stage2Weights, options.loss_weights, "model.loss_weights"),
            text_encoder=encoder, **stage2_training(options))
        self.options, self.words = options, self_words
        self.prepare_codebook()

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """Weighted losses of a batch."""
        target = samples.get("target")
        if target is None:
            with torch.autocast(self.device.type, enabled=False):
                target = self.target_of(None, self.word_ids(captions_of(samples)).to(self.device)).float()
        out = Seed1Stage2Model.forward(self, samples["image"], target, quantize=self.use_codes)
        self.keep_codes(out.pre_quant, out.indices)
        return self.with_log(out.loss, loss_embed=out.loss_embed, loss_recon_s=out.loss_recon_s,
                             loss_distil_text=out.loss_distil)

    def word_ids(self, captions: Any) -> Tensor:
        """Captions → word pieces `[B, text_tokens]`."""
        return self.words(list(captions), padding="max_length", truncation=True, max_length=self.config.text_tokens,
                          return_tensors="pt")["input_ids"]


def text_encoder(options: Seed1Options) -> tuple[Any, Any]:
    """Stable Diffusion's frozen text encoder and its tokenizer, from a pipeline folder or a folder with both.

    Raises:
        CheckpointError: not there, or not complete.
    """
    from transformers import CLIPTextModel, CLIPTokenizer

    place = Path(locate(str(options.text_encoder)))
    parts = [place / name if (place / name).is_dir() else place for name in ("text_encoder", "tokenizer")]
    try:
        encoder, loaded = CLIPTextModel.from_pretrained(parts[0], dtype=frozen_dtype(options.clip_precision),
                                                        local_files_only=True, output_loading_info=True)
        words = CLIPTokenizer.from_pretrained(parts[1], local_files_only=True)
        missing = [name for name in loaded["missing_keys"] if not name.endswith("position_ids")]
        if missing:
            raise ValueError(f"{len(missing)} tensors are missing, first {sorted(missing)[0]!r}")
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{place}: no complete text encoder and tokenizer ({first_line(error)}); download text_encoder and "
            "tokenizer of Stable Diffusion 1 (CompVis/stable-diffusion-v1-4) and put them at "
            "pretrained/stable-diffusion-v1-4, or give their folder as model.text_encoder.") from error
    log(f"{parts[0]}: text encoder loaded, its last states are the target.")
    return encoder.eval().requires_grad_(False), words
