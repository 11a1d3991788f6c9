"""Metrics of a run: smoothing, console lines, JSON log, TensorBoard and wandb."""

from __future__ import annotations

import importlib.util
import json
import math
import resource
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from seed_multimodal.disk import replace_text, writing
from seed_multimodal.errors import ConfigError
from seed_multimodal.training.config import TrainerSettings
from seed_multimodal.training.distributed import ProcessGroup

_EXACT = ("lr", "loss_scale")  # not smoothed


class Meter:
    """Exponentially smoothed numbers of each step, averaged over processes at log lines, and samples per second.
    `llm.metrics.TokenMeter` uses sums over all tokens of a line's steps instead."""

    def __init__(self, samples: int) -> None:
        """`samples`: per step and process."""
        self.samples = samples
        self.smooth: dict[str, float] = {}

    def combine(
        self, found: Sequence[Mapping[str, Any]], norm: Tensor | None, rate: float
    ) -> dict[str, float]:
        """Numbers of a step from those of its micro-steps (including `loss`): means, `grad` (if the gradient norm is
        known) and `lr`."""
        count = len(found)
        parts = {
            key: sum((one[key] for one in found[1:]), found[0][key])
            for key in found[0]
            if key != "loss"
        }
        if count > 1:
            parts = {key: number / count for key, number in parts.items()}
        loss = (
            found[0]["loss"] if count == 1 else torch.stack([one["loss"] for one in found]).mean()
        )
        return _numbers(
            {"loss": loss, **({} if norm is None else {"grad": norm}), "lr": rate, **parts}
        )

    def shared(self, numbers: Mapping[str, float]) -> list[float]:
        """Numbers of a step to be summed over processes immediately; by default none."""
        return []

    def add(self, numbers: Mapping[str, float], sums: Sequence[float]) -> None:
        """Add a step; `sums`: the values of `shared`, summed over processes."""
        for key, value in numbers.items():
            if key in _EXACT or not math.isfinite(self.smooth.get(key, math.nan)):
                self.smooth[key] = (
                    value  # also after non-finite values: fp16 often starts with an overflow
                )
            elif math.isfinite(value):  # a skipped fp16 step has no norm
                self.smooth[key] = 0.95 * self.smooth[key] + 0.05 * value

    def numbers(self) -> dict[str, float]:
        """This process's smoothed numbers for a log line, to be merged over processes."""
        return dict(self.smooth)

    def rates(self, step: int, steps: int, seconds: float, world: int) -> dict[str, float]:
        """Global numbers for a log line about the last `steps` steps in `seconds`: samples per second."""
        return {"samples_per_s": self.samples * world * steps / seconds}

    def text(self, line: Mapping[str, float]) -> tuple[str, str]:
        """The line as text: (numbers, speed)."""
        tail = (
            "step",
            "samples_per_s",
            "seconds_per_step",
            "eta_seconds",
            "peak_memory_mib",
            "wait_share",
            "tflops",
            "mfu",
        )
        return (
            " ".join(f"{key} {value:.4g}" for key, value in line.items() if key not in tail),
            f"{line['samples_per_s']:.0f} samples/s",
        )

    def state_dict(self) -> dict[str, Any]:
        """The smoothed numbers."""
        return {"smooth": dict(self.smooth)}

    def process_state(self) -> dict[str, Any]:
        """The part of the state that differs between processes."""
        return self.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.smooth.update(state.get("smooth", {}))


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Numbers and scalar tensors as floats, with one transfer from the device."""
    tensors = [value.detach().reshape(()) for value in values.values() if isinstance(value, Tensor)]
    read = iter(
        torch.stack([value.to(tensors[0].device, torch.float32) for value in tensors]).tolist()
    )
    return {
        key: next(read) if isinstance(value, Tensor) else float(value)
        for key, value in values.items()
    }


class RunLog:
    """Writes log lines every `logging_steps` steps; every process calls it for every step."""

    def __init__(
        self,
        name: str,
        settings: TrainerSettings,
        step: int,
        home: Path,
        group: ProcessGroup,
        device: torch.device,
        meter: Meter,
        status: Callable[[], Mapping[str, float]],
        kept: int,
        starts_branch: bool = False,
    ) -> None:
        """Open the logs and drop lines of a killed run after step `kept`; a branch is another run of wandb.

        Raises ConfigError: no wandb.
        """
        self.name, self.settings, self.file = name, settings, home / f"{name}.log.jsonl"
        self.group, self.device, self.meter, self.status = group, device, meter, status
        self.mark_step, self.mark = step, time.monotonic()
        self.waited = status().get("wait_seconds")
        self.board: Any = None
        self.wandb: Any = None
        if group.first:
            drop_lines_after(kept, self.file)
            if "tensorboard" in settings.report_to:
                from torch.utils.tensorboard import SummaryWriter

                board = (
                    home / "tensorboard" / name
                )  # one folder per task, so that a resume hides only its events
                with writing(board):
                    self.board = SummaryWriter(str(board), purge_step=step + 1)
            if "wandb" in settings.report_to:
                self.wandb = _open_wandb(settings, home, name, starts_branch)

    def add(self, step: int, evaluation: Mapping[str, float] | None = None) -> None:
        """Write a log line when due, and the numbers of an evaluation."""
        if step % self.settings.logging_steps == 0 or step == self.settings.max_steps:
            self.finish(step)
        if evaluation:
            self.write({"step": step, **evaluation})

    def finish(self, step: int) -> None:
        """Write a log line about the remaining steps, if any."""
        if step == self.mark_step:
            return
        now, status = time.monotonic(), dict(self.status())
        seconds, steps = max(1e-6, now - self.mark), step - self.mark_step
        own: dict[str, float] = {"peak_memory_mib": peak_memory_mib(self.device)}
        if self.waited is not None:
            waited = status.pop("wait_seconds")
            own["wait_share"] = min(1.0, max(0.0, waited - self.waited) / seconds)
            self.waited = waited
        merged = merge(self.group.gather({**own, **self.meter.numbers(), **status}))
        self.mark, self.mark_step = now, step
        self.write(
            {
                "step": step,
                **self.meter.rates(step, steps, seconds, self.group.world),
                "seconds_per_step": seconds / steps,
                "eta_seconds": (self.settings.max_steps - step) * seconds / steps,
                **merged,
            }
        )

    def write(self, line: Mapping[str, float]) -> None:
        """Write a line to all logs (first process). Raises CheckpointError: disk error."""
        if not self.group.first:
            return
        step = int(line["step"])
        filled = int(20 * step / max(1, self.settings.max_steps))
        print(
            f"[{self.name}] {'#' * filled}{'.' * (20 - filled)} {step}/{self.settings.max_steps} {self._text(line)}",
            flush=True,
        )
        values = {key: value for key, value in line.items() if key != "step"}
        with writing(self.file):
            with open(self.file, "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            if self.board is not None:
                for key, value in values.items():
                    self.board.add_scalar(key, value, step)
                self.board.flush()
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def pause(self, seconds: float) -> None:
        """Exclude time spent outside of steps (saving, evaluation) from the rates."""
        self.mark += seconds

    def last_line_with(self, key: str) -> dict[str, float]:
        """The last line of the first process's log with a key of this prefix; equal in all processes."""
        lines = (
            self.file.read_text(encoding="utf-8").splitlines()
            if self.group.first and self.file.is_file()
            else []
        )
        found: dict[str, float] = next(
            (json.loads(line) for line in reversed(lines) if f'"{key}' in line), {}
        )
        return self.group.gather(found)[0]

    def close(self) -> None:
        """Close TensorBoard and wandb."""
        if self.board is not None:
            with writing(self.file):
                self.board.close()
        if self.wandb is not None:
            self.wandb.finish()

    def _text(self, line: Mapping[str, float]) -> str:
        if "seconds_per_step" not in line:
            return " ".join(f"{key} {value:.4g}" for key, value in line.items() if key != "step")
        numbers, speed = self.meter.text(line)
        mfu = f" (MFU {100 * line['mfu']:.3g} %)" if "mfu" in line else ""
        used = f", {line['tflops']:.3g} TFLOP/s{mfu}" if "tflops" in line else ""
        wait = f", waited for data {100 * line['wait_share']:.0f} %" if "wait_share" in line else ""
        return (
            f"{numbers} | {speed}, {line['seconds_per_step']:.3g} s/step{used}{wait}, "
            f"{line['peak_memory_mib'] / 1024:.1f} GiB, {tqdm.format_interval(line['eta_seconds'])} left"
        )


