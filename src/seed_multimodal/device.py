"""One choice of device and dtype for every command, printed with its reason; memory and peak rates of devices.

For language models bf16 is chosen on CUDA devices that compute it, fp16 on older ones; for tokenizers and de-tokenizers
fp16 on all of them, as in the originals (docs/benchmarks.md). On CPU and MPS it is fp32, because half precision
LayerNorms are slow or missing there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32,
    "float16": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}
SMALL = 50_000_000  # parameters
_THREADS = torch.get_num_threads()  # another number later was set by the user

# Reasons for `choose_device(fp16=…)`.
RELEASED_FP16 = "as pictures were read and drawn by the released programs"
BESIDE_8BIT = "beside 8-bit weights"

# Of the CPU's allocator (two wordings) and its matrix library, of a GPU's, of Apple's GPUs.
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "not enough memory", "could not create a ", "ALLOC_FAILED",
                  "MPS backend out of memory")

# Peak rates of dense matrix products by the makers' data sheets, in TFLOP/s without sparsity: in 16 bits, TF32, fp32.
# The first match counts, so longer names come first. V100 and T4 compute fp16 only, which is not here.
_PEAKS = {"B200": (2250.0, 1125.0, 75.0), "H200|GH200|H800": (989.4, 494.7, 66.9), "H100 NVL": (835.0, 417.5, 60.0),
          "H100 PCIe": (756.0, 378.0, 51.0), "H100": (989.4, 494.7, 66.9), "H20": (148.0, 74.0, 44.0),
          "A100|A800": (312.0, 156.0, 19.5), "A40": (149.7, 74.8, 37.4), "A30": (165.0, 82.0, 10.3),
          "A10": (125.0, 62.5, 31.2), "L40S": (362.0, 183.0, 91.6), "L40": (181.0, 90.5, 90.5),
          "L4": (121.0, 60.0, 30.3), "RTX 5090": (209.5, 104.8, 104.8), "RTX 4090": (165.2, 82.6, 82.6),
          "RTX 3090": (71.0, 35.6, 35.6)}


@dataclass(frozen=True)
class Runtime:
    """Where tensors live and in which precision models compute."""

    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.device} in {str(self.dtype).removeprefix('torch.')}"


def choose_device(
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    log: Callable[[str], None] | None = print,
    *,
    fp16: str = "",
    doing: str = "Running",
) -> Runtime:
    """Resolve `auto` (CUDA, then MPS, then CPU) and report the result through `log`, with reasons for what was `auto`.

    Args:
        fp16: why `auto` means float16 on every CUDA device here; "": it means bfloat16 where there is that.
        doing: what is done there, the first words of the report.

    Raises:
        ConfigError: for an unknown device or dtype name, or a device this machine does not have.
    """
    place, why = _resolve_device(device)
    precision, why_dtype = _resolve_dtype(dtype, place, fp16)
    runtime = Runtime(place, precision)
    if log is not None:
        reasons = "; ".join(filter(None, (why, why_dtype)))
        log(f"{doing} on {runtime}{f' ({reasons})' if reasons else ''}.")
    return runtime


def choose_for_pictures(device: str | torch.device, dtype: str | torch.dtype, language: Runtime,
                        log: Callable[[str], None] | None = print) -> Runtime:
    """Where images are read and drawn with a language model: `auto` is float16 on CUDA; reported if it differs from
    `language`."""
    chosen = choose_device(device, dtype, None, fp16=RELEASED_FP16)
    if chosen != language:
        choose_device(device, dtype, log, fp16=RELEASED_FP16, doing="Reading and drawing pictures")
    return chosen


def copy_to(device: torch.device, tensor: Tensor) -> Tensor:
    """The tensor on a device; on a GPU from page-locked memory, so that the process need not wait for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # nothing is copied where it is so already
    return tensor.to(device, non_blocking=True)


def limit_threads(*models: nn.Module) -> None:
    """Take one CPU thread in a program whose models are small (their threads mostly wait for each other), unless the
    user has set a number of threads."""
    weights = [weight for model in models for weight in model.parameters()]
    if (not any(name in os.environ for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))
            and torch.get_num_threads() == _THREADS and all(weight.device.type == "cpu" for weight in weights)
            and sum(weight.numel() for weight in weights) < SMALL):
        torch.set_num_threads(1)


def free_memory(device: torch.device) -> None:
    """Give memory that tensors have left back to the GPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of a GPU or of this machine, did not suffice."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY))


def peak_of(name: str, dtype: torch.dtype, tf32: bool = False) -> float | None:
    """TFLOP/s of the GPU that its driver calls `name`, at most; None if unknown or a slice of a GPU (MIG)."""
    for pattern, (half, tensor_float, full) in _PEAKS.items():
        if "MIG" not in name and re.search(rf"\b(?:{pattern})\b", name):
            return half if dtype != torch.float32 else tensor_float if tf32 else full
    return None


def known_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """TFLOP/s that `device` reaches at most on matrix products in `dtype`; None for a CPU and for unknown devices."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), dtype, torch.get_float32_matmul_precision() != "highest")


def _resolve_device(device: str | torch.device) -> tuple[torch.device, str]:
    if isinstance(device, torch.device) or device != "auto":
        try:
            place = torch.device(device)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"Unknown device {device!r}: use auto, cpu, cuda, cuda:N or mps.") from error
        if place.type not in ("cpu", "cuda", "mps"):  # of meta, torch throws the weights away
            raise ConfigError(f"Unknown device {device!r}: use auto, cpu, cuda, cuda:N or mps.")
        if place.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"Device {str(device)!r} was asked for, but this machine has no usable CUDA device.")
        if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"Device {str(device)!r} was asked for, but this machine's last CUDA device is "
                              f"cuda:{torch.cuda.device_count() - 1}.")
        return place, ""
    if torch.cuda.is_available():
        return torch.device("cuda"), "a CUDA device is present"
    if torch.backends.mps.is_available():
        return torch.device("mps"), "an Apple GPU is present"
    return torch.device("cpu"), "no GPU found"


def _resolve_dtype(dtype: str | torch.dtype, place: torch.device, fp16: str) -> tuple[torch.dtype, str]:
    if isinstance(dtype, torch.dtype):
        return dtype, ""
    if dtype == "auto":
        if place.type != "cuda":
            return torch.float32, f"float32 is the safe precision on {place.type}"
        if fp16:
            return torch.float16, f"float16 {fp16}"
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16, "this GPU computes bfloat16"
        return torch.float16, "this GPU has no bfloat16"
    if dtype not in DTYPES:
        raise ConfigError(f"Unknown dtype {dtype!r}: use auto, {', '.join(sorted(DTYPES))}.")
    return DTYPES[dtype], ""
