"""Quantised language models: how much scores depend on the batch; time of eight answers.

python benchmarks/quantization.py --model pretrained/nano
"""

from __future__ import annotations

import argparse
import random
import time

import torch
from shared import load_system, start, system_parser

from seed_multimodal.device import limit_threads
from seed_multimodal.inference.backends.base import PromptChunk
from seed_multimodal.inference.prompt import GenerationSettings, Prompt

NAMES = (None, "int8", "8bit", "4bit", "int4")
ROWS = 8
NEW_TOKENS = 48


def run(options: argparse.Namespace) -> None:
    rng = random.Random(0)
    prompts = [
        Prompt([1, *(rng.randrange(3, 300) for _ in range(10 + 3 * row))]) for row in range(ROWS)
    ]
    settings = GenerationSettings(
        max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
    )
    print("quantization | alone against together | CPU seconds of 8 answers")
    for name in NAMES:
        system = load_system(options, load_decoder=False, quantization=name)
        limit_threads(system.llm, system.images.model)
        backend = system.engine.backend

        # 1. The scores after each prompt, alone and with the others.
        with backend.ready():
            inputs = [backend.prepare(prompt) for prompt in prompts]
            chunks = [PromptChunk(row, ids, 0, len(ids)) for row, ids in enumerate(inputs)]
            together = backend.prefill(chunks).scores
            alone = torch.cat([backend.prefill([chunk]).scores for chunk in chunks])
        difference = float((together - alone).abs().max())

        # 2. The time, after one run to warm up.
        system.engine.generate(prompts, settings)
        started = time.process_time()
        system.engine.generate(prompts, settings)
        print(
            f"{name or 'none':12} | {difference:22.1e} | {time.process_time() - started:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    parser = system_parser(__doc__)
    parser.set_defaults(device="cpu")
    start(run, parser)