def drop_lines_after(step: int, log: Path) -> None:
    """Drop log lines of a killed run after its last checkpoint, and an incomplete line. Raises CheckpointError."""
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.is_file() else []
    kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
    if len(kept) < len(lines):
        with writing(log):
            replace_text(log, "".join(kept))


def _open_wandb(settings: TrainerSettings, home: Path, name: str, is_new_run: bool) -> Any:
    """The run of wandb that a file in the output folder names, so that a restart continues it."""
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "trainer: report_to has wandb, but the package is not installed: pip install wandb."
        )
    wandb = importlib.import_module("wandb")  # not a dependency
    file = home / f"{name}.wandb_id"
    if is_new_run or not file.is_file():
        with writing(file):
            home.mkdir(parents=True, exist_ok=True)
            replace_text(file, uuid.uuid4().hex)
    return wandb.init(
        project="seed-multimodal",
        name=settings.run_name or home.name,
        dir=str(home),
        id=file.read_text(encoding="utf-8").strip(),
        resume="allow",
    )


def merge(lines: list[dict[str, float]]) -> dict[str, float]:
    """Merge the processes' lines: counts (int) summed, maximum of wait and memory, the rest averaged."""
    merged: dict[str, float] = {}
    for key in dict.fromkeys(key for line in lines for key in line):
        values = [line[key] for line in lines if key in line]
        if key in ("wait_share", "peak_memory_mib"):
            merged[key] = max(values)
        else:
            merged[key] = (
                sum(values)
                if all(isinstance(v, int) for v in values)
                else sum(values) / len(values)
            )
    return merged


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory in MiB: allocated on the GPU, or resident in this process on other devices."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )
