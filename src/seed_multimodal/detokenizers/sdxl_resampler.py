"""SEED-X's resampler for SDXL: visual embeddings become what SDXL's two text encoders would give.

A perceiver (Jaegle et al. 2021, as in IP-Adapter): learned queries look at the embeddings and at themselves in every
layer. Two projections of the result stand for the hidden states of SDXL's text encoders, an attention pool for the
second one's pooled output. Parameter names and sizes are those of SEED-X's released code (`ResamplerXLV2`).

Shape suffixes: B pictures, N embeddings of a picture, Q queries, D width of the queries, H heads, d width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.nn.layers import AttentionPool, heads_first, heads_last
from seed_multimodal.settings import check_settings, setting


@dataclass(frozen=True)
class ResamplerSizes:
    """Sizes of `ResamplerXLV2`; the defaults are those of both released adapters.

    Attributes:
        dim, depth: width D and layers. heads, dim_head: of the attention; the pool has as many heads.
        num_queries: Q, the length of the prompt. embedding_dim: width of the visual embeddings.
        output1_dim, output2_dim: widths of the two text encoders' hidden states; the pooled output has the second.
        normalize: scale each channel's values over the embeddings of a picture to length 1 (released: off).
    """

    dim: int = setting(1024, least=1)
    depth: int = setting(4, least=0)
    dim_head: int = setting(64, least=1)
    heads: int = setting(16, least=1)
    num_queries: int = setting(64, least=1)
    embedding_dim: int = setting(4096, least=1)
    output1_dim: int = setting(768, least=1)
    output2_dim: int = setting(1280, least=1)
    ff_mult: int = setting(4, least=1)
    normalize: bool = False

    def __post_init__(self) -> None:
        check_settings(self, "resampler")
        if self.dim % self.heads:
            raise ConfigError(f"resampler: dim must be a multiple of heads, not {self.dim} with {self.heads} heads.")

    @property
    def prompt_dim(self) -> int:
        """Width of the prompt embeddings, which the U-Net's cross-attention reads."""
        return self.output1_dim + self.output2_dim


class ResamplerXLV2(nn.Module):
    """Visual embeddings `[B, N, embedding_dim]`, any N (released: 64 or 256), → prompt and pooled embeddings.

    Released size: 62 keys, 61,245,696 parameters.
    """

    def __init__(self, sizes: ResamplerSizes | None = None) -> None:
        super().__init__()
        self.sizes = sizes = sizes or ResamplerSizes()
        width = sizes.dim
        self.latents = nn.Parameter(torch.randn(1, sizes.num_queries, width) / width**0.5)
        self.proj_in = nn.Linear(sizes.embedding_dim, width)
        self.norm_out = nn.LayerNorm(width)
        self.layers = nn.ModuleList(nn.ModuleList([
            PerceiverAttention(width, sizes.heads, sizes.dim_head), _feed_forward(width, sizes.ff_mult * width),
        ]) for _ in range(sizes.depth))
        self.unet_proj_1 = nn.Linear(width, sizes.output1_dim)
        self.unet_proj_2 = nn.Linear(width, sizes.output2_dim)
        self.unet_attnpool = AttentionPool(sizes.num_queries, width, sizes.heads, sizes.output2_dim)

    def forward(self, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Prompt embeddings `[B, Q, output1_dim + output2_dim]` and pooled ones `[B, output2_dim]`."""
        queries_BQD = self.latents.expand(len(embeds), -1, -1)
        if self.sizes.normalize:
            embeds = F.normalize(embeds, dim=1)
        x_BND = self.proj_in(embeds)
        for attention, feed_forward in self.layers:  # type: ignore[misc]
            queries_BQD = queries_BQD + attention(x_BND, queries_BQD)
            queries_BQD = queries_BQD + feed_forward(queries_BQD)
        queries_BQD = self.norm_out(queries_BQD)
        prompt = torch.cat([self.unet_proj_1(queries_BQD), self.unet_proj_2(queries_BQD)], dim=-1)
        return prompt, self.unet_attnpool(queries_BQD)


class PerceiverAttention(nn.Module):
    """Queries look at the embeddings and at themselves; no biases.

    The released code scales queries and keys by the fourth root of the head's width each, which SDPA's own scaling
    equals.
    """

    def __init__(self, width: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, width, bias=False)

    def forward(self, x_BND: Tensor, queries_BQD: Tensor) -> Tensor:
        """`[B, N, D]`, `[B, Q, D]` → `[B, Q, D]`."""
        queries = self.norm2(queries_BQD)
        key, value = self.to_kv(torch.cat([self.norm1(x_BND), queries], dim=1)).chunk(2, dim=-1)
        seen_BHQd = F.scaled_dot_product_attention(*(heads_first(one, self.heads)
                                                     for one in (self.to_q(queries), key, value)))
        return self.to_out(heads_last(seen_BHQd))


def _feed_forward(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden, bias=False), nn.GELU(),
                         nn.Linear(hidden, width, bias=False))
