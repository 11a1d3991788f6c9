"""Metrics of a run: smoothing, console lines, JSON log, TensorBoard and wandb."""

from __future__ import annotations

import importlib.util
import json
import math
import resource
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from seed_multimodal.disk import JsonObject, replace_text, strict_json, writing
from seed_multimodal.errors import ConfigError
from seed_multimodal.training.config import TrainerSettings
from seed_multimodal.training.distributed import ProcessGroup

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

UNSMOOTHED = ("lr", "loss_scale")
# Numbers of a log line that its text leaves out or formats itself.
NOT_LISTED = (
    "step samples_per_s seconds_per_step eta_seconds peak_memory_mib wait_share tflops mfu".split()
)
BAR_WIDTH = 20  # characters of the progress bar


Metrics = Mapping[str, Tensor | float]  # scalars to log
# A language model's metrics, summed over micro-steps and processes.
SUMMED = "loss text_sum text_count image_sum image_count tokens positions squares".split()


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
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.smooth: dict[str, float] = {}

    def combine(self, micro_metrics: Sequence[Metrics], world: int) -> dict[str, Tensor | float]:
        """This process's share of a step's numbers, from those of its micro-steps; their sum over
        the processes goes to `add`."""
        count = len(micro_metrics) * world
        return {key: sum_of(micro_metrics, key) / count for key in micro_metrics[0]}

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add a step: the numbers of all processes, `lr` and `grad`."""
        for key, value in metrics.items():
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
        listed = [f"{key} {value:.4g}" for key, value in line.items() if key not in NOT_LISTED]
        return " ".join(listed), f"{line['samples_per_s']:.0f} samples/s"

    def state_dict(self) -> JsonObject:
        finite = {key: value for key, value in self.smooth.items() if math.isfinite(value)}
        return {"smooth": finite}

    def load_state_dict(self, state: JsonObject) -> None:
        """Inverse of `state_dict`."""
        self.smooth.update(state.get("smooth", {}))


class TokenMeter(Meter):
    """Sums over the tokens since the last log line, of a language model's run.

    Losses of a line are means over its steps, rates use those steps' seconds. `tokens` are useful
    (non-padding) positions, `positions` all positions including padding. Attention is within
    sequences, so its FLOP are proportional to the sum of squared lengths.

    Attributes:
        flops: of sequences of length 1.
        peak: of one device, in TFLOP/s.
        divisor: of the loss summed over processes; set before each step.
        total: sums over the run.
        timed: sums since the last line, without those of a resumed run's checkpoint.
        last: loss, learning rate and gradient norm of the last line or step.
    """

    def __init__(self) -> None:
        super().__init__(samples=0)
        self.flops = TokenFlops(0.0, 0.0, 0.0)
        self.peak: float | None = None
        self.divisor = 1.0
        self.total = {"tokens": 0.0, "positions": 0.0}
        self.timed = dict.fromkeys(SUMMED, 0.0)
        self.last: dict[str, float] = {}

    def combine(self, micro_metrics: Sequence[Metrics], world: int) -> dict[str, Tensor | float]:
        """Sums over the micro-steps."""
        return {key: sum_of(micro_metrics, key) for key in SUMMED}

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add a step."""
        self.last["learning_rate"] = metrics["lr"]
        self.last["grad_norm"] = metrics["grad"]
        step = {key: metrics[key] for key in SUMMED}
        step["loss"] /= max(self.divisor, 1e-8)
        # Sums since the last line, of the run, and since the last line in this process.
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
        return {**super().state_dict(), "total": dict(self.total), "last": self.last}

    def load_state_dict(self, state: JsonObject) -> None:
        super().load_state_dict(state)
        self.total.update(state.get("total", {}))
        self.last.update(state.get("last", {}))


def sum_of(micro_metrics: Sequence[Metrics], key: str) -> Tensor | float:
    """Sum of a metric over micro-steps: a number, or a tensor on the device."""
    total = micro_metrics[0][key]
    for metrics in micro_metrics[1:]:
        total = total + metrics[key]
    return total


def to_floats(metrics: Metrics) -> dict[str, float]:
    """Numbers and scalar tensors as floats, with one transfer from the device."""
    tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
    device = next(iter(tensors.values())).device
    scalars = [value.detach().reshape(()).to(device, torch.float32) for value in tensors.values()]
    floats = dict(zip(tensors, torch.stack(scalars).tolist(), strict=True))
    # In the order of the metrics.
    return {name: float(floats.get(name, value)) for name, value in metrics.items()}


class Logged(Protocol):
    """What a log reads of a `Task`."""

    name: str
    settings: TrainerSettings
    meter: Meter

    def status(self) -> Mapping[str, float]: ...


