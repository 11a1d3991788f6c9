"""Process group of a run: initialization, sums, SIGTERM handling, translation of failures.

Gradients use the engine's group, everything else a separate gloo group.
"""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from seed_multimodal.device import choose_device, is_out_of_memory, return_freed_memory
from seed_multimodal.disk import JsonObject, raise_file_limit
from seed_multimodal.entry import node_count, rank_and_world_size
from seed_multimodal.errors import ConfigError, SeedError, first_line
from seed_multimodal.training.config import DEFAULT_TIMEOUT_MINUTES

STOPPED = 143  # exit code after SIGTERM or Ctrl-C: the step was finished and saved
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Texts of torch's errors after another process has ended; they have no class of their own.
LOST_PROCESS_TEXTS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
    "timed out",
    "NCCL",
    "remote process",
    "no response from",
)
# gloo's source line before its reason, and advice behind it.
GLOO_EXTRAS = r"^\[[^]]*\] |\. This is typically .*|\.? Check the logs .*"


class TrainingError(SeedError):
    """A run that cannot continue: non-finite loss, out of memory, dead process, full disk."""


class ProcessGroup:
    """All processes of torch.distributed's default group, or only this one.

    Methods but `log` are collective. `first`: whether this process writes files and prints.
    `nodes`: machines, to which shards are dealt.
    """

    def __init__(self, timeout_minutes: float = DEFAULT_TIMEOUT_MINUTES) -> None:
        # A group of its own: the engine's may be NCCL, which has no sums on the CPU.
        self.world = 1
        self.rank = 0
        self._group: dist.ProcessGroup | None = None
        if dist.is_available() and dist.is_initialized():
            self.world = dist.get_world_size()
        if self.world > 1:
            self.rank = dist.get_rank()
            self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
        self.first = self.rank == 0
        # All processes must deal alike.
        counts = {row["nodes"] for row in self.gather({"nodes": node_count()})}
        self.nodes = counts.pop() if len(counts) == 1 else 1

    def pair(self, rank: int) -> ProcessGroup | None:
        """The first process and another one; None in all others."""
        pair = copy.copy(self)
        pair.world = 2
        pair._group = dist.new_group([0, rank], backend="gloo")
        return pair if self.rank in (0, rank) else None

    def log(self, name: str, *texts: str) -> None:
        """Print lines in the first process, after `[name]`; empty ones are left out."""
        if self.first:
            for text in filter(None, texts):
                print(f"[{name}] {text}", flush=True)

    def agree(self, *flags: bool) -> list[bool]:
        """Logical or of each flag over all processes."""
        return [total > 0 for total in self.sum(flags)]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in fp64."""
        addends = [float(value) for value in values]
        if self.world == 1:
            return addends
        total = torch.tensor(addends, dtype=torch.float64)
        dist.all_reduce(total, dist.ReduceOp.SUM, self._group)
        return total.tolist()

    def gather(self, value: Mapping[str, object]) -> list[JsonObject]:
        """The (JSON) values of all processes, by rank."""
        if self.world == 1:
            return [dict(value)]
        # JSON, since torch's `all_gather_object` unpickles network data.
        text = torch.frombuffer(bytearray(json.dumps(dict(value)).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(lengths, torch.tensor([len(text)]), self._group)

        # All tensors of an `all_gather` have one size: pad the texts to the longest.
        longest = max(int(length) for length in lengths)
        padded = torch.cat([text, text.new_zeros(longest - len(text))])
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world)]
        dist.all_gather(texts, padded, self._group)
        return [
            json.loads(bytes(text[: int(length)].tolist()))
            for text, length in zip(texts, lengths, strict=True)
        ]


def join_processes(
    device: str, timeout_minutes: float, *, single_process_group: bool = False
) -> torch.device:
    """Join the process group of torchrun's environment; returns this process's device.

    single_process_group: create a group for a single process, too (for DeepSpeed).

    Raises:
        ConfigError: more processes on this node than GPUs.
    """
    _, world = rank_and_world_size()
    local_rank = int(os.environ.get("LOCAL_RANK") or 0)
    process_device = choose_device(device, log=None).device
    backend = "gloo"

    # 1. On CUDA each process of a node has its own GPU.
    if process_device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"Local process {local_rank} has no GPU: this node has "
                f"{torch.cuda.device_count()}; start no more processes per node than that."
            )
        backend = "nccl"
        process_device = torch.device("cuda", process_device.index if world == 1 else local_rank)
        torch.cuda.set_device(process_device)
    elif process_device.type == "cpu":  # avoids DeepSpeed's warning about a missing GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return_freed_memory(at_once=False)

    # 2. A single process needs no launcher and no network.
    warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)  # of torch's DDP
    timeout = timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        if world > 1:
            # gloo would connect each process with all others, a file each.
            os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
            raise_file_limit()
            dist.init_process_group(backend, timeout=timeout)
        elif single_process_group:
            dist.init_process_group(
                backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
            )
    return process_device


@contextmanager
def process_group_cleanup() -> Iterator[None]:
    """Destroy the process group on success; after a failure other processes may never reach this
    point."""
    success = False
    try:
        yield
        success = True
    except SystemExit:  # saved after SIGTERM
        success = True
        raise
    finally:
        if dist.is_available() and dist.is_initialized():
            if success or dist.get_world_size() == 1:
                dist.destroy_process_group()


@contextmanager
def stop_request() -> Iterator[threading.Event]:
    """Context in which SIGTERM and the first Ctrl-C only set the event; the loop then finishes its
    step and saves. A second Ctrl-C ends the process at once."""
    requested = threading.Event()

    def request(number: int, frame: object) -> None:
        requested.set()
        if number == signal.SIGINT:
            print(
                "Stopping: the step is finished and saved; Ctrl-C again ends at once.", flush=True
            )
            signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {number: signal.signal(number, request) for number in STOP_SIGNALS}
    try:
        yield requested
    finally:
        for number, handler in previous.items():
            # None: a handler that was not set from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def translate_errors(activity: str, checkpoint: Callable[[], str]) -> Iterator[None]:
    """Convert out-of-memory and lost-process errors into TrainingError.

    activity: what is being done (`"step 12"`).
    checkpoint: description of the last checkpoint.
    """
    try:
        yield
    except SeedError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise TrainingError(
                f"Out of memory at {activity} ({first_line(error)}): lower data.rows "
                "(or data.batch_size) and raise trainer.gradient_accumulation_steps; "
                f"{checkpoint()}."
            ) from error
        text = str(error)
        if isinstance(error, RuntimeError) and any(lost in text for lost in LOST_PROCESS_TEXTS):
            reason = re.sub(GLOO_EXTRAS, "", first_line(error))
            raise TrainingError(
                f"Another process died or did not answer at {activity} ({reason}); {checkpoint()}; "
                "start the same command again."
            ) from error
        if "Current loss scale already at minimum" in text:  # DeepSpeed's plain Exception
            raise TrainingError(
                f"The fp16 gradients overflow at any loss scale (use bf16 or fp32) at {activity}; "
                f"{checkpoint()}."
            ) from error
        raise
