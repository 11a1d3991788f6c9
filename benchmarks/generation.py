"""Time the language model: new tokens per second of one request after another and of a batch, and descriptions.

    python benchmarks/generation.py --model pretrained/nano-x         any system: SEED-LLaMA, SEED-X, LaVIT
    python benchmarks/generation.py --device cuda --model original    random weights of LLaMA-7B

`plain`: transformers' `generate` with a key-value cache, one request after another; `engine`: so many at once, of
different lengths, in `Engine`; `compiled`: the same with compiled decoding. Then descriptions of new images.
"""

from __future__ import annotations

import argparse
import itertools
from types import SimpleNamespace
from typing import Any

import torch
from shared import Timed, benchmark_parser, compare, fill_random, input_images, start, system_folder

from seed_multimodal.device import Runtime, choose_device
from seed_multimodal.language.engine import Engine
from seed_multimodal.language.generation import GenerationSettings, Prompt
from seed_multimodal.language.vocabulary import ImageVocabulary
from seed_multimodal.system.base import MultimodalSystem

LLAMA_7B = {"vocab_size": 40194, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "max_position_embeddings": 2048}
WORDS: Any = SimpleNamespace(vocabulary=ImageVocabulary(), eos_id=2)  # all of a tokenizer that an engine needs


def random_llama(runtime: Runtime) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_7B))
    rotary = type(model.model.rotary_emb)(model.config)  # computed, so it must not be random
    fill_random(model, runtime.device, runtime.dtype)
    model.model.rotary_emb = rotary.to(runtime.device)
    return model


def random_prompts(llm: Any, count: int, longest: int) -> list[list[int]]:
    """Ids; the first is the longest."""
    generator = torch.Generator().manual_seed(0)
    lengths = [longest, *torch.randint(longest // 2, longest + 1, (count - 1,), generator=generator).tolist()]
    return [torch.randint(3, llm.config.vocab_size, (length,), generator=generator).tolist() for length in lengths]


def run(options: argparse.Namespace) -> None:
    """Time generation, then descriptions."""
    runtime = choose_device(options.device, options.dtype, log=None)
    system: Any = None
    if options.model != "original":
        system = MultimodalSystem.from_pretrained(system_folder(options.model), device=options.device,
                                                  dtype=options.dtype, log=None)
    llm = random_llama(runtime) if system is None else system.llm

    def plain(_: int) -> Timed:
        ids = torch.tensor(random_prompts(llm, 1, options.prompt), device=llm.device)
        return Timed(lambda: llm.generate(
            ids, min_new_tokens=options.new, max_new_tokens=options.new, do_sample=False, use_cache=True,
            pad_token_id=0, eos_token_id=2), options.new)

    def engine(batch: int, compiled: bool = False) -> Timed:
        prompts = [Prompt(ids) for ids in random_prompts(llm, batch, options.prompt)]
        how = GenerationSettings(options.new, options.new, do_sample=False, constrain=False)
        made = Engine(llm, WORDS, batch, compiled=compiled)
        return Timed(lambda: made.generate(prompts, how), batch * options.new)

    variants = {"plain": plain, "engine": engine, "compiled": lambda batch: engine(batch, compiled=True)}
    settings = {"prompt_tokens": options.prompt, "new_tokens": options.new}
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
