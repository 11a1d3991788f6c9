"""`CodeAdapter`: codes, or what a SEED tokenizer decodes from them → what a denoiser reads.

Its folder `code_adapter/` in a diffusion folder says what the denoiser reads: the decoder's output
for each code, the one image embedding that is pooled from them, or the codes of any tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import ConfigError
from seed_multimodal.nn.layers import Block
from seed_multimodal.nn.pretrained import PretrainedNetwork
from seed_multimodal.settings import check_value, non_negative, positive

CODE_ADAPTER = "code_adapter"  # sub-folder of a diffusion folder
Reads = Literal["codes", "embedding", "ids"]


@dataclass(frozen=True, kw_only=True)
class CodeAdapterConfig:
    """Sizes of an adapter.

    reads: output of `SeedTokenizer.decode_tokens` ("codes") or of `decode` ("embedding"), or codes
        themselves ("ids"), which are below `vocabulary`.
    width: of what it reads, with "ids" of its embeddings of them.
    tokens: that the denoiser reads, one for each code unless it is the embedding that is read;
        `context_dim`: their width.
    pooled_dim: of the one vector that the denoiser also reads; 0: none.
    depth, heads: transformer blocks of the tokens.
    """

    reads: Reads = "codes"
    width: int = positive()
    tokens: int = positive()
    context_dim: int = positive()
    pooled_dim: int = non_negative(0)
    depth: int = non_negative(2)
    heads: int = positive(1)
    vocabulary: int = non_negative(0)

    def __post_init__(self) -> None:
        if self.context_dim % self.heads:
            raise ConfigError(f"{self.context_dim} does not divide into {self.heads} heads.")


class CodeAdapter(PretrainedNetwork[CodeAdapterConfig]):
    """Tokens of the cross-attention, and one vector pooled from them.

    The tokenizer's decoder learned to be read as a whole, so blocks mix the codes before a denoiser
    attends to them one by one. The unconditional tokens are learned; they and the pooled vector are
    zeros at first.
    """

    config_class = CodeAdapterConfig
    model_type = "seed_code_adapter"

    def __init__(self, config: CodeAdapterConfig) -> None:
        super().__init__()
        self.config = config
        width = config.context_dim
        # 1. One embedding is projected to all tokens, as IP-Adapter does (Ye et al. 2023).
        tokens_per_row = config.tokens if config.reads == "embedding" else 1
        self.norm = nn.LayerNorm(config.width)
        self.project = nn.Linear(config.width, tokens_per_row * width)
        self.positions = nn.Parameter(torch.zeros(1, config.tokens, width).normal_(std=0.02))
        self.blocks = nn.Sequential(*(Block(width, config.heads) for _ in range(config.depth)))
        self.null_tokens = nn.Parameter(torch.zeros(1, config.tokens, width))

        # 2. The pooled vector.
        self.pooler = None
        if config.pooled_dim:
            self.pooler = nn.Linear(width, config.pooled_dim)
            nn.init.zeros_(self.pooler.weight)
            nn.init.zeros_(self.pooler.bias)

        # 3. Embeddings of codes; the last one is that of a code that is left out.
        self.table = None
        if config.reads == "ids":
            self.table = nn.Embedding(config.vocabulary + 1, config.width)

    def embed(self, codes: Tensor) -> Tensor:
        """Codes `[B, N]`, -1: left out, → what `forward` reads; anything else as it is."""
        if self.table is None:
            return codes
        return self.table(codes.remainder(self.table.num_embeddings))

    def forward(self, embeds: Tensor) -> Tensor:
        """`[B, N, W]` or, of the embedding, `[B, W]` → tokens `[B, N, D]`."""
        rows = self.project(self.norm(embeds.to(self.positions.dtype)))
        tokens = rows.reshape(len(embeds), *self.positions.shape[1:]) + self.positions
        return self.blocks(tokens)

    def pool(self, tokens: Tensor) -> Tensor | None:
        """Tokens `[B, N, D]` → one vector each, `[B, pooled_dim]`; None: the denoiser has none."""
        if self.pooler is None:
            return None
        return self.pooler(F.silu(tokens).mean(dim=1))


def stored_reads(folder: Path) -> Reads:
    """What the denoiser of a diffusion folder reads; without an adapter it is unCLIP's."""
    file = folder / CODE_ADAPTER / "config.json"
    if not file.is_file():
        return "embedding"
    return check_value(Reads, read_json_object(file).get("reads", "codes"), str(file))
