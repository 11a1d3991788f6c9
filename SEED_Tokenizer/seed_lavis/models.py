"""The trained models by their LAVIS names.

Networks and losses: `seed_multimodal.models.seed.losses`, `seed_multimodal.models.lavit.losses`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seed_lavis import log
from seed_lavis.base import SeedModel, clip_target
from seed_lavis.compat import registry
from seed_lavis.options import (
    APPLICATION,
    CodebookOptions,
    LavitOptions,
    ModelOptions,
    Seed1Options,
    Stage1Options,
    Stage2Options,
    locate,
    vit_sizes,
    with_derived,
)
from seed_multimodal.device import copy_to
from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.models.lavit.decoder import CodeDecoder, LavitDecoderConfig
from seed_multimodal.models.lavit.export import Stage1Sizes
from seed_multimodal.models.lavit.losses import LavitLossWeights, LavitStage1
from seed_multimodal.models.lavit.modeling import DynamicTokenizer, LavitTokenizerConfig
from seed_multimodal.models.lavit.train_tokenizer import stage1_groups
from seed_multimodal.models.seed.captions import load_caption_tokenizer
from seed_multimodal.models.seed.checkpoints import VISION, load_blip2
from seed_multimodal.models.seed.configuration import QFormerConfig, Seed1Config, Seed2Config
from seed_multimodal.models.seed.diffusion import StableDiffusionDetokenizer
from seed_multimodal.models.seed.losses import (
    Seed1Stage2Model,
    Seed1Stage2Weights,
    Stage1Model,
    Stage2Model,
    Stage2Weights,
)
from seed_multimodal.nn.vision.base import VisionEncoder
from seed_multimodal.nn.vision.hub import HubVision
from seed_multimodal.settings import leaves, read_settings
from seed_multimodal.state_dicts import fingerprint, load_state_dict


def qformer_sizes(options: ModelOptions) -> QFormerConfig:
    """The Q-Former's sizes; `qformer` of the YAML overrides some of them."""
    values = {"cross_attention_freq": options.cross_attention_freq, **options.qformer}
    if values.get("causal_queries") != 0:  # 0: not causal
        values = with_derived(values, {"causal_queries": options.num_query_token}, "model.qformer")
    return read_settings(QFormerConfig, values, "model.qformer")


@registry.register_model("blip2_casual")
class Blip2Casual(SeedModel, Stage1Model):
    """Stage 1, the causal Q-Former.

    Keys of `samples`:

    image: `[B, 3, S, S]`.
    caption: texts; without text tokenizer `input_ids` and `attention_mask`, `[B, T]`.
    target: `[B, E]`, optional.
    """

    stage = "stage1"
    contrasts = True
    options_type = Stage1Options
    options: Stage1Options

    def __init__(self, options: Stage1Options) -> None:
        # 1. Text tokenizer.
        tokenizer = None
        vocab_size = options.vocab_size
        if options.text_tokenizer:
            source = locate(options.text_tokenizer)
            tokenizer = load_caption_tokenizer(source, options.max_txt_len)
            vocab_size = tokenizer.size

        # 2. The sizes.
        config = Seed2Config(
            vit=vit_sizes(options),
            qformer=qformer_sizes(options),
            num_query=options.num_query_token,
            alignment_target=options.alignment_target,
        )

        if options.max_txt_len > config.qformer.max_positions:
            raise ConfigError(
                f"model.max_txt_len ({options.max_txt_len}) is more than "
                f"model.qformer.max_positions ({config.qformer.max_positions})."
            )

        # 3. The target embedding: the encoder's own, a CLIP's, or that of the samples.
        clip = None
        width = None
        if options.embedding_weight:
            width = options.embedding_dim
            if options.alignment_target == "encoder":
                width = config.vit.pooled_width
            elif options.clip_model or not width:
                clip = clip_target(options.clip_model, width)
                width = clip.config.projection_dim

        # 4. The model.
        Stage1Model.__init__(
            self,
            config,
            vocab_size=vocab_size,
            embed_dim=options.embed_dim,
            temperature=options.temperature,
            label_smoothing=options.label_smoothing,
            lm_head=options.lm_head,
            freeze_vit=options.freeze_vit,
            gather_gradient=options.gather_gradient,
            embedding_dim=width,
            embedding_weight=options.embedding_weight,
        )
        self.options = options
        self.caption_tokenizer = tokenizer
        self.clip_model = clip

    def load_stage_before(self) -> bool:
        """BLIP-2's Q-Former."""
        if self.options.pretrained:
            load_blip2(self, locate(self.options.pretrained), log)
        return False

    @property
    def skips_parameters(self) -> bool:
        """Whether some trained parameters get no gradient: those behind a hub encoder's tokens."""
        return not self.freeze_vit and isinstance(self.visual_encoder, HubVision)

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """Losses of a batch of pairs; `loss_itc` and `loss_embedding` are unweighted."""
        if self.caption_tokenizer is None:
            ids = samples["input_ids"]
            mask = samples["attention_mask"]
        else:
            ids, mask = self.caption_tokenizer(samples["caption"])
        vit, target = self.features_and_target(samples["image"])
        target = samples.get("target", target)
        out = Stage1Model.forward(
            self,
            None,
            copy_to(self.device, ids),
            copy_to(self.device, mask),
            vit_features=vit,
            target_embedding=None if self.embedding_head is None else target,
        )
        loss = out.loss
        if self.options.itc_weight != 1.0:  # the loss has the contrast once
            loss = loss + (self.options.itc_weight - 1.0) * out.loss_itc
        return self.with_log(
            loss, loss_itc=out.loss_itc, loss_embedding=out.loss_embedding, temperature=self.temp
        )


