"""Training of the SEED tokenizers: stage 1 (contrastive with captions), stage 2 of SEED-2 and of SEED-1 (codebook).

Parameter names are the original training checkpoints', so each stage takes the earlier one's tensors by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.nn.eva import EvaVit
from seed_multimodal.nn.layers import LayerNorm
from seed_multimodal.seed.checkpoints import ENCODER_PARTS, VISION
from seed_multimodal.seed.configuration import Seed1Config, Seed2Config
from seed_multimodal.seed.modeling import (
    Seed1Tokenizer,
    Seed2Tokenizer,
    SeedTokenizer,
    decode_blocks,
    keep_first_rows,
)
from seed_multimodal.seed.qformer import QFormer
from seed_multimodal.settings import setting
from seed_multimodal.weights import LoadReport, assign_strictly

# ---- stage 1


@dataclass
class Stage1Output:
    """Losses `[]`, logits `[B, B · processes]` (already divided by the temperature) and normalised features."""

    loss: Tensor
    loss_itc: Tensor
    loss_embedding: Tensor | None
    sim_i2t: Tensor
    sim_t2i: Tensor
    targets: Tensor
    query_output: Tensor
    query_feats: Tensor
    text_feats: Tensor


class Stage1Model(nn.Module):
    """Stage 1: the causal Q-Former is trained with a contrastive loss to encode an image into 32 ordered queries.

    Only the last query, which attends to all others, is compared with the caption's first token. Projections and logits
    are always fp32: with a temperature of 0.07, bf16 products cause several per cent of error in the gradient. Ours,
    off by default: `embedding_dim` adds a head that regresses an image embedding from the first k queries.

    Args:
        config: sizes; only `vit`, `qformer` and `num_query` matter here.
        vocab_size: word pieces of the text tokenizer (original: BERT's 30522 and `[DEC]`).
        lm_head: keep BERT's prediction head: unused and frozen, but part of the original checkpoint.
        gather_gradient: whether features of other processes carry gradient; None, as in the original: not, nor a
            process's own features if there is a process group.
    """

    def __init__(
        self,
        config: Seed2Config,
        *,
        vocab_size: int = 30523,
        embed_dim: int = 256,
        temperature: float = 0.07,
        label_smoothing: float = 0.1,
        lm_head: bool = True,
        freeze_vit: bool = True,
        gather_gradient: bool | None = None,
        embedding_dim: int | None = None,
        embedding_weight: float = 1.0,
    ) -> None:
        super().__init__()
        width = config.qformer.width
        self.config, self.label_smoothing, self.freeze_vit = config, label_smoothing, freeze_vit
        self.gather_gradient, self.embedding_weight = gather_gradient, embedding_weight
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query, width).normal_(std=0.02))
        self.temp = nn.Parameter(torch.tensor(float(temperature)))
        self.visual_encoder = EvaVit(config.vit)
        self.ln_vision = LayerNorm(config.vit.width)
        self.Qformer = QFormer(config.qformer, config.vit.width, vocab_size, lm_head)
        self.Qformer.copy_text_to_query()
        self.text_proj = nn.Linear(width, embed_dim)
        self.vision_proj = nn.Linear(width, embed_dim)
        self.embedding_head = (
            nn.Linear(config.num_query * width, embedding_dim)
            if embedding_dim is not None
            else None
        )
        for name, parameter in self.Qformer.named_parameters():
            if "cls.predictions" in name:  # without the word table, which its decoder shares
                parameter.requires_grad_(False)
        if freeze_vit:
            self.visual_encoder.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """As usual, except that a frozen vision encoder stays in eval mode."""
        super().train(mode)
        if self.freeze_vit:
            self.visual_encoder.eval()
        return self

    def vit_features(self, images: Tensor) -> Tensor:
        """Pixels `[B, 3, S, S]` → output of the vision encoder `[B, N, W]`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_vit):
            return self.visual_encoder(images)

    def query_features(self, vit_BNW: Tensor) -> Tensor:
        """Output of the vision encoder `[B, N, W]` → Q-Former output `[B, 32, D]`."""
        return self.Qformer(self.query_tokens.expand(len(vit_BNW), -1, -1), self.ln_vision(vit_BNW))

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Word pieces `[B, T]` (first one `[CLS]`) → normalised features `[B, embed_dim]`."""
        return unit_rows(
            self.text_proj, self.Qformer(input_ids=input_ids, attention_mask=attention_mask)[:, 0]
        )

    def forward(
        self,
        images: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        vit_features: Tensor | None = None,
        target_embedding: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Stage1Output:
        """Contrastive loss of a batch of pairs, plus the embedding loss if a target is given.

        Args:
            images: normalised pixels `[B, 3, S, S]`, or None with `vit_features` `[B, N, W]` (before `ln_vision`).
            input_ids: `[B, T]`; `attention_mask` `[B, T]` with 0 for padding.
            target_embedding: `[B, embedding_dim]`. In training each image shows only its first k queries, k uniform
                in 1..32 (drawn from `generator`), so that early codes carry the most.
        """
        query_output = self.query_features(
            self.vit_features(images) if vit_features is None else vit_features
        )
        query_feats = unit_rows(self.vision_proj, query_output)
        text_feats = self.text_features(input_ids, attention_mask)
        image_feats = query_feats[:, -1]
        sim_i2t = similarities(image_feats, self._gather(text_feats)) / self.temp
        sim_t2i = similarities(text_feats, self._gather(image_feats)) / self.temp
        rank = dist.get_rank() if _has_group() else 0
        targets = rank * len(image_feats) + torch.arange(len(image_feats), device=sim_i2t.device)
        loss_itc = (
            F.cross_entropy(sim_i2t, targets, label_smoothing=self.label_smoothing)
            + F.cross_entropy(sim_t2i, targets, label_smoothing=self.label_smoothing)
        ) / 2
        loss, loss_embedding = loss_itc, None
        if target_embedding is not None:
            loss_embedding = self._embedding_loss(query_output, target_embedding, generator)
            loss = loss + self.embedding_weight * loss_embedding
        return Stage1Output(
            loss,
            loss_itc,
            loss_embedding,
            sim_i2t,
            sim_t2i,
            targets,
            query_output,
            query_feats,
            text_feats,
        )

    def _embedding_loss(
        self, query_BQD: Tensor, target: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        if self.training:
            device = query_BQD.device if generator is None else generator.device
            keep = torch.randint(
                1, query_BQD.shape[1] + 1, (len(query_BQD),), generator=generator, device=device
            )
            query_BQD = keep_first_rows(query_BQD, keep.to(query_BQD.device))
        assert self.embedding_head is not None, (
            "a model with a target embedding needs embedding_dim"
        )
        return F.mse_loss(self.embedding_head(query_BQD.flatten(1)).float(), target.float())

    def _gather(self, features: Tensor) -> Tensor:
        """Features of all processes in rank order `[B · processes, E]`."""
        with_gradient = not _has_group() if self.gather_gradient is None else self.gather_gradient
        features = features if with_gradient else features.detach()
        return _Gather.apply(features.contiguous()) if _has_group() else features


class _Gather(torch.autograd.Function):
    """Rows of all processes, with gradients to where each came from (torch's own such gather is deprecated)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def unit_rows(projection: nn.Linear, features: Tensor) -> Tensor:
    """`[..., D]` projected to `[..., E]` and normalised, in the precision of the projection's weights."""
    with torch.autocast(features.device.type, enabled=False):
        return F.normalize(projection(features.to(projection.weight.dtype)), dim=-1)


def similarities(rows_BE: Tensor, others_NE: Tensor) -> Tensor:
    """Scalar products `[B, N]` of rows in their own precision, at least fp32."""
    rows, others = (
        part.float() if part.dtype.itemsize < 4 else part for part in (rows_BE, others_NE)
    )
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ others.T


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


# ---- stage 2: what both tokenizers share


@dataclass
class Stage2Output:
    """Weighted losses `[]` that add up to `loss`, and the activations they came from.

    `loss_embed_raw` is unweighted. `indices` is None when the quantizer was bypassed, `recon_s` without its blocks;
    `tokens` and `embeds` are the decoder's, `target` is what `embeds` should be.
    """

    loss: Tensor
    loss_embed: Tensor
    loss_recon_s: Tensor
    loss_distil: Tensor
    loss_readout: Tensor
    loss_embed_raw: Tensor
    indices: Tensor | None
    pre_quant: Tensor
    quant: Tensor
    query_output: Tensor
    query_up: Tensor
    recon_s: Tensor | None
    tokens: Tensor
    embeds: Tensor
    target: Tensor


class Stage2Base(SeedTokenizer):
    """A frozen encoder, a codebook and a decoder; mixed in before the tokenizer's class, which it adds losses to.

        loss = 5 · codebook + 2 · (1 - cosine to the Q-Former's output) + 0.5 · MSE of the decoder's embeddings

    As in the original, the frozen Q-Former stays in train mode, so dropout makes codes and targets noisy. Ours, off by
    default: training the Q-Former, corrupted codes, prefixes of codes, and warm-up without quantizer.

    Args:
        ema_decay: moving-average codebook instead of the codebook loss.
        freeze_qformer: False trains `Qformer`, `query_tokens` and `ln_vision` too (the vision encoder never).
        frozen_dropout: leave the frozen Q-Former in train mode, as in the original.
        corrupt: each sample gets a fraction of its codes, uniform in [0, corrupt], replaced by random ones before
            decoding (training mode only), so that the decoder is robust to a language model's errors.
        nested: probability that a sample is decoded from its first k codes only, k uniform (training mode only), so
            that early codes carry the most; the rows after them are zeros.
    """

    weights: Any

    def __init__(
        self,
        config: Any,
        *,
        ema_decay: float | None = None,
        freeze_qformer: bool = True,
        frozen_dropout: bool = True,
        corrupt: float = 0.0,
        nested: float = 0.0,
    ) -> None:
        super().__init__(config, ema_decay=ema_decay)  # type: ignore[call-arg]
        self.freeze_qformer, self.frozen_dropout = freeze_qformer, frozen_dropout
        self.corrupt, self.nested = corrupt, nested
        self.visual_encoder.requires_grad_(False)
        if freeze_qformer:
            for part in (self.ln_vision, self.Qformer, self.query_tokens):
                part.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """As usual, but vision and text encoder, and a frozen Q-Former if asked for, stay in eval mode (as in the
        original, SEED-2's CLIP does not)."""
        super().train(mode)
        quiet = ["visual_encoder", "text_encoder"]
        quiet += ["Qformer"] if self.freeze_qformer and not self.frozen_dropout else []
        for name, part in self.named_children():
            if name in quiet:
                part.eval()
        return self

    def encoder_output(self, images: Tensor | None, vit_features: Tensor | None = None) -> Tensor:
        """Pixels, or output of the vision encoder `[B, N, W]`, → Q-Former output `[B, 32, D]`."""
        with torch.no_grad():
            vit = self.visual_encoder(images) if vit_features is None else vit_features
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_qformer):
            return self.query_features_from(vit)

    def forward(
        self,
        images: Tensor | None,
        target: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        vit_features: Tensor | None = None,
        quantize: bool = True,
        generator: torch.Generator | None = None,
    ) -> Any:
        """`Stage2Output` of a batch.

        Args:
            images: normalised pixels `[B, 3, S, S]`, or None with `vit_features` `[B, N, W]` (before `ln_vision`).
            target: what the decoder should predict; by default `target_of` the images or captions `input_ids`.
            quantize: False lets the features themselves through (warm-up before `quantize.init_from`).
            generator: draws the corruption.
        """
        query_features = self.encoder_output(images, vit_features)
        target = self.target_of(images, input_ids) if target is None else target
        pre_quant = self.encode_task_layer(query_features)
        if quantize:
            quant, embed_raw, indices = self.quantize(pre_quant)
            quant = self.keep_prefix(self.corrupt_codes(quant, generator), generator)
        else:
            quant, embed_raw, indices = (
                self.quantize.prepare(pre_quant),
                pre_quant.new_zeros(()),
                None,
            )
        query_up = self.decode_task_layer(quant)
        loss_embed, loss_recon, recon_s = (
            self.weights.embed * embed_raw,
            query_up.new_zeros(()),
            None,
        )
        if hasattr(self, "blocks"):
            recon_s = self.rebuild_queries(query_up)
            loss_recon = (
                self.weights.recon_s * (1 - cosine(recon_s, query_features.detach())).mean()
            )
        tokens = self.decoder_tokens(query_up)
        embeds = self.project(tokens)
        loss_distil = self.distil_weight * F.mse_loss(embeds.float(), target.float())
        loss_readout = self.readout_loss(embeds, target)
        return Stage2Output(
            loss_embed + loss_recon + loss_distil + loss_readout,
            loss_embed,
            loss_recon,
            loss_distil,
            loss_readout,
            embed_raw,
            indices,
            pre_quant,
            quant,
            query_features,
            query_up,
            recon_s,
            tokens,
            embeds,
            target,
        )

    @property
    def distil_weight(self) -> float:
        """Factor of the embeddings' error."""
        raise NotImplementedError

    def readout_loss(self, embeds: Tensor, target: Tensor) -> Tensor:
        """A further loss of the embeddings; none by default."""
        return embeds.new_zeros(())

    def target_of(self, images: Tensor | None, input_ids: Tensor | None) -> Tensor:
        """The frozen target encoder's output for images or captions, without gradient."""
        raise NotImplementedError

    def corrupt_codes(self, quant: Tensor, generator: torch.Generator | None) -> Tensor:
        """Codebook rows `[B, 32, d]`, in training some of them replaced (see `corrupt`)."""
        if not (self.training and self.corrupt):
            return quant
        device = quant.device if generator is None else generator.device
        shape = quant.shape[:2]
        fraction = self.corrupt * torch.rand(shape[0], 1, generator=generator, device=device)
        swap = (torch.rand(shape, generator=generator, device=device) < fraction).to(quant.device)
        codes = torch.randint(self.quantize.size, shape, generator=generator, device=device).to(
            quant.device
        )
        if (
            self.quantize.sections > 1
        ):  # others of the same position, which is what a language model confuses
            size = self.quantize.size // self.quantize.sections
            codes = codes % size + size * torch.arange(self.quantize.sections, device=codes.device)
        return torch.where(
            swap[..., None], self.quantize.lookup(codes).detach().to(quant.dtype), quant
        )

    def keep_prefix(self, quant: Tensor, generator: torch.Generator | None) -> Tensor:
        """Codebook rows `[B, 32, d]`, in training those of some samples only up to a position (see `nested`)."""
        if not (self.training and self.nested):
            return quant
        count, places = quant.shape[:2]
        device = quant.device if generator is None else generator.device
        keep = torch.randint(1, places + 1, (count, 1), generator=generator, device=device)
        whole = torch.rand(count, 1, generator=generator, device=device) >= self.nested
        return keep_first_rows(quant, torch.where(whole, places, keep).squeeze(1).to(quant.device))

    def load_stage1(
        self, state: Mapping[str, Tensor], source: str = "the stage-1 model"
    ) -> LoadReport:
        """Take the encoder by name from a stage-1 state dict, which may lack the frozen vision encoder."""
        own = self.state_dict()
        state = {
            name: value
            for name, value in state.items()
            if name in own and name.split(".")[0] in ENCODER_PARTS
        }
        rest = [name for name in own if name.split(".")[0] not in ENCODER_PARTS]
        if not any(name.startswith(VISION) for name in state):
            rest += [name for name in own if name.startswith(VISION)]
        return assign_strictly(self, state, source, allow_missing=rest)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine along the last axis without an epsilon, as in the original: `[..., D]` → `[...]`."""
    a, b = a.float(), b.float()
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


# ---- stage 2 of SEED-2


@dataclass(frozen=True)
class Stage2Weights:
    """Factor of each loss term; `readout` multiplies the read-out loss if a read-out matrix is given."""

    embed: float = setting(5.0, minimum=0)
    recon_s: float = setting(2.0, minimum=0)
    distil_image: float = setting(0.5, minimum=0)
    readout: float = setting(1.0, minimum=0)


class Stage2Model(Stage2Base, Seed2Tokenizer):
    """Codes towards a frozen CLIP's image embedding.

    Args:
        config: sizes; the published training code used `use_qformer_image=True, reverse_depth=4`.
        clip_model: frozen model whose output's `.image_embeds` is the target when `forward` gets none.
        readout_weight: `W` `[M, E]`; adds `mse(W ê, W e)`, for example a read-out of VAE latents (ours).
        training: see `Stage2Base`.
    """

    readout_weight: Tensor | None

    def __init__(
        self,
        config: Seed2Config,
        *,
        weights: Stage2Weights | None = None,
        clip_model: nn.Module | None = None,
        readout_weight: Tensor | None = None,
        **training: Any,
    ) -> None:
        super().__init__(config, **training)
        self.weights = weights or Stage2Weights()
        self.register_buffer("readout_weight", readout_weight, persistent=False)
        self.clip_model = (
            clip_model if clip_model is None else clip_model.requires_grad_(False).train()
        )

    @property
    def distil_weight(self) -> float:
        return self.weights.distil_image

    def readout_loss(self, embeds: Tensor, target: Tensor) -> Tensor:
        if self.readout_weight is None:
            return super().readout_loss(embeds, target)
        error = (embeds.float() - target.float()) @ self.readout_weight.float().T
        return self.weights.readout * error.square().mean()

    @torch.no_grad()
    def scale_start(self) -> None:
        """Random weights around the codebook and in the decoder that keep the size of what goes through them.

        PyTorch's, as in the original, shrink it at each layer, so codes have no effect for hundreds of steps.
        """
        for part in (
            self.encode_task_layer,
            self.decode_task_layer,
            getattr(self, "image_down", ()),
        ):
            gain = (
                2.0 if part is getattr(self, "image_down", None) else 1.0
            )  # ReLU lets half of it through
            for layer in part:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=(gain / layer.in_features) ** 0.5)
        nn.init.normal_(
            self.distill_image_proj.weight, std=0.3 * self.distill_image_proj.in_features**-0.5
        )
        nn.init.normal_(self.pos_embed_image, std=0.5)

    @torch.no_grad()
    def target_of(self, images: Tensor | None, input_ids: Tensor | None = None) -> Tensor:
        """Image embeddings `[B, E]` of normalised pixels."""
        if self.clip_model is None or images is None:
            raise ConfigError(
                "Stage 2 needs a target image embedding: give clip_model or samples with a target."
            )
        return self.clip_model(images).image_embeds


# ---- stage 2 of SEED-1


@dataclass(frozen=True)
class Seed1Stage2Weights:
    """Factor of each loss term."""

    embed: float = setting(5.0, minimum=0)
    recon_s: float = setting(2.0, minimum=0)
    distil_text: float = setting(0.5, minimum=0)


class Seed1Stage2Model(Stage2Base, Seed1Tokenizer):
    """Codes towards text features of the caption, the 77 x 768 states that Stable Diffusion 1 is conditioned on.
    SEED-1's own training code was never published; this is the text branch in its successor's code.

    Arguments as of `Stage2Model`; `text_encoder`: frozen `CLIPTextModel` (Stable Diffusion's) whose
    `last_hidden_state` of the caption is the target when `forward` gets none.
    """

    def __init__(
        self,
        config: Seed1Config,
        *,
        weights: Seed1Stage2Weights | None = None,
        text_encoder: nn.Module | None = None,
        **training: Any,
    ) -> None:
        super().__init__(config, **training)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_query, config.qformer.width))
        self.blocks = decode_blocks(config)
        self.weights = weights or Seed1Stage2Weights()
        if text_encoder is not None and text_encoder.config.hidden_size != config.text_features_dim:
            raise ConfigError(
                f"The text encoder's features are {text_encoder.config.hidden_size} wide, the "
                f"tokenizer's embeddings {config.text_features_dim}: they do not belong together."
            )
        self.text_encoder = (
            text_encoder if text_encoder is None else text_encoder.requires_grad_(False).eval()
        )

    @property
    def distil_weight(self) -> float:
        return self.weights.distil_text

    @torch.no_grad()
    def target_of(self, images: Tensor | None, input_ids: Tensor | None = None) -> Tensor:
        """Captions `[B, text_tokens]` int64, padded as by Stable Diffusion's tokenizer (padding is attended, as there)
        → text features `[B, text_tokens, text_features_dim]`."""
        if self.text_encoder is None or input_ids is None:
            raise ConfigError(
                "Stage 2 of SEED-1 needs target text features: give text_encoder or samples with a "
                "target."
            )
        return self.text_encoder(input_ids=input_ids).last_hidden_state
