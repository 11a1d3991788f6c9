"""Shared by the scripts in this folder: the clock, random weights, the JSON line, flags, the peak rate."""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seed_multimodal.device import Runtime, choose_device
from seed_multimodal.entry import whole_number
from seed_multimodal.errors import CheckpointError, ConfigError, first_line
from seed_multimodal.evaluation import machine
from seed_multimodal.peaks import known_peak
from seed_multimodal.systems.system_file import read_system_json


def measure(work: Callable[[], Any], device: torch.device, repeats: int = 5, warmup: int = 1) -> dict[str, float]:
    """Seconds of one call of `work`: median, smallest and largest of `repeats`, after `warmup` unmeasured calls.

    Work on a GPU is waited for before the clock is read.
    """
    for _ in range(warmup):
        work()
    seconds = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def fill_random(module: nn.Module, device: torch.device, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """Give a module that was built on the meta device memory on `device` and small random weights; evaluation mode.

    Released sizes are timed this way: their values do not change the time, and nothing is computed twice.
    """
    torch.manual_seed(seed)
    module = module.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not tensor.is_floating_point():
            tensor.zero_()
        elif tensor.ndim <= 1 and name.endswith(("weight", "running_var")):
            tensor.fill_(1.0)  # of a normalisation
        else:
            tensor.normal_(0.0, 0.02)
    return module


def print_line(name: str, device: torch.device, settings: Mapping[str, Any], results: Mapping[str, Any],
               references: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Print one JSON line: what was timed, with which settings, where; returns it.

    Args:
        references: earlier figures of other code, shown only on the hardware they were measured on (an H200).
    """
    facts = machine.circumstances(device, machine.script_line())
    line: dict[str, Any] = {"benchmark": name, **settings, "results": results}
    if references and "H200" in facts["hardware"].get("gpu", ""):
        line["reference_h200"] = references
    if device.type == "cuda":
        line["peak_gpu_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    line |= facts
    print(json.dumps(line), flush=True)
    return line


positive = whole_number(1)  # a flag's number, for argparse


def batch_sizes(text: str) -> list[int]:
    """`1,32,256` → the numbers, for argparse."""
    return [positive(part) for part in text.split(",")]


def peak(text: str) -> str:
    """`measured`, or a number above 0, for argparse."""
    try:
        if text == "measured" or 0 < float(text) < math.inf:
            return text
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number above 0 nor `measured`")


def guidance(text: str) -> float:
    """A finite number, for argparse."""
    try:
        if math.isfinite(float(text)):
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a number")


def common_flags(parser: argparse.ArgumentParser, sizes: Sequence[str], repeats: int, *, batches: str | None = None,
                 model: bool = False, peak_flag: bool = False) -> None:
    """`--size`, `--repeats`, `--device`, `--dtype`, and those of `--batches`, `--model`, `--peak-tflops` asked for."""
    if model:
        parser.add_argument("--model", help="folder of a system; without it weights of --size are timed")
    if batches:
        parser.add_argument("--batches", type=batch_sizes, default=batches)
    if peak_flag:
        parser.add_argument("--peak-tflops", type=peak,
                            help="for the MFU: a number, or `measured` for one large product now")
    parser.add_argument("--size", choices=tuple(sizes), default="nano")
    parser.add_argument("--repeats", type=positive, default=repeats)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")


def refuse_unknown(parser: argparse.ArgumentParser, names: Sequence[str], known: Iterable[str], what: str) -> None:
    """End as argparse does at the first of `names` that is not `known`."""
    options = list(known)
    if wrong := [name for name in names if name not in options]:
        parser.error(f"unknown {what} {wrong[0]!r}: use {', '.join(options)}")


def runtime_of(parser: argparse.ArgumentParser, options: argparse.Namespace, fp16: str = "") -> Runtime:
    """Device and precision by `--device` and `--dtype` (`fp16` as of `choose_device`); ends as argparse does where they
    are impossible."""
    try:
        return choose_device(options.device, options.dtype, log=None, fp16=fp16)
    except ConfigError as error:
        parser.error(str(error))


def part_of(model: str | Path, part: str) -> Path:
    """A part (`llm`, `tokenizer`, `detokenizer`) of a system's folder.

    Raises:
        CheckpointError: no such folder, one without `system.json` or without the part. ConfigError: a damaged one.
    """
    folder = Path(model)
    name = getattr(read_system_json(folder), part)
    if name is None:
        raise CheckpointError(f"{folder / 'system.json'}: this system has no {part}.")
    return folder / name


def peak_tflops(asked: str | None, device: torch.device, dtype: torch.dtype) -> float | None:
    """The number given, for `measured` the rate of one large matrix product now; else the data sheet's, if known.

    Random numbers, because products of zeros run faster than real ones.
    """
    if not asked:
        return known_peak(device, dtype)
    if asked != "measured":
        return float(asked)
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / measure(lambda: a @ b, device, repeats=10, warmup=3)["seconds"] / 1e12


def utilisation(tflops: float, peak_rate: float | None) -> dict[str, float]:
    """The figures `model_tflops` and, where the peak is known, `mfu` and `peak_tflops`."""
    known = {} if peak_rate is None else {"mfu": rounded(tflops / peak_rate), "peak_tflops": rounded(peak_rate)}
    return {"model_tflops": rounded(tflops), **known}


def failure(error: Exception) -> dict[str, str]:
    """The results of a setting that failed (out of memory, …): the others are still measured."""
    return {"error": first_line(error)}


def forget(device: torch.device) -> None:
    """Let go of compiled code and memory of the setting before, and count the peak from here."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def rounded(value: float) -> float:
    """Four significant digits: nano on a CPU and the released size on a GPU are five powers of ten apart."""
    return float(f"{value:.4g}")
