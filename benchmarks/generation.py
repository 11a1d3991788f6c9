"""Time the language model: new tokens per second of one request after another and of a batch, and descriptions.

    python benchmarks/generation.py                                   pretrained/nano
    python benchmarks/generation.py --model pretrained/nano-x         any system: SEED-LLaMA, SEED-X, LaVIT
    python benchmarks/generation.py --device cuda --model original    random weights of LLaMA-7B

Prompts differ in length, as requests do. `plain`: transformers' `generate` with a key-value cache, one request after
another; `batch`: so many requests in one call, padded on the left; `static` (CUDA): the same with a static cache and
compiled decoding. Then descriptions of images that were not seen before: `plain` one by one, `batch`
in one call.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from shared import Timed, benchmark_parser, compare, fill_random, input_images, start, system_folder
from torch import Tensor

from seed_multimodal.device import Runtime, choose_device
from seed_multimodal.system.base import MultimodalSystem

LLAMA_7B = {"vocab_size": 40194, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "max_position_embeddings": 2048}


def random_llama(runtime: Runtime) -> Any:
    """LLaMA-7B with SEED's vocabulary and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_7B))
    rotary = type(model.model.rotary_emb)(model.config)  # computed, so it must not be random
    fill_random(model, runtime.device, runtime.dtype)
    model.model.rotary_emb = rotary.to(runtime.device)
    return model


def random_prompts(llm: Any, count: int, longest: int) -> tuple[Tensor, Tensor]:
    """Ids `[count, longest]` padded on the left, and their mask; the first is the longest, the shortest half of it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, llm.config.vocab_size, (count, longest), generator=generator)
    lengths = torch.randint(longest // 2, longest + 1, (count, 1), generator=generator)
    lengths[0] = longest
    mask = (torch.arange(longest) >= longest - lengths).long()
    return (ids * mask).to(llm.device), mask.to(llm.device)


def run(options: argparse.Namespace) -> None:
    """Time generation, then descriptions."""
    runtime = choose_device(options.device, options.dtype, log=None)
    system: Any = None
    if options.model != "original":
        system = MultimodalSystem.from_pretrained(system_folder(options.model), device=options.device,
                                                  dtype=options.dtype, log=None)
    llm = random_llama(runtime) if system is None else system.llm

    def generate(batch: int, **how: Any) -> Timed:
        ids, mask = random_prompts(llm, batch, options.prompt)
        return Timed(lambda: llm.generate(
            ids, attention_mask=mask, min_new_tokens=options.new, max_new_tokens=options.new, do_sample=False,
            use_cache=True, pad_token_id=0, eos_token_id=2, **how), batch * options.new)

    variants = {"plain": lambda batch: generate(1), "batch": generate}
    if runtime.device.type == "cuda":
        variants["static"] = lambda batch: generate(batch, cache_implementation="static")
    settings = {"parameters": sum(p.numel() for p in llm.parameters()), "prompt_tokens": options.prompt,
                "new_tokens": options.new}
    compare("generation", "tokens", variants, options, runtime, settings)
    if system is not None:
        images = iter(input_images((options.repeats + 2) * (len(options.batches) + sum(options.batches))))
        compare("describe", "images", {
            "plain": lambda batch: Timed(lambda: system.describe(next(images)), 1),
            "batch": lambda batch: Timed(lambda: system.describe(list(itertools.islice(images, batch))), batch),
        }, options, runtime, {})


if __name__ == "__main__":
    parser = benchmark_parser(__doc__, [1, 4, 16])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the longest prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    start(run, parser)
