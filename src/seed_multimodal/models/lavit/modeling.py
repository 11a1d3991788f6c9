"""LaVIT's dynamic tokenizer: images → a variable number of tokens.

    pixels ─ vision encoder ─► features ─ token selector ─► kept patches ─ token merger ─► rows
    rows ─ projector ─► LLM input
    rows ─ quantizer ─► codes

    tokenizer = load_dynamic_tokenizer(folder)             # checkpoints.py
    codes = tokenizer.encode(pixels, mode="threshold")     # [LongTensor[n]], 0 … codebook_size − 1

The vision encoder (the original: EVA, without its final norm) is any of `nn.vision.registry`; its
class tokens are not read. The language model has continuous
rows as input and codes as output; the original model has a token merger for each. With
half-precision layers everything runs under autocast; residual streams stay fp32, as in the
original, and codes are compared in fp32 (bf16 changes some codes).

Source: arXiv 2309.04669 and its code; parameter names are the original ones. Shape suffixes: B
batch, H heads, N patches (Q of queries, K of keys), D vision width, T rows of all images, C code
width.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Self, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.images.transforms import ImageTransform
from seed_multimodal.nn.layers import (
    Attend,
    Attention,
    LayerNorm,
    Mlp,
    cast_layers,
    checkpoint_layers,
    multi_head,
    task_layer,
)
from seed_multimodal.nn.pretrained import PretrainedNetwork
from seed_multimodal.nn.quantizer import VectorQuantizer
from seed_multimodal.nn.vision.eva import EvaConfig
from seed_multimodal.nn.vision.registry import AnyVisionConfig
from seed_multimodal.settings import non_negative, positive

MODES = ("draw", "threshold")  # of the token selection, see `choose`
EPSILON = 1e-6  # of `masked_softmax`
NORM_EPSILON = 1e-5
# One for the batch, one for each image, or None: torch's global one.
Generators = torch.Generator | Sequence[torch.Generator] | None


class SelectionOptions(TypedDict, total=False):
    """Arguments of `choose`."""

    mode: str
    generator: Generators
    noise: Tensor | None


@dataclass(frozen=True)
class LavitTokenizerConfig:
    """Sizes of the dynamic tokenizer; the defaults are the original ones.

    Attributes:
        vit_head: width of the classification head that the original's EVA stores with a final norm,
            both unused; 0: no head, as in other vision encoders.
        llm_width: of the projector's output; 0: no projector.
    """

    vit: AnyVisionConfig = field(default_factory=lambda: EvaConfig(depth=40))
    vit_head: int = non_negative(1024)
    merger_depth: int = positive(12)
    merger_heads: int = positive(16)
    merger_mlp_width: int = positive(6144)
    codebook_size: int = positive(16384)
    codebook_dim: int = positive(32)
    llm_width: int = non_negative(4096)
    grad_checkpoint: bool = False


# ---- token selector


class Selection(NamedTuple):
    """Log-probabilities of (keep, drop) `[B, N, 2]`, decisions `[B, N]` (1: kept); fp32."""

    log_probs_BN2: Tensor
    keep_BN: Tensor


class TokenSelector(nn.Module):
    """Decides by each patch's features, half of which are replaced by their mean over the image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(LayerNorm(width, eps=1e-5), nn.Linear(width, width), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
            nn.LogSoftmax(dim=-1),
        )

    def forward(self, x_BND: Tensor, policy_BN1: Tensor | None = None) -> Tensor:
        """Features `[B, N, D]` → log-probabilities `[B, N, 2]` (keep first), fp32.

        policy_BN1: weights of the patches in the mean; None: equal ones.
        """
        # Half of the channels stay the patch's, the other half become the image's mean.
        local, shared = self.in_conv(x_BND.float()).chunk(2, dim=-1)  # [B, N, D / 2] each
        if policy_BN1 is None:
            policy_BN1 = torch.ones_like(shared[..., :1], dtype=torch.float32)
        mean = (shared.float() * policy_BN1).sum(1, True) / policy_BN1.sum(1, True)
        mean = mean.to(local.dtype).expand_as(local)
        return self.out_conv(torch.cat([local, mean], dim=-1)).float()


