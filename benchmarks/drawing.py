"""Time drawing: images from text, edits, reconstructions.

One JSON line per task, variant and batch size.

    python benchmarks/drawing.py --model pretrained/nano-x        any system (default: nano)
    python benchmarks/drawing.py --device cuda --model original   random weights of SD-2.1-unCLIP

`original` draws 768 pixels in 20 steps. `plain`: one image after another; `batch`: so many in one
call; `clients`: so many threads, one image each; of images drawn again also `fast`, the preset, and
`compiled`: U-Net with fused attention and compiled blocks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from shared import Timed, benchmark_parser, compare, fill_random, input_images, load_system, start

from seed_multimodal.device import FP16_AS_ORIGINAL, Runtime, choose_device
from seed_multimodal.models.seed.diffusion import UnclipDetokenizer

UNET = {
    "sample_size": 96,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 2048,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 768,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


def random_detokenizer(runtime: Runtime) -> UnclipDetokenizer:
    """SD-2.1-unCLIP with random weights, without its text encoder (the empty prompt is a
    constant)."""
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
        StableUnCLIPImageNormalizer,
    )

    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
        vae = AutoencoderKL(**VAE)
    return UnclipDetokenizer(
        fill_random(unet, runtime.device, runtime.dtype),
        fill_random(vae, runtime.device, runtime.dtype),
        DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
        StableUnCLIPImageNormalizer(1024).to(runtime.device, runtime.dtype),
        DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    )


def run(options: argparse.Namespace) -> None:
    runtime = choose_device(options.device, options.dtype, log=None, fp16=FP16_AS_ORIGINAL)
    steps = {} if options.steps is None else {"num_inference_steps": options.steps}
    tasks: dict[str, Callable[..., Any]]  # what draws so many images
    if options.model == "original":
        decoder: Any = random_detokenizer(runtime)
        embeds = torch.randn(max(options.batches), decoder.embedding_dim)
        tasks = {
            "reconstruct": lambda count, **options_of_variant: decoder(
                embeds[:count], **steps, **options_of_variant
            )
        }
    else:
        system = load_system(options)
        decoder = system.images.decoder
        images = input_images(max(options.batches))
        tasks = {
            "draw": lambda count: system.draw(["a red fish"] * count, **steps),
            "edit": lambda count: system.edit(images[:count], "Put it at night.", **steps),
            "reconstruct": lambda count, **options_of_variant: system.reconstruct(
                images[:count], **steps, **options_of_variant
            ),
        }

    def compiled(batch: int) -> Timed:  # for the rest of the run
        decoder.unet.fuse_qkv_projections()
        decoder.unet.compile_repeated_blocks()
        return Timed(lambda: tasks["reconstruct"](batch), batch)

    pool = ThreadPoolExecutor(max(options.batches))
    settings = {
        "parameters": sum(
            p.numel() for model in decoder.parts.values() for p in model.parameters()
        ),
        "steps": options.steps or decoder.defaults.num_inference_steps,
    }

    def variants(name: str, draw: Callable[..., Any]) -> dict[str, Callable[[int], Timed]]:
        variants = {
            "plain": lambda batch: Timed(lambda: draw(1), 1),
            "batch": lambda batch: Timed(lambda: draw(batch), batch),
        }
        if options.model != "original":
            variants["clients"] = lambda batch: Timed(lambda: [*pool.map(draw, [1] * batch)], batch)
        if name == "reconstruct":
            variants["fast"] = lambda batch: Timed(lambda: draw(batch, preset="fast"), batch)
            variants["compiled"] = compiled
        return variants

    for name, draw in tasks.items():
        compare(name, "images", variants(name, draw), options, runtime, settings)


if __name__ == "__main__":
    parser = benchmark_parser(__doc__, [1, 8])
    parser.add_argument(
        "--steps", type=int, help="diffusion steps (default: the system's; original: 20)"
    )
    start(run, parser)
