"""Q-Former: causality, text path, padding, dropout."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from seed_multimodal.models.seed.configuration import QFormerConfig
from seed_multimodal.models.seed.qformer import QFormer

CONFIG = QFormerConfig(width=24, depth=3, heads=3, mlp_width=40, max_positions=20, dropout=0.1)


@pytest.fixture
def model() -> QFormer:
    return QFormer(CONFIG, encoder_width=16, vocab_size=30).eval()


@torch.no_grad()
def _influence(model: QFormer, count: int, **inputs: torch.Tensor) -> torch.Tensor:
    """`[inputs, outputs]`: which output positions move when one query moves."""
    queries = torch.randn(1, count, 24)
    encoded = torch.randn(1, 7, 16)
    base = model(queries, encoded, **inputs)
    rows = []
    for index in range(count):
        moved = queries.clone()
        moved[0, index] += torch.randn(24)
        rows.append((model(moved, encoded, **inputs) - base).abs().amax(-1)[0] > 1e-7)
    return torch.stack(rows)


@pytest.mark.parametrize(("causal", "count"), [(32, 32), (8, 8), (32, 31)])
def test_forward_is_causal_for_the_configured_number_of_queries(causal, count):
    model = QFormer(dataclasses.replace(CONFIG, causal_queries=causal), 16).eval()
    everything = torch.ones(count, count, dtype=torch.bool)
    assert torch.equal(
        _influence(model, count), everything.triu() if causal == count else everything
    )


def test_forward_with_text_attends_to_both_sides():
    ids = torch.tensor([[2, 5, 6, 3]])
    one_layer = QFormer(dataclasses.replace(CONFIG, depth=1), 16, vocab_size=30).eval()
    moved = _influence(one_layer, 32, input_ids=ids)
    assert torch.equal(moved[:, :32], torch.ones(32, 32, dtype=torch.bool).triu())
    assert bool(moved[:, 32:].all())
    with torch.no_grad():
        queries = torch.randn(1, 32, 24)
        encoded = torch.randn(1, 7, 16)
        other = ids.clone()
        other[0, 3] = 9
        difference = one_layer(queries, encoded, input_ids=ids) - one_layer(
            queries, encoded, input_ids=other
        )
    assert bool((difference.abs().amax(-1) > 1e-7)[0, :32].all()), "every query must see the text"


def test_forward_with_padding(model: QFormer):
    ids = torch.tensor([[2, 5, 3, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids, attention_mask=mask)[:, :3], model(input_ids=ids[:, :3])
        )


def test_copy_text_to_query_and_cross_attention_in_every_second_layer():
    model = QFormer(CONFIG, 16, vocab_size=30, lm_head=True)
    assert [layer.crossattention is not None for layer in model.bert.encoder.layer] == [
        True,
        False,
        True,
    ]
    model.copy_text_to_query()
    layer = model.bert.encoder.layer[1]
    assert torch.equal(layer.intermediate_query.dense.weight, layer.intermediate.dense.weight)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