class Stage2Mixin(SeedModel):
    """What both stage-2 models have in common: the start, and the interface to `CodebookTask`."""

    options: CodebookOptions
    use_codes = True

    @property
    def skips_parameters(self) -> bool:
        """Whether some trained parameters get no gradient in some steps (an option of DDP)."""
        return self.options.ema_decay is not None or self.options.codebook_warmup > 0

    def codebook_points(self, batch: Mapping[str, Any]) -> Tensor:
        """Features of a batch before the quantizer `[B, 32, d]`."""
        return self.pre_quant(batch["image"])

    def load_stage_before(self) -> bool:
        """Stage 1's encoder.

        Raises ConfigError: stage 1 had other sizes that no tensor's shape shows.
        """
        # 1. The sizes.
        file = Path(locate(str(self.options.pretrained)))
        if not file.is_file():
            raise CheckpointError(
                f"{file}: no such stage-1 checkpoint; train stage 1 first "
                "(sh train_scripts/causal_qformer.sh), or give model.pretrained=FILE."
            )
        stage1_config = file.with_name("config.json")
        if stage1_config.is_file():
            trained = dict(leaves(read_json_object(stage1_config)))
            sizes = dict(leaves(self.config.to_dict()))
            for key in ("qformer.heads", "qformer.causal_queries", "vit.heads"):
                if trained.get(key) != sizes.get(key):
                    raise ConfigError(
                        f"model.{key} is {sizes.get(key)}, but {file} was trained with "
                        f"{trained.get(key)}."
                    )

        # 2. The weights.
        state = load_state_dict(file)
        report = self.load_stage1(state, str(file))
        log(f"{file}: {len(report.loaded)} tensors loaded into the encoder.")
        return any(name.startswith(VISION) for name in state)


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


