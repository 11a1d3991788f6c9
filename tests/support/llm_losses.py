"""Batches of a language model's training, and their loss by the training's module."""

from types import SimpleNamespace

from torch import Tensor

from seed_multimodal.training.llm.loss import (
    ALL_TEXT,
    MAX_LOGITS,
    LossModule,
    LossParts,
    LossWeights,
)


def rows(
    input_ids: Tensor,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> SimpleNamespace:
    """A batch `[B, T]`; labels are by default the ids, positions None: one sequence a row."""
    return SimpleNamespace(
        input_ids=input_ids,
        labels=input_ids if labels is None else labels,
        position_ids=position_ids,
        attention_mask=attention_mask,
    )


def packed_loss(
    model, batch, *, weights: LossWeights = ALL_TEXT, chunked: bool = False
) -> LossParts:
    """Loss of a batch; `chunked`: logits of at most 64 tokens at once."""
    # The same module for both, with another limit.
    return LossModule(model, weights, 1 if chunked else MAX_LOGITS)(
        batch.input_ids, batch.labels, batch.position_ids, batch.attention_mask
    )
