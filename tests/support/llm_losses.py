"""The loss of a batch by the training's module."""

from __future__ import annotations

from typing import Any

from torch import nn

from seed_multimodal.training.llm.loss import (
    ALL_TEXT,
    MAX_LOGITS,
    LossModule,
    LossParts,
    LossWeights,
)


def packed_loss(
    model: nn.Module, batch: Any, *, weights: LossWeights = ALL_TEXT, chunked: bool = False
) -> LossParts:
    """Loss of a batch or of anything with its four tensors; `chunked`: logits of at most 64 tokens
    at once."""
    return LossModule(model, weights, 1 if chunked else MAX_LOGITS)(
        batch.input_ids, batch.labels, batch.position_ids, batch.attention_mask
    )
