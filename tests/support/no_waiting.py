"""Watches that a training step never waits for its device: what would make a GPU's queue run empty is an error here.

On a CPU nothing has to wait, so the calls are forbidden that would on a GPU: reading a tensor's values into Python, and
operations whose result has a shape that depends on values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READING = {Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__,
           Tensor.__array__, Tensor.__index__, torch.equal}
OPERATIONS = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "is_nonzero", "equal", "_unique2",
              "unique_dim", "unique_consecutive")


class _Waits(AssertionError):
    active = True


class _NoOperations(TorchDispatchMode):
    def __init__(self, host: set[int]) -> None:
        super().__init__()
        self.host = host

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        values = [args[0]] if args and isinstance(args[0], Tensor) else []
        indices = args[1] if name in ("index", "index_put", "index_put_", "_unsafe_index") else ()
        by_mask = any(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in indices)
        if _Waits.active and (name in OPERATIONS or by_mask) and not (
                values and values[0].data_ptr() in self.host):
            raise _Waits(f"a GPU would be waited for: {function}")
        return function(*args, **(kwargs or {}))


class _NoReading(TorchFunctionMode):
    def __init__(self, host: set[int]) -> None:
        super().__init__()
        self.host = host

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _Waits.active and function in READING and args[0].data_ptr() not in self.host:
            raise _Waits(f"a GPU would be waited for: {function}")
        return function(*args, **(kwargs or {}))


@contextmanager
def never_waiting(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, no tensor's values may be read but the optimiser's count of steps, which it keeps in the CPU's memory."""
    host = {state["step"].data_ptr() for state in optimizer.state.values() if isinstance(state.get("step"), Tensor)}
    with _NoReading(host), _NoOperations(host):
        yield


def guard_steps(monkeypatch: Any, *on_host: tuple[type, str]) -> list[int]:
    """Let every step of the trainings in this process that needs no number run inside `never_waiting`; the list fills
    with the numbers of these steps. The first, which makes the optimiser's state, is let through.
    `on_host`: (class, name of a method) that, as the data's loader, touches only tensors that are on no device."""
    from seed_multimodal.data.stream.loader import StepLoader
    from seed_multimodal.training.optimizer_step import OptimizerStep

    made, guarded = OptimizerStep.make, list[int]()

    def make(self: OptimizerStep, step: int, conditions: Any) -> Any:
        if step == 0 or self._needed(step + 1):
            return made(self, step, conditions)
        guarded.append(step)
        with never_waiting(self.engine.optimizer):
            return made(self, step, conditions)

    def free(method: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            before, _Waits.active = _Waits.active, False
            try:
                return method(*args, **more)
            finally:
                _Waits.active = before

        return call

    monkeypatch.setattr(OptimizerStep, "make", make)
    for owner, name in ((StepLoader, "at"), *on_host):
        monkeypatch.setattr(owner, name, free(getattr(owner, name)))
    return guarded
