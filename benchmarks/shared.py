"""Shared by the benchmarks: flags, input images, random weights, the clock, JSON lines."""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image

from seed_multimodal.device import Runtime
from seed_multimodal.entry import DONE, run_guarded
from seed_multimodal.errors import SeedError, first_line
from seed_multimodal.evaluation import machine
from seed_multimodal.pipelines.base import MultimodalSystem

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Timed:
    """What one repeat runs, how many units it handles, and further figures, made from its
    seconds."""

    work: Callable[[], Any]
    amount: float
    extra: Callable[[float], dict[str, Any]] = lambda seconds: {}


def system_parser(description: str | None) -> argparse.ArgumentParser:
    """The flags of programs that measure one system."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument(
        "--model",
        default="pretrained/nano",
        help="folder or name of a system, also one of original_layouts.py",
    )
    return parser


def benchmark_parser(
    description: str | None, batches: list[int], repeats: int = 3
) -> argparse.ArgumentParser:
    """The flags of programs that use `compare`."""
    parser = system_parser(description)
    parser.add_argument("--batches", type=int, nargs="+", default=batches)
    parser.add_argument(
        "--repeats", type=int, default=repeats, help="timed runs; the median is printed"
    )
    parser.add_argument("--variants", nargs="+", help="only these; ratios need `plain`")
    return parser


def start(
    run: Callable[[argparse.Namespace], int | None], parser: argparse.ArgumentParser
) -> NoReturn:
    """Run a program; user errors are one sentence."""
    options = parser.parse_args()
    raise SystemExit(run_guarded(parser.prog, False, lambda: run(options) or DONE))


def load_system(options: argparse.Namespace, **settings: Any) -> MultimodalSystem:
    """The system of `--model`, on the device and in the dtype of the flags."""
    return MultimodalSystem.from_pretrained(
        options.model,
        device=options.device,
        dtype=options.dtype,
        log=None,
        **settings,
    )


def input_images(count: int) -> list[Image.Image]:
    """Different images: `images/*.png`, each time turned by another angle."""
    rng = random.Random(0)
    files = [Image.open(file).convert("RGB") for file in sorted((ROOT / "images").glob("*.png"))]
    return [files[index % len(files)].rotate(rng.uniform(-9, 9)) for index in range(count)]


def median_seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median seconds of one call, with the work of a GPU."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def compare(
    name: str,
    unit: str,
    variants: Mapping[str, Callable[[int], Timed]],
    options: argparse.Namespace,
    runtime: Runtime,
    settings: Mapping[str, Any],
) -> None:
    """Time each variant at each batch size; print a JSON line for each, with the ratio of its rate
    to `plain`'s.

    A variant that fails (out of memory, no compiler) prints its error; the others are still
    measured.
    """
    plain: dict[int, float] = {}
    for variant in options.variants or variants:
        for batch in options.batches:
            # Start each measurement without compiled code and memory of the one before.
            torch.compiler.reset()
            gc.collect()
            if runtime.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(runtime.device)
            try:
                results = measure(variants[variant](batch), unit, options.repeats, runtime.device)
            except (RuntimeError, SeedError) as error:
                results = {"error": first_line(error)}
            else:
                # `plain` comes first, so that the others can be compared with it.
                rate = results[f"{unit}_per_second"]
                if variant == "plain":
                    plain[batch] = rate
                if batch in plain:
                    results["times_plain"] = round(rate / plain[batch], 2)
            case = {"variant": variant, "batch": batch, **settings, "repeats": options.repeats}
            print_line(name, options, runtime, case, results)


def measure(timed: Timed, unit: str, repeats: int, device: torch.device) -> dict[str, Any]:
    """Figures of one variant, after two unmeasured calls."""
    timed.work()  # compiles
    timed.work()
    seconds = median_seconds(timed.work, device, repeats)
    return {
        f"{unit}_per_second": rounded(timed.amount / seconds),
        "seconds": rounded(seconds),
        **timed.extra(seconds),
    }


def print_line(
    name: str,
    options: argparse.Namespace,
    runtime: Runtime,
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
) -> None:
    """Print one JSON line: settings, figures, memory, hardware, versions, commit, command, date."""
    line = {
        "benchmark": name,
        "model": options.model,
        "runtime": str(runtime),
        **settings,
        "results": dict(results),
        **machine.circumstances(runtime.device),
    }
    if runtime.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(runtime.device)
        line["results"]["peak_gpu_gib"] = round(peak / 2**30, 2)
    print(json.dumps(line), flush=True)


def rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")
