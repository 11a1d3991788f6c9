"""Timing for the scripts in `benchmarks/`: warm-up, synchronisation, median of repeats, one JSON line."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from seed_multimodal.evaluation import machine


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
