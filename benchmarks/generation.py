"""Time the language model: new tokens per second of one request after another and of a batch.

    python benchmarks/generation.py --model pretrained/nano-x         any system
    python benchmarks/generation.py --device cuda --model original    random weights of LLaMA-7B
    python benchmarks/generation.py --model laptop --dtype bfloat16   1.24 B random weights

`plain`: transformers' `generate` with a key-value cache, one request after another; `engine`: so
many at once, of different lengths, in `Engine`; `compiled`: the same with compiled decoding;
`int8`: and with torchao's 8-bit weights; `llama.cpp` (of `laptop`): Q4_K_M.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from functools import partial
from typing import Any

import torch
from shared import (
    LLAMA_7B,
    ROOT,
    Timed,
    benchmark_parser,
    compare,
    fill_random,
    load_system,
    rounded,
    start,
)

from seed_multimodal.device import Runtime, choose_device
from seed_multimodal.inference.backends.torch import TorchBackend
from seed_multimodal.inference.engine import Engine
from seed_multimodal.inference.prompt import GenerationSettings, Prompt
from seed_multimodal.language.tokenizer import MultimodalTokenizer

LAPTOP = {
    **LLAMA_7B,
    "vocab_size": 2526,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
}
RANDOM = {"original": {**LLAMA_7B, "vocab_size": 40194}, "laptop": LAPTOP}
WORDS = ROOT / "pretrained/nano/seed_tokenizer"


def random_llama(runtime: Runtime, sizes: dict[str, int]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    rotary = type(model.model.rotary_emb)(model.config)  # computed, so it must not be random
    fill_random(model, runtime.device, runtime.dtype)
    model.model.rotary_emb = rotary.to(runtime.device)
    return model


def random_prompts(llm: Any, count: int, longest: int) -> list[list[int]]:
    """Ids; the first is the longest."""
    generator = torch.Generator().manual_seed(0)
    lengths = [
        longest,
        *torch.randint(longest // 2, longest + 1, (count - 1,), generator=generator).tolist(),
    ]
    return [
        torch.randint(3, llm.config.vocab_size, (length,), generator=generator).tolist()
        for length in lengths
    ]


def weights_read(model: Any, steps: int, seconds: float) -> dict[str, float]:
    """Gigabytes of weights a second, if each step reads every matrix once."""
    matrices = [p for p in model.get_decoder().layers.parameters() if p.ndim == 2]
    matrices.append(model.get_output_embeddings().weight)
    # torchao's quantised matrices hold their bytes in `qdata`.
    n_bytes = sum(getattr(matrix, "qdata", matrix).nbytes for matrix in matrices)
    return {"weight_gb_per_second": rounded(n_bytes * steps / seconds / 1e9)}


def run(options: argparse.Namespace) -> None:
    runtime = choose_device(options.device, options.dtype, log=None)
    llm = (
        random_llama(runtime, RANDOM[options.model])
        if options.model in RANDOM
        else load_system(options).llm
    )
    tokenizer = MultimodalTokenizer.from_pretrained(WORDS)

    def plain(_: int) -> Timed:
        ids = torch.tensor(random_prompts(llm, 1, options.prompt), device=llm.device)
        return Timed(
            lambda: llm.generate(
                ids,
                min_new_tokens=options.new,
                max_new_tokens=options.new,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
                eos_token_id=2,
            ),
            options.new,
            partial(weights_read, llm, options.new),
        )

    def timed(batch: int, engine: Engine, model: Any = None) -> Timed:
        prompts = [Prompt(ids) for ids in random_prompts(llm, batch, options.prompt)]
        settings = GenerationSettings(options.new, options.new, do_sample=False, constrain=False)
        work = Timed(lambda: engine.generate(prompts, settings), batch * options.new)
        if model is not None:
            work.extra = partial(weights_read, model, options.new)
        return work

    def llama_cpp(batch: int) -> Timed:
        from seed_multimodal.inference.backends.llama_cpp import LlamaCppBackend
        from seed_multimodal.inference.gguf import export_gguf

        # The backend reads a quantised GGUF file of the same weights.
        with tempfile.TemporaryDirectory() as folder:
            llm.save_pretrained(folder)
            file = export_gguf(folder, WORDS, f"{folder}/q4_k_m.gguf", "q4_k_m")
            return timed(
                batch,
                Engine(
                    LlamaCppBackend(folder, tokenizer.vocabulary, file, max_rows=batch), tokenizer
                ),
            )

    def torch_engine(batch: int, model: Any, compiled: bool = False) -> Timed:
        backend = TorchBackend(model, max_rows=batch, compiled=compiled)
        return timed(batch, Engine(backend, tokenizer), model)

    def int8(batch: int) -> Timed:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        model = copy.deepcopy(llm)
        quantize_(model.get_decoder(), Int8WeightOnlyConfig())
        return torch_engine(batch, model, compiled=True)

    # Each takes a batch size; llama.cpp is timed at the size of a laptop's model only.
    variants = {
        "plain": plain,
        "engine": lambda batch: torch_engine(batch, llm),
        "compiled": lambda batch: torch_engine(batch, llm, compiled=True),
        **({"llama.cpp": llama_cpp} if options.model == "laptop" else {}),
        "int8": int8,
    }
    compare(
        "generation",
        "tokens",
        variants,
        options,
        runtime,
        {"prompt_tokens": options.prompt, "new_tokens": options.new},
    )


if __name__ == "__main__":
    parser = benchmark_parser(__doc__, [1, 4, 16])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the longest prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    start(run, parser)
