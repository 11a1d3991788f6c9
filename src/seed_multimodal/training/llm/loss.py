"""The language model's loss over packed or padded batches; the head is applied to learned tokens only.

Packed rows (`attention_mask` None) have several sequences whose `position_ids` restart at 0; the last token of one does
not predict the first of the next. transformers separates their attention, with flash attention only in a single row, so
rows are concatenated there. Right padding needs no mask under causal attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seed_multimodal.language.vocabulary import IGNORE_INDEX

LARGEST_LOGITS = 2**26  # 256 MiB in fp32


@dataclass(frozen=True)
class LossWeights:
    """Weights of text and image tokens; ids from `first_code` on (codes, image start and end) are image tokens."""

    first_code: int
    text: float = 1.0
    image: float = 1.0

    def count(self, labels: Tensor, position_ids: Tensor | None) -> float:
        """Weighted number of learned tokens of a CPU batch; `position_ids`: only of packed rows."""
        targets = learned_targets(labels, position_ids)
        learned, images = (
            int((targets != IGNORE_INDEX).sum()),
            int((targets >= self.first_code).sum()),
        )
        return self.text * (learned - images) + self.image * images


ALL_TEXT = LossWeights(2**31)


class LossParts(NamedTuple):
    """Sums over the learned tokens of one batch, fp32 scalars; only `sum` carries a gradient.

    `sum` and `count` are weighted (`sum / count` is the loss); the parts by token type are not.
    """

    sum: Tensor
    count: Tensor
    text_sum: Tensor
    text_count: Tensor
    image_sum: Tensor
    image_count: Tensor

    @property
    def mean(self) -> Tensor:
        """Weighted mean; 0 if nothing is learned."""
        return self.sum / self.count.clamp(min=1e-8)


class LossModule(nn.Module):
    """A module whose forward is the loss of a LLaMA or PEFT model, for engines that wrap one forward pass (DDP,
    DeepSpeed). Parameter names get the prefix `llm.`.

    Args:
        weights: by token type.
        largest: maximum size of the logits; more are computed in chunks, and recomputed in the backward pass.
    """

    def __init__(
        self, llm: nn.Module, weights: LossWeights = ALL_TEXT, largest: int = LARGEST_LOGITS
    ) -> None:
        super().__init__()
        self.llm, self.weights, self.largest = llm, weights, largest

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        embeds: Tensor | None = None,
    ) -> LossParts:
        """Loss of a batch's tensors `[B, L]`; `embeds` `[B, L, width]`: input embeddings with image features."""
        llama = find_llama(self.llm)
        hidden, targets = _learned(llama, input_ids, labels, position_ids, attention_mask, embeds)
        return _parts(targets, _losses(llama, hidden, targets, self.largest), self.weights)


def round_residual(module: nn.Module, precision: str) -> None:
    """Round the output of embeddings trained in fp32 to a half-precision base's dtype; otherwise all activations
    between layers would be fp32, twice the memory."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    if half is None or not any(
        p.dtype == half and not p.requires_grad for p in module.parameters()
    ):
        return

    def rounded(table: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.to(half)

    for part in module.modules():
        if isinstance(part, nn.Embedding) and part.weight.requires_grad:
            part.register_forward_hook(rounded)


def learned_targets(labels: Tensor, position_ids: Tensor | None) -> Tensor:
    """Shifted targets: `[B, L]` → `[B, L-1]`, -100 where none."""
    targets = labels[:, 1:]
    if position_ids is None:
        return targets
    return targets.masked_fill(position_ids.expand_as(labels)[:, 1:] == 0, IGNORE_INDEX)


def find_llama(model: nn.Module) -> Any:
    """The `LlamaForCausalLM` inside wrappers of PEFT, torch.compile or an engine (LoRA layers stay in it)."""
    for module in model.modules():
        # Looked up in `_modules`, because PEFT's wrappers forward attribute access to the wrapped module.
        if "lm_head" in module._modules and hasattr(module._modules.get("model"), "layers"):
            return module
    raise TypeError(f"{type(model).__name__} contains no LLaMA.")


def use_attention(llama: Any, packed: bool) -> None:
    """Select attention for packed or padded rows, if the model has two kinds (`model.build_llm`). It stays set until
    the next forward pass for activation checkpointing."""
    wanted = getattr(llama, "attentions", {}).get(packed)
    if wanted is not None and wanted != llama.config._attn_implementation:
        llama.set_attn_implementation(wanted)


def add_packed_lengths(
    decoder: Any, inputs: tuple[Any, ...], given: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of the decoder: the sequence lengths that flash attention needs for a packed row.

    Otherwise transformers derives them from the position ids in every layer, which waits for the device each time.
    """
    positions = given.get("position_ids")
    if positions is None or positions.shape[0] != 1 or given.get("attention_mask") is not None:
        return inputs, given
    if "flash" not in str(decoder.config._attn_implementation):
        return inputs, given
    starts = (positions.flatten() == 0).nonzero().flatten().int()
    boundaries = torch.cat([starts, starts.new_tensor([positions.numel()])])
    longest = int(boundaries.diff().max())
    lengths = {
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    return inputs, {**given, **lengths}


def _learned(
    llama: Any,
    ids: Tensor,
    labels: Tensor,
    positions: Tensor | None,
    mask: Tensor | None,
    embeds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Last hidden states with a target `[T, width]`, and targets `[T]`."""
    if mask is not None:
        positions = None
        mask = (
            mask if (mask[:, 1:] > mask[:, :-1]).any() else None
        )  # padded on the right: causal attention hides it
    use_attention(llama, positions is not None)
    shape = ids.shape
    if positions is not None and "flash" in str(llama.config._attn_implementation):
        ids, positions = ids.reshape(1, -1), positions.expand(shape).reshape(1, -1)
        embeds = None if embeds is None else embeds.reshape(1, -1, embeds.shape[-1])
    given = {"input_ids": ids} if embeds is None else {"inputs_embeds": embeds}
    hidden = llama.model(
        **given, position_ids=positions, attention_mask=mask, use_cache=False
    ).last_hidden_state
    hidden = hidden.reshape(*shape, -1)[:, :-1].flatten(0, 1)
    targets = learned_targets(
        labels, None if positions is None else positions.reshape(-1, shape[1])
    ).flatten()
    learned = (targets != IGNORE_INDEX).nonzero().flatten()
    return hidden.index_select(0, learned), targets.index_select(0, learned)


def _parts(targets: Tensor, values: Tensor, weights: LossWeights) -> LossParts:
    """Sums by token type from the losses `[T]` of the learned tokens `[T]`."""
    image = targets >= weights.first_code
    text_sum, image_sum = (
        torch.where(image, 0.0, values).sum(),
        torch.where(image, values, 0.0).sum(),
    )
    image_count = image.sum().float()
    text_count = targets.numel() - image_count
    return LossParts(
        weights.text * text_sum + weights.image * image_sum,
        weights.text * text_count + weights.image * image_count,
        text_sum.detach(),
        text_count,
        image_sum.detach(),
        image_count,
    )


def _losses(llama: Any, hidden: Tensor, targets: Tensor, largest: int) -> Tensor:
    """Cross-entropy of each row `[T]`, fp32."""
    head, size = llama.lm_head, max(64, largest // int(llama.config.vocab_size))
    if len(targets) <= size:
        return _head_losses(head, hidden, targets)
    return torch.cat(
        [
            checkpoint(
                _head_losses,
                head,
                hidden[at : at + size],
                targets[at : at + size],
                use_reentrant=False,
            )
            for at in range(0, len(targets), size)
        ]
    )


def _head_losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="none")
