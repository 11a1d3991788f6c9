"""The attention masks of a decoder's layers: all positions so far, or a sliding window of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seed_multimodal.language.llm import FULL, SLIDING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Of a model whose attention adds the mask to the scores; the others take a boolean one.
ADDITIVE = "eager"


class AttentionMasks:
    """Builds what `config`'s decoder takes as `attention_mask`.

    window: how far back layers with sliding attention see; None: there are none.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        layer_types = set(getattr(config, "layer_types", None) or ())
        # A decoder with layer types takes a mask for each; others have one window for all layers.
        self._by_layer_type = SLIDING in layer_types
        self.window: int | None = None
        if self._by_layer_type or not layer_types:
            self.window = getattr(config, "sliding_window", None)
        self._config = config  # the implementation of attention may be changed later

    def __call__(
        self, positions: Tensor, span_positions: Tensor, dtype: torch.dtype
    ) -> Tensor | dict[str, Tensor]:
        """Masks `[B, 1, n, span]` of tokens at `positions` `[B, n]`.

        span_positions: those of the keys `[span]`.
        dtype: of the model.
        """
        queries = positions[:, None, :, None]  # [B, 1, n, 1]
        full = span_positions <= queries
        sliding = full
        if self.window is not None:
            sliding = full & (span_positions > queries - self.window)
        if not self._by_layer_type:
            return self._form(sliding, dtype)
        return {FULL: self._form(full, dtype), SLIDING: self._form(sliding, dtype)}

    def _form(self, visible: Tensor, dtype: torch.dtype) -> Tensor:
        """The mask as the attention implementation takes it."""
        if getattr(self._config, "_attn_implementation", None) != ADDITIVE:
            return visible
        hidden = torch.finfo(dtype).min
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, hidden)
