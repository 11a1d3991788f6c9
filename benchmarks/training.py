"""Time training steps of the language model (LoRA) and of stage 2 of the SEED-2 tokenizer.

    python benchmarks/training.py                                   nano's sizes, random weights
    python benchmarks/training.py --device cuda --model original    the originals' sizes
    python benchmarks/training.py --parts llm --variants plain packed

Language model, on captions of an image's 32 codes and 6 to 40 text tokens; rates count useful
tokens (no padding). `plain` is the original's step: one caption a row, padded to 200 tokens,
transformers' loss over all positions, activation checkpointing. `packed`: rows packed, loss on
learned tokens only. On CUDA `compiled` also compiles the layers (of the tokenizer: the forward
pass), and `kept` keeps activations, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from shared import LLAMA_7B, Timed, benchmark_parser, compare, rounded, start, system_folder
from torch import Tensor, nn

from seed_multimodal.device import Runtime, choose_device, peak_tflops
from seed_multimodal.language.llm import LLAMA_IDS
from seed_multimodal.language.vocabulary import ImageVocabulary
from seed_multimodal.models.seed.configuration import Seed2Config
from seed_multimodal.models.seed.losses import Stage2Model
from seed_multimodal.models.seed.modeling import Seed2Tokenizer
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.training.llm.config import LlmModelSettings
from seed_multimodal.training.llm.loss import LossModule
from seed_multimodal.training.llm.metrics import token_flops
from seed_multimodal.training.llm.model import build_llm

PADDED_LENGTH = 200
MIN_TEXT = 6
MAX_TEXT = 40


def read_sizes(model: str) -> tuple[dict[str, Any], ImageVocabulary, Seed2Config]:
    """Sizes of the language model, its vocabulary, sizes of the tokenizer."""
    if model == "original":
        return LLAMA_7B, ImageVocabulary(), Seed2Config()
    config = SystemConfig.find(system_folder(model))
    llm = json.loads((config.llm / "config.json").read_text())
    tokenizer = Seed2Tokenizer.read_config(config.tokenizer / "config.json")
    vocabulary = ImageVocabulary(
        llm["vocab_size"] - tokenizer.codebook_size - 2, tokenizer.codebook_size
    )
    return {name: llm[name] for name in LLAMA_7B}, vocabulary, tokenizer


def captions(
    vocabulary: ImageVocabulary, rows: int, length: int, packing: bool
) -> tuple[dict[str, Tensor], np.ndarray]:
    """Rows of `<s><img>codes</img>text</s>`, one in each or packed; their tensors, and the
    captions' lengths."""
    rng = np.random.default_rng(0)
    lengths = []
    ids, positions, labels = (np.full((rows, length), value) for value in (0, 0, -100))
    for row in range(rows):
        end = 0
        shortest = MIN_TEXT + vocabulary.tokens_per_image + 4
        while (end == 0 or packing) and length - end >= shortest:
            # The length of the text is log-normal, cut to the positions that are left.
            text = np.clip(int(rng.lognormal(2.5, 0.4)), MIN_TEXT, MAX_TEXT)
            text = min(text, length - end - vocabulary.tokens_per_image - 4)
            codes = rng.integers(vocabulary.n_text, vocabulary.boi_id, vocabulary.tokens_per_image)
            caption = [
                1,
                vocabulary.boi_id,
                *codes,
                vocabulary.eoi_id,
                *rng.integers(3, vocabulary.n_text, text),
                2,
            ]
            start = end
            end = end + len(caption)
            ids[row, start:end] = caption
            labels[row, start + 1 : end] = caption[1:]
            positions[row, start:end] = np.arange(end - start)
            lengths.append(end - start)
        # The padding is one more segment.
        positions[row, end:] = np.arange(length - end)
    return {
        "input_ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(positions),
    }, np.array(lengths)


