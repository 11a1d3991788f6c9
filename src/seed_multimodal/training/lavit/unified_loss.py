"""LaVIT's model as stage 2 trains it: language model, merger and projector, whose forward pass is the loss.

The merger takes part in every step, with numbers that count for nothing where the batch has no picture to read: all
processes compute gradients of the same parameters, and ZeRO-3 gathers them in one order.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from seed_multimodal.training.llm.loss import LossModule, LossParts, LossWeights, find_llama


class UnifiedLoss(LossModule):
    """`LossModule` with features in places of the rows. Parameter names: `llm.*`, `causal_encoder.*`, `vit_proj.*`."""

    def __init__(self, llm: nn.Module, merger: nn.Module, projector: nn.Linear, *, kind: str = "auto",
                 weights: LossWeights | None = None) -> None:
        super().__init__(llm, kind=kind, weights=weights)
        self.causal_encoder, self.vit_proj = merger, projector

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None,
                attention_mask: Tensor | None = None, features: Tensor | None = None,
                keep: Tensor | None = None, kept: Tensor | None = None, places: Tensor | None = None) -> LossParts:
        """As `LossModule`; `features`, `keep`, `kept` and `places` as of `rows.ReadyBatch`."""
        llama: Any = find_llama(self.llm)
        embeds = llama.get_input_embeddings()(input_ids)
        if features is None or keep is None or kept is None or places is None:
            nothing = self.vit_proj.weight.new_zeros(1, 1, self.vit_proj.in_features)
            embeds = embeds + 0.0 * self.read(nothing, nothing.new_ones(1, 1)).sum().to(embeds)
        else:
            rows = self.read(features, keep).flatten(0, 1).index_select(0, kept)
            embeds = embeds.flatten(0, 1).index_copy(0, places, rows.to(embeds)).view_as(embeds)
        return super().forward(input_ids, labels, position_ids, attention_mask, embeds)

    def read(self, features: Tensor, keep: Tensor) -> Tensor:
        """Features `[n, N, D]`, kept or not `[n, N]` → what the language model reads `[n, N, width]`."""
        found: Tensor = self.vit_proj(self.causal_encoder(features.to(self.vit_proj.weight.dtype), keep))
        return found