def choose(
    log_probs_BN2: Tensor,
    *,
    mode: str = "draw",
    generator: Generators = None,
    noise: Tensor | None = None,
) -> Selection:
    """The hard decision, with the gradient of the soft one; an image keeps at least one patch.

    Args:
        mode: `draw` keeps each patch with its probability (Gumbel noise at temperature 1; at
            inference, too, as in the original); `threshold` keeps those with p > 0.5.
        generator: with one for each image, its tokens do not depend on the batch.
        noise: Gumbel noise `[B, N, 2]` instead of a draw.
    """
    if mode not in MODES:
        raise ConfigError(f"Unknown selection {mode!r}: use {' or '.join(MODES)}.")

    # 1. Soft decisions in 0…1, and the hard ones.
    log_probs_BN2 = log_probs_BN2.float()
    if mode == "draw":
        if noise is None:
            noise = gumbel_noise(log_probs_BN2.shape, log_probs_BN2.device, generator)
        soft_BN2 = (log_probs_BN2 + noise.to(log_probs_BN2)).softmax(-1)
        hard_BN = (soft_BN2.argmax(-1) == 0).float()
        soft_BN = soft_BN2[..., 0]
    else:
        soft_BN = log_probs_BN2[..., 0].exp()
        hard_BN = (soft_BN > 0.5).float()

    # 2. An image without a kept patch keeps its most probable one.
    best_BN = F.one_hot(log_probs_BN2[..., 0].argmax(1), hard_BN.shape[1])
    hard_BN = hard_BN + best_BN * (hard_BN.sum(1, keepdim=True) == 0)

    # 3. Straight through: the value of the hard decision, the gradient of the soft one.
    if soft_BN.requires_grad:
        hard_BN = hard_BN + (soft_BN - soft_BN.detach())
    return Selection(log_probs_BN2, hard_BN)


def gumbel_noise(shape: Sequence[int], device: torch.device, generator: Generators) -> Tensor:
    """Standard Gumbel noise, fp32, drawn in the order of `torch.nn.functional.gumbel_softmax`."""
    if generator is None or isinstance(generator, torch.Generator):
        generator_device = device if generator is None else generator.device
        exponential = torch.empty(tuple(shape), dtype=torch.float32, device=generator_device)
        exponential.exponential_(generator=generator)
        tiny = torch.finfo(exponential.dtype).tiny
        return -exponential.clamp_min_(tiny).log().to(device)
    images = [gumbel_noise(shape[1:], device, image_generator) for image_generator in generator]
    return torch.stack(images)


# ---- token merger


def masked_softmax(scores_BHQK: Tensor, allowed: Tensor) -> Tensor:
    """`e = exp(score − max over all keys) · allowed`, `w = (e + ε / K) / (Σ e + ε)`, in fp32.

    Gradients flow into `allowed` (1 visible, 0 masked, broadcast); a query without a visible key
    averages everything.
    """
    # The maximum is that of all keys, masked ones included.
    scores = scores_BHQK.float()
    weights = (scores - scores.amax(-1, keepdim=True).detach()).exp() * allowed
    weights = (weights + EPSILON / weights.shape[-1]) / (weights.sum(-1, keepdim=True) + EPSILON)
    return weights.to(scores_BHQK.dtype)


def masked_attention(q_BHNd: Tensor, k_BHNd: Tensor, v_BHNd: Tensor, attn_mask: Tensor) -> Tensor:
    """Attention with `masked_softmax`."""
    scale = q_BHNd.shape[-1] ** -0.5
    scores_BHQK = (q_BHNd * scale) @ k_BHNd.transpose(-1, -2)
    return masked_softmax(scores_BHQK, attn_mask).to(v_BHNd.dtype) @ v_BHNd


def causal_mask(keep_BN: Tensor) -> Tensor:
    """`[B, N]` → `[B, 1, N, N]`: a patch sees the kept patches before it, and itself."""
    # 1 on the diagonal: a dropped patch sees itself, too.
    self_NN = torch.eye(keep_BN.shape[1], dtype=keep_BN.dtype, device=keep_BN.device)
    return (keep_BN[:, None, None, :] * (1 - self_NN) + self_NN).tril()


def dropped_mask(keep_BN: Tensor) -> Tensor:
    """`[B, N]` → `[B, 1, 1, N]`: every patch sees the dropped ones."""
    return 1 - keep_BN[:, None, None, :]


class CrossAttention(nn.Module):
    """Attention to other tokens by `attend`, see `multi_head`."""

    def __init__(self, width: int, heads: int, attend: Attend | None) -> None:
        super().__init__()
        self.heads = heads
        self.attend = attend
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, source_BKD: Tensor, mask: Tensor) -> Tensor:
        """Queries `[B, N, D]`, sources `[B, K, D]` → `[B, N, D]`."""
        rows = self.query(x_BND), self.key(source_BKD), self.value(source_BKD)
        return self.proj(multi_head(*rows, self.heads, self.attend, attn_mask=mask))


