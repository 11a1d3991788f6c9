"""Shared by the scripts in this folder: the peak rate for utilisation, rounding, flags, folders."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from seed_multimodal.device import Runtime, choose_device
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.evaluation.timing import measure
from seed_multimodal.peaks import known_peak
from seed_multimodal.systems.system_spec import read_system_json


def positive(text: str) -> int:
    """A flag's whole number of at least 1, for argparse."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


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


def runtime_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Runtime:
    """Device and precision by `--device` and `--dtype`; ends as argparse does where they are impossible."""
    try:
        return choose_device(options.device, options.dtype, log=None)
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


def rounded(value: float) -> float:
    """Four significant digits: nano on a CPU and the released size on a GPU are five powers of ten apart."""
    return float(f"{value:.4g}")
