"""Selection of device and dtype, logged with its reason; peak rates of GPUs.

Language models compute in bf16 on CUDA devices that have it, else fp16; tokenizers and
de-tokenizers in fp16, as in the originals. CPU and MPS compute in fp32, because half precision
LayerNorms are slow or missing there.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seed_multimodal.config import read_table
from seed_multimodal.errors import ConfigError

# Names of precisions; the short ones are the originals'.
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
SMALL_MODEL = 50_000_000  # parameters
_DEFAULT_THREADS = torch.get_num_threads()  # if it differs later, the user has set it

# Reasons for `choose_device(fp16=…)`.
FP16_AS_ORIGINAL = "as in the original programs"
FP16_WITH_8BIT = "with 8-bit weights"

# mallopt: M_MMAP_MAX and M_TRIM_THRESHOLD (first glibc's defaults), M_MMAP_THRESHOLD, M_ARENA_MAX.
_RETURN_FREED = ((-4, 1 << 16), (-1, 1 << 17), (-3, 1 << 20), (-8, 2))
_KEEP_FREED = ((-4, 0), (-1, -1))

# Messages of the CPU's allocator and matrix library, of GPUs, of Apple's GPUs.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator",
    "not enough memory",
    "could not create a ",
    "ALLOC_FAILED",
    "MPS backend out of memory",
)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Context in which torch's generator of the CPU is seeded; afterwards it is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def return_freed_memory(at_once: bool = True) -> None:
    """From now on, return blocks of 1 MB and more to the system when they are freed, or no block at
    all (glibc only).

    glibc otherwise keeps freed blocks of up to 32 MB, and those of each thread apart. A training
    keeps all: at each step the system would clear the pages of logits and of gradients again.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        for option, value in _RETURN_FREED if at_once else _KEEP_FREED:
            ctypes.CDLL(None).mallopt(option, value)


def trim_memory() -> None:
    """Return freed pages that lie between blocks in use to the system (glibc only)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True)
class Runtime:
    """Device and dtype of models."""

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
    notice: str = "",
) -> Runtime:
    """Resolve `auto` (CUDA, then MPS, then CPU) and log the result with reasons. A GPU's device has
    its index.

    fp16: reason for which `auto` is float16 on CUDA; "": bfloat16 if supported.
    doing: first words of the logged line.
    notice: its end.

    Raises ConfigError: an unknown name, or a missing device.
    """
    resolved_device, device_reason = _resolve_device(device)
    resolved_dtype, dtype_reason = _resolve_dtype(dtype, resolved_device, fp16)
    runtime = Runtime(resolved_device, resolved_dtype)

    # Without `auto` there are no reasons.
    if log is not None:
        reasons = "; ".join(filter(None, (device_reason, dtype_reason)))
        ending = f" ({reasons})" if reasons else ""
        log(f"{doing} on {runtime}{ending}. {notice}".rstrip())
    return runtime


def choose_for_images(
    device: str | torch.device,
    dtype: str | torch.dtype,
    language: Runtime,
    log: Callable[[str], None] | None = print,
) -> Runtime:
    """Runtime of image encoder and decoder: `auto` is float16 on CUDA; logged if it differs from
    `language`."""
    chosen = choose_device(device, dtype, None, fp16=FP16_AS_ORIGINAL)
    if chosen != language:
        choose_device(
            device, dtype, log, fp16=FP16_AS_ORIGINAL, doing="Image encoder and decoder run"
        )
    return chosen


def copy_to(device: torch.device, tensor: Tensor) -> Tensor:
    """Copy the tensor to a device, asynchronously to a GPU (page-locked memory)."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # no copy if already pinned
    return tensor.to(device, non_blocking=True)


def limit_threads(*models: nn.Module | None) -> None:
    """Use one CPU thread if all models are small (more threads mostly wait), unless the user set a
    number; None: a model outside of torch."""
    weights: list[Tensor] = []
    for model in models:
        if model is not None:
            weights += model.parameters()
    # A number that the user set is kept.
    if os.environ.keys() & {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}:
        return
    if torch.get_num_threads() != _DEFAULT_THREADS:
        return

    # Weights on a GPU leave nothing to the CPU's threads.
    on_cpu = all(weight.device.type == "cpu" for weight in weights)
    if on_cpu and sum(weight.numel() for weight in weights) < SMALL_MODEL:
        torch.set_num_threads(1)