class CrossBlock(nn.Module):
    """Self-attention, attention to other tokens without a norm of theirs, MLP; pre-norm.

    names: original ones of the two attentions. attend: of both.
    """

    names = ("self_attn", "cross_attn")
    attend: ClassVar[Attend | None] = None

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self_name, cross_name = self.names
        self.norm0 = LayerNorm(width, eps=NORM_EPSILON)
        self.add_module(self_name, Attention(width, heads, attend=self.attend))
        self.norm1 = LayerNorm(width, eps=NORM_EPSILON)
        self.add_module(cross_name, CrossAttention(width, heads, self.attend))
        self.norm2 = LayerNorm(width, eps=NORM_EPSILON)
        self.mlp = Mlp(width, mlp_width)

    def forward(
        self, x_BND: Tensor, source_BKD: Tensor, self_mask: Tensor | None, cross_mask: Tensor
    ) -> Tensor:
        """`[B, N, D]`, other tokens `[B, K, D]` → `[B, N, D]`."""
        self_attention, cross_attention = map(self.get_submodule, self.names)
        x_BND = x_BND + self_attention(self.norm0(x_BND), self_mask)
        x_BND = x_BND + cross_attention(self.norm1(x_BND), source_BKD, cross_mask)
        return x_BND + self.mlp(self.norm2(x_BND))


class MergerBlock(CrossBlock):
    """Attention to kept patches so far, and to dropped patches."""

    names = ("token_causal_attn", "token_cross_attn")
    attend = staticmethod(masked_attention)


class TokenMerger(nn.Module):
    """Folds the content of dropped patches into the kept ones.

    Rows of all patches are computed; only those of kept patches are used.
    """

    def __init__(self, config: LavitTokenizerConfig, width: int) -> None:
        """width: of the vision encoder."""
        super().__init__()
        self.blocks = nn.ModuleList(
            MergerBlock(width, config.merger_heads, config.merger_mlp_width)
            for _ in range(config.merger_depth)
        )
        self.ln_vision = LayerNorm(width, eps=NORM_EPSILON)
        self.norm = LayerNorm(width, eps=NORM_EPSILON)
        if config.grad_checkpoint:
            checkpoint_layers(self)

    def forward(self, features_BND: Tensor, keep_BN: Tensor) -> Tensor:
        """Raw features `[B, N, D]`, kept (1) or dropped (0) `[B, N]` → `[B, N, D]`, same dtype."""
        # Dropped patches are always read as they came in, not as the blocks change them.
        causal = causal_mask(keep_BN.float())
        dropped = dropped_mask(keep_BN.float())
        source_BND = self.ln_vision(features_BND)
        x_BND = features_BND
        for block in self.blocks:
            x_BND = block(x_BND, source_BND, causal, dropped)
        return self.norm(x_BND)


# ---- tokenizer


