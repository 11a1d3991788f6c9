"""The trained models by their LAVIS names: sizes from the YAML, initial weights, losses.

A model is both LAVIS's `BaseModel` and the library's class (`seed_multimodal.recipes.seed.losses`,
`seed_multimodal.recipes.lavit.losses`), so its parameter names are the original ones. `forward`
takes LAVIS's `samples` (a mapping with `image` and `caption`) and returns a mapping with `loss`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seed_lavis import log
from seed_lavis.compat import BaseModel, registry
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
from seed_multimodal.device import DTYPES, copy_to
from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.fingerprints import fingerprint
from seed_multimodal.models.lavit.decoder import CodeDecoder, LavitDecoderConfig
from seed_multimodal.models.lavit.modeling import DynamicTokenizer, LavitTokenizerConfig
from seed_multimodal.models.seed.captions import load_caption_tokenizer
from seed_multimodal.models.seed.checkpoints import VISION, load_blip2, load_vision
from seed_multimodal.models.seed.configuration import (
    QFormerConfig,
    Seed1Config,
    Seed2Config,
)
from seed_multimodal.models.seed.diffusion import StableDiffusionDetokenizer
from seed_multimodal.nn.layers import cast_layers, checkpoint_layers
from seed_multimodal.nn.vision.clip import load_clip_vision
from seed_multimodal.nn.vision.eva import EvaConfig
from seed_multimodal.nn.vision.hub import HubVision
from seed_multimodal.recipes.lavit.export import Stage1Sizes
from seed_multimodal.recipes.lavit.losses import LavitLossWeights, LavitStage1
from seed_multimodal.recipes.lavit.train_tokenizer import stage1_groups
from seed_multimodal.recipes.seed.losses import (
    Seed1Stage2Model,
    Seed1Stage2Weights,
    Stage1Model,
    Stage2Model,
    Stage2Weights,
    clip_preprocessing,
)
from seed_multimodal.settings import leaves, read_settings
from seed_multimodal.state_dicts import assign_strictly, load_state_dict
from seed_multimodal.training.engine import autocast
from seed_multimodal.training.task import frozen_names
from seed_multimodal.weights.catalogue import download_advice


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
    clip_model: Any  # computes the target embeddings
    shares_encoder = False  # with the target CLIP: computed once
    # Of the last `forward`: codes; of held-out images their decoded and target embeddings.
    codes: Tensor | None = None
    matched: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_config(cls, cfg: Any) -> SeedModel:
        """LAVIS's constructor: sizes and initial weights from the section `model` of the YAML."""
        model: Any = cls(read_settings(cls.options_type, cfg, "model"))
        if hasattr(model, "quantize"):
            # Averaged or fixed codes have no gradient; they count as trained, so that they are
            # saved.
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
        for name, child in self.named_children():
            if name in ("clip_model", "text_encoder"):
                child.to(DTYPES[frozen_precision(self.options.clip_precision, device)])
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
        """LAVIS's output mapping, with what is logged."""
        self.codes = codes
        values = {name: value.detach() for name, value in losses.items() if value is not None}
        return {"loss": loss, **values}


def clip_target(source: str | None, width: int | None = None) -> Any:
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


def qformer_sizes(options: ModelOptions) -> QFormerConfig:
    """The Q-Former's sizes; `qformer` of the YAML overrides some of them."""
    values = {"cross_attention_freq": options.cross_attention_freq, **options.qformer}
    if values.get("causal_queries") != 0:  # 0: not causal
        values = with_derived(values, {"causal_queries": options.num_query_token}, "model.qformer")
    return read_settings(QFormerConfig, values, "model.qformer")


def sizes_of(kind: type[Any], options: ModelOptions, **others: Any) -> Any:
    """A configuration of the library from options: those of the same names, and of LAVIS's names.

    others: fields that are no options.
    """
    renamed = {
        "num_query_token": "num_query",
        "n_embed": "codebook_size",
        "codebook_embed_dim": "codebook_dim",
    }
    values = {renamed.get(key, key): value for key, value in vars(options).items()}
    names = [item.name for item in fields(kind) if item.name in values]
    return read_settings(kind, {**{name: values[name] for name in names}, **others}, "model")


def seed_sizes(kind: type[Any], options: ModelOptions, **others: Any) -> Any:
    """Sizes of one of SEED's tokenizers."""
    parts = {"vit": vit_sizes(options), "qformer": qformer_sizes(options)}
    return sizes_of(kind, options, **parts, **others)


