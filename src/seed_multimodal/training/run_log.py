"""The one step log of a run: a console line, a line of JSON, TensorBoard scalars and, if asked, wandb.

On a terminal the current line is rewritten in place; in a log file only whole lines appear.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from seed_multimodal.disk import disk_reason, replace_text, writing
from seed_multimodal.errors import CheckpointError, ConfigError, how_to_install
from seed_multimodal.progress import duration
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.failures import TrainingError
from seed_multimodal.training.loop_settings import LoopSettings
from seed_multimodal.training.meter import Meter, utilisation_text

Status = Callable[[], Mapping[str, float]]


class RunLog:
    """Writes the numbers of steps every `log_every` steps; every process calls it for every step.

    Numbers of a meter and of `status` are averaged over processes, except whole numbers (counts: summed) and data-wait
    share and peak memory (the largest).

    Attributes:
        problem: why a log could not be written (a full disk), as a sentence.
    """

    def __init__(self, name: str, settings: LoopSettings, step: int, home: Path, group: ProcessGroup,
                 device: torch.device, meter: Meter, status: Status = dict,
                 kept: int | None = None) -> None:
        """Open the logs; lines of steps after `kept` (`step` by default), of a killed run, are dropped.

        Raises:
            ConfigError: tensorboard or wandb is asked for and not installed. CheckpointError: the disk.
        """
        self.name, self.settings, self.home = name, settings, home
        self.group, self.device, self.meter, self.status = group, device, meter, status
        self.problem: TrainingError | None = None
        self.mark_step, self.waiting = step, False
        self.mark = self.ticked = time.monotonic()
        self.pace: float | None = None  # seconds per step, smoothed over log lines
        self.waited = status().get("wait_seconds")
        self.alive = group.first and sys.stdout.isatty()
        self.board: Any = None
        self.wandb: Any = None
        if group.first:
            drop_lines_after(step if kept is None else kept, self.file)
            # One folder per task: a resume hides only its own events.
            self.board = open_board(home / "tensorboard" / name, step) if settings.tensorboard else None
            self.wandb = _open_wandb(settings, home) if settings.wandb else None

    @property
    def file(self) -> Path:
        """The JSON lines."""
        return self.home / f"{self.name}.log.jsonl"

    def add(self, step: int, more: Mapping[str, float] | None = None) -> None:
        """Count a step that the meter already holds and write a line if one is due. `more` (an evaluation's numbers) is
        always written: in this step's line, or in one of its own."""
        merged = {} if self.meter.own_evaluation_line else dict(more or {})
        self.waiting = bool(step % self.settings.log_every and step != self.settings.steps and not merged)
        if not self.waiting:
            self._write_line(step, merged)
        elif self.alive:
            self._tick(step)
        if more and self.meter.own_evaluation_line:
            self.write(step, {"step": step, **more})

    def finish(self, step: int) -> None:
        """End of the run: write a line for the steps since the last one."""
        if self.waiting:
            self.waiting = False
            self._write_line(step, {})

    def write(self, step: int, line: Mapping[str, float]) -> None:
        """Put a line into all logs; a full disk becomes `problem`."""
        if not self.group.first:
            return
        try:
            print(f"{self._head(step)} {self._text(line)}", flush=True)
            with open(self.file, "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            values = {key: value for key, value in line.items() if key != "step"}
            if self.board is not None:
                for key, value in values.items():
                    self.board.add_scalar(key, value, step)
                self.board.flush()
            if self.wandb is not None:
                self.wandb.log(values, step=step)
        except OSError as error:
            self.problem = TrainingError(f"{self.home}: the log of step {step} cannot be written: "
                                         f"{disk_reason(error)}.")

    def pause(self, seconds: float) -> None:
        """Leave time spent outside of steps (saving, an evaluation) out of the rates."""
        self.mark += seconds

    def last_line_with(self, key: str) -> dict[str, float]:
        """The last line of the first process's log that has a key (beginning so); the same in all processes."""
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.group.first and self.file.is_file() else []
        found: dict[str, float] = next((json.loads(line) for line in reversed(lines) if f'"{key}' in line), {})
        return self.group.gather(found)[0]

    def close(self) -> None:
        """Finish TensorBoard's and wandb's files; a failure to write becomes `problem`."""
        try:
            if self.board is not None:
                self.board.close()
        except OSError as error:
            self.problem = self.problem or TrainingError(
                f"{self.home / 'tensorboard'}: cannot be written ({disk_reason(error)}).")
        if self.wandb is not None:
            self.wandb.finish()

    def _write_line(self, step: int, more: Mapping[str, float]) -> None:
        now = time.monotonic()
        status = dict(self.status())
        waited = status.pop("wait_seconds", None)
        seconds, steps = max(1e-6, now - self.mark), max(1, step - self.mark_step)
        pace = seconds / steps
        self.pace = pace if self.pace is None else 0.5 * self.pace + 0.5 * pace
        own: dict[str, float] = {"peak_memory_mib": peak_memory_mib(self.device)}
        if waited is not None:
            own["wait_share"] = min(1.0, max(0.0, waited - (self.waited or 0.0)) / seconds)
        merged = merge(self.group.gather({**own, **self.meter.numbers(), **status, **more}))
        self.mark, self.mark_step, self.waited = now, step, waited
        self.write(step, {"step": step, **self.meter.rates(step, steps, seconds, self.group.world),
                          "seconds_per_step": pace, "eta_seconds": (self.settings.steps - step) * self.pace, **merged})

    def _text(self, line: Mapping[str, float]) -> str:
        if "seconds_per_step" not in line:
            return " ".join(f"{key} {value:.4g}" for key, value in line.items() if key != "step")
        numbers, speed = self.meter.text(line)
        wait = f", waited for data {100 * line['wait_share']:.0f} %" if "wait_share" in line else ""
        return (f"{numbers} | {speed}, {line['seconds_per_step']:.3g} s/step{utilisation_text(line)}{wait}, "
                f"{line['peak_memory_mib'] / 1024:.1f} GiB, {duration(line['eta_seconds'])} left")

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
        loss = self.meter.numbers().get("loss")
        print(f"{self._head(step)} {'' if loss is None else f'loss {loss:.4g} | '}"
              f"{duration((self.settings.steps - step) * pace)} left", end="", flush=True)


def drop_lines_after(step: int, log: Path) -> None:
    """Drop log lines of steps that a killed run made after its last save (they are made again) and a torn line.

    A log of which nothing would remain belongs to another run, or to one killed before its first save; it is renamed to
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
    with writing(log):
        if kept:
            replace_text(log, "".join(kept))
        else:
            log.replace(log.with_name(f"{log.stem}.old.jsonl"))


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
        raise ConfigError("`tensorboard: true` needs the package tensorboard: "
                          f"{how_to_install('tensorboard')}.") from error
    try:
        return SummaryWriter(str(folder), purge_step=step + 1)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror}).") from error


def _open_wandb(settings: LoopSettings, home: Path) -> Any:
    try:
        wandb = importlib.import_module("wandb")  # not a dependency: used only where installed
    except ImportError as error:
        raise ConfigError("trainer: report_to has wandb, but the package is not installed: pip install wandb."
                          ) from error
    return wandb.init(project="seed-multimodal", name=settings.run_name or home.name, dir=str(home), resume="allow")


def merge(lines: list[dict[str, float]]) -> dict[str, float]:
    """The processes' lines as one: counts (int) summed, the largest wait and memory, the rest averaged."""
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
