"""The random LLaMA of the tiny systems."""

from __future__ import annotations

from typing import Any

WIDTH = 32


def llama(vocab_size: int, mlp_width: int = 64, context: int = 512) -> Any:
    """One layer, with weights large enough that answers differ from prompt to prompt."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=mlp_width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)
