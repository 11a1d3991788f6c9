"""Qwen-VL's resampler: learned queries on a square grid look once at a picture's features and become its new features.

Three are in SEED-X: the vision tower's attention pool, and the language model's input and output resampler. Note: there
is no residual, no MLP and no norm at the end; keys carry positions, values do not; the positions are fixed sines, but
stand in checkpoints. Source: SEED-X's released code (`qwen_visual.py`, from Qwen-VL); parameter names are the released
ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.nn.layers import LayerNorm
from seed_multimodal.settings import check_settings, setting
from seed_multimodal.vision.positions import SquarePositions, sine_table


@dataclass(frozen=True)
class ResamplerConfig:
    """Sizes of a resampler: `grid_size`² queries of `embed_dim` numbers look at features of `kv_dim` numbers (None: as
    many as a query has, and they are not projected)."""

    grid_size: int = setting(least=1)
    embed_dim: int = setting(least=1)
    num_heads: int = setting(least=1)
    kv_dim: int | None = setting(None, least=1)
    norm_eps: float = setting(1e-5, above=0)

    def __post_init__(self) -> None:
        check_settings(self, "resampler")
        if self.embed_dim % self.num_heads:
            raise ConfigError(f"The resampler's width {self.embed_dim} does not divide into {self.num_heads} heads.")


INPUT_RESAMPLER = ResamplerConfig(grid_size=8, embed_dim=5120, num_heads=32, kv_dim=4096)  # of the released SEED-X
OUTPUT_RESAMPLER = ResamplerConfig(grid_size=8, embed_dim=4096, num_heads=32, kv_dim=5120)


class Resampler(nn.Module):
    """One cross-attention from `grid_size`² learned queries to the features of a picture."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.config = config
        width, kv_dim = config.embed_dim, config.kv_dim or config.embed_dim
        self.pos_embed = nn.Parameter(sine_table(width, config.grid_size), requires_grad=False)
        self.query = nn.Parameter(torch.zeros(config.grid_size**2, width))
        self.kv_proj = nn.Identity() if kv_dim == width else nn.Linear(kv_dim, width, bias=False)
        self.attn = nn.MultiheadAttention(width, config.num_heads, batch_first=True)
        self.ln_q = LayerNorm(width, eps=config.norm_eps)
        self.ln_kv = LayerNorm(width, eps=config.norm_eps)
        self.positions = SquarePositions()
        nn.init.trunc_normal_(self.query, std=0.02)
        for module in (self.kv_proj, self.attn.out_proj):
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, x_BNK: Tensor) -> Tensor:
        """Features `[B, N, kv_dim]` of N = g² places, row by row → `[B, grid_size², embed_dim]`.

        Raises:
            ConfigError: features of another width, or of places that are not a square grid.
        """
        expected = self.config.kv_dim or self.config.embed_dim
        if x_BNK.ndim != 3 or x_BNK.shape[2] != expected:
            raise ConfigError(f"The resampler needs features [B, N, {expected}], got {list(x_BNK.shape)}.")
        values = self.ln_kv(self.kv_proj(x_BNK))
        keys = values + self.positions(self.pos_embed, values.shape[1], "The resampler's input").to(values.dtype)
        queries = self.ln_q(self.query) + self.pos_embed
        queries = queries.to(values.dtype).expand(len(values), -1, -1)
        return self.attn(queries, keys, values, need_weights=False)[0]


def count_weights(config: ResamplerConfig, trained: bool = False) -> int:
    """Numbers of a resampler's weights, or of those that training changes, without making it."""
    with torch.device("meta"):
        return sum(one.numel() for one in Resampler(config).parameters() if one.requires_grad or not trained)
