"""Process group of a run: initialization, sums, SIGTERM handling, translation of failures.

Gradients use the engine's group, everything else a separate gloo group.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from seed_multimodal.device import choose_device, is_out_of_memory
from seed_multimodal.errors import ConfigError, SeedError, first_line
from seed_multimodal.training.config import DEFAULT_TIMEOUT_MINUTES

STOPPED = 143  # exit code after SIGTERM: the step was finished and saved
_PEER_WORDS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "timed out",
    "NCCL",
    "remote process",
    "no response from",
)


class TrainingError(SeedError):
    """A run that cannot continue: non-finite loss, out of memory, dead process, full disk."""


class ProcessGroup:
    """All processes of torch.distributed's default group, or only this one.

    Methods are collective. `first`: whether this process writes files and prints.
    """

    def __init__(self, timeout_minutes: float = DEFAULT_TIMEOUT_MINUTES) -> None:
        ready = dist.is_available() and dist.is_initialized()
        self.world = dist.get_world_size() if ready else 1
        self.rank = dist.get_rank() if self.world > 1 else 0
        self.first = self.rank == 0
        self._group: Any = None
        if self.world > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))

    def agree(self, *flags: bool) -> list[bool]:
        """Logical or of each flag over all processes."""
        return [total > 0 for total in self.sum(flags)]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in fp64."""
        if self.world == 1:
            return [float(value) for value in values]
        total = torch.tensor([float(value) for value in values], dtype=torch.float64)
        dist.all_reduce(total, dist.ReduceOp.SUM, self._group)
        return [float(value) for value in total.tolist()]

    def gather(self, value: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The (JSON) values of all processes, by rank."""
        if self.world == 1:
            return [dict(value)]
        # JSON, since torch's `all_gather_object` unpickles network data.
        own = torch.frombuffer(bytearray(json.dumps(dict(value)).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(own)]), self._group)
        longest = max(int(size) for size in sizes)
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world)]
        dist.all_gather(texts, torch.cat([own, own.new_zeros(longest - len(own))]), self._group)
        return [
            json.loads(bytes(text[: int(size)].tolist()))
            for text, size in zip(texts, sizes, strict=True)
        ]


def join_processes(
    device: str, timeout_minutes: float, *, group_of_one: bool = False
) -> torch.device:
    """Join the process group of torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK); returns this process's device.
    `group_of_one`: create a group for a single process, too (for DeepSpeed).

    Raises:
        ConfigError: more processes on this node than GPUs.
    """
    world, local = int(os.environ.get("WORLD_SIZE") or 1), int(os.environ.get("LOCAL_RANK") or 0)
    place = choose_device(device, log=None).device
    if place.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"Local process {local} has no GPU: this node has {torch.cuda.device_count()}; start no "
                "more processes per node than that."
            )
        place = torch.device("cuda", place.index if world == 1 else local)
        torch.cuda.set_device(place)
    elif place.type == "cpu":  # avoids DeepSpeed's warning about a missing GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    timeout, backend = (
        timedelta(minutes=timeout_minutes),
        "nccl" if place.type == "cuda" else "gloo",
    )
    if not dist.is_initialized() and world > 1:
        dist.init_process_group(backend, timeout=timeout)
    elif not dist.is_initialized() and group_of_one:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    return place


def rank_and_world_size() -> tuple[int, int]:
    """torchrun's RANK and WORLD_SIZE; default 0 of 1."""
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)


@contextmanager
def process_group_cleanup() -> Iterator[None]:
    """Destroy the process group on success; after a failure other processes may never reach this point."""
    clean = False
    try:
        yield
        clean = True
    except SystemExit:  # saved after SIGTERM
        clean = True
        raise
    finally:
        if dist.is_available() and dist.is_initialized() and (clean or dist.get_world_size() == 1):
            dist.destroy_process_group()


@contextmanager
def stop_request() -> Iterator[threading.Event]:
    """Context in which SIGTERM only sets the event; the loop then finishes its step and saves."""
    requested = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: requested.set())
    try:
        yield requested
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


@contextmanager
def translate_errors(where: str, saved: str) -> Iterator[None]:
    """Converts out-of-memory and lost-process errors into TrainingError; `where`: current activity (`"step 12"`),
    `saved`: description of the last checkpoint."""
    try:
        yield
    except SeedError:
        raise
    except Exception as error:
        text = str(error)
        if is_out_of_memory(error):
            raise TrainingError(
                f"Out of memory at {where} ({first_line(error)}): lower data.rows "
                "(or data.batch_size) and raise trainer.gradient_accumulation_steps; "
                f"{saved}."
            ) from error
        if isinstance(error, RuntimeError) and any(word in text for word in _PEER_WORDS):
            raise TrainingError(
                f"Another process died or did not answer at {where} ({first_line(error)}); {saved}; "
                "the same command resumes from there."
            ) from error
        if "Current loss scale already at minimum" in text:  # DeepSpeed's plain Exception
            raise TrainingError(
                f"The fp16 gradients overflow at any loss scale (use bf16 or fp32) at {where}; "
                f"{saved}."
            ) from error
        raise