def training_step(
    model: nn.Module, loss: Callable[[], Tensor], runtime: Runtime
) -> Callable[[], Tensor]:
    """Forward under autocast, backward, clipped gradients, AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=1e-4, weight_decay=0.05, fused=runtime.device.type == "cuda"
    )

    def step() -> Tensor:
        with torch.autocast(
            runtime.device.type, dtype=runtime.dtype, enabled=runtime.dtype != torch.float32
        ):
            value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return value.detach()

    return step


def llm_step(options: argparse.Namespace, runtime: Runtime, variant: str, rows: int) -> Timed:
    """A step of the language model on `rows` packed rows, or as many positions of padded ones."""
    sizes, image_vocabulary, _ = read_sizes(options.model)
    length = 2048 if options.model == "original" else 256
    packing = variant != "plain"
    if not packing:
        rows = max(1, rows * length // PADDED_LENGTH)
        length = PADDED_LENGTH
    tensors, lengths = captions(image_vocabulary, rows, length, packing)
    mask = None if packing else (tensors["input_ids"] != 0).long().to(runtime.device)
    batch = {name: tensor.to(runtime.device) for name, tensor in tensors.items()}
    settings = LlmModelSettings(
        sizes=sizes,
        dtype="fp32" if runtime.dtype == torch.float32 else "bf16",
        lora={"lora_dropout": 0.05},
        attention="auto" if packing else "sdpa",
        gradient_checkpointing=variant != "kept",
        compile=variant not in ("plain", "packed"),
    )
    tokenizer = SimpleNamespace(vocabulary=image_vocabulary, special_ids=LLAMA_IDS)
    with torch.device(runtime.device):  # drawing seven billion weights on a CPU takes minutes
        model: Any = build_llm(settings, tokenizer, runtime.device)

    def loss() -> Tensor:
        if not packing:
            return model(
                **{**batch, "position_ids": None}, attention_mask=mask, use_cache=False
            ).loss
        return LossModule(model)(**batch).mean

    step = training_step(model, loss, runtime)
    tokens = int(lengths.sum())
    first = float(step())
    body, head, attention = token_flops(model, float((lengths**2).sum()) / tokens)
    flops = tokens * (body + attention) + (tokens - len(lengths)) * head
    peak = peak_tflops(runtime.device, runtime.dtype)

    def extra(seconds: float) -> dict[str, Any]:
        tflops = flops / seconds / 1e12
        return {
            "model_tflops": rounded(tflops),
            "mfu": peak and rounded(tflops / peak),
            "rows": rows,
            "fill": round(tokens / (rows * length), 4),
            "first_loss": round(first, 3),
            "loss": round(float(step()), 3),
        }

    return Timed(step, tokens, extra)


def tokenizer_step(
    options: argparse.Namespace, runtime: Runtime, variant: str, batch: int
) -> Timed:
    """A step of stage 2 with given target embeddings."""
    sizes = read_sizes(options.model)[2]
    config = dataclasses.replace(sizes, use_qformer_image=True, reverse_depth=4, recon_s=True)
    torch.manual_seed(0)
    with torch.device(runtime.device):
        model = Stage2Model(config)
        pixels = torch.randn(batch, 3, config.vit.image_size, config.vit.image_size)
        target = torch.randn(batch, config.image_features_dim)
    forward = torch.compile(model) if variant == "compiled" else model
    # One step before the clock runs: it compiles, and gives the first loss.
    step = training_step(model, lambda: forward(pixels, target).loss, runtime)
    first = float(step())

    def extra(seconds: float) -> dict[str, Any]:
        return {"first_loss": round(first, 3), "loss": round(float(step()), 3)}

    return Timed(step, batch, extra)


def run(options: argparse.Namespace) -> None:
    """Time both trainings."""
    runtime = choose_device(options.device, options.dtype, log=None)
    cuda = runtime.device.type == "cuda"
    # Part → step, unit, variants, default batch size.
    parts = {
        "llm": (
            llm_step,
            "useful_tokens",
            ["plain", "packed", *(["compiled", "kept"] if cuda else [])],
            8 if options.model == "original" else 16,
        ),
        "tokenizer": (tokenizer_step, "images", ["plain", *(["compiled"] if cuda else [])], 64),
    }
    for part in options.parts:
        make, unit, names, batch = parts[part]
        variants = {name: partial(make, options, runtime, name) for name in names}
        batches = options.batches or [batch]
        compare(f"training {part}", unit, variants, options, runtime, {}, batches)


if __name__ == "__main__":
    parser = benchmark_parser(__doc__, [])
    parser.add_argument(
        "--parts", nargs="+", choices=("llm", "tokenizer"), default=["llm", "tokenizer"]
    )
    start(run, parser)