@registry.register_model("blip2_casual")
class Blip2Casual(SeedModel, Stage1Model):
    """Stage 1, the causal Q-Former.

    Keys of `samples`: `image` `[B, 3, S, S]`, `caption`: texts.
    """

    stage = "stage1"
    contrasts = True
    options_type = Stage1Options

    def __init__(self, options: Stage1Options) -> None:
        # 1. The sizes.
        source = locate(options.text_tokenizer)
        tokenizer = load_caption_tokenizer(source, options.max_txt_len)
        config = seed_sizes(Seed2Config, options)
        if options.max_txt_len > config.qformer.max_positions:
            raise ConfigError(
                f"model.max_txt_len ({options.max_txt_len}) is more than "
                f"model.qformer.max_positions ({config.qformer.max_positions})."
            )

        # 2. The target embedding: the encoder's own, or a CLIP's.
        clip = None
        width = None
        if options.embedding_weight and options.alignment_target == "encoder":
            width = config.vit.pooled_width
        elif options.embedding_weight:
            clip = clip_target(options.clip_model)
            width = clip.config.projection_dim

        # 3. The model.
        Stage1Model.__init__(
            self, config, options=options, vocab_size=tokenizer.size, embedding_dim=width
        )
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
        return not self.options.freeze_vit and isinstance(self.visual_encoder, HubVision)

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """Losses of a batch of pairs; `loss_itc` and `loss_embedding` are unweighted."""
        ids, mask = self.caption_tokenizer(samples["caption"])
        vit, target = self.features_and_target(samples["image"])
        out = Stage1Model.forward(
            self,
            None,
            copy_to(self.device, ids),
            copy_to(self.device, mask),
            vit_features=vit,
            target_embedding=None if self.embedding_head is None else target,
        )
        return self.with_log(
            out.loss,
            loss_itc=out.loss_itc,
            loss_embedding=out.loss_embedding,
            temperature=self.temp,
        )


class Stage2Mixin(SeedModel):
    """What both stage-2 models have in common: the start, and the interface to `CodebookTask`."""

    options: CodebookOptions
    use_codes = True

    @property
    def skips_parameters(self) -> bool:
        """Whether some trained parameters get no gradient in some steps (an option of DDP)."""
        options = self.options
        has_gradient = options.ema_decay is None and not self.quantize.is_fixed
        return not has_gradient or options.codebook_warmup > 0

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


@registry.register_model("blip2_codebook_all_image")
class Blip2CodebookAllImage(Stage2Mixin, Stage2Model):
    """Stage 2, codebook and decode head.

    Keys of `samples`: `image` `[B, 3, S, S]`.
    """

    stage = "stage2"
    options_type = Stage2Options

    def __init__(self, options: Stage2Options) -> None:
        # 1. Frozen targets.
        width = options.image_features_dim
        clip = None
        if options.alignment_target == "encoder":
            width = vit_sizes(options).with_pooled_feature().pooled_width
        else:
            clip = clip_target(options.clip_model, width)

        # 2. The model.
        Stage2Model.__init__(
            self,
            seed_sizes(Seed2Config, options, image_features_dim=width),
            weights=read_settings(Stage2Weights, options.loss_weights, "model.loss_weights"),
            clip_model=clip,
            options=options,
        )

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """Weighted losses of a batch, and the unweighted codebook loss."""
        vit, target = self.features_and_target(samples["image"])
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

    Keys of `samples`: `image` `[B, 3, S, S]`, and `caption`.
    """

    stage = "seed1-stage2"
    options_type = Seed1Options

    def __init__(self, options: Seed1Options) -> None:
        folder = Path(locate(options.text_encoder))
        Seed1Stage2Model.__init__(
            self,
            seed_sizes(Seed1Config, options),
            weights=read_settings(Seed1Stage2Weights, options.loss_weights, "model.loss_weights"),
            text_encoder=StableDiffusionDetokenizer.load_part(folder, "text_encoder"),
            options=options,
        )
        self.text_tokenizer = StableDiffusionDetokenizer.load_part(folder, "tokenizer")

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """Weighted losses of a batch."""
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
    reads_captions = False
    skips_parameters = True  # moving-average codebook, frozen token selector

    def __init__(self, options: LavitOptions) -> None:
        # The original's EVA has 40 blocks; SEED's models omit the last.
        vit = vit_sizes(options, depth=40)
        sizes = sizes_of(LavitTokenizerConfig, options, vit=vit, vit_head=0, **options.merger)
        tokenizer = DynamicTokenizer(sizes)
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

    def load_initial(self) -> None:
        """As the base's; the configuration gets the vision encoder's fingerprint for the export."""
        super().load_initial()
        self.config = replace(self.config, tower=fingerprint(self.visual_encoder))

    @property
    def visual_encoder(self) -> Any:
        """The frozen vision encoder, by the name that it has in the other models."""
        return self.tokenizer.encoder

    def optimizer_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The optimizer's groups; the token selector has its own learning rate."""
        return stage1_groups(self, weight_decay, self.options.selector_lr_scale)

    def patch_features(self, batch: Tensor) -> Tensor:
        """As the library's, with the vision encoder in `vit_precision`."""
        with torch.no_grad():
            return self.vit_features(batch)[:, self.visual_encoder.n_class_tokens :]

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:  # type: ignore[override]
        """Loss of a batch, its parts, and the share of patches that are kept."""
        out = LavitStage1.forward(self, samples["image"])
        return self.with_log(out.loss, out.codes_T, **out.metrics)
