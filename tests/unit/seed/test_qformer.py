"""Q-Former: causality, padding, the text layers that stage 1 starts from (values: golden)."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from seed_multimodal.models.seed.configuration import QFormerConfig
from seed_multimodal.models.seed.qformer import QFormer

CONFIG = QFormerConfig(width=24, depth=3, heads=3, mlp_width=40, max_positions=20, dropout=0.1)


def qformer(**changes: int) -> QFormer:
    return QFormer(dataclasses.replace(CONFIG, **changes), encoder_width=16, vocab_size=30).eval()


@torch.no_grad()
def influence(model: QFormer, count: int) -> torch.Tensor:
    """`[inputs, outputs]`: which output positions move when one query moves."""
    queries = torch.randn(1, count, 24)
    encoded = torch.randn(1, 7, 16)
    base = model(queries, encoded)
    rows = []
    for index in range(count):
        moved = queries.clone()
        moved[0, index] += torch.randn(24)
        rows.append((model(moved, encoded) - base).abs().amax(-1)[0] > 1e-7)
    return torch.stack(rows)


@pytest.mark.parametrize(("causal", "count"), [(8, 8), (8, 7)])
def test_forward_is_causal_for_the_configured_number_of_queries(causal, count):
    # Other numbers of queries attend to all, as BLIP-2's.
    moved = influence(qformer(causal_queries=causal), count)
    everything = torch.ones(count, count, dtype=torch.bool)
    assert torch.equal(moved, everything.triu() if causal == count else everything)


def test_copy_text_to_query_and_cross_attention_in_every_second_layer():
    # Stage 1 starts from BERT's text layers in both branches.
    model = QFormer(CONFIG, 16, vocab_size=30, lm_head=True)
    layers = model.bert.encoder.layer
    assert [layer.crossattention is not None for layer in layers] == [True, False, True]
    model.copy_text_to_query()
    copied, text = layers[1].intermediate_query, layers[1].intermediate
    assert torch.equal(copied.dense.weight, text.dense.weight)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
