"""Q-Former: causality, the 32-query rule, text path, padding, and the released mask cases."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from seed_multimodal.errors import ConfigError
from seed_multimodal.seed.configuration import QFormerConfig
from seed_multimodal.seed.qformer import MASKED, QFormer

CONFIG = QFormerConfig(width=24, depth=3, heads=3, mlp_width=40, max_positions=20, dropout=0.1)


@pytest.fixture
def model() -> QFormer:
    return QFormer(CONFIG, encoder_width=16, vocab_size=30).eval()


@torch.no_grad()
def _influence(model: QFormer, count: int, **inputs: torch.Tensor) -> torch.Tensor:
    """`[inputs, outputs]`: which output positions move when one query moves."""
    queries, encoded = torch.randn(1, count, 24), torch.randn(1, 7, 16)
    base = model(queries, encoded, **inputs)
    rows = []
    for place in range(count):
        moved = queries.clone()
        moved[0, place] += torch.randn(24)
        rows.append((model(moved, encoded, **inputs) - base).abs().amax(-1)[0] > 1e-7)
    return torch.stack(rows)


def test_forward_32_queries_are_causal(model: QFormer) -> None:
    moved = _influence(model, 32)
    assert torch.equal(moved, torch.ones(32, 32, dtype=torch.bool).triu())


def test_forward_other_numbers_of_queries_see_everything(model: QFormer) -> None:
    assert bool(_influence(model, 31).all())


def test_forward_causal_number_is_a_setting() -> None:
    model = QFormer(dataclasses.replace(CONFIG, causal_queries=8), 16).eval()
    assert torch.equal(_influence(model, 8), torch.ones(8, 8, dtype=torch.bool).triu())


def test_forward_with_text_both_sides_see_each_other(model: QFormer) -> None:
    ids = torch.tensor([[2, 5, 6, 3]])
    one_layer = QFormer(dataclasses.replace(CONFIG, depth=1), 16, vocab_size=30).eval()
    moved = _influence(one_layer, 32, input_ids=ids)
    assert torch.equal(moved[:, :32], torch.ones(32, 32, dtype=torch.bool).triu())
    assert bool(moved[:, 32:].all())
    with torch.no_grad():
        queries, encoded = torch.randn(1, 32, 24), torch.randn(1, 7, 16)
        other = ids.clone()
        other[0, 3] = 9
        difference = one_layer(queries, encoded, input_ids=ids) - one_layer(queries, encoded, input_ids=other)
    assert bool((difference.abs().amax(-1) > 1e-7)[0, :32].all()), "every query must see the text"


def test_forward_padding_changes_nothing_else(model: QFormer) -> None:
    ids, mask = torch.tensor([[2, 5, 3, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask)[:, :3], model(input_ids=ids[:, :3]))
        other = ids.clone()
        other[0, 4] = 7
        assert torch.equal(model(input_ids=other, attention_mask=mask)[:, :3],
                           model(input_ids=ids, attention_mask=mask)[:, :3])


def test_forward_additive_and_built_in_masks_agree(model: QFormer) -> None:
    queries, encoded = torch.randn(2, 32, 24), torch.randn(2, 7, 16)
    x = model.bert.embeddings(queries, None)
    mask = (1 - torch.ones(32, 32).tril())[None, None] * MASKED
    with torch.no_grad():
        expected = x
        for layer in model.bert.encoder.layer:
            expected = layer(expected, 32, mask, False, encoded)
        torch.testing.assert_close(model(queries, encoded), expected)


def test_forward_dropout_in_training_only(model: QFormer) -> None:
    queries, encoded = torch.randn(1, 32, 24), torch.randn(1, 7, 16)
    assert torch.equal(model(queries, encoded), model(queries, encoded))
    model.train()
    assert not torch.equal(model(queries, encoded), model(queries, encoded))


def test_copy_text_to_query_and_cross_attention_in_every_second_layer() -> None:
    model = QFormer(CONFIG, 16, vocab_size=30, lm_head=True)
    assert [layer.crossattention is not None for layer in model.bert.encoder.layer] == [True, False, True]
    model.copy_text_to_query()
    layer = model.bert.encoder.layer[1]
    assert torch.equal(layer.intermediate_query.dense.weight, layer.intermediate.dense.weight)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


def test_qformer_config_heads_must_divide_the_width() -> None:
    with pytest.raises(ConfigError, match="heads"):
        QFormerConfig(width=20, heads=3)
