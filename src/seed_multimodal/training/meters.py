"""Meters: numbers of steps → numbers of log lines."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from seed_multimodal.disk import JsonObject
from seed_multimodal.training.distributed import TrainingError

UNSMOOTHED = ("lr", "loss_scale")
STEP_NAMES = ("loss", "grad", "lr", "loss_scale")  # of every step, beside the task's
# Numbers of a log line that its text leaves out or formats itself.
LINE_NAMES = (
    "step samples_per_s seconds_per_step eta_seconds peak_memory_mib wait_share tflops mfu".split()
)
MIN_WEIGHT = 1e-8  # of a step without targets
Metrics = Mapping[str, Tensor | float]  # scalars to log
# A language model's metrics, summed over micro-steps and processes.
SUMMED = "loss text_sum text_count image_sum image_count tokens positions squares".split()
# A language model's log has other names of rates, and further numbers.
RATE_NAMES = {"lr": "learning_rate", "grad": "grad_norm"}
TOKEN_NAMES = (
    "learning_rate grad_norm text_loss image_loss fill tokens_per_s useful_tokens_per_s".split()
)


class TokenFlops(NamedTuple):
    """Training FLOP per token; `attention` is for each position of the token's sequence."""

    body: float
    head: float  # of learned tokens only
    attention: float


class Meter:
    """Numbers of a run's steps, the same in all processes; saved in checkpoints, so that a resumed
    run writes the same lines.

    This one smooths the means of each step; `TokenMeter` sums over the tokens of a line's steps.

    Attributes:
        samples: per step and process.
        smooth: the numbers since the last line, or smoothed.
        last: those of the last step.
        reserved: names that are not free for a task's numbers.
    """

    reserved: ClassVar[Collection[str]] = (*LINE_NAMES, *STEP_NAMES)

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.smooth: dict[str, float] = {}
        self.last: dict[str, float] = {}

    def add(self, sums: Mapping[str, float], weight: float, rates: Mapping[str, float]) -> None:
        """Add a step: `Task.loss`'s sums over all micro-batches and processes, the sum of their
        weights, and numbers of the step itself, among them `grad` and `lr`."""
        means = {key: value / weight for key, value in sums.items()}
        # In the order of the console's line.
        self.last = {"loss": means.pop("loss"), **rates, **means}
        for key, value in self.last.items():
            # fp16 often starts with an overflow, so a finite value replaces one that is not.
            if key in UNSMOOTHED or not math.isfinite(self.smooth.get(key, math.nan)):
                self.smooth[key] = value
            elif math.isfinite(value):  # a skipped fp16 step has no norm
                self.smooth[key] = 0.95 * self.smooth[key] + 0.05 * value

    def line(self, steps: int, seconds: float, world: int) -> dict[str, float]:
        """Numbers of a log line about the last `steps` steps."""
        return {"samples_per_s": self.samples * world * steps / seconds, **self.smooth}

    def text(self, line: Mapping[str, float]) -> tuple[str, str]:
        """The line as text: (metrics, speed)."""
        listed = [f"{key} {value:.4g}" for key, value in line.items() if key not in LINE_NAMES]
        return " ".join(listed), f"{line['samples_per_s']:.0f} samples/s"

    def metrics(self) -> dict[str, float]:
        """The task's numbers in the last step."""
        return {name: value for name, value in self.last.items() if name not in STEP_NAMES}

    def state_dict(self) -> JsonObject:
        return {"smooth": _finite(self.smooth), "last": _finite(self.last)}

    def load_state_dict(self, state: JsonObject) -> None:
        """Inverse of `state_dict`."""
        self.smooth.update(state.get("smooth", {}))
        self.last.update(state.get("last", {}))