class RunLog:
    """Writes log lines every `logging_steps` steps; every process calls it for every step."""

    def __init__(
        self, task: Logged, step: int, output_dir: Path, group: ProcessGroup, device: torch.device
    ) -> None:
        """Open the logs and drop lines of a killed run after `step`, at which this one starts.

        Raises ConfigError: no wandb.
        """
        self.task = task
        self.meter = task.meter
        self.settings = settings = task.settings
        self.file = output_dir / f"{task.name}.log.jsonl"
        self.group = group
        self.device = device
        # Of the last line: step, time (without pauses) and seconds spent waiting for data.
        self.mark_step = step
        self.mark_time = time.monotonic()
        self.mark_waited = task.status().get("wait_seconds")
        self.board: SummaryWriter | None = None
        self.wandb: Any = None  # not a dependency
        if not group.first:
            return
        drop_lines_after(step, self.file)
        if "tensorboard" in settings.report_to:
            from torch.utils.tensorboard import SummaryWriter

            # One folder per task, so that a resume hides only its events.
            board_dir = output_dir / "tensorboard" / task.name
            with writing(board_dir):
                self.board = SummaryWriter(str(board_dir), purge_step=step + 1)
        if "wandb" in settings.report_to:
            self.wandb = _open_wandb(settings, output_dir, task.name)

    def add(self, step: int, evaluation: Mapping[str, float] | None = None) -> None:
        """Write a log line when due, and the metrics of an evaluation."""
        if step % self.settings.logging_steps == 0 or step == self.settings.max_steps:
            self.finish(step)
        if evaluation:
            self.write({"step": step, **evaluation})

    def finish(self, step: int) -> None:
        """Write a log line about the remaining steps, if any."""
        if step == self.mark_step:
            return
        # 1. Numbers of this process, merged over all.
        now = time.monotonic()
        status = dict(self.task.status())
        seconds = max(1e-6, now - self.mark_time)
        steps = step - self.mark_step
        process_line = {"peak_memory_mib": peak_memory_mib(self.device)}
        if self.mark_waited is not None:
            waited = status.pop("wait_seconds")
            share = max(0.0, waited - self.mark_waited) / seconds
            process_line["wait_share"] = min(1.0, share)
            self.mark_waited = waited
        merged = merge(self.group.gather({**process_line, **status}))

        # 2. The line, with the speed since the last one.
        self.mark_time = now
        self.mark_step = step
        self.write(
            {
                "step": step,
                **self.meter.line(steps, seconds, self.group.world),
                "seconds_per_step": seconds / steps,
                "eta_seconds": (self.settings.max_steps - step) * seconds / steps,
                **merged,
            }
        )

    def write(self, line: Mapping[str, float]) -> None:
        """Write a line to all logs (first process). Raises CheckpointError: disk error."""
        if not self.group.first:
            return

        # 1. The console, with a progress bar.
        step = int(line["step"])
        max_steps = self.settings.max_steps
        filled = int(BAR_WIDTH * step / max(1, max_steps))
        bar = "#" * filled + "." * (BAR_WIDTH - filled)
        self.group.log(self.task.name, f"{bar} {step}/{max_steps} {self._text(line)}")

        # 2. JSON log, TensorBoard and wandb.
        values = {key: value for key, value in line.items() if key != "step"}
        with writing(self.file):
            with open(self.file, "a", encoding="utf-8") as log:
                log.write(strict_json(line) + "\n")
            if self.board is not None:
                for key, value in values.items():
                    self.board.add_scalar(key, value, step)
                self.board.flush()
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def pause(self, seconds: float) -> None:
        """Exclude time spent outside of steps (saving, evaluation) from the rates."""
        self.mark_time += seconds

    def close(self) -> None:
        """Close TensorBoard and wandb."""
        if self.board is not None:
            with writing(self.file):
                self.board.close()
        if self.wandb is not None:
            self.wandb.finish()

    def _text(self, line: Mapping[str, float]) -> str:
        if "seconds_per_step" not in line:  # an evaluation
            return " ".join(f"{key} {value:.4g}" for key, value in line.items() if key != "step")
        metrics, speed = self.meter.text(line)
        text = f"{metrics} | {speed}, {line['seconds_per_step']:.3g} s/step"
        if "tflops" in line:
            text += f", {line['tflops']:.3g} TFLOP/s"
            if "mfu" in line:
                text += f" (MFU {100 * line['mfu']:.3g} %)"
        if "wait_share" in line:
            text += f", waited for data {100 * line['wait_share']:.0f} %"
        memory_gib = line["peak_memory_mib"] / 1024
        time_left = tqdm.format_interval(line["eta_seconds"])
        return f"{text}, {memory_gib:.1f} GiB, {time_left} left"


def drop_lines_after(step: int, log: Path) -> None:
    """Drop log lines of a killed run after its last checkpoint, and an incomplete line.

    Raises CheckpointError.
    """
    if not log.is_file():
        return
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    valid = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
    if len(valid) < len(lines):
        with writing(log):
            replace_text(log, "".join(valid))


def _open_wandb(settings: TrainerSettings, output_dir: Path, name: str) -> Any:
    """The run of wandb that a file in the output folder names, so that a restart continues it."""
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "trainer: report_to has wandb, but the package is not installed: pip install wandb."
        )
    wandb = importlib.import_module("wandb")  # not a dependency
    file = output_dir / f"{name}.wandb_id"
    if not file.is_file():
        with writing(file):
            output_dir.mkdir(parents=True, exist_ok=True)
            replace_text(file, uuid.uuid4().hex)
    return wandb.init(
        project="seed-multimodal",
        name=settings.run_name or output_dir.name,
        dir=str(output_dir),
        id=file.read_text(encoding="utf-8").strip(),
        resume="allow",
    )


def merge(lines: list[dict[str, float]]) -> dict[str, float]:
    """Merge the processes' lines: counts (int) summed, maximum of wait and memory, the rest
    averaged."""
    # Not all processes have all keys.
    values_by_key: dict[str, list[float]] = {}
    for line in lines:
        for key, value in line.items():
            values_by_key.setdefault(key, []).append(value)

    merged: dict[str, float] = {}
    for key, values in values_by_key.items():
        if key in ("wait_share", "peak_memory_mib"):
            merged[key] = max(values)
        elif isinstance(values[0], int):
            merged[key] = sum(values)
        else:
            merged[key] = sum(values) / len(values)
    return merged


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory in MiB: allocated on the GPU, or resident in this process on other devices."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # `ru_maxrss` has bytes on macOS, KiB on Linux.
    units_per_mib = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units_per_mib
