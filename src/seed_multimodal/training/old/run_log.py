"""What a run says of itself: a line on the console, a line of JSON and TensorBoard scalars at every log step.

On a terminal the line under way is rewritten in place; in a log file only whole lines appear.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.progress import duration
from seed_multimodal.training.loop_settings import SampleCost, StageSettings
from seed_multimodal.training.old.distributed import ProcessGroup

Status = Callable[[], Mapping[str, float]]

_EXACT = ("lr", "loss_scale")  # set, not measured: shown as they are


class Progress:
    """Smooths the numbers of each step and writes them every `log_every` steps.

    Numbers are averaged over processes, except whole numbers of `status` (counts: summed) and data-wait share and
    peak memory (the largest). `smooth` is shared with the state, so that a resume does not begin it anew; `problem`
    is the sentence for a log that could not be written (a full disk).
    """

    def __init__(self, name: str, settings: StageSettings, step: int, home: Path, peers: ProcessGroup,
                 device: torch.device, smooth: dict[str, float], status: Status | None = None,
                 cost: SampleCost | None = None) -> None:
        self.name, self.settings, self.home = name, settings, home
        self.peers, self.device, self.status, self.cost = peers, device, status, cost
        self.problem: CheckpointError | None = None
        self.smooth = smooth
        self.mark_step = step
        self.mark = self.ticked = time.monotonic()
        self.pace: float | None = None  # seconds per step, smoothed over log lines
        status_now = self._status()
        self.waited, self.aside = self._waited(status_now), float(status_now.get("aside_seconds", 0.0))
        self.alive = peers.first and sys.stdout.isatty()
        self.board: Any = None
        if peers.first:
            forget_after(step, home / f"{name}.log.jsonl")
        if settings.tensorboard and peers.first:
            # One folder per stage: what a resume hides there is its own.
            self.board = open_board(home / "tensorboard" / name, step)

    def show(self, step: int, parts: Mapping[str, float], more: Mapping[str, float] | None = None) -> None:
        """Fold in the numbers of the step that was just made; write them if a log line is due.

        `more` stands in the line as it is, and makes one due.
        """
        for key, value in parts.items():
            if key in _EXACT or not math.isfinite(self.smooth.get(key, math.nan)):
                self.smooth[key] = value  # also when all before were none: fp16 often begins with an overflow
            elif math.isfinite(value):  # an fp16 step that overflowed, and was skipped, has no norm
                self.smooth[key] = 0.95 * self.smooth[key] + 0.05 * value
        if step % self.settings.log_every and step != self.settings.steps and not more:
            if self.alive:
                self._tick(step)
            return
        line = self._line(step, more or {})
        if self.peers.first:
            try:
                self._write(step, line)
            except OSError as error:
                self.problem = CheckpointError(f"{self.home}: the log of step {step} cannot be written "
                                               f"({error.strerror}).")

    def close(self) -> None:
        """Finish the TensorBoard file; that it cannot be written is a `problem`."""
        if self.board is None:
            return
        try:
            self.board.close()
        except OSError as error:
            self.problem = self.problem or CheckpointError(
                f"{self.home / 'tensorboard'}: cannot be written ({error.strerror}).")

    def _line(self, step: int, more: Mapping[str, float]) -> dict[str, float]:
        now = time.monotonic()
        status = self._status()
        waited, aside = self._waited(status), float(status.pop("aside_seconds", 0.0))
        status.pop("wait_seconds", None)
        seconds, steps = max(1e-6, now - self.mark - (aside - self.aside)), max(1, step - self.mark_step)
        pace = seconds / steps
        self.pace = pace if self.pace is None else 0.5 * self.pace + 0.5 * pace
        own: dict[str, float] = {"peak_memory_mib": peak_memory_mib(self.device)}
        if waited is not None:
            own["wait_share"] = min(1.0, (waited - (self.waited or 0.0)) / seconds)
        merged = merge(self.peers.gather({**own, **self.smooth, **status, **more}))
        self.mark, self.mark_step, self.waited, self.aside = now, step, waited, aside
        samples = self.settings.batch_size * self.settings.accumulate
        return {"step": step, "samples_per_s": samples * self.peers.world / pace, "seconds_per_step": pace,
                "eta_seconds": (self.settings.steps - step) * self.pace, **utilisation(self.cost, samples / pace),
                **merged}

    def _write(self, step: int, line: Mapping[str, float]) -> None:
        own = ("step", "samples_per_s", "seconds_per_step", "eta_seconds", "peak_memory_mib", "wait_share", "tflops",
               "mfu")
        numbers = " ".join(f"{key} {value:.4g}" for key, value in line.items() if key not in own)
        wait = f", waited for data {100 * line['wait_share']:.0f} %" if "wait_share" in line else ""
        print(f"{self._head(step)} {numbers} | {line['samples_per_s']:.0f} samples/s, "
              f"{line['seconds_per_step']:.3g} s/step{said_of(line)}{wait}, {line['peak_memory_mib'] / 1024:.1f} GiB, "
              f"{duration(line['eta_seconds'])} left", flush=True)
        with open(self.home / f"{self.name}.log.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        if self.board is not None:
            for key, value in line.items():
                if key != "step":
                    self.board.add_scalar(key, value, step)
            self.board.flush()

    def _head(self, step: int) -> str:
        filled = int(20 * step / max(1, self.settings.steps))
        clear = "\r\x1b[K" if self.alive else ""
        return f"{clear}[{self.name}] {'#' * filled}{'.' * (20 - filled)} {step}/{self.settings.steps}"

    def _tick(self, step: int) -> None:
        """Between log lines a terminal shows the step, at most twice a second."""
        now = time.monotonic()
        if now - self.ticked < 0.5:
            return
        self.ticked = now
        pace = self.pace or (now - self.mark) / max(1, step - self.mark_step)
        print(f"{self._head(step)} loss {self.smooth.get('loss', float('nan')):.4g} | "
              f"{duration((self.settings.steps - step) * pace)} left", end="", flush=True)

    def _status(self) -> dict[str, float]:
        return dict(self.status()) if self.status is not None else {}

    @staticmethod
    def _waited(status: Mapping[str, float]) -> float | None:
        return float(status["wait_seconds"]) if "wait_seconds" in status else None


def utilisation(cost: SampleCost | None, samples_per_s: float) -> dict[str, float]:
    """`tflops` that one device achieves with so many samples per second, and `mfu`, their share of its peak."""
    if cost is None:
        return {}
    tflops = cost.flops * samples_per_s / 1e12
    return {"tflops": tflops} | ({"mfu": tflops / cost.peak_tflops} if cost.peak_tflops else {})


def said_of(numbers: Mapping[str, float]) -> str:
    """`utilisation` as the console and the end of a run say it, after a comma; "" without."""
    if "tflops" not in numbers:
        return ""
    share = f" (MFU {100 * numbers['mfu']:.3g} %)" if "mfu" in numbers else ""
    return f", {numbers['tflops']:.3g} TFLOP/s{share}"


def forget_after(step: int, log: Path) -> None:
    """Drop log lines of steps that a killed run made after its last save (they are made again) and a torn line.

    A log of which nothing would stay is another run's, or of one killed before its first save: it becomes
    `NAME.log.old.jsonl`.

    Raises:
        CheckpointError: the log cannot be replaced.
    """
    if not log.is_file():
        return
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step]
    if len(kept) == len(lines):
        return
    try:
        if not kept:
            log.replace(log.with_name(f"{log.stem}.old.jsonl"))
            return
        temporary = log.with_name(f".{log.name}.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(log)
    except OSError as error:
        raise CheckpointError(f"{log}: cannot be written ({error.strerror}).") from error


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def open_board(folder: Path, step: int) -> Any:
    """A TensorBoard writer (torch's `SummaryWriter`); events after `step` of earlier runs in the folder are hidden.

    Raises:
        ConfigError: the package tensorboard is not installed. CheckpointError: the folder cannot be written.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("`tensorboard: true` needs the package tensorboard: pip install tensorboard.") from error
    try:
        return SummaryWriter(str(folder), purge_step=step + 1)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror}).") from error


def merge(lines: list[dict[str, float]]) -> dict[str, float]:
    """One line out of every process's: counts (int) summed, wait and memory their largest, the rest averaged."""
    merged: dict[str, float] = {}
    for key in dict.fromkeys(key for line in lines for key in line):
        values = [line[key] for line in lines if key in line]
        if key in ("wait_share", "peak_memory_mib"):
            merged[key] = max(values)
        else:
            merged[key] = sum(values) if all(isinstance(v, int) for v in values) else sum(values) / len(values)
    return merged


def peak_memory_mib(device: torch.device) -> float:
    """Most memory in use so far, in MiB: allocated on the GPU, or resident in this process on other devices."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return 0.0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
