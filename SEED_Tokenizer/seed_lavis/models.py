"""SEED-2's two training stages as LAVIS models, `blip2_casual` (sic) and `blip2_codebook_all_image`.

The models themselves, their losses included, are in `seed_multimodal.seed.training`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from seed_lavis.base import (
    CodebookMixin,
    SeedModel,
    captions_of,
    qformer_sizes,
    stage2_sizes,
    stage2_training,
    vit_sizes,
)
from seed_lavis.compat import registry
from seed_lavis.initial_weights import clip_target, label_heads, readout_matrix, target_embeddings
from seed_lavis.options import Stage1Options, Stage2Options
from seed_lavis.processors import caption_words
from seed_multimodal.device import copy_to
from seed_multimodal.seed.configuration import Seed2Config
from seed_multimodal.seed.training import Stage1Model, Stage2Model, Stage2Weights
from seed_multimodal.settings import read_settings
from seed_multimodal.training.label_heads import label_divergence


@registry.register_model("blip2_casual")
class Blip2Casual(SeedModel, Stage1Model):
    """Stage 1, the causal Q-Former. `samples`: `image` `[B, 3, S, S]`, and `caption` (texts) or ready `input_ids` with
    `attention_mask` `[B, T]`; `target` `[B, E]` if the image embedding is regressed and no `clip_model` is loaded."""

    stage, companions = "stage1", ("clip",)
    options_type = Stage1Options
    options: Stage1Options

    def __init__(self, options: Stage1Options) -> None:
        words = caption_words(options.text_tokenizer, options.max_txt_len) if options.text_tokenizer else None
        clip, width = None, options.embedding_dim if options.embedding_weight else None
        if options.embedding_weight and not (width and not options.clip_model):
            clip = clip_target(options.clip_model, options.clip_precision, width)
            width = clip.config.projection_dim
        config = Seed2Config(vit=vit_sizes(options), qformer=qformer_sizes(options), num_query=options.num_query_token)
        Stage1Model.__init__(
            self, config, vocab_size=words.size if words else options.vocab_size, embed_dim=options.embed_dim,
            temperature=options.temperature, label_smoothing=options.label_smoothing, lm_head=options.lm_head,
            freeze_vit=options.freeze_vit, gather_gradient=options.gather_gradient,
            embedding_dim=width, embedding_weight=options.embedding_weight)
        self.options, self.words = options, words
        self.__dict__["clip"] = clip  # not a submodule: frozen, and no part of a stage-1 checkpoint

    def vit_features(self, images: Tensor | None) -> Tensor:
        """As the library's, with the vision encoder in `vit_precision`."""
        assert images is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_vit):
            return self.encode_vision(images)

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """Losses of a batch of pairs; `loss_itc` and `loss_embedding` are unweighted."""
        images = samples["image"]
        ids, mask = ((samples["input_ids"], samples["attention_mask"]) if self.words is None
                     else self.words(captions_of(samples)))
        target = samples.get("target") if self.embedding_head is not None else None
        vit = self.vit_features(images)
        if target is None and self.clip is not None:
            target = target_embeddings(self.clip, images, vit if self.shares_encoder else None)
        out = Stage1Model.forward(self, None, copy_to(self.device, ids), copy_to(self.device, mask), vit_features=vit,
                                  target_embedding=target)
        loss = out.loss + (self.options.itc_weight - 1.0) * out.loss_itc if self.options.itc_weight != 1.0 else out.loss
        return self.with_log(loss, loss_itc=out.loss_itc, loss_embedding=out.loss_embedding, temperature=self.temp)


@registry.register_model("blip2_codebook_all_image")
class Blip2CodebookAllImage(CodebookMixin, SeedModel, Stage2Model):
    """Stage 2, codebook and decode head. `samples`: `image` `[B, 3, S, S]`, optionally `target` `[B, E]`."""

    stage, companions = "stage2", ("label_heads",)
    options_type = Stage2Options
    options: Stage2Options

    def __init__(self, options: Stage2Options) -> None:
        width, clip = options.image_features_dim, None
        if options.clip_model:
            clip = clip_target(options.clip_model, options.clip_precision, width)
        config = Seed2Config(**stage2_sizes(options), image_features_dim=width,
                             use_qformer_image=options.use_qformer_image, recon_s=options.recon_s)
        Stage2Model.__init__(
            self, config, weights=read_settings(Stage2Weights, options.loss_weights, "model.loss_weights"),
            clip_model=clip, readout_weight=readout_matrix(options.readout_weight) if options.readout_weight else None,
            **stage2_training(options))
        if options.scaled_start:
            self.scale_start()
        self.options = options
        self.__dict__["label_heads"] = label_heads(options) if options.label_weight else None  # no part of a checkpoint
        self.prepare_codebook()

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """Weighted losses of a batch, and the unweighted codebook loss."""
        images, target = samples["image"], samples.get("target")
        with torch.no_grad():
            vit = self.encode_vision(images)
        if target is None and self.clip_model is not None:
            target = target_embeddings(self.clip_model, images, vit if self.shares_encoder else None)
        out = Stage2Model.forward(self, None, target, vit_features=vit, quantize=self.use_codes)
        self.keep_codes(out.pre_quant, out.indices)
        labels = None if self.label_heads is None else label_divergence(self.label_heads, out.embeds, out.target).mean()
        loss = out.loss if labels is None else out.loss + self.options.label_weight * labels
        return self.with_log(loss, loss_embed=out.loss_embed, loss_recon_s=out.loss_recon_s,
                             loss_distil_image=out.loss_distil,
                             loss_readout=out.loss_readout if self.readout_weight is not None else None,
                             loss_labels=labels)
