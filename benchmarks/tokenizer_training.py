"""Time stage 2 of the SEED-2 tokenizer's training: images/s, model-FLOP utilisation and peak memory. JSON lines.

    python benchmarks/tokenizer_training.py                           # nano sizes
    python benchmarks/tokenizer_training.py --device cuda --size released --dtype bf16 --batches 64,256 \
        --peak-tflops measured                                        # random weights, 1.15 B parameters

A step: frozen encoder, codebook and decoders forward and backward under autocast, clipped gradients, AdamW. Weights are
float32; pictures and target embeddings wait on the device (`--clip` computes the targets with a CLIP ViT-H as in real
training). Encoders: `modules` as the model has them, with the frozen Q-Former's dropout as released; `packed` and
`compile` the fast encoder, without that dropout; `compile-all` also compiles the trained part.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shared import (
    common_flags,
    failure,
    forget,
    measure,
    peak_tflops,
    print_line,
    refuse_unknown,
    rounded,
    runtime_of,
    utilisation,
)
from torch import Tensor, nn

from seed_multimodal.tokenizers.fast import Levers, optimise
from seed_multimodal.tokenizers.flops import stage2_flops, vision_flops
from seed_multimodal.tokenizers.seed2 import Seed2Config
from seed_multimodal.tokenizers.stage2 import Stage2Model
from seed_multimodal.vision.eva import EvaConfig

NANO = Path(__file__).resolve().parents[1] / "pretrained" / "nano" / "seed_tokenizer" / "config.json"
CLIP_VIT_H = EvaConfig(image_size=224, patch_size=14, width=1280, depth=32, heads=16, mlp_width=5120)
ENCODERS = ("modules", "packed", "compile", "compile-all")


def clip_model(device: torch.device, dtype: torch.dtype) -> nn.Module:
    """CLIP ViT-H/14 with random weights: pixels `[B, 3, 224, 224]` → `.image_embeds` `[B, 1024]`."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    size = CLIP_VIT_H
    config = CLIPVisionConfig(hidden_size=size.width, intermediate_size=size.mlp_width, num_hidden_layers=size.depth,
                              num_attention_heads=size.heads, image_size=size.image_size, patch_size=size.patch_size,
                              projection_dim=1024, hidden_act="gelu")
    with torch.device(device):
        return CLIPVisionModelWithProjection(config).to(dtype).eval().requires_grad_(False)


def trainer(model: Stage2Model, encoder: str, dtype: torch.dtype, clip: nn.Module | None) -> Callable[..., Tensor]:
    """One step on `(pixels, target)`, returning the loss."""
    device = model.device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05, fused=device.type == "cuda")
    fast = None
    if encoder != "modules":
        fast = optimise(model, compile=encoder.startswith("compile"), levers=Levers(dtype=dtype))
    forward = torch.compile(model, dynamic=False) if encoder == "compile-all" else model

    def step(pixels: Tensor, target: Tensor) -> Tensor:
        if clip is not None:
            with torch.no_grad():
                target = clip(pixels.to(dtype)).image_embeds
        features = None if fast is None else fast.query_features(pixels)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = forward(pixels if fast is None else None, target, query_features=features).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.detach()

    return step


def timed(options: argparse.Namespace, config: Seed2Config, encoder: str, batch: int, device: torch.device,
          dtype: torch.dtype, peak: float | None, clip: nn.Module | None) -> dict[str, Any]:
    """Figures of one setting."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Stage2Model(config, frozen_dropout=encoder == "modules")
        pixels = torch.randn(batch, 3, config.vit.image_size, config.vit.image_size)
        target = torch.randn(batch, config.image_features_dim)
    step = trainer(model, encoder, dtype, clip)
    started = time.perf_counter()
    first_loss = float(step(pixels, target))
    first = time.perf_counter() - started
    taken = measure(lambda: step(pixels, target), device, options.repeats, warmup=2 if device.type == "cuda" else 1)
    flops = stage2_flops(config) + (0 if clip is None else vision_flops(CLIP_VIT_H))
    tflops = flops * batch / taken["seconds"] / 1e12
    return {"images_per_second": rounded(batch / taken["seconds"]), "seconds_per_step": rounded(taken["seconds"]),
            "gflop_per_image": round(flops / 1e9, 3),
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "first_step_seconds": round(first, 2), "first_loss": round(first_loss, 4),
            "loss": round(float(step(pixels, target)), 4), **utilisation(tflops, peak)}


def peak_memory(device: torch.device) -> dict[str, float]:
    """Largest memory so far in GiB: of the GPU since the last setting began, of the process on a CPU."""
    if device.type == "cuda":
        return {"peak_memory_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2)}
    try:
        import resource
    except ImportError:  # not on Windows
        return {}
    return {"peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Time stage 2 of the SEED-2 tokenizer's training.")
    common_flags(parser, ("nano", "released"), 5, batches="64", peak_flag=True)
    parser.add_argument("--head", choices=("image_down", "reverse"), default="reverse",
                        help="decode head: the published training code's Reverse Q-Former of 4 layers, or image_down")
    parser.add_argument("--encoders", help=f"only these, with commas: {', '.join(ENCODERS)}")
    parser.add_argument("--clip", action="store_true", help="compute the targets with CLIP ViT-H (released size)")
    options = parser.parse_args()
    if options.clip and options.size != "released":
        parser.error("--clip goes with --size released")
    runtime = runtime_of(parser, options)
    device, dtype = runtime.device, runtime.dtype
    sizes = (Seed2Config() if options.size == "released" else Seed2Config.read(NANO)).to_dict()
    config = Seed2Config.from_dict({**sizes, "use_qformer_image": options.head == "reverse", "reverse_depth": 4,
                                    "recon_s": True})
    encoders = options.encoders.split(",") if options.encoders else ENCODERS if device.type == "cuda" else ENCODERS[:2]
    refuse_unknown(parser, encoders, ENCODERS, "encoder")
    peak = peak_tflops(options.peak_tflops, device, dtype)
    clip = clip_model(device, dtype) if options.clip else None
    for encoder in encoders:
        for batch in options.batches:
            forget(device)
            try:
                results = timed(options, config, encoder, batch, device, dtype, peak, clip)
            except RuntimeError as error:
                results = failure(error)
            print_line("tokenizer_training", device, {
                "stage": 2, "size": options.size, "head": options.head, "encoder": encoder, "batch": batch,
                "targets": "CLIP ViT-H" if clip is not None else "given", "runtime": str(runtime),
                "repeats": options.repeats}, {**results, **peak_memory(device)})


if __name__ == "__main__":
    main()
