"""Cost of training a LLaMA: floating-point operations of its matrix products, forward and backward.

A multiply-add counts as two. A frozen matrix of n numbers costs 4 n a token (its product, and the gradient that goes
on to its input), a trained one 6 n (and its own gradient); so LoRA is close to 4 N a token, full fine-tuning 6 N.
A matrix in FP8 counts as a frozen one of any precision, its transposed copy not at all. Attention is counted as the
causal half of each sequence of a packed row, padding not at all. Not counted, as usual for a model-FLOP utilisation
(MFU): norms, softmax, rotary positions, lookups, and products made a second time by activation checkpointing or by the
chunked loss.
"""

from __future__ import annotations

from torch import nn

from seed_multimodal.training.llm.loss import find_llama

FROZEN, TRAINED = 4, 6


def step_flops(model: nn.Module, positions: float, length: float, learned: float | None = None) -> float:
    """Training on `positions` tokens (no padding) in sequences of `length`, with `learned` of them through the head
    (all). For sequences of several lengths give the mean of the squares over the mean of the lengths."""
    body, head, attention = token_flops(model, length)
    return positions * (body + attention) + (positions if learned is None else learned) * head


def token_flops(model: nn.Module, length: float) -> tuple[int, int, float]:
    """FLOP of one token: in the layers' matrices, in the head, and in attention over a sequence of `length`.

    `length` as in `step_flops`; attention is proportional to it.
    """
    llama = find_llama(model)
    config = llama.config
    body = 0
    for name, parameter in llama.model.layers.named_parameters():
        if ".original_module." not in f".{name}":
            numbers = _numbers(parameter)
            body += (TRAINED if parameter.requires_grad else FROZEN) * numbers
    trained_head = any(p.requires_grad for p in llama.lm_head.parameters())
    head = (TRAINED if trained_head else FROZEN) * config.vocab_size * config.hidden_size
    width = config.num_attention_heads * llama.model.layers[0].self_attn.head_dim
    return body, head, 3.0 * config.num_hidden_layers * 2 * length * width


def _numbers(parameter: nn.Parameter) -> int:
    """Numbers in a matrix, 0 for vectors; bitsandbytes packs two 4-bit ones into a byte and keeps the true shape."""
    quantized = getattr(parameter, "quant_state", None)
    shape = getattr(quantized, "shape", None) or parameter.shape
    return shape[0] * shape[1] if len(shape) == 2 else 0
