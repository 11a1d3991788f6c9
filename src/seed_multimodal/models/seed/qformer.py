"""The causal Q-Former: 32 learned queries read an image in order; a text path shares its attention.

A BERT (post-norm) with cross-attention to the image in every second layer. As in the original:

    queries get no position embedding; their order comes only from the vectors and the causal mask
    queries and text have separate feed-forward layers
    masked scores get -10000

Parameter names are the original ones (`bert.encoder.layer.N.attention.self.query.weight` …).
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.models.seed.configuration import QFormerConfig
from seed_multimodal.nn.layers import LayerNorm, multi_head

MASKED = -10000.0


class _Residual(nn.Module):
    """`LayerNorm(residual + dropout(dense(x)))`."""

    def __init__(self, input_width: int, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(input_width, config.width)
        self.LayerNorm = LayerNorm(config.width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class _AttentionLayer(nn.Module):
    """Attention over `source` with an output projection; `self`, `output`: the original names."""

    def __init__(self, config: QFormerConfig, source_width: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.self = nn.ModuleDict(
            {
                "query": nn.Linear(config.width, config.width),
                "key": nn.Linear(source_width, config.width),
                "value": nn.Linear(source_width, config.width),
            }
        )
        self.output = _Residual(config.width, config)

    def forward(
        self, x: Tensor, source: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        attended = multi_head(
            self.self["query"](x),
            self.self["key"](source),
            self.self["value"](source),
            self.heads,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
        )
        return self.output(attended, x)


def _intermediate(config: QFormerConfig) -> nn.Sequential:
    """First half of a feed-forward layer, with exact GELU."""
    dense = nn.Linear(config.width, config.mlp_width)
    return nn.Sequential(OrderedDict(dense=dense, gelu=nn.GELU()))


class QFormerLayer(nn.Module):
    """Self-attention over queries and text; cross-attention to the image for the queries only.

    Queries and text have separate feed-forward layers.
    """

    def __init__(
        self, config: QFormerConfig, encoder_width: int, has_cross: bool, has_text: bool
    ) -> None:
        super().__init__()
        self.attention = _AttentionLayer(config, config.width)
        self.crossattention = _AttentionLayer(config, encoder_width) if has_cross else None
        if has_text:
            self.intermediate = _intermediate(config)
            self.output = _Residual(config.mlp_width, config)
        self.intermediate_query = _intermediate(config)
        self.output_query = _Residual(config.mlp_width, config)

    def forward(
        self,
        x: Tensor,
        n_queries: int,
        mask: Tensor | None,
        causal: bool,
        image_features: Tensor | None,
    ) -> Tensor:
        """Hidden states of queries and text, `[B, Q + T, D]` → the same shape.

        n_queries: Q.
        mask: additive, broadcast over heads.
        image_features: `[B, N, W]`.
        """
        # 1. All see each other, as far as the mask lets them.
        x = self.attention(x, x, mask, causal)
        queries = x[:, :n_queries]  # [B, Q, D]
        text = x[:, n_queries:]  # [B, T, D]
        if n_queries == 0:
            return self._text_feed_forward(text)

        # 2. Only queries see the image.
        if self.crossattention is not None and image_features is not None:
            queries = self.crossattention(queries, image_features)
        queries = self.output_query(self.intermediate_query(queries), queries)
        if text.shape[1] == 0:
            return queries
        return torch.cat([queries, self._text_feed_forward(text)], dim=1)

    def _text_feed_forward(self, text: Tensor) -> Tensor:
        return self.output(self.intermediate(text), text)


class _Embeddings(nn.Module):
    """LayerNorm over queries followed by word pieces, whose positions count from 0."""

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
            position_ids = self.position_ids[:, : input_ids.shape[1]]
            parts.append(self.word_embeddings(input_ids) + self.position_embeddings(position_ids))
        return self.dropout(self.LayerNorm(torch.cat(parts, dim=1)))


class QFormer(nn.Module):
    """The Q-Former.

    encoder_width: width of the image features.
    vocab_size: word pieces of the text path; None: no text path.
    lm_head: also BERT's unused prediction head.
    """

    def __init__(
        self,
        config: QFormerConfig,
        encoder_width: int,
        vocab_size: int | None = None,
        lm_head: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        # Below BERT's names.
        self.bert = nn.ModuleDict({"embeddings": _Embeddings(config, vocab_size)})
        layers = nn.ModuleList()
        for index in range(config.depth):
            has_cross = index % config.cross_attention_freq == 0
            layers.append(QFormerLayer(config, encoder_width, has_cross, vocab_size is not None))
        self.bert.encoder = nn.ModuleDict({"layer": layers})
        self.apply(_init_bert)
        # Unused by the contrastive stage, present in its checkpoints; it shares the word table.
        if lm_head:
            from transformers import BertConfig
            from transformers.models.bert.modeling_bert import BertOnlyMLMHead

            self.cls = BertOnlyMLMHead(BertConfig(vocab_size=vocab_size, hidden_size=config.width))
            predictions = self.cls.predictions
            _init_bert(predictions.transform.dense)
            predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight
            predictions.decoder.bias = predictions.bias

    def forward(
        self,
        queries: Tensor | None = None,
        encoded: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states `[B, Q + T, D]`: queries first, then text.

        queries: `[B, Q, D]`; they see all text.
        encoded: image features `[B, N, W]` for the cross-attention of the queries.
        input_ids: `[B, T]` int64.
        attention_mask: `[B, T]`, 0 for padding; None: no padding.
        """
        x = self.bert.embeddings(queries, input_ids)
        n_queries = 0 if queries is None else queries.shape[1]
        mask, causal = self._mask(x, n_queries, attention_mask)
        for layer in self.bert.encoder.layer:
            x = layer(x, n_queries, mask, causal, encoded)
        return x

    def _mask(
        self, x: Tensor, n_queries: int, attention_mask: Tensor | None
    ) -> tuple[Tensor | None, bool]:
        """Additive mask of the self-attention, and whether PyTorch's causal mask replaces it."""
        is_causal = n_queries == self.config.causal_queries
        length = x.shape[1]

        # 1. Which keys are no padding: [B, 1, 1, Q + T].
        if attention_mask is None:
            if not is_causal or length == n_queries:
                return None, is_causal
            keys = x.new_ones(x.shape[0], length, dtype=torch.long)
        else:
            keys = F.pad(attention_mask.long(), (n_queries, 0), value=1)
        visible = keys[:, None, None, :]

        # 2. Among themselves queries see only earlier ones.
        if is_causal:
            square = torch.ones(length, length, dtype=torch.long, device=x.device)
            square[:n_queries, :n_queries].tril_()
            visible = visible * square  # [B, 1, Q + T, Q + T]
        hidden = (1 - visible).to(x.dtype)
        return hidden * MASKED, False

    def copy_text_to_query(self) -> None:
        """Copy the text's feed-forward weights to the queries', as stage 1 does with BERT's."""
        for layer in self.bert.encoder.layer:
            for name in ("intermediate", "output"):
                text_weights = layer.get_submodule(name).state_dict()
                layer.get_submodule(f"{name}_query").load_state_dict(text_weights)


def _init_bert(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
