"""Time what a device can do at most: a large copy in its memory, and a large matrix product.

    python benchmarks/ceilings.py --device cuda
    python benchmarks/ceilings.py --device cpu --side 1024

`copy` counts the bytes read and those written; `product` is of square matrices in the precision of
`--dtype`. Other figures are shares of these.
"""

from __future__ import annotations

import argparse

import torch
from shared import Timed, benchmark_parser, compare, start

from seed_multimodal.device import choose_device


def run(options: argparse.Namespace) -> None:
    runtime = choose_device(options.device, options.dtype, log=None)
    device, dtype, side = runtime.device, runtime.dtype, options.side

    def product(_: int) -> Timed:
        left, right = torch.randn(2, side, side, device=device, dtype=dtype)
        return Timed(lambda: left @ right, 2 * side**3 / 1e12)

    def copy(_: int) -> Timed:
        source = torch.randn(16 * side, side, device=device)
        target = torch.empty_like(source)
        return Timed(lambda: target.copy_(source), 2 * source.nbytes / 1e9)

    settings = {"side": side}
    compare("ceiling product", "tflop", {"plain": product}, options, runtime, settings)
    compare("ceiling copy", "gigabytes", {"plain": copy}, options, runtime, settings)


if __name__ == "__main__":
    parser = benchmark_parser(__doc__, [1], repeats=10)
    parser.add_argument("--side", type=int, default=8192, help="rows and columns of the matrices")
    start(run, parser)
