"""The processes of a run: who they are, where each computes, and what they tell each other.

`torchrun` sets RANK, LOCAL_RANK and WORLD_SIZE on any number of nodes; without it there is one process. CUDA devices
talk over NCCL, CPUs over gloo. Peculiar: without a GPU, accelerate with DeepSpeed believes that every process is
number 0 of 1 and trains as many separate models; its state is therefore written here from torch.distributed, and
`Processes.check` makes sure that it was believed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from seed_multimodal.device import choose_device
from seed_multimodal.errors import ConfigError, first_line
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.failures import TrainingError

_FOR_EVER = timedelta(days=30)


class RunProcessGroup(ProcessGroup):
    """The run's processes; questions between them have the run's patience, not hours."""

    def __init__(self, timeout: timedelta) -> None:
        ready = dist.is_available() and dist.is_initialized()
        self.world = dist.get_world_size() if ready else 1
        self.rank = dist.get_rank() if self.world > 1 else 0
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if self.world > 1 else None

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes in fp64; every process must ask at the same place."""
        if self.world == 1:
            return [float(value) for value in values]
        total = torch.tensor([float(value) for value in values], dtype=torch.float64)
        dist.all_reduce(total, dist.ReduceOp.SUM, self._group)
        return [float(value) for value in total.tolist()]


@dataclass
class Processes:
    """This process among the others. `local_rank` counts on its node."""

    peers: RunProcessGroup
    device: torch.device
    local_rank: int
    timeout: timedelta
    added: tuple[str, ...] = ()  # environment variables that were set here

    @property
    def rank(self) -> int:
        return self.peers.rank

    @property
    def world(self) -> int:
        return self.peers.world

    def tell_accelerate(self) -> None:
        """Write accelerate's state from what torch.distributed knows.

        Raises:
            TrainingError: accelerate counts other processes.
        """
        from accelerate.state import AcceleratorState, GradientState, PartialState
        from accelerate.utils import DistributedType

        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        kind = (DistributedType.NO if self.world == 1 else
                DistributedType.MULTI_GPU if self.device.type == "cuda" else DistributedType.MULTI_CPU)
        PartialState._shared_state.update(
            _cpu=False, backend=dist.get_backend() if dist.is_initialized() else None, device=self.device, debug=False,
            distributed_type=kind, num_processes=self.world, process_index=self.rank,
            local_process_index=self.local_rank, fork_launched=False)

    def check(self, accelerator: Any) -> None:
        """Refuse to train where accelerate did not count all processes."""
        expected = _number("WORLD_SIZE", 1)
        if (accelerator.num_processes, accelerator.process_index) != (expected, self.rank):
            raise TrainingError(f"accelerate sees process {accelerator.process_index} of {accelerator.num_processes}, "
                                f"but this is process {self.rank} of {expected} (WORLD_SIZE).")

    def close(self, clean: bool) -> None:
        """Leave the others; after a failure they may never come to do it together, so then nothing is waited for."""
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        for name in ("ACCELERATE_USE_DEEPSPEED", *self.added):
            os.environ.pop(name, None)
        if (clean or self.world == 1) and dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def start_processes(device: str, timeout_minutes: float, *, group_of_one: bool = False) -> Processes:
    """Join the process group that torchrun's environment describes.

    Args:
        device: as `device.choose_device`; `auto` takes each node's GPUs by local rank.
        timeout_minutes: how long a collective waits; 0: for ever.
        group_of_one: make a process group for a single process, too (DeepSpeed needs one).

    Raises:
        ConfigError: more processes on this node than GPUs, or an incomplete environment.
        TrainingError: the others did not come in time.
    """
    world, local = _number("WORLD_SIZE", 1), _number("LOCAL_RANK", 0)
    if world < 1 or _number("RANK", 0) >= max(world, 1):
        raise ConfigError(f"RANK must be below WORLD_SIZE, but is {_number('RANK', 0)} of {world}.")
    place = choose_device(device, log=None).device
    if place.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ConfigError(f"Local process {local} has no GPU: this node has {torch.cuda.device_count()}; start no "
                              f"more processes per node than that.")
        place = torch.device("cuda", place.index if place.index is not None and world == 1 else local)
        torch.cuda.set_device(place)
    elif place.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, if anything imports it, wonders aloud
    timeout = timedelta(minutes=timeout_minutes) if timeout_minutes else _FOR_EVER
    backend = "nccl" if place.type == "cuda" else "gloo"
    added: tuple[str, ...] = ()
    if group_of_one and "LOCAL_RANK" not in os.environ:  # DeepSpeed looks it up at every step
        os.environ["LOCAL_RANK"], added = str(local), ("LOCAL_RANK",)
    if not dist.is_initialized():
        if world > 1:
            for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
                if not os.environ.get(name):
                    raise ConfigError(f"WORLD_SIZE is {world}, but {name} is not set: start several processes with "
                                      f"torchrun.")
            _number("MASTER_PORT", 0)
            _join(backend, timeout)
        elif group_of_one:
            store = tempfile.NamedTemporaryFile(prefix="seed-group-", delete=False).name
            os.unlink(store)
            dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1, timeout=timeout)
    return Processes(RunProcessGroup(timeout), place, local, timeout, added)


def _join(backend: str, timeout: timedelta) -> None:
    """Meet the others.

    Raises:
        TrainingError: they did not come in time, or their address leads nowhere.
    """
    try:
        dist.init_process_group(backend, timeout=timeout)
    except dist.DistError as error:
        raise TrainingError(
            f"Process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} did not meet the others at MASTER_ADDR "
            f"{os.environ['MASTER_ADDR']}, MASTER_PORT {os.environ['MASTER_PORT']} ({first_line(error)}); start all "
            f"processes within trainer.timeout_minutes of each other.") from error


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdigit():
        raise ConfigError(f"{name} must be a number, not {text!r}.")
    return int(text)
