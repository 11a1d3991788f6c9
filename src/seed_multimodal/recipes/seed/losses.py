"""Training of the SEED tokenizers: networks and losses of each stage.

    stage 1             `Stage1Model`        contrast of images and captions
    stage 2 of SEED-2   `Stage2Model`        codebook, towards a CLIP's image embedding
    stage 2 of SEED-1   `Seed1Stage2Model`   codebook, towards a text encoder's features

Parameter names are those of the original training checkpoints, so each stage loads the tensors of
the earlier one by name. Shape suffixes: B images, Q queries (32), D width of the Q-Former, d width
of a code, E width of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.images.transforms import ImageTransform, seed_image_processor
from seed_multimodal.models.seed.checkpoints import ENCODER_PARTS, VISION
from seed_multimodal.models.seed.configuration import Seed1Config, Seed2Config
from seed_multimodal.models.seed.modeling import (
    Seed1Tokenizer,
    Seed2Tokenizer,
    SeedEncoder,
    SeedTokenizer,
    decode_blocks,
    keep_first_rows,
)
from seed_multimodal.nn.layers import cosine
from seed_multimodal.settings import fraction, non_negative, positive, setting
from seed_multimodal.state_dicts import LoadReport, assign_strictly

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx
    from transformers import PreTrainedModel

# ---- stage 1


@dataclass
class Stage1Output:
    """Losses, logits and features of a batch."""

    loss: Tensor  # [], weighted sum of the two next ones
    loss_itc: Tensor  # [], contrast
    loss_embedding: Tensor | None  # [], regression
    sim_i2t: Tensor  # [B, B · processes], already divided by the temperature
    sim_t2i: Tensor  # [B, B · processes]
    targets: Tensor  # [B], the columns of the pairs
    query_output: Tensor  # [B, Q, D]
    query_feats: Tensor  # [B, Q, E], normalised
    text_feats: Tensor  # [B, E], normalised


@dataclass
class Stage1TrainingOptions:
    """Options of stage 1's training.

    Attributes:
        embed_dim: width in which images and captions are compared.
        temperature: of the contrast, at the start; it is learned.
        lm_head: keep BERT's prediction head: unused and frozen, but part of the original
            checkpoint.
        freeze_vit: the vision encoder is not trained.
        gather_gradient: whether features of other processes carry gradient. None, as in the
            original: not, and with several processes neither do a process's own.
        itc_weight, embedding_weight: factors of the contrast and of the regressed embedding (ours).
    """

    embed_dim: int = positive(256)
    temperature: float = setting(0.07, minimum=1e-6)
    label_smoothing: float = fraction(0.1)
    lm_head: bool = True
    freeze_vit: bool = True
    gather_gradient: bool | None = None
    itc_weight: float = 1.0
    embedding_weight: float = 0.0


class Stage1Model(SeedEncoder):
    """Stage 1: a contrastive loss trains the Q-Former to encode an image into ordered queries.

    Only the last query, which attends to all others, is compared with the caption's first token.
    Projections and logits are always fp32: with a temperature of 0.07, bf16 products cause several
    per cent of error in the gradient.

    config: only `vit`, `qformer` and `num_query` matter.
    vocab_size: word pieces of the text tokenizer (original: BERT's 30522 and `[DEC]`).
    embedding_dim: ours: adds a head that regresses an image embedding from the first k queries.
    """

    def __init__(
        self,
        config: Seed2Config,
        *,
        options: Stage1TrainingOptions | None = None,
        vocab_size: int = 30523,
        embedding_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.options = options = options or Stage1TrainingOptions()

        # 1. Networks, in the order of the original state dict.
        width = config.qformer.width
        self.add_query_tokens(config)
        self.temp = nn.Parameter(torch.tensor(float(options.temperature)))
        self.add_encoder(vocab_size, options.lm_head)
        self.Qformer.copy_text_to_query()
        self.text_proj = nn.Linear(width, options.embed_dim)
        self.vision_proj = nn.Linear(width, options.embed_dim)
        self.embedding_head: nn.Linear | None = None
        if embedding_dim is not None:
            self.embedding_head = nn.Linear(config.num_query * width, embedding_dim)

        # 2. What is frozen.
        for name, parameter in self.Qformer.named_parameters():
            if "cls.predictions" in name:  # without the word table, which its decoder shares
                parameter.requires_grad_(False)
        if options.freeze_vit:
            self.visual_encoder.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """As usual, except that a frozen vision encoder stays in eval mode."""
        super().train(mode)
        if self.options.freeze_vit:
            self.visual_encoder.eval()
        return self

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Word pieces `[B, T]` that begin with `[CLS]` → normalised features `[B, embed_dim]`."""
        states_BTD = self.Qformer(input_ids=input_ids, attention_mask=attention_mask)
        return project_and_normalize(self.text_proj, states_BTD[:, 0])

    def forward(
        self,
        images: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        vit_features: Tensor | None = None,
        target_embedding: Tensor | None = None,
    ) -> Stage1Output:
        """Contrastive loss of a batch of pairs, plus the embedding loss if there is a target.

        images: normalised pixels `[B, 3, S, S]`; None with `vit_features`.
        input_ids: `[B, T]`.
        attention_mask: `[B, T]`, 0 for padding.
        vit_features: output of the vision encoder `[B, N, W]`, before `ln_vision`.
        target_embedding: `[B, embedding_dim]`.
        """
        # 1. Features; an image's are those of its last query.
        if vit_features is None:
            vit_features = self.vit_features(images)
        query_output = self.query_features_from(vit_features)
        query_feats = project_and_normalize(self.vision_proj, query_output)
        image_feats = query_feats[:, -1]
        text_feats = self.text_features(input_ids, attention_mask)

        # 2. Contrast with the other modality's features of all processes; row n of this process
        #    belongs to column rank · B + n.
        sim_i2t = similarities(image_feats, self._gather(text_feats)) / self.temp
        sim_t2i = similarities(text_feats, self._gather(image_feats)) / self.temp
        rank = dist.get_rank() if dist.is_initialized() else 0
        n_images = len(image_feats)
        targets = rank * n_images + torch.arange(n_images, device=sim_i2t.device)
        smoothing = self.options.label_smoothing
        loss_i2t = F.cross_entropy(sim_i2t, targets, label_smoothing=smoothing)
        loss_t2i = F.cross_entropy(sim_t2i, targets, label_smoothing=smoothing)
        loss_itc = (loss_i2t + loss_t2i) / 2

        # 3. Regression of an embedding (ours).
        loss = self.options.itc_weight * loss_itc
        loss_embedding = None
        if target_embedding is not None:
            loss_embedding = self._embedding_loss(query_output, target_embedding)
            loss = loss + self.options.embedding_weight * loss_embedding
        return Stage1Output(
            loss=loss,
            loss_itc=loss_itc,
            loss_embedding=loss_embedding,
            sim_i2t=sim_i2t,
            sim_t2i=sim_t2i,
            targets=targets,
            query_output=query_output,
            query_feats=query_feats,
            text_feats=text_feats,
        )

    def _embedding_loss(self, query_BQD: Tensor, target: Tensor) -> Tensor:
        """Squared error of the embedding that the head reads from the first k queries.

        In training k is uniform in 1..32 for each image, so that early codes carry the most.
        """
        assert self.embedding_head is not None, (
            "a model with a target embedding needs embedding_dim"
        )
        if self.training:
            n_images, n_queries, _ = query_BQD.shape
            lengths = torch.randint(1, n_queries + 1, (n_images,), device=query_BQD.device)
            query_BQD = keep_first_rows(query_BQD, lengths)
        embedding = self.embedding_head(query_BQD.flatten(1))
        return F.mse_loss(embedding.float(), target.float())

    def _gather(self, features: Tensor) -> Tensor:
        """Features of all processes in rank order `[B · processes, E]`."""
        keep_gradient = self.options.gather_gradient
        if keep_gradient is None:
            keep_gradient = not dist.is_initialized()
        if not keep_gradient:
            features = features.detach()
        if not dist.is_initialized():
            return features
        return _Gather.apply(features.contiguous())


class _Gather(torch.autograd.Function):
    """Rows of all processes; gradients go back to each row's process.

    torch's own gather with gradients is deprecated.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> Tensor:
        # Every process has a part of the gradient of every row.
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def project_and_normalize(projection: nn.Linear, features: Tensor) -> Tensor:
    """`[..., D]` → unit vectors `[..., E]`, in the precision of the projection's weights."""
    with torch.autocast(features.device.type, enabled=False):
        return F.normalize(projection(features.to(projection.weight.dtype)), dim=-1)


def similarities(rows_BE: Tensor, columns_NE: Tensor) -> Tensor:
    """Scalar products `[B, N]`, in the precision of the arguments, at least fp32."""
    if rows_BE.dtype.itemsize < 4:
        rows_BE = rows_BE.float()
    if columns_NE.dtype.itemsize < 4:
        columns_NE = columns_NE.float()
    with torch.autocast(rows_BE.device.type, enabled=False):
        return rows_BE @ columns_NE.T


# ---- stage 2: the base of both tokenizers' models


@dataclass
class Stage2Output:
    """Losses and activations of a batch; the three weighted losses add up to `loss`."""

    loss: Tensor  # []
    loss_embed: Tensor  # [], codebook
    loss_recon_s: Tensor  # [], Q-Former output
    loss_distil: Tensor  # [], embeddings
    loss_embed_raw: Tensor  # [], codebook, unweighted
    indices: Tensor | None  # codes [B, Q]; None: the quantizer was bypassed
    pre_quant: Tensor  # [B, Q, d], before the quantizer
    quant: Tensor  # [B, Q, d], input of the decoder
    query_output: Tensor  # [B, Q, D], output of the Q-Former
    query_up: Tensor  # [B, Q, D], output of `decode_task_layer`
    recon_s: Tensor | None  # [B, Q, D]; None: the model has no blocks for it
    tokens: Tensor  # [B, Q, D], output of the decoder's blocks
    embeds: Tensor  # embeddings as of `decode`
    target: Tensor  # target of `embeds`


@dataclass
class Stage2TrainingOptions:
    """Options of both models' training. Ours, off by default: all but `frozen_dropout`.

    Attributes:
        ema_decay: of a moving-average codebook instead of the codebook loss.
        freeze_qformer: False trains `Qformer`, `query_tokens` and `ln_vision` too (the vision
            encoder is always frozen).
        frozen_dropout: leave the frozen Q-Former in train mode, as in the original.
        corrupt: in training a fraction of each image's codes, uniform in [0, corrupt], is replaced
            by random ones before decoding, so that the decoder is robust to a language model's
            errors.
        nested: in training the probability that an image is decoded from its first k codes only, k
            uniform, so that early codes carry the most; the rows after them are zeros.
    """

    ema_decay: float | None = non_negative(None, maximum=0.999999)
    freeze_qformer: bool = True
    frozen_dropout: bool = True
    corrupt: float = fraction(0.0)
    nested: float = fraction(0.0)


class Stage2Base(SeedTokenizer):
    """A frozen encoder, a codebook and a decoder; a mixin that adds losses to a tokenizer's class.

        loss = 5 · codebook
             + 2 · (1 - cosine to the Q-Former's output)
             + 0.5 · squared error of the decoder's embeddings

    As in the original, the frozen Q-Former stays in train mode, so dropout makes codes and targets
    noisy. Ours, off by default: warm-up without quantizer, and most `options`.
    """

    weights: Stage2Weights | Seed1Stage2Weights
    distil_weight: float  # factor of the embeddings' error
    options: Stage2TrainingOptions

    def __init__(
        self, config: Seed1Config | Seed2Config, options: Stage2TrainingOptions | None = None
    ) -> None:
        super().__init__(config)
        self.options = options or Stage2TrainingOptions()
        if self.options.ema_decay is not None:
            self.quantize.start_averages(self.options.ema_decay)
        self.visual_encoder.requires_grad_(False)
        if self.options.freeze_qformer:
            self.ln_vision.requires_grad_(False)
            self.Qformer.requires_grad_(False)
            self.query_tokens.requires_grad_(False)
        self.train()

    def codebook_points(self, images: Tensor) -> Tensor:
        """Features before the quantizer `[B, Q, d]`, for `training.codebook.CodebookTask`."""
        return self.pre_quant(images)

    def train(self, mode: bool = True) -> Self:
        """As usual, but frozen encoders stay in eval mode.

        Frozen are the vision and the text encoder, and the Q-Former without `frozen_dropout`. As in
        the original, SEED-2's CLIP is not among them.
        """
        super().train(mode)
        in_eval_mode = ["visual_encoder", "text_encoder"]
        if self.options.freeze_qformer and not self.options.frozen_dropout:
            in_eval_mode.append("Qformer")
        # A model need not have them all.
        for name, child in self.named_children():
            if name in in_eval_mode:
                child.eval()
        return self

    def forward(
        self,
        images: Tensor | None,
        target: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        vit_features: Tensor | None = None,
        quantize: bool = True,
    ) -> Stage2Output:
        """Losses and activations of a batch.

        images: normalised pixels `[B, 3, S, S]`; None with `vit_features`.
        target: target of the decoder's embeddings; None: `target_of` images and captions.
        input_ids: captions `[B, T]`, for `target_of`.
        vit_features: output of the vision encoder `[B, N, W]`, before `ln_vision`.
        quantize: False decodes the features themselves (warm-up before `quantize.init_from`).
        """
        # 1. Encoder and target.
        if vit_features is None:
            vit_features = self.vit_features(images)
        query_output = self.query_features_from(vit_features)
        if target is None:
            target = self.target_of(images, input_ids)
        pre_quant = self.encode_task_layer(query_output)

        # 2. Codebook.
        if quantize:
            quant, loss_embed_raw, indices = self.quantize(pre_quant)
            quant = self.corrupt_codes(quant)
            quant = self.keep_prefix(quant)
        else:
            quant = self.quantize.prepare(pre_quant)
            loss_embed_raw = pre_quant.new_zeros(())
            indices = None
        loss_embed = self.weights.embed * loss_embed_raw

        # 3. Reconstruction of the Q-Former's output.
        query_up = self.decode_task_layer(quant)
        recon_s = None
        loss_recon = query_up.new_zeros(())
        if hasattr(self, "blocks"):
            recon_s = self.rebuild_queries(query_up)
            distance = (1 - cosine(recon_s, query_output.detach())).mean()
            loss_recon = self.weights.recon_s * distance

        # 4. Embeddings.
        tokens = self.decoder_tokens(query_up)
        embeds = self.project(tokens)
        loss_distil = self.distil_weight * F.mse_loss(embeds.float(), target.float())
        return Stage2Output(
            loss=loss_embed + loss_recon + loss_distil,
            loss_embed=loss_embed,
            loss_recon_s=loss_recon,
            loss_distil=loss_distil,
            loss_embed_raw=loss_embed_raw,
            indices=indices,
            pre_quant=pre_quant,
            quant=quant,
            query_output=query_output,
            query_up=query_up,
            recon_s=recon_s,
            tokens=tokens,
            embeds=embeds,
            target=target,
        )

    def target_of(self, images: Tensor | None, input_ids: Tensor | None) -> Tensor:
        """The frozen target encoder's output for images or captions, without gradient."""
        raise NotImplementedError

    def corrupt_codes(self, quant: Tensor) -> Tensor:
        """Codebook rows `[B, 32, d]`, in training some of them replaced (see `corrupt`)."""
        if not (self.training and self.options.corrupt):
            return quant
        device = quant.device
        n_images, n_codes, _ = quant.shape
        shape = (n_images, n_codes)

        # 1. Which codes are replaced: of each image another fraction.
        fraction = self.options.corrupt * torch.rand(n_images, 1, device=device)
        is_replaced = torch.rand(shape, device=device) < fraction  # [B, Q]

        # 2. By which: with sections by others of the same position, because these are the codes
        #    that a language model confuses.
        codes = torch.randint(self.quantize.size, shape, device=device)
        n_sections = self.quantize.sections
        if n_sections > 1:
            section_size = self.quantize.size // n_sections
            section_starts = section_size * torch.arange(n_sections, device=device)
            codes = codes % section_size + section_starts
        replacements = self.quantize.lookup(codes).detach().to(quant.dtype)
        return torch.where(is_replaced[..., None], replacements, quant)

    def keep_prefix(self, quant: Tensor) -> Tensor:
        """Codebook rows `[B, 32, d]`, in training of some images only the first (see `nested`)."""
        if not (self.training and self.options.nested):
            return quant
        n_images, n_codes, _ = quant.shape
        device = quant.device
        # A prefix of each image, and which images are decoded from all of their codes anyway.
        prefixes = torch.randint(1, n_codes + 1, (n_images,), device=device)
        is_complete = torch.rand(n_images, device=device) >= self.options.nested
        lengths = torch.where(is_complete, n_codes, prefixes)
        return keep_first_rows(quant, lengths)

    def load_stage1(
        self, state: Mapping[str, Tensor], source: str = "the stage-1 model"
    ) -> LoadReport:
        """Load the encoder from a stage-1 state dict, which may lack the frozen vision encoder."""
        names = list(self.state_dict())
        encoder_names = {name for name in names if name.split(".")[0] in ENCODER_PARTS}
        encoder = {name: value for name, value in state.items() if name in encoder_names}
        has_vision = any(name.startswith(VISION) for name in encoder)
        # Everything else keeps its start values; the frozen vision encoder is loaded from its file.
        optional: list[str] = []
        for name in names:
            is_vision = name.startswith(VISION)
            if name not in encoder_names or (is_vision and not has_vision):
                optional.append(name)
        return assign_strictly(self, encoder, source, allow_missing=optional)


# ---- stage 2 of SEED-2


@dataclass(frozen=True)
class Stage2Weights:
    """Factor of each loss term."""

    embed: float = non_negative(5.0)
    recon_s: float = non_negative(2.0)
    distil_image: float = non_negative(0.5)


class Stage2Model(Stage2Base, Seed2Tokenizer):
    """Codes are trained towards a frozen CLIP's image embedding, or the vision encoder's own.

    config: the published training code used `use_qformer_image=True, reverse_depth=4`.
    clip_model: frozen model whose `.image_embeds` are the target when `forward` gets none.
    """

    weights: Stage2Weights

    def __init__(
        self,
        config: Seed2Config,
        *,
        weights: Stage2Weights | None = None,
        clip_model: nn.Module | None = None,
        options: Stage2TrainingOptions | None = None,
    ) -> None:
        super().__init__(config, options)
        self.weights = weights or Stage2Weights()
        self.distil_weight = self.weights.distil_image
        if clip_model is not None:
            clip_model.requires_grad_(False).train()
        self.clip_model = clip_model

    @torch.no_grad()
    def target_of(self, images: Tensor | None, input_ids: Tensor | None = None) -> Tensor:
        """Image embeddings `[B, E]` of normalised pixels, by `config.alignment_target`."""
        if images is not None and self.config.alignment_target == "encoder":
            return self.visual_encoder.features_and_pooled(images)[1]
        if self.clip_model is None or images is None:
            raise ConfigError(
                "Stage 2 needs a target image embedding: give clip_model or samples with a target."
            )
        pixels = self.visual_encoder.preprocessing.convert(
            images, clip_preprocessing(self.clip_model)
        )
        return self.clip_model(pixels).image_embeds


def clip_preprocessing(clip: nn.Module) -> ImageTransform:
    """Of a target CLIP, for `ImageTransform.convert`; of a stand-in without sizes the default."""
    sizes = getattr(clip, "config", None)
    return seed_image_processor(getattr(sizes, "image_size", 224))


# ---- stage 2 of SEED-1


@dataclass(frozen=True)
class Seed1Stage2Weights:
    """Factor of each loss term."""

    embed: float = non_negative(5.0)
    recon_s: float = non_negative(2.0)
    distil_text: float = non_negative(0.5)


class Seed1Stage2Model(Stage2Base, Seed1Tokenizer):
    """Codes are trained towards the caption's text features, the condition of Stable Diffusion 1.

    SEED-1's own training code was never published; this is the text branch in its successor's code.

    text_encoder: Stable Diffusion's frozen `CLIPTextModel`, whose `last_hidden_state` of the
        caption is the target when `forward` gets none.
    """

    weights: Seed1Stage2Weights

    def __init__(
        self,
        config: Seed1Config,
        *,
        weights: Seed1Stage2Weights | None = None,
        text_encoder: PreTrainedModel | None = None,
        options: Stage2TrainingOptions | None = None,
    ) -> None:
        super().__init__(config, options)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_query, config.qformer.width))
        self.blocks = decode_blocks(config)
        self.weights = weights or Seed1Stage2Weights()
        self.distil_weight = self.weights.distil_text
        if text_encoder is not None and text_encoder.config.hidden_size != config.text_features_dim:
            raise ConfigError(
                f"The text encoder's features are {text_encoder.config.hidden_size} wide, the "
                f"tokenizer's embeddings {config.text_features_dim}: they do not belong together."
            )
        if text_encoder is not None:
            text_encoder.requires_grad_(False).eval()
        self.text_encoder = text_encoder

    @torch.no_grad()
    def target_of(self, images: Tensor | None, input_ids: Tensor | None = None) -> Tensor:
        """Captions `[B, text_tokens]` int64 → text features `[B, text_tokens, text_features_dim]`.

        Captions are padded by Stable Diffusion's tokenizer; as there, padding is attended.
        """
        if self.text_encoder is None or input_ids is None:
            raise ConfigError(
                "Stage 2 of SEED-1 needs target text features: give text_encoder or samples with a "
                "target."
            )
        return self.text_encoder(input_ids=input_ids).last_hidden_state
