"""The causal Q-Former: 32 learned queries read an image in order; a text path shares its attention in stage 1.

A BERT (post-norm) with cross-attention to the image in every second layer. As in the original: queries get no position
embedding, their order comes only from the vectors and the causal mask; queries and text have separate feed-forward
layers; masked scores get -10000. Parameter names are the original ones
(`bert.encoder.layer.N.attention.self.query.weight` …).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.nn.layers import LayerNorm, heads_first, heads_last
from seed_multimodal.seed.configuration import QFormerConfig

MASKED = -10000.0


class _Projections(nn.Module):
    """Query, key and value projections and the attention itself."""

    def __init__(self, config: QFormerConfig, source_width: int) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(source_width, config.width)
        self.value = nn.Linear(source_width, config.width)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        q, k, v = (
            heads_first(part, self.heads)
            for part in (self.query(x), self.key(source), self.value(source))
        )
        dropout = self.dropout if self.training else 0.0
        return heads_last(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal
            )
        )


class _Residual(nn.Module):
    """`LayerNorm(residual + dropout(dense(x)))`."""

    def __init__(self, inner: int, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, config.width)
        self.LayerNorm = LayerNorm(config.width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class _AttentionLayer(nn.Module):
    """Attention over `source` with its output projection; `self` and `output` are the original names."""

    def __init__(self, config: QFormerConfig, source_width: int) -> None:
        super().__init__()
        self.self = _Projections(config, source_width)
        self.output = _Residual(config.width, config)

    def forward(
        self, x: Tensor, source: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        return self.output(self.self(x, source, mask, causal), x)


class _Intermediate(nn.Module):
    """First half of a feed-forward layer with exact GELU."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class QFormerLayer(nn.Module):
    """Self-attention over queries and text; queries also attend to the image and have their own feed-forward."""

    def __init__(
        self, config: QFormerConfig, encoder_width: int, has_cross: bool, has_text: bool
    ) -> None:
        super().__init__()
        self.attention = _AttentionLayer(config, config.width)
        self.crossattention = _AttentionLayer(config, encoder_width) if has_cross else None
        if has_text:
            self.intermediate = _Intermediate(config)
            self.output = _Residual(config.mlp_width, config)
        self.intermediate_query = _Intermediate(config)
        self.output_query = _Residual(config.mlp_width, config)

    def forward(
        self, x: Tensor, queries: int, mask: Tensor | None, causal: bool, encoded: Tensor | None
    ) -> Tensor:
        """`x` `[B, queries + text, D]`, `encoded` `[B, N, W]`; the mask is additive and broadcast over heads."""
        x = self.attention(x, x, mask, causal)
        q, text = x[:, :queries], x[:, queries:]
        if not queries:
            return self.output(self.intermediate(text), text)
        if self.crossattention is not None and encoded is not None:
            q = self.crossattention(q, encoded)
        q = self.output_query(self.intermediate_query(q), q)
        return (
            torch.cat([q, self.output(self.intermediate(text), text)], dim=1)
            if text.shape[1]
            else q
        )


class _Embeddings(nn.Module):
    """LayerNorm over queries followed by word pieces with positions that start at 0 for the text."""

    position_ids: Tensor

    def __init__(self, config: QFormerConfig, vocab_size: int | None) -> None:
        super().__init__()
        if vocab_size is not None:
            self.word_embeddings = nn.Embedding(vocab_size, config.width)
            self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.LayerNorm = LayerNorm(config.width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("position_ids", torch.arange(config.max_positions)[None])

    def forward(self, queries: Tensor | None, input_ids: Tensor | None) -> Tensor:
        parts = [] if queries is None else [queries]
        if input_ids is not None:
            places = self.position_ids[:, : input_ids.shape[1]]
            parts.append(self.word_embeddings(input_ids) + self.position_embeddings(places))
        return self.dropout(self.LayerNorm(torch.cat(parts, dim=1)))


class _Predictions(nn.Module):
    """The masked-LM head of BERT: unused by the contrastive stage, present in its checkpoints."""

    def __init__(self, config: QFormerConfig, words: nn.Embedding) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(words.num_embeddings))
        self.transform = nn.ModuleDict(
            {
                "dense": nn.Linear(config.width, config.width),
                "LayerNorm": LayerNorm(config.width, eps=1e-12),
            }
        )
        self.decoder = nn.Linear(config.width, words.num_embeddings)
        self.decoder.weight, self.decoder.bias = words.weight, self.bias


class QFormer(nn.Module):
    """The Q-Former; with `vocab_size` also its text path, with `lm_head` also BERT's unused prediction head."""

    def __init__(
        self,
        config: QFormerConfig,
        encoder_width: int,
        vocab_size: int | None = None,
        lm_head: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.bert: Any = nn.Module()
        self.bert.embeddings = _Embeddings(config, vocab_size)
        self.bert.encoder = nn.Module()
        self.bert.encoder.layer = nn.ModuleList(
            QFormerLayer(
                config,
                encoder_width,
                number % config.cross_attention_freq == 0,
                vocab_size is not None,
            )
            for number in range(config.depth)
        )
        self.apply(_init_bert)
        if lm_head:
            self.cls = nn.Module()
            self.cls.predictions = predictions = _Predictions(
                config, self.bert.embeddings.word_embeddings
            )
            _init_bert(predictions.transform["dense"])

    def forward(
        self,
        queries: Tensor | None = None,
        encoded: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states `[B, Q + T, D]`: queries first, then text.

        Args:
            queries: `[B, Q, D]`; they see all text.
            encoded: image features `[B, N, W]` for the cross-attention of the queries.
            input_ids: `[B, T]` int64; `attention_mask` `[B, T]`: 0 for padding (default: none).
        """
        x = self.bert.embeddings(queries, input_ids)
        count = 0 if queries is None else queries.shape[1]
        mask, causal = self._mask(x, count, attention_mask)
        for layer in self.bert.encoder.layer:
            x = layer(x, count, mask, causal, encoded)
        return x

    def _mask(
        self, x: Tensor, queries: int, attention_mask: Tensor | None
    ) -> tuple[Tensor | None, bool]:
        """Additive mask of the self-attention (None: none), and whether PyTorch's causal one does instead."""
        is_causal, length = queries == self.config.causal_queries, x.shape[1]
        if attention_mask is None:
            if not is_causal or length == queries:
                return None, is_causal
            keys = x.new_ones(x.shape[0], length, dtype=torch.long)
        else:
            keys = F.pad(attention_mask.long(), (queries, 0), value=1)
        visible = keys[:, None, None, :]
        if is_causal:
            square = torch.ones(length, length, dtype=torch.long, device=x.device)
            square[:queries, :queries].tril_()
            visible = visible * square
        return (1 - visible).to(x.dtype) * MASKED, False

    def copy_text_to_query(self) -> None:
        """Start the queries' feed-forward layers from the text's, as stage 1 does from BERT weights."""
        for layer in self.bert.encoder.layer:
            for name in ("intermediate", "output"):
                layer.get_submodule(f"{name}_query").load_state_dict(
                    layer.get_submodule(name).state_dict()
                )


def _init_bert(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
