"""The log of a run: console lines, JSON lines, TensorBoard and wandb."""

from __future__ import annotations

import importlib.util
import json
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from seed_multimodal.device import peak_memory_mib
from seed_multimodal.disk import replace_text, strict_json, writing
from seed_multimodal.errors import ConfigError
from seed_multimodal.training.config import TrainerSettings
from seed_multimodal.training.distributed import ProcessGroup, TrainingError
from seed_multimodal.training.meters import check_names
from seed_multimodal.training.task import Task

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

BAR_WIDTH = 20  # characters of the progress bar


class RunLog:
    """Writes log lines; every process calls it."""

    def __init__(
        self, task: Task, step: int, output_dir: Path, group: ProcessGroup, device: torch.device
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
        status = self._status()
        check_names(status, self.meter.reserved, f"[{task.name}] `parts`")
        self.mark_waited = status.get("wait_seconds")
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

    def write_line(self, step: int) -> None:
        """Write a log line about the remaining steps, if any."""
        if step == self.mark_step:
            return
        # 1. Numbers of this process, merged over all.
        now = time.monotonic()
        status = self._status()
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
        numbers = self.meter.line(steps, seconds, self.group.world)
        check_names(merged, numbers, f"[{self.task.name}] `parts`")
        self.mark_time = now
        self.mark_step = step
        self.write(
            {
                "step": step,
                **numbers,
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

    def counts(self) -> dict[str, int]:
        """The counts among the parts' numbers, of all processes; collective."""
        counts = {key: value for key, value in self._status().items() if isinstance(value, int)}
        sums = self.group.sum(list(counts.values()))
        return dict(zip(counts, map(int, sums), strict=True))

    def _status(self) -> dict[str, float]:
        """The numbers of all parts. Raises TrainingError: two have a measure of the same name."""
        status: dict[str, float] = {}
        for part in self.task.parts:
            for name, value in part.status().items():
                if name in status and name != "wait_seconds" and not isinstance(value, int):
                    raise TrainingError(f"[{self.task.name}] two parts log {name}; rename one.")
                status[name] = status.get(name, 0) + value
        return status

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
