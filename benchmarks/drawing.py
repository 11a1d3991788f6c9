"""Time drawing: images from text, edits, reconstructions.

One JSON line per task, variant and batch size.

    python benchmarks/drawing.py --model pretrained/nano-x        any system (default: nano)

`plain`: one image after another; `batch`: so many in one call; `clients`: so many threads, one
image each; of reconstructions also `fast`, the preset, and `compiled`: U-Net with fused attention
and compiled blocks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from shared import Timed, benchmark_parser, compare, input_images, load_system, start

from seed_multimodal.device import FP16_AS_ORIGINAL, choose_device


def run(options: argparse.Namespace) -> None:
    runtime = choose_device(options.device, options.dtype, log=None, fp16=FP16_AS_ORIGINAL)
    system = load_system(options)
    decoder = system.images.decoder
    images = input_images(max(options.batches))
    pool = ThreadPoolExecutor(max(options.batches))

    # Task → what draws so many images.
    steps = {} if options.steps is None else {"num_inference_steps": options.steps}
    tasks: dict[str, Callable[..., Any]] = {
        "draw": lambda count: system.draw(["a red fish"] * count, **steps),
        "edit": lambda count: system.edit(images[:count], "Put it at night.", **steps),
        "reconstruct": lambda count, **preset: system.reconstruct(
            images[:count], **steps, **preset
        ),
    }

    def compiled(batch: int) -> Timed:  # for the rest of the run
        decoder.unet.fuse_qkv_projections()
        decoder.unet.compile_repeated_blocks()
        return Timed(lambda: tasks["reconstruct"](batch), batch)

    def variants(name: str, draw: Callable[..., Any]) -> dict[str, Callable[[int], Timed]]:
        variants = {
            "plain": lambda batch: Timed(lambda: draw(1), 1),
            "batch": lambda batch: Timed(lambda: draw(batch), batch),
            "clients": lambda batch: Timed(lambda: [*pool.map(draw, [1] * batch)], batch),
        }
        if name == "reconstruct":
            variants["fast"] = lambda batch: Timed(lambda: draw(batch, preset="fast"), batch)
            variants["compiled"] = compiled
        return variants

    settings = {"steps": options.steps or decoder.defaults.num_inference_steps}
    for name, draw in tasks.items():
        compare(name, "images", variants(name, draw), options, runtime, settings)


if __name__ == "__main__":
    parser = benchmark_parser(__doc__, [1, 8])
    parser.add_argument("--steps", type=int, help="diffusion steps (default: the system's)")
    start(run, parser)