class TokenMeter(Meter):
    """Sums over the tokens since the last log line, of a language model's run.

    Losses of a line are means over its steps, rates use those steps' seconds. `tokens` are useful
    (non-padding) positions, `positions` all positions including padding. Attention is within
    sequences, so its FLOP are proportional to the sum of squared lengths.

    Attributes:
        flops: of sequences of length 1.
        peak: of one device, in TFLOP/s.
        total: sums over the run.
        timed: sums since the last line, without those of a resumed run's checkpoint.
        last: loss of the last line; learning rate, gradient norm and means of numbers that are not
            among `SUMMED` of the last step.
    """

    reserved = (*Meter.reserved, *TOKEN_NAMES)

    def __init__(self) -> None:
        super().__init__(samples=0)
        self.flops = TokenFlops(0.0, 0.0, 0.0)
        self.peak: float | None = None
        self.total = {"tokens": 0.0, "positions": 0.0}
        self.timed = dict.fromkeys(SUMMED, 0.0)

    def add(self, sums: Mapping[str, float], weight: float, rates: Mapping[str, float]) -> None:
        # 1. Numbers of the step itself, and what a subclass of the task adds.
        missing = [key for key in SUMMED if key not in sums]
        if missing:
            raise TrainingError(f"`loss` must also return {', '.join(missing)} for this log.")
        means = {key: sums[key] / weight for key in sums if key not in SUMMED}
        for key, value in {**rates, **means}.items():
            self.last[RATE_NAMES.get(key, key)] = value

        # 2. Sums since the last line, of the run, and since the last line in this process.
        step = {key: sums[key] for key in SUMMED}
        step["loss"] /= weight
        for key, value in {**step, "steps": 1.0}.items():
            self.smooth[key] = self.smooth.get(key, 0.0) + value
        for key in self.total:
            self.total[key] += step[key]
        for key in self.timed:
            self.timed[key] += step[key]

    def line(self, steps: int, seconds: float, world: int) -> dict[str, float]:
        # 1. Mean losses; by token type only if there are image tokens.
        sums = self.smooth
        self.last["loss"] = sums["loss"] / sums["steps"]
        line = dict(self.last)
        for kind in ("text", "image"):
            if sums[f"{kind}_count"] and sums["image_count"]:
                line[f"{kind}_loss"] = sums[f"{kind}_sum"] / sums[f"{kind}_count"]

        # 2. Speed of all processes; TFLOP/s of one.
        timed = self.timed
        learned = timed["text_count"] + timed["image_count"]
        work = (
            timed["tokens"] * self.flops.body
            + timed["squares"] * self.flops.attention
            + learned * self.flops.head
        )
        tflops = work / seconds / world / 1e12
        line["tokens_per_s"] = timed["positions"] / seconds
        line["useful_tokens_per_s"] = timed["tokens"] / seconds
        line["tflops"] = tflops
        line["fill"] = sums["tokens"] / max(1.0, sums["positions"])
        line["tokens"] = self.total["tokens"]
        if self.peak:
            line["mfu"] = tflops / self.peak

        # 3. The next line starts from zero.
        self.smooth.clear()
        self.timed = dict.fromkeys(SUMMED, 0.0)
        return line

    def text(self, line: Mapping[str, float]) -> tuple[str, str]:
        losses = [key for key in ("loss", "text_loss", "image_loss") if key in line]
        metrics = [f"{key} {line[key]:.4g}" for key in losses]
        metrics += [f"lr {line['learning_rate']:.3g}", f"grad {line['grad_norm']:.3g}"]
        speed = (
            f"{line['useful_tokens_per_s']:,.0f} useful of {line['tokens_per_s']:,.0f} tokens/s, "
            f"fill {100 * line['fill']:.1f} %"
        )
        return " ".join(metrics), speed

    def state_dict(self) -> JsonObject:
        """Sums since the last log line and of the run, and the last loss."""
        return {**super().state_dict(), "total": dict(self.total)}

    def load_state_dict(self, state: JsonObject) -> None:
        super().load_state_dict(state)
        self.total.update(state.get("total", {}))


def check_names(names: Collection[str], taken: Collection[str], source: str) -> None:
    """Raise TrainingError if numbers of a source have names of other numbers of a log line."""
    both = [name for name in names if name in taken]
    if both:
        raise TrainingError(
            f"{source}: the log has another number of the name {', '.join(both)}; rename it."
        )


def _finite(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def to_floats(metrics: Metrics) -> dict[str, float]:
    """Numbers and scalar tensors as floats, with one transfer from the device."""
    tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
    device = next(iter(tensors.values())).device
    scalars = [value.detach().reshape(()).to(device, torch.float32) for value in tensors.values()]
    floats = dict(zip(tensors, torch.stack(scalars).tolist(), strict=True))
    # In the order of the metrics.
    return {name: float(floats.get(name, value)) for name, value in metrics.items()}