@registry.register_model("blip2_codebook_all_image")
class Blip2CodebookAllImage(Stage2Mixin, Stage2Model):
    """Stage 2, codebook and decode head.

    Keys of `samples`: `image` `[B, 3, S, S]`, optionally `target` `[B, E]`.
    """

    stage = "stage2"
    options_type = Stage2Options
    options: Stage2Options

    def __init__(self, options: Stage2Options) -> None:
        # 1. Frozen targets.
        sizes = stage2_sizes(options)
        width = options.image_features_dim
        clip = None
        if options.alignment_target == "encoder":
            width = sizes["vit"].with_pooled_feature().pooled_width
        elif options.clip_model:
            clip = clip_target(options.clip_model, width)

        # 2. The model.
        config = Seed2Config(
            **sizes,
            image_features_dim=width,
            alignment_target=options.alignment_target,
            use_qformer_image=options.use_qformer_image,
            recon_s=options.recon_s,
        )
        Stage2Model.__init__(
            self,
            config,
            weights=read_settings(Stage2Weights, options.loss_weights, "model.loss_weights"),
            clip_model=clip,
            options=options,
        )

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """Weighted losses of a batch, and the unweighted codebook loss."""
        vit, target = self.features_and_target(samples["image"])
        target = samples.get("target", target)
        out = Stage2Model.forward(self, None, target, vit_features=vit, quantize=self.use_codes)
        # For the contact sheets of held-out images.
        self.matched = None if self.training else (out.embeds.float(), out.target.float())
        others = self.other_losses(out.embeds, out.target)
        return self.with_log(
            sum(others.values(), out.loss),
            out.indices,
            loss_embed=out.loss_embed,
            loss_recon_s=out.loss_recon_s,
            loss_distil_image=out.loss_distil,
            **others,
        )

    def other_losses(self, embeds: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Further weighted losses of decoded embeddings `[B, E]`, by their names in the log."""
        return {}


@registry.register_model("seed1_codebook_text")
class Seed1CodebookText(Stage2Mixin, Seed1Stage2Model):
    """Stage 2 of SEED-1.

    Keys of `samples`: `image` `[B, 3, S, S]`, and `caption` or `target` `[B, text_tokens,
    text_features_dim]`.
    """

    stage = "seed1-stage2"
    options_type = Seed1Options
    options: Seed1Options

    def __init__(self, options: Seed1Options) -> None:
        encoder = None
        tokenizer = None
        if options.text_encoder:
            folder = Path(locate(options.text_encoder))
            encoder = StableDiffusionDetokenizer.load_part(folder, "text_encoder")
            tokenizer = StableDiffusionDetokenizer.load_part(folder, "tokenizer")
        config = Seed1Config(
            **stage2_sizes(options),
            text_tokens=options.text_tokens,
            text_features_dim=options.text_features_dim,
        )
        Seed1Stage2Model.__init__(
            self,
            config,
            weights=read_settings(Seed1Stage2Weights, options.loss_weights, "model.loss_weights"),
            text_encoder=encoder,
            options=options,
        )
        self.text_tokenizer = tokenizer

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """Weighted losses of a batch."""
        target = samples.get("target")
        if target is None:
            ids = self.caption_ids(samples["caption"]).to(self.device)
            with torch.autocast(self.device.type, enabled=False):
                target = self.target_of(None, ids).float()
        out = Seed1Stage2Model.forward(self, samples["image"], target, quantize=self.use_codes)
        return self.with_log(
            out.loss,
            out.indices,
            loss_embed=out.loss_embed,
            loss_recon_s=out.loss_recon_s,
            loss_distil_text=out.loss_distil,
        )

    def caption_ids(self, captions: Sequence[str]) -> Tensor:
        """Captions → word pieces `[B, text_tokens]`."""
        batch = self.text_tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=self.config.text_tokens,
            return_tensors="pt",
        )
        return batch["input_ids"]


@registry.register_model("lavit_tokenizer")
class LavitTokenizer(SeedModel, LavitStage1):
    """`samples`: `image` `[B, 3, S, S]`; captions are not read."""

    PRETRAINED_MODEL_CONFIG_DICT = {
        "pretrain": str(APPLICATION / "lavis/configs/models/lavit/lavit_pretrain.yaml")
    }
    stage = "lavit-stage1"
    options_type = LavitOptions
    options: LavitOptions
    reads_captions = False
    skips_parameters = True  # moving-average codebook, frozen token selector

    def __init__(self, options: LavitOptions) -> None:
        tokenizer = DynamicTokenizer(lavit_sizes(options))
        derived = {
            "tokens": tokenizer.n_patches,
            "code_dim": tokenizer.config.codebook_dim,
            "feature_dim": tokenizer.encoder.width,
        }
        values = with_derived(options.decoder, derived, "model.decoder")
        decoder_sizes = read_settings(LavitDecoderConfig, values, "model.decoder")
        LavitStage1.__init__(
            self,
            tokenizer,
            CodeDecoder(decoder_sizes),
            weights=read_settings(LavitLossWeights, options.loss_weights, "model.loss_weights"),
            ema_decay=options.ema_decay,
            freeze_selector=options.freeze_selector,
        )
        self.options = options
        self.config = Stage1Sizes(tokenizer.config, decoder_sizes)
        self.init_keep_share()
        # Parts of later trainings: random values would differ between seeds.
        for name, parameter in self.named_parameters():
            if name.startswith(("tokenizer.vit_proj.", "decoder.unet_")):
                nn.init.zeros_(parameter)

    @classmethod
    def from_config(cls, cfg: Any) -> SeedModel:
        """As the base's; the configuration gets the vision encoder's fingerprint for the export."""
        model: Any = super().from_config(cfg)
        model.config = replace(model.config, tower=tuple(fingerprint(model.visual_encoder)))
        return model

    @property
    def visual_encoder(self) -> VisionEncoder:
        """The frozen vision encoder, by the name that it has in the other models."""
        return self.tokenizer.encoder

    def optimizer_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The optimizer's groups; the token selector has its own learning rate."""
        return stage1_groups(self, weight_decay, self.options.selector_lr_scale)

    def patch_features(self, batch: Tensor) -> Tensor:
        """As the library's, with the vision encoder in `vit_precision`."""
        with torch.no_grad():
            return self.vit_features(batch)[:, self.visual_encoder.n_class_tokens :]

    def codebook_points(self, batch: Mapping[str, Any]) -> Tensor:  # type: ignore[override]
        """As the library's, of a batch of samples."""
        return super().codebook_points(batch["image"])

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:  # type: ignore[override]
        """Loss of a batch, its parts, and the share of patches that are kept."""
        out = LavitStage1.forward(self, samples["image"])
        return self.with_log(out.loss, out.codes_T, **out.metrics)


def lavit_sizes(options: LavitOptions) -> LavitTokenizerConfig:
    """Sizes of the tokenizer."""
    sizes = read_settings(
        LavitTokenizerConfig,
        {
            "codebook_size": options.n_embed,
            "codebook_dim": options.codebook_embed_dim,
            "vit_head": 0,
            **options.merger,
        },
        "model.merger",
    )
    # The original's EVA has 40 blocks; SEED's models omit the last.
    return replace(sizes, vit=vit_sizes(options, depth=40))
