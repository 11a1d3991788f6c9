"""Time the language model: tokens per second of `generate` with a key-value cache. One JSON line.

    python benchmarks/llm.py --model pretrained/nano                         # the shipped weights
    python benchmarks/llm.py --size released --device cuda --dtype float16     # random LLaMA-7B, vocabulary 40,194
    python benchmarks/llm.py --size nano --batches 1,16 --prompt 64 --new 64
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from shared import common_flags, fill_random, measure, part_of, positive, print_line, runtime_of

from seed_multimodal.device import Runtime
from seed_multimodal.entry import DONE, guarded

# LLaMA-7B (vocabulary 40,194), random weights, fp16, 128 + 128 tokens, transformers on one H200 (2026-11-20).
REFERENCES = {"tokens_per_second": {"1": 24.8, "16": 253}, "static_cache_compiled_batch_1": 151,
              "bandwidth_bound_batch_1": 353}
SIZES = {
    "nano": {"vocab_size": 2514, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
             "num_attention_heads": 8, "max_position_embeddings": 512},
    "released": {"vocab_size": 40194, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                 "num_attention_heads": 32, "max_position_embeddings": 2048}}


def load(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[Any, str]:
    """The language model of a system's folder, or random weights of a size; and what it is."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if options.model:
        from seed_multimodal.language.llama import load_llm

        return load_llm(part_of(options.model, "llm"), device=device, dtype=dtype), options.model
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES[options.size]))
    # The rotary table is a buffer that is computed, not learned: it must not be random.
    rotary = type(model.model.rotary_emb)(model.config)
    fill_random(model, device, dtype)
    model.model.rotary_emb = rotary.to(device)
    return model, f"random weights, {options.size} size"


def timed(options: argparse.Namespace, runtime: Runtime) -> int:
    """Time and print the line; returns the exit code.

    Raises:
        CheckpointError, ConfigError: a folder that is no system, or incomplete.
    """
    model, what = load(options, runtime.device, runtime.dtype)
    results: dict[str, Any] = {"tokens_per_second": {}, "seconds": {}}
    generator = torch.Generator().manual_seed(0)
    for batch in options.batches:
        prompt = torch.randint(3, model.config.vocab_size, (batch, options.prompt), generator=generator)
        prompt = prompt.to(runtime.device)
        taken = measure(lambda p=prompt: model.generate(
            p, attention_mask=torch.ones_like(p), min_new_tokens=options.new, max_new_tokens=options.new,
            do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=2), runtime.device, options.repeats)
        results["seconds"][str(batch)] = round(taken["seconds"], 3)
        results["tokens_per_second"][str(batch)] = round(batch * options.new / taken["seconds"], 1)
    settings = {"model": what, "runtime": str(runtime), "parameters": sum(p.numel() for p in model.parameters()),
                "prompt_tokens": options.prompt, "new_tokens": options.new, "repeats": options.repeats}
    print_line("llm", runtime.device, settings, results, REFERENCES if options.size == "released" else None)
    return DONE


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Time the language model.")
    common_flags(parser, tuple(SIZES), 3, batches="1,16", model=True)
    parser.add_argument("--prompt", type=positive, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=positive, default=128, help="tokens to generate")
    options = parser.parse_args()
    runtime = runtime_of(parser, options)
    return guarded("llm", False, lambda: timed(options, runtime))


if __name__ == "__main__":
    raise SystemExit(main())
