"""Time the language model: new tokens per second of one request after another and of a batch.

    python benchmarks/generation.py --model pretrained/nano-x         any system

`plain`: transformers' `generate` with a key-value cache, one request after another; `engine`: so
many at once, of different lengths, in `Engine`; `generate_batch`: the same by transformers'
continuous batching, its start included; `compiled`: `engine` with compiled decoding; `int8`: and
with torchao's 8-bit weights.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from typing import Any

import torch
from shared import Timed, benchmark_parser, compare, load_system, start
from transformers import GenerationConfig

from seed_multimodal.device import choose_device
from seed_multimodal.inference.backends.torch import TorchBackend
from seed_multimodal.inference.engine import Engine
from seed_multimodal.inference.prompt import GenerationSettings, Prompt


def random_prompts(llm: Any, count: int, longest: int) -> list[list[int]]:
    """Ids of prompts of different lengths; the first is the longest."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(longest // 2, longest + 1, (count,), generator=generator).tolist()
    lengths[0] = longest
    return [
        torch.randint(3, llm.config.vocab_size, (length,), generator=generator).tolist()
        for length in lengths
    ]


def run(options: argparse.Namespace) -> None:
    runtime = choose_device(options.device, options.dtype, log=None)
    system = load_system(options, load_decoder=False)
    llm = system.llm
    settings = GenerationSettings(options.new, options.new, do_sample=False, constrain=False)

    llm.generation_config.eos_token_id = None  # no token ends an answer of transformers
    config = GenerationConfig(max_new_tokens=options.new, do_sample=False, pad_token_id=0)

    def plain(_: int) -> Timed:
        ids = torch.tensor(random_prompts(llm, 1, options.prompt), device=llm.device)
        return Timed(lambda: llm.generate(ids, generation_config=config), options.new)

    def engine(batch: int, model: Any, compiled: bool = False) -> Timed:
        backend = TorchBackend(model, max_rows=batch, compiled=compiled)
        engine = Engine(backend, system.tokenizer)
        prompts = [Prompt(ids) for ids in random_prompts(llm, batch, options.prompt)]

        def generate() -> Any:
            engine.forget()  # every prompt is read
            return engine.generate(prompts, settings)

        return Timed(generate, batch * options.new)

    def generate_batch(batch: int) -> Timed:
        prompts = random_prompts(llm, batch, options.prompt)
        run = partial(llm.generate_batch, prompts, config, progress_bar=False)
        return Timed(run, batch * options.new)

    def int8(batch: int) -> Timed:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        model = copy.deepcopy(llm)
        quantize_(model.get_decoder(), Int8WeightOnlyConfig())
        return engine(batch, model, compiled=True)

    variants = {
        "plain": plain,
        "engine": lambda batch: engine(batch, llm),
        "generate_batch": generate_batch,
        "compiled": lambda batch: engine(batch, llm, compiled=True),
        "int8": int8,
    }
    lengths = {"prompt_tokens": options.prompt, "new_tokens": options.new}
    compare("generation", "tokens", variants, options, runtime, lengths)


if __name__ == "__main__":
    parser = benchmark_parser(__doc__, [1, 4, 16])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the longest prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    start(run, parser)
