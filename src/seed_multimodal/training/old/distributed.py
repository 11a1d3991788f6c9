"""What the processes of one training stage tell each other, and how a stop request is heard.

Gradients travel through DistributedDataParallel. Everything else (did anyone see a NaN, shall we save, shall we stop,
numbers for the log) goes over a gloo group of its own, so that no such question waits for a GPU.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from seed_multimodal.errors import ConfigError

# Rank 0 may write a large state or evaluate while the others wait.
_PATIENCE = timedelta(hours=6)


class ProcessGroup:
    """The processes that run a stage together; without a process group this one is alone. A context manager."""

    def __init__(self, name: str, wrapped: nn.Module | None) -> None:
        ready = dist.is_available() and dist.is_initialized()
        self.world = dist.get_world_size() if ready else 1
        self.rank = dist.get_rank() if self.world > 1 else 0
        if self.world > 1 and wrapped is None:
            raise ConfigError(f"[{name}] {self.world} processes run this stage, but the model is not wrapped in "
                              "DistributedDataParallel (`wrapped`), so each would train its own.")
        self._group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE) if self.world > 1 else None

    def __enter__(self) -> ProcessGroup:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        # After a failure the others may never come to close the group with this process; its end closes it.
        if self._group is not None and kind is None:
            dist.destroy_process_group(self._group)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def agree(self, *flags: bool) -> list[bool]:
        """For each flag: has any process raised it? Every process must ask at the same place."""
        if self.world == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX, self._group)
        return [bool(flag) for flag in raised.tolist()]

    def gather(self, value: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Every process's (JSON) value, in the order of ranks; every process must ask at the same place."""
        if self.world == 1:
            return [dict(value)]
        own = torch.frombuffer(bytearray(json.dumps(dict(value)).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(own)]), self._group)
        longest = max(int(size) for size in sizes)
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world)]
        dist.all_gather(texts, torch.cat([own, own.new_zeros(longest - len(own))]), self._group)
        return [json.loads(bytes(text[:int(size)].tolist())) for text, size in zip(texts, sizes, strict=True)]


def micro_step_sync(wrapped: nn.Module | None, last: bool) -> AbstractContextManager[Any]:
    """Processes average their gradients only after the last micro-step of a step."""
    no_sync = getattr(wrapped, "no_sync", None)
    return nullcontext() if last or no_sync is None else no_sync()


class StopRequest:
    """While active, SIGTERM does not end the process but sets `asked`: the loop then finishes its step and saves."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None
        self._active = False

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self._before = signal.signal(signal.SIGTERM, self._hear)
            self._active = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._active:
            signal.signal(signal.SIGTERM, self._before if self._before is not None else signal.SIG_DFL)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
