"""Q-Former: the text layers that stage 1 starts from (values, causality: golden)."""

import torch

from seed_multimodal.models.seed.configuration import QFormerConfig
from seed_multimodal.models.seed.qformer import QFormer

CONFIG = QFormerConfig(width=24, depth=3, heads=3, mlp_width=40, max_positions=20, dropout=0.1)


def test_copy_text_to_query():
    # Stage 1 starts from BERT's text layers in both branches.
    model = QFormer(CONFIG, 16, vocab_size=30, lm_head=True)
    model.copy_text_to_query()
    layer = model.bert.encoder.layer[1]
    copied, text = layer.intermediate_query, layer.intermediate
    assert torch.equal(copied.dense.weight, text.dense.weight)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
