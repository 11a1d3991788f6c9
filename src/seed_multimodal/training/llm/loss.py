"""The language model's loss over packed or padded batches; the head is applied to learned tokens
only.

Packed rows (`attention_mask` None) have several sequences whose `position_ids` restart at 0; the
last token of one does not predict the first of the next. transformers separates their attention;
flash attention and `segment_attention` need a single row, so rows are concatenated there. Right
padding needs no mask under causal attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seed_multimodal.language.llm import output_scores
from seed_multimodal.language.vocabulary import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from seed_multimodal.language.llm import LanguageModel

MAX_LOGITS = 2**26  # 256 MiB in fp32
ROWS_MULTIPLE = 64  # of the head's states, see `head_losses`
SEGMENTS = "sdpa_of_segments"  # transformers' name of `segment_attention`


@dataclass(frozen=True)
class LossWeights:
    """Weights of text and image tokens; ids from `first_code` on (codes, image start and end) are
    image tokens."""

    first_code: int
    text: float = 1.0
    image: float = 1.0

    def count(self, labels: Tensor, position_ids: Tensor | None) -> float:
        """Weighted number of learned tokens of a CPU batch; `position_ids`: only of packed rows."""
        targets = learned_targets(labels, position_ids)
        n_learned = int((targets != IGNORE_INDEX).sum())
        n_image = int((targets >= self.first_code).sum())
        return self.text * (n_learned - n_image) + self.image * n_image


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
    def text_mean(self) -> Tensor:
        return self.text_sum / self.text_count.clamp(min=1)

    @property
    def image_mean(self) -> Tensor:
        return self.image_sum / self.image_count.clamp(min=1)

    @property
    def mean(self) -> Tensor:
        """Weighted mean; 0 if nothing is learned."""
        return self.sum / self.count.clamp(min=1e-8)


class LossModule(nn.Module):
    """A module whose forward is the loss of a LLaMA or PEFT model.

    For DDP and DeepSpeed, which wrap one forward pass. Parameter names get the prefix `llm.`.

    Args:
        weights: by token type.
        max_logits: maximum size of the logits; more are computed in chunks, and recomputed in the
            backward pass.
    """

    def __init__(
        self, llm: nn.Module, weights: LossWeights = ALL_TEXT, max_logits: int = MAX_LOGITS
    ) -> None:
        super().__init__()
        self.llm = llm
        self.weights = weights
        self.max_logits = max_logits

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        embeds: Tensor | None = None,
        axis_ids: Tensor | None = None,
    ) -> LossParts:
        """Loss of a batch's tensors `[B, L]`.

        embeds: input embeddings with image features `[B, L, width]`.
        axis_ids: positions on the model's axes `[A, B, L]`; None: they are `position_ids`.
        """
        llama = find_llama(self.llm)
        # Only states with a target pass the head: [T, width], [T].
        hidden, targets = _learned_states(
            llama, input_ids, labels, position_ids, attention_mask, embeds, axis_ids
        )
        losses = _token_losses(llama, hidden, targets, self.max_logits)
        return _sum_by_type(targets, losses, self.weights)


def round_residual(module: nn.Module, precision: str) -> None:
    """Round the output of embeddings trained in fp32 to a half-precision base's dtype.

    Otherwise all activations between layers would be fp32, twice the memory.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    frozen_dtypes = {p.dtype for p in module.parameters() if not p.requires_grad}
    if dtype not in frozen_dtypes:
        return

    def round_output(table: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.to(dtype)

    for submodule in module.modules():
        if isinstance(submodule, nn.Embedding) and submodule.weight.requires_grad:
            submodule.register_forward_hook(round_output)


def learned_targets(labels: Tensor, position_ids: Tensor | None) -> Tensor:
    """Shifted targets: `[B, L]` → `[B, L-1]`, -100 where none."""
    targets = labels[:, 1:]
    if position_ids is None:
        return targets
    return targets.masked_fill(position_ids.expand_as(labels)[:, 1:] == 0, IGNORE_INDEX)


def find_llama(model: nn.Module) -> LlamaForCausalLM:
    """The causal language model inside wrappers of PEFT, torch.compile or an engine (LoRA layers
    stay in it).

    Raises TypeError: none with transformers' usual names, `model.layers` and `lm_head`.
    """
    for module in model.modules():
        # Looked up in `_modules`, because PEFT's wrappers forward attribute access to the wrapped
        # module.
        if "lm_head" in module._modules and hasattr(module._modules.get("model"), "layers"):
            return module
    raise TypeError(
        f"{type(model).__name__} contains no language model with model.layers and lm_head."
    )


def use_attention(llama: LlamaForCausalLM, packed: bool) -> None:
    """Select attention for packed or padded rows, if the model has two kinds (`model.build_llm`).

    It stays set until the next forward pass, for activation checkpointing.
    """
    attention = getattr(llama, "attentions", {}).get(packed)
    if attention is not None and attention != llama.config._attn_implementation:
        llama.set_attn_implementation(attention)


def joins_rows(config: Any) -> bool:
    """Whether a model's attention separates the sequences of a single row only."""
    name = str(config._attn_implementation)
    return "flash" in name or name == SEGMENTS


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """SDPA, with boundaries of each sequence of a packed row `[1, heads, L, D]` alone, so that no
    scores between them are computed."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
    lengths = cu_seq_lens_q.diff().tolist()
    segments = zip(*(states.split(lengths, 2) for states in (query, key, value)), strict=True)
    outputs = [
        sdpa_attention_forward(module, *segment, None, **arguments)[0] for segment in segments
    ]
    return torch.cat(outputs, 1), None


def add_packed_lengths(
    decoder: nn.Module, inputs: tuple[Any, ...], arguments: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of the decoder: the sequence lengths that its attention needs for a packed
    row.

    Otherwise transformers derives them from the position ids in every layer, which waits for the
    device each time.
    """
    positions = arguments.get("position_ids")
    if positions is not None and positions.ndim == 3:  # with axes: the first one is of time
        positions = positions[0]
    is_padded = arguments.get("attention_mask") is not None
    if positions is None or len(positions) != 1 or is_padded or not joins_rows(decoder.config):
        return inputs, arguments
    starts = (positions.flatten() == 0).nonzero().flatten().int()
    boundaries = torch.cat([starts, starts.new_tensor([positions.numel()])])
    max_length = int(boundaries.diff().max())
    lengths = {
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": max_length,
        "max_length_k": max_length,
    }
    if decoder.config._attn_implementation == SEGMENTS:
        arguments["attention_mask"] = positions.new_zeros(1, 1, 1, 1)  # else a mask is built
    return inputs, {**arguments, **lengths}


def _learned_states(
    llama: LlamaForCausalLM,
    input_ids: Tensor,
    labels: Tensor,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    embeds: Tensor | None,
    axis_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Last hidden states with a target `[T, width]`, and targets `[T]`."""
    shape = input_ids.shape

    # 1. Padded rows: causal attention hides padding on the right; a mask is needed only for padding
    # on the left.
    if attention_mask is not None:
        position_ids = None
        if not (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
            attention_mask = None
    use_attention(llama, packed=position_ids is not None)

    # 2. Packed rows.
    if position_ids is not None and joins_rows(llama.config):
        input_ids = input_ids.reshape(1, -1)
        position_ids = position_ids.expand(shape).reshape(1, -1)
        if embeds is not None:
            embeds = embeds.reshape(1, -1, embeds.shape[-1])
        if axis_ids is not None:
            axis_ids = axis_ids.reshape(len(axis_ids), 1, -1)
    # Packed, transformers reads the sequences' borders from a first axis.
    all_ids = position_ids
    if axis_ids is not None:
        all_ids = axis_ids if all_ids is None else torch.cat([all_ids[None], axis_ids])
    output = llama.get_decoder()(
        input_ids=input_ids if embeds is None else None,
        inputs_embeds=embeds,
        position_ids=all_ids,
        attention_mask=attention_mask,
        use_cache=False,
    )

    # 3. Each state predicts the next token of its row; keep those with a target.
    states = output.last_hidden_state.reshape(*shape, -1)[:, :-1].flatten(0, 1)
    if position_ids is not None:
        position_ids = position_ids.reshape(-1, shape[1])
    targets = learned_targets(labels, position_ids).flatten()
    learned = (targets != IGNORE_INDEX).nonzero().flatten()
    return states.index_select(0, learned), targets.index_select(0, learned)


def _sum_by_type(targets: Tensor, losses: Tensor, weights: LossWeights) -> LossParts:
    """Sums by token type from the losses `[T]` of the learned tokens `[T]`."""
    # No boolean indexing, which would wait for the device.
    is_image = targets >= weights.first_code
    text_sum = torch.where(is_image, 0.0, losses).sum()
    image_sum = torch.where(is_image, losses, 0.0).sum()
    image_count = is_image.sum().float()
    text_count = targets.numel() - image_count
    return LossParts(
        sum=weights.text * text_sum + weights.image * image_sum,
        count=weights.text * text_count + weights.image * image_count,
        text_sum=text_sum.detach(),
        text_count=text_count,
        image_sum=image_sum.detach(),
        image_count=image_count,
    )


def _token_losses(
    llama: LlamaForCausalLM, hidden: Tensor, targets: Tensor, max_logits: int
) -> Tensor:
    """Cross-entropy of each learned token `[T]`, fp32."""
    n_multiples = max_logits // int(llama.config.vocab_size) // ROWS_MULTIPLE
    chunk_size = max(1, n_multiples) * ROWS_MULTIPLE
    if len(targets) <= chunk_size:
        return head_losses(llama, hidden, targets)
    # Only one chunk's logits exist at a time: the backward pass computes them again.
    losses = [
        checkpoint(head_losses, llama, states, chunk_targets, use_reentrant=False)
        for states, chunk_targets in zip(
            hidden.split(chunk_size), targets.split(chunk_size), strict=True
        )
    ]
    return torch.cat(losses)


def head_losses(llm: LanguageModel, states: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy `[T]` fp32 of tokens `[T]`, from the decoder's states `[T, width]`."""
    # For each new number of rows, oneDNN compiles kernels for bf16 on CPUs, some MB each, and keeps
    # up to 1,024 of them. So the rows are filled up, and there are few numbers.
    n_tokens = len(targets)
    n_filled = -n_tokens % ROWS_MULTIPLE
    scores = output_scores(llm, F.pad(states, (0, 0, 0, n_filled)))
    filled_targets = F.pad(targets, (0, n_filled), value=IGNORE_INDEX)
    losses = F.cross_entropy(scores, filled_targets, ignore_index=IGNORE_INDEX, reduction="none")
    return losses[:n_tokens]
