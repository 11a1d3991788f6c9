"""Time the SEED-2 tokenizer: images → 32 codes. One JSON line per variant and batch size.

    python benchmarks/tokenizer.py                                   pretrained/nano
    python benchmarks/tokenizer.py --device cuda --model 8b          SEED-LLaMA's

`plain` is the original's way: attention as three operations, nothing compiled; `modules`:
scaled_dot_product_attention; `compiled`: each block with torch.compile (`fast_encode`); `graph`
(CUDA): the same as a CUDA graph. Each line has the ratio to `plain` and the share of codes equal to
those of float32 with the same weights.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial

import torch
from shared import Timed, benchmark_parser, compare, input_images, start
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from seed_multimodal.device import FP16_AS_ORIGINAL, choose_device
from seed_multimodal.images.transforms import seed_image_processor
from seed_multimodal.models.seed.modeling import Seed2Tokenizer
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.pretokenize.encode import fast_encode

COMPARED = 64  # images whose codes are compared with float32's


def encoder(variant: str, master: Seed2Tokenizer, images: Tensor) -> Callable[[Tensor], Tensor]:
    """Pixels `[B, 3, S, S]` → codes `[B, 32]`, for batches like `images` and in their precision."""
    model = copy.deepcopy(master)
    fast = fast_encode(model, images.dtype, compile=variant in ("compiled", "graph"))
    if variant == "graph":
        features = torch.cuda.make_graphed_callables(
            model.requires_grad_(False).pre_quant, (images,)
        )
        return lambda pixels: model.quantize.nearest(features(pixels))

    def encode(pixels: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return fast(pixels)

    return encode if variant == "plain" else fast


def run(options: argparse.Namespace) -> None:
    """Time encoding."""
    runtime = choose_device(options.device, options.dtype, log=None, fp16=FP16_AS_ORIGINAL)
    folder = SystemConfig.find(options.model).tokenizer
    master = Seed2Tokenizer.from_pretrained(folder, device=runtime.device)
    transform = seed_image_processor(master.config.vit.image_size)
    pixels = torch.stack([*map(transform, input_images(max(COMPARED, *options.batches)))]).to(
        runtime.device
    )
    exact = master.encode(pixels)
    pixels = pixels.to(runtime.dtype)

    def encoding(variant: str, batch: int) -> Timed:
        images = pixels[:batch]
        encode = encoder(variant, master, images)

        def equal(seconds: float) -> dict[str, float]:
            # Whole batches: another size would be compiled again.
            count = max(1, COMPARED // batch) * batch
            codes = torch.cat([encode(part) for part in pixels[:count].split(batch)])
            return {"codes_equal_float32": float((codes == exact[:count]).float().mean())}

        return Timed(lambda: encode(images), batch, equal)

    names = ["plain", "modules", "compiled"]
    if runtime.device.type == "cuda":
        names.append("graph")
    settings = {"parameters": sum(p.numel() for p in master.parameters())}
    variants = {name: partial(encoding, name) for name in names}
    compare("tokenizer encode", "images", variants, options, runtime, settings)


if __name__ == "__main__":
    start(run, benchmark_parser(__doc__, [1, 32, 256], repeats=5))
