"""Language models of other architectures, with random weights."""

from __future__ import annotations

from typing import Any

import torch

# model_type → fields of its configuration, in addition to `SIZES`.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "smollm3": {"no_rope_layers": [1, 0]},
    "mistral": {"sliding_window": None},
    "phi3": {},
    # With layers that see the last few tokens only.
    "mistral sliding": {"sliding_window": 8},
    "qwen3 sliding": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "final_logit_softcapping": 1.0},
    "gemma2 eager": {"head_dim": 16, "sliding_window": 8, "attn_implementation": "eager"},
}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.5,
    "tie_word_embeddings": False,
}


def random_llm(architecture: str, vocab_size: int, seed: int = 0, **fields: Any) -> Any:
    """A model of `ARCHITECTURES`, whose answers differ from prompt to prompt."""
    from transformers import AutoConfig, AutoModelForCausalLM

    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    values = {**SIZES, **special, **ARCHITECTURES.get(architecture, {}), **fields}
    config = AutoConfig.for_model(architecture.split()[0], vocab_size=vocab_size, **values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()