class OffloadedWeights:
    """Weights of a module on the CPU, which are copied to a device while the module computes.

    `release` drops the copies instead of copying them back, so changes made to the weights between
    `load` and `release` are lost. Only inference off-loads: LoRA is merged while a system is
    loaded, and training keeps its weights on the device. Changes made after `release` are loaded
    next time.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        self.device = device
        # Parameters and buffers, each with its data on the CPU; empty while that is in place.
        self._cpu_weights: list[tuple[Tensor, Tensor]] = []

    def load(self) -> None:
        """Copy the weights to the device; without effect if they are there."""
        if self._cpu_weights or self.device.type == "cpu":
            return
        try:
            # Tied weights are one tensor, which both iterators name once.
            for tensor in itertools.chain(self.module.parameters(), self.module.buffers()):
                self._cpu_weights.append((tensor, tensor.data))
                # Copies of weights that were read in inference mode are inference tensors, too.
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.data = tensor.data.to(self.device)
        except BaseException:  # such as out of memory
            self.release()
            raise

    def release(self) -> None:
        """Put the CPU's weights back, and free the device's memory."""
        if not self._cpu_weights:
            return
        for tensor, cpu_data in self._cpu_weights:
            tensor.data = cpu_data
        self._cpu_weights.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()


@contextlib.contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Context in which an off-loaded module is on `device`."""
    weights = OffloadedWeights(module, device)
    weights.load()
    try:
        yield
    finally:
        weights.release()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory, on a GPU or the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return any(message in str(error) for message in _OUT_OF_MEMORY)


def peak_tflops_by_name(name: str) -> float | None:
    """Peak 16-bit TFLOP/s of a GPU by its driver's name (`device.yaml`); None if unknown or a MIG
    slice."""
    if "MIG" in name:
        return None
    peaks: dict[str, float] = read_table(__file__)
    for pattern, peak in peaks.items():
        if re.search(rf"\b(?:{pattern})\b", name):
            return peak
    return None


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak TFLOP/s of `device` for matrix products in `dtype`; None: unknown."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    return peak_tflops_by_name(torch.cuda.get_device_name(device))


def _resolve_device(device: str | torch.device) -> tuple[torch.device, str]:
    """The device, and why `auto` is that one ("" for other names)."""
    if device != "auto":
        if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", str(device)):  # "meta" would drop the weights
            raise ConfigError(
                f"Unknown device {str(device)!r}: use auto, cpu, cuda, cuda:N or mps."
            )
        resolved = _with_index(torch.device(device))
        count = int(torch.backends.mps.is_available())
        if resolved.type == "cuda":
            count = torch.cuda.device_count()
        if resolved.type != "cpu" and resolved.index >= count:
            raise ConfigError(
                f"Device {str(device)!r} was requested, but this machine has "
                f"{count or 'no usable'} {resolved.type.upper()} devices."
            )
        return resolved, ""
    if torch.cuda.is_available():
        return _with_index(torch.device("cuda")), "a CUDA device is present"
    if torch.backends.mps.is_available():
        return _with_index(torch.device("mps")), "an Apple GPU is present"
    return torch.device("cpu"), "no GPU found"


def _with_index(device: torch.device) -> torch.device:
    """The device as loaded tensors name it: `cuda:0`, not `cuda`, which would never compare
    equal."""
    if device.type == "cpu" or device.index is not None:
        return device
    if device.type == "cuda" and torch.cuda.is_initialized():
        return torch.device("cuda", torch.cuda.current_device())  # that of `torch.cuda.set_device`
    return torch.device(device.type, 0)


def _resolve_dtype(
    dtype: str | torch.dtype, device: torch.device, fp16: str
) -> tuple[torch.dtype, str]:
    """The dtype on a device, and why `auto` is that one ("" for other names)."""
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype, ""
    if dtype == "auto":
        if device.type != "cuda":
            return torch.float32, f"float32 is the safe precision on {device.type}"
        if fp16:
            return torch.float16, f"float16 {fp16}"
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16, "this GPU computes bfloat16"
        return torch.float16, "this GPU has no bfloat16"
    if dtype not in DTYPES:
        raise ConfigError(f"Unknown dtype {dtype!r}: use auto, {', '.join(sorted(DTYPES))}.")
    return DTYPES[dtype], ""


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory in MiB: allocated on the GPU, or resident in this process on other devices."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not on Windows

    # `ru_maxrss` has bytes on macOS, KiB on Linux.
    units_per_mib = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units_per_mib
