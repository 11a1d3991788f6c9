"""Meters: they turn the numbers of steps into log lines; their state is part of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_EXACT = ("lr", "loss_scale")  # set, not measured: shown as they are


@dataclass
class StepNumbers:
    """A step's numbers, still on the device: `values` `[n]`, and what makes them numbers by name. Nothing waits for the
    device before `read`."""

    values: Tensor
    named: Callable[[list[float]], dict[str, float]]

    def read(self) -> dict[str, float]:
        """The numbers, with one transfer, which waits until the step is done."""
        return self.named(self.values.tolist())


class Meter:
    """Exponentially smoothed numbers of each step, averaged over the processes at log lines, and samples per second.
    `llm.token_meter` overrides it with sums over all tokens of a line's steps.

    Args:
        samples: of one step in one process.
    """

    own_evaluation_line = False  # whether numbers of an evaluation get a line of their own

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.smooth: dict[str, float] = {}

    def combine(self, found: Sequence[Mapping[str, Any]], norm: Tensor | None, rate: float) -> StepNumbers:
        """Numbers of a step from those of its micro-steps (`loss` is among them): means, `grad` and `lr`.

        Args:
            norm: of the gradients; None: not known yet.
        """
        count = len(found)
        parts = {key: sum((one[key] for one in found[1:]), found[0][key]) for key in found[0] if key != "loss"}
        if count > 1:
            parts = {key: number / count for key, number in parts.items()}
        loss = found[0]["loss"] if count == 1 else torch.stack([one["loss"] for one in found]).mean()
        return _unread({"loss": loss, **({} if norm is None else {"grad": norm}), "lr": rate, **parts})

    def shared(self, numbers: Mapping[str, float]) -> list[float]:
        """Those of a step's numbers that are summed over the processes at once; none: averages at log lines do."""
        return []

    def add(self, numbers: Mapping[str, float], sums: Sequence[float]) -> None:
        """Fold in a step that was made; `sums`: of what `shared` gave, over all processes."""
        for key, value in numbers.items():
            if key in _EXACT or not math.isfinite(self.smooth.get(key, math.nan)):
                self.smooth[key] = value  # also when all before were not finite: fp16 often begins with an overflow
            elif math.isfinite(value):  # an fp16 step that overflowed, and was skipped, has no norm
                self.smooth[key] = 0.95 * self.smooth[key] + 0.05 * value

    def numbers(self) -> dict[str, float]:
        """This process's numbers of a log line, which are merged over the processes: the smoothed ones."""
        return dict(self.smooth)

    def rates(self, step: int, steps: int, seconds: float, world: int) -> dict[str, float]:
        """All processes' numbers of a log line, called after the line's steps, which `steps` and `seconds` count:
        samples per second."""
        return {"samples_per_s": self.samples * world * steps / seconds}

    def text(self, line: Mapping[str, float]) -> tuple[str, str]:
        """The line as text: numbers, speed; the first without those that every line ends with."""
        tail = ("step", "samples_per_s", "seconds_per_step", "eta_seconds", "peak_memory_mib", "wait_share", "tflops",
                "mfu")
        return (" ".join(f"{key} {value:.4g}" for key, value in line.items() if key not in tail),
                f"{line['samples_per_s']:.0f} samples/s")

    def state_dict(self) -> dict[str, Any]:
        """The smoothed numbers, so that a resumed run does not begin to smooth anew."""
        return {"smooth": dict(self.smooth)}

    def own_state(self) -> dict[str, Any]:
        """That part of the state which differs between processes."""
        return self.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.smooth.update(state.get("smooth", {}))


def utilisation_text(numbers: Mapping[str, float]) -> str:
    """`tflops` and `mfu` in words, after a comma; "" without."""
    if "tflops" not in numbers:
        return ""
    share = f" (MFU {100 * numbers['mfu']:.3g} %)" if "mfu" in numbers else ""
    return f", {numbers['tflops']:.3g} TFLOP/s{share}"


def _unread(numbers: Mapping[str, Any]) -> StepNumbers:
    """Numbers and scalar tensors, put together on the device of the first."""
    tensors = {key: value.detach() for key, value in numbers.items() if isinstance(value, Tensor)}
    device = next(iter(tensors.values())).device

    def named(values: list[float]) -> dict[str, float]:
        known = dict(zip(tensors, values, strict=True))
        return {key: known[key] if key in known else float(value) for key, value in numbers.items()}

    return StepNumbers(torch.stack([value.reshape(()).to(device, torch.float32) for value in tensors.values()]), named)