class DynamicTokenizer(PretrainedNetwork[LavitTokenizerConfig]):
    """Pixels → a list with one entry per image, of as many rows or codes as the image needs.

    `selection`: arguments of `choose`. `vit_proj`: to the language model's width; None in weights
    that only make codes.
    """

    config_class = LavitTokenizerConfig
    model_type = "lavit_tokenizer"
    config: LavitTokenizerConfig

    def __init__(self, config: LavitTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        # Names are those of the original's state dict.
        self.encoder = config.vit.build()
        width = self.encoder.width
        if config.vit_head:
            self.encoder.add_module("norm", LayerNorm(width, eps=1e-6))
            self.encoder.add_module("head", nn.Linear(width, config.vit_head))
        self.token_predictor = TokenSelector(width)
        self.causal_encoder = TokenMerger(config, width)
        self.quantize = VectorQuantizer(config.codebook_size, config.codebook_dim, unit_rows=True)
        self.encode_task_layer = task_layer(width, config.codebook_dim)
        self.vit_proj: nn.Linear | None
        projector = nn.Linear(width, config.llm_width) if config.llm_width else None
        self.register_module("vit_proj", projector)

    @property
    def transform(self) -> ImageTransform:
        """An image of any size → pixels of the vision encoder: its preprocessing."""
        return self.encoder.preprocessing

    @property
    def n_patches(self) -> int:
        """Patches N of an image, the most tokens that it can have."""
        return self.encoder.n_patches

    def cast(self, dtype: torch.dtype) -> Self:
        """Convert linear and convolution layers; the others stay as stored."""
        return cast_layers(self, dtype)

    def patch_features(self, pixels_B3HW: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, S, S]` → features of the patches `[B, N, D]`, fp32."""
        with self.precision():
            return self.encoder.patch_features(pixels_B3HW).float()

    def select(self, features_BND: Tensor, **selection: Unpack[SelectionOptions]) -> Selection:
        """Features → the decision about each patch; differentiable (straight through)."""
        with self.precision():
            log_probs_BN2 = self.token_predictor(features_BND)
        return choose(log_probs_BN2, **selection)

    def merge(self, features_BND: Tensor, keep_BN: Tensor) -> Tensor:
        """Features `[B, N, D]`, kept (1) or dropped (0) `[B, N]` → merged rows `[B, N, D]` fp32.

        Rows of dropped patches have no meaning.
        """
        with self.precision():
            return self.causal_encoder(features_BND, keep_BN).float()

    def to_codebook(self, rows_TD: Tensor) -> Tensor:
        """Merged rows `[T, D]` → queries of the codebook `[T, C]` fp32, not normalised yet."""
        with self.precision():
            return self.encode_task_layer(rows_TD).float()

    def quantize_rows(self, rows_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Merged rows `[T, D]` → codes `[T]` int64 and codebook rows `[T, C]`, without gradient."""
        codes_T = self.quantize.nearest(self.to_codebook(rows_TD))
        return codes_T, self.quantize.lookup(codes_T)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Codes `[...]` int64 → their codebook rows `[..., C]`."""
        return self.quantize.lookup(codes)

    def project(self, features_BND: Tensor, keep_BN: Tensor) -> list[Tensor]:
        """Features and kept patches → the language model's input of each image, by `vit_proj`."""
        assert self.vit_proj is not None
        rows_TD, counts_B = kept_rows(self.merge(features_BND, keep_BN), keep_BN)
        with self.precision():
            return list(self.vit_proj(rows_TD).split(counts_B.tolist()))

    @torch.no_grad()
    def encode(self, pixels_B3HW: Tensor, **selection: Unpack[SelectionOptions]) -> list[Tensor]:
        """Pixels → the codes of each image `[n_b]` int64, 0 … codebook_size − 1."""
        features_BND = self.patch_features(pixels_B3HW)
        return self.codes(features_BND, self.select(features_BND, **selection).keep_BN)

    def codes(self, features_BND: Tensor, keep_BN: Tensor) -> list[Tensor]:
        """Features and kept patches → the codes of each image, as `encode`."""
        rows_TD, counts_B = kept_rows(self.merge(features_BND, keep_BN), keep_BN)
        codes_T, _ = self.quantize_rows(rows_TD)
        return list(codes_T.split(counts_B.tolist()))

    def precision(self) -> AbstractContextManager[object]:
        """Autocast to half-precision layers; with fp32 layers a surrounding autocast applies."""
        dtype = self.encode_task_layer[0].weight.dtype
        if dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype)


def kept_rows(merged_BND: Tensor, keep_BN: Tensor) -> tuple[Tensor, Tensor]:
    """`[B, N, D]` → rows of kept patches in raster order `[T, D]`, and their counts `[B]` int64."""
    mask_BN = keep_BN > 0.5
    return merged_BND[mask_BN], mask_BN.sum(1)


class DynamicCodes(nn.Module):
    """`encode`: normalized pixels `[B, 3, S, S]` → codes `[B, N]` in raster order, padded with -1.

    Token selection depends only on pixels and seed, so codes of data sets are reproducible.
    """

    def __init__(self, tokenizer: DynamicTokenizer, selection: str, seed: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.selection = selection
        self.seed = seed
        self.device = tokenizer.device
        # Part of the encoder's fingerprint, since it changes the codes.
        self.register_buffer("drawn_by", torch.tensor([MODES.index(selection), seed]))

    def to(self, dtype: torch.dtype) -> Self:  # type: ignore[override]
        """Convert the layers to a dtype; other parameters stay fp32."""
        self.tokenizer.cast(dtype)
        return self

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """See the class."""
        generators = []
        for image in pixels.cpu().contiguous():
            image_seed = zlib.crc32(image.numpy().tobytes(), self.seed)
            generators.append(torch.Generator().manual_seed(image_seed))
        codes = self.tokenizer.encode(pixels, mode=self.selection, generator=generators)
        rows = nn.utils.rnn.pad_sequence(codes, batch_first=True, padding_value=-1)
        return F.pad(rows, (0, self.tokenizer.n_patches - rows.shape[1]), value=-1)
