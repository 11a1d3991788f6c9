"""Time training steps of the language model (LoRA) and of stage 2 of the SEED-2 tokenizer.

    python benchmarks/training.py                                   nano's sizes, random weights
    python benchmarks/training.py --device cuda --model 8b          SEED-LLaMA's sizes
    python benchmarks/training.py --parts llm --variants plain packed
    python benchmarks/training.py --against trainer,trl             a table, see `peer_trainers`

Language model, on captions of an image's 32 codes and 18 other tokens; rates count useful tokens
(no padding). `plain` is the original's step: one caption a row, padded to 200 tokens,
transformers' loss over all positions, activation checkpointing. `packed`: rows packed, loss on
learned tokens only; `compiled`: also with compiled layers (of the tokenizer: the forward pass).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peer_trainers import compare_trainers
from shared import Timed, benchmark_parser, compare, rounded, start
from torch import Tensor, nn

from seed_multimodal.device import Runtime, choose_device, peak_tflops
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import ImageVocabulary
from seed_multimodal.models.seed.modeling import Seed2Tokenizer
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.recipes.seed.losses import Stage2Model
from seed_multimodal.training.llm.config import LlmModelSettings
from seed_multimodal.training.llm.loss import LossModule, round_residual
from seed_multimodal.training.llm.metrics import token_flops
from seed_multimodal.training.llm.model import build_llm

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
VARIANTS = {"llm": ("plain", "packed", "compiled"), "tokenizer": ("plain", "compiled")}
PADDED_LENGTH = 200
CAPTION = 50  # tokens: 32 codes, their two marks, 16 of the text


def captions(
    vocabulary: ImageVocabulary, rows: int, length: int, packing: bool
) -> dict[str, Tensor]:
    """Rows of `<img>codes</img>text`, one in each or packed: ids, labels and positions
    `[rows, length]`."""
    generator = torch.Generator().manual_seed(0)
    n_captions = length // CAPTION if packing else 1
    end = n_captions * CAPTION
    ids = torch.zeros(rows, length, dtype=torch.long)
    ids[:, :end] = torch.randint(3, vocabulary.n_text, (rows, end), generator=generator)
    labels = ids.masked_fill(ids == 0, -100)
    labels[:, :end:CAPTION] = -100  # nothing comes before the first token
    # The padding is one more segment.
    positions = torch.arange(length).repeat(rows, 1)
    positions[:, :end] %= CAPTION
    positions[:, end:] -= end
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


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
    config = SystemConfig.find(options.model)
    llm_config = json.loads((config.llm / "config.json").read_text())
    sizes = {name: llm_config[name] for name in SIZES}
    tokenizer = MultimodalTokenizer.from_pretrained(config.tokenizer)
    length = min(2048, sizes["max_position_embeddings"])
    packing = variant != "plain"
    if not packing:
        rows = max(1, rows * length // PADDED_LENGTH)
        length = PADDED_LENGTH
    tensors = captions(tokenizer.vocabulary, rows, length, packing)
    mask = None if packing else (tensors["input_ids"] != 0).long().to(runtime.device)
    batch = {name: tensor.to(runtime.device) for name, tensor in tensors.items()}
    settings = LlmModelSettings(
        sizes=sizes,
        dtype="fp32" if runtime.dtype == torch.float32 else "bf16",
        lora={"lora_dropout": 0.05},
        attention="auto" if packing else "sdpa",
        gradient_checkpointing=True,
        compile=variant == "compiled",
    )
    with torch.device(runtime.device):  # drawing seven billion weights on a CPU takes minutes
        model: Any = build_llm(settings, tokenizer, runtime.device)
    if packing and settings.dtype == "bf16":
        round_residual(model, settings.dtype)  # as our trainer

    def loss() -> Tensor:
        if not packing:
            ids, labels = batch["input_ids"], batch["labels"]
            return model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
        return LossModule(model)(**batch).mean

    step = training_step(model, loss, runtime)
    tokens = int((tensors["input_ids"] != 0).sum())
    body, head, attention = token_flops(model, CAPTION)
    flops = tokens * (body + attention + head)
    peak = peak_tflops(runtime.device, runtime.dtype)

    def extra(seconds: float) -> dict[str, Any]:
        return {"mfu": peak and rounded(flops / seconds / 1e12 / peak)}

    return Timed(step, tokens, extra)


def tokenizer_step(
    options: argparse.Namespace, runtime: Runtime, variant: str, batch: int
) -> Timed:
    """A step of stage 2 with given target embeddings."""
    folder = SystemConfig.find(options.model).tokenizer
    sizes = Seed2Tokenizer.from_pretrained(folder, device="cpu").config
    config = dataclasses.replace(sizes, use_qformer_image=True, reverse_depth=4, recon_s=True)
    torch.manual_seed(0)
    with torch.device(runtime.device):
        model = Stage2Model(config)
        pixels = torch.randn(batch, 3, config.vit.image_size, config.vit.image_size)
        target = torch.randn(batch, config.image_features_dim)
    forward = torch.compile(model) if variant == "compiled" else model
    step = training_step(model, lambda: forward(pixels, target).loss, runtime)
    return Timed(step, batch)


def run(options: argparse.Namespace) -> None:
    """Time both trainings, or the language model's against other trainers."""
    if options.against:
        compare_trainers(options.against.split(","), max(5, options.repeats), steps=8)
        return
    runtime = choose_device(options.device, options.dtype, log=None)
    steps = {"llm": llm_step, "tokenizer": tokenizer_step}
    units = {"llm": "useful_tokens", "tokenizer": "images"}
    for part in options.parts:
        variants = {name: partial(steps[part], options, runtime, name) for name in VARIANTS[part]}
        compare(f"training {part}", units[part], variants, options, runtime, {})


if __name__ == "__main__":
    parser = benchmark_parser(__doc__, [8])
    parser.add_argument("--parts", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--against", help="trainer, trl, or both with a comma (on a CPU)")
    start(run, parser)
