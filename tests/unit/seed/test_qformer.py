"""Q-Former: the text layers that stage 1 starts from (values, causality: golden)."""

import torch
from tiny.seed import SIZES

from seed_multimodal.models.seed.qformer import QFormer


def test_copy_text_to_query():
    # Stage 1 starts from BERT's text layers in both branches.
    model = QFormer(SIZES["qformer"], 16, vocab_size=30, lm_head=True)
    model.copy_text_to_query()
    layer = model.bert.encoder.layer[1]
    copied, text = layer.intermediate_query, layer.intermediate
    assert torch.equal(copied.dense.weight, text.dense.weight)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
