"""`CodeAdapter`: what a SEED tokenizer decodes from codes → tokens of a denoiser's cross-attention.

Its folder `code_adapter/` in a diffusion folder says what the denoiser reads: the decoder's output
for each code, or the one image embedding that is pooled from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from seed_multimodal.nn.pretrained import PretrainedNetwork
from seed_multimodal.settings import setting

CODE_ADAPTER = "code_adapter"  # sub-folder of a diffusion folder
Reads = Literal["codes", "embedding"]


@dataclass(frozen=True, kw_only=True)
class CodeAdapterConfig:
    """reads: output of `SeedTokenizer.decode_tokens` ("codes") or of `decode` ("embedding")."""

    reads: Reads = "codes"
    width: int = setting(minimum=1)  # of what it reads
    tokens: int = setting(minimum=1)  # that the denoiser reads, with "codes" one for each code
    context_dim: int = setting(minimum=1)  # their width


class CodeAdapter(PretrainedNetwork[CodeAdapterConfig]):
    """Normalises and projects; has learned unconditional tokens, zeros at first."""

    config_class = CodeAdapterConfig
    model_type = "seed_code_adapter"

    def __init__(self, config: CodeAdapterConfig) -> None:
        super().__init__()
        self.config = config
        shape = (1, config.tokens, config.context_dim)
        # One embedding is projected to all tokens, as IP-Adapter does (Ye et al. 2023).
        tokens_per_row = 1 if config.reads == "codes" else config.tokens
        self.norm = nn.LayerNorm(config.width)
        self.project = nn.Linear(config.width, tokens_per_row * config.context_dim)
        self.positions = nn.Parameter(torch.zeros(shape).normal_(std=0.02))
        self.null_tokens = nn.Parameter(torch.zeros(shape))

    def forward(self, embeds: Tensor, without: Tensor | None = None) -> Tensor:
        """`[B, N, W]` or, of the embedding, `[B, W]` → tokens `[B, N, D]`.

        without: bool `[B]`, images whose tokens are the unconditional ones.
        """
        rows = self.project(self.norm(embeds.to(self.positions.dtype)))
        tokens = rows.reshape(len(embeds), *self.positions.shape[1:]) + self.positions
        if without is None:
            return tokens
        return torch.where(without[:, None, None], self.null_tokens, tokens)
