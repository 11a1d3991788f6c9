"""Compute the memory that a Qwen 3 with SEED's tokens needs, from its published sizes: no weights.

    python benchmarks/memory.py                        # Qwen3-0.6B, 4B, 8B
    python benchmarks/memory.py --models 8B --context 32768 --rank 64

All in GB. bf16, int8, 4bit: the weights; quantised are the linear layers but the head. lora and
tables: what training adds for the low-rank matrices of all linear layers, and for trained copies of
embeddings and head (without settings both are trained): weights, gradients and two moments of AdamW
in fp32. kv_row: keys and values of one sequence, in bf16. Activations are not included.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch import nn

from seed_multimodal.language.llm import head_dim
from seed_multimodal.language.vocabulary import ImageVocabulary
from seed_multimodal.training.llm.lora import add_lora

N_TEXT = 151_669  # tokens of Qwen 3's tokenizer
# Hidden and intermediate width, layers, heads, tied tables, of huggingface.co/Qwen/Qwen3-*.
MODELS = {
    "0.6B": (1024, 3072, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False),
}
TRAINED_BYTES = 16  # weight, gradient, two moments
NF4_BYTES = 0.5 + 4 / 64  # a scale in fp32 for each 64 weights


def read_config(name: str) -> Any:
    """The configuration of a model, with a row for each token of SEED's."""
    from transformers import Qwen3Config

    hidden, intermediate, layers, heads, is_tied = MODELS[name]
    return Qwen3Config(
        vocab_size=ImageVocabulary(N_TEXT).size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=is_tied,
    )


def memory(name: str, rank: int, context: int) -> dict[str, Any]:
    """The figures of one model."""
    from transformers import AutoModelForCausalLM

    # 1. The weights; tied tables count once.
    config = read_config(name)
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config)
    n_weights = sum(parameter.numel() for parameter in llm.parameters())
    n_quantised = 0
    for module in llm.get_decoder().modules():
        if isinstance(module, nn.Linear):
            n_quantised += module.weight.numel()
    others = 2 * (n_weights - n_quantised)

    # 2. What training adds.
    with torch.device("meta"):
        model = add_lora(llm, {"r": rank})
    n_lora = 0
    n_tables = 0
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" in parameter_name:
            n_lora += parameter.numel()
        elif parameter.requires_grad:
            n_tables += parameter.numel()

    # 3. Keys and values.
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim(config)
    sizes = {
        "bf16": 2 * n_weights,
        "int8": n_quantised + others,
        "4bit": NF4_BYTES * n_quantised + others,
        "lora": TRAINED_BYTES * n_lora,
        "tables": TRAINED_BYTES * n_tables,
        "kv_row": 2 * values * context,
    }
    figures = {key: round(size / 1e9, 2) for key, size in sizes.items()}
    return {"model": f"Qwen3-{name}", "parameters": n_weights, "rank": rank, **figures}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--context", type=int, default=4096, help="tokens of a sequence")
    options = parser.parse_args()
    for model_name in options.models:
        print(json.dumps(memory(model_name, options.rank, options.context)))
