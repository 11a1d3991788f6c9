"""What a run says of itself: a console line, a JSON line, TensorBoard scalars and, if asked, wandb, at every log step.

Losses of a line are means over the steps since the line before; rates count those steps' seconds. `tokens` are
positions that hold a token (useful), `positions` all that the model computed, padding included.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.peaks import known_peak
from seed_multimodal.progress import duration
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.failures import disk_sentence
from seed_multimodal.training.llm.trainer_settings import TrainerSettings
from seed_multimodal.training.loop_settings import StageSettings
from seed_multimodal.training.run_log import Progress, merge, peak_memory_mib

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class StepNumbers:
    """What one optimiser step brought, summed over all processes; `loss` is the mean that was minimised."""

    loss: float
    text_sum: float
    text_count: float
    image_sum: float
    image_count: float
    tokens: float
    positions: float
    sequences: float
    rate: float = 0.0
    norm: float = math.nan

    @property
    def learned(self) -> float:
        """Tokens that were predicted."""
        return self.text_count + self.image_count


class RunProgress(Progress):
    """Gathers the numbers of steps and writes a line every `logging_steps`.

    `smooth` holds the sums of the line under way; it is part of a checkpoint, so that a resumed run writes the same
    lines. Every process must call `add` for every step.
    """

    def __init__(self, settings: TrainerSettings, step: int, home: Path, peers: ProcessGroup, device: torch.device,
                 smooth: dict[str, float], waited: Callable[[], float], flops: tuple[float, float, float],
                 name: str = "train") -> None:
        """Open the logs.

        Args:
            waited: seconds spent waiting for data so far.
            flops: of one token: in the layers, in the head (learned tokens only), and in attention per token of its
                sequence; see `flops.token_flops`.

        Raises:
            ConfigError: tensorboard or wandb is asked for and not installed.
        """
        stage = StageSettings(steps=settings.max_steps, log_every=settings.logging_steps,
                              tensorboard="tensorboard" in settings.report_to)
        super().__init__(name, stage, step, home, peers, device, smooth, lambda: {"wait_seconds": waited()})
        self.flops = flops
        self.peak = settings.peak_tflops or known_peak(device, _DTYPES[settings.precision])
        self.history: list[dict[str, float]] = []
        self.total = {"tokens": 0.0, "positions": 0.0}
        self.timed = {"tokens": 0.0, "positions": 0.0, "sequences": 0.0, "learned": 0.0}  # since the line before
        self._waiting: StepNumbers | None = None  # the last step, if its line is not due
        self.wandb = _wandb(settings, home) if peers.first and "wandb" in settings.report_to else None

    def add(self, step: int, numbers: StepNumbers) -> None:
        """Fold in the step that was just made; write a line if one is due."""
        sums = {"loss": numbers.loss, "steps": 1.0, "text_sum": numbers.text_sum, "text_count": numbers.text_count,
                "image_sum": numbers.image_sum, "image_count": numbers.image_count, "tokens": numbers.tokens,
                "positions": numbers.positions}
        for key, value in sums.items():
            self.smooth[key] = self.smooth.get(key, 0.0) + value
        for key in self.total:
            self.total[key] += getattr(numbers, key)
        for key in self.timed:
            self.timed[key] += getattr(numbers, key)
        if step % self.settings.log_every and step != self.settings.steps:
            if self.alive:
                self._tick(step)
            self._waiting = numbers
            return
        self._show(step, numbers)

    def finish(self, step: int) -> None:
        """The run ends here, perhaps between two lines: write that of the steps since the last one."""
        if self._waiting is not None:
            self._show(step, self._waiting)

    def _show(self, step: int, numbers: StepNumbers) -> None:
        line = self._numbers(step, numbers)
        self._waiting = None
        self.smooth.clear()
        self.history = [*self.history[-999:], {key: line[key] for key in
                                               ("step", "loss", "learning_rate", "grad_norm") if key in line}]
        self.write(step, line)

    def write(self, step: int, line: Mapping[str, float]) -> None:
        """Put a line (of losses, or of an evaluation) into all logs; a full disk becomes `problem`."""
        if not self.peers.first:
            return
        try:
            self._write(step, line)
        except OSError as error:
            self.problem = CheckpointError(f"{self.home}: the log of step {step} cannot be written: "
                                           f"{disk_sentence(error)}.")

    def pause(self, seconds: float) -> None:
        """Time that went into something else than steps (evaluation, saving): rates leave it out."""
        self.mark += seconds

    def evaluated(self) -> dict[str, float]:
        """The last evaluation in the log, which may be younger than the checkpoint of its step; the first process's."""
        log = self.home / f"{self.name}.log.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines() if self.peers.first and log.is_file() else []
        return next((json.loads(line) for line in reversed(lines) if '"eval_loss"' in line), {})

    def close(self) -> None:
        """Finish TensorBoard's and wandb's files."""
        super().close()
        if self.wandb is not None:
            self.wandb.finish()

    def _numbers(self, step: int, last: StepNumbers) -> dict[str, float]:
        now = time.monotonic()
        seconds, steps = max(1e-6, now - self.mark), max(1, step - self.mark_step)
        self.pace = seconds / steps if self.pace is None else 0.5 * self.pace + 0.5 * seconds / steps
        waited = self._waited(self._status()) or 0.0
        own = {"peak_memory_mib": peak_memory_mib(self.device),
               "wait_share": min(1.0, max(0.0, waited - (self.waited or 0.0)) / seconds)}
        line = {"step": step, "loss": self.smooth["loss"] / self.smooth["steps"]}
        for kind in ("text", "image"):
            if self.smooth[f"{kind}_count"] and self.smooth["image_count"]:
                line[f"{kind}_loss"] = self.smooth[f"{kind}_sum"] / self.smooth[f"{kind}_count"]
        positions, length = self.timed["positions"], self.timed["tokens"] / max(1.0, self.timed["sequences"])
        body, head, attention = self.flops
        work = positions * (body + attention * length) + self.timed["learned"] * head
        tflops = work / seconds / self.peers.world / 1e12  # of one process
        line |= {"learning_rate": last.rate, "grad_norm": last.norm,
                 "tokens_per_s": positions / seconds, "useful_tokens_per_s": self.timed["tokens"] / seconds,
                 "tflops": tflops, "fill": self.smooth["tokens"] / max(1.0, self.smooth["positions"]),
                 "seconds_per_step": seconds / steps, "eta_seconds": (self.settings.steps - step) * self.pace,
                 "tokens": self.total["tokens"], **merge(self.peers.gather(own))}
        if self.peak:
            line["mfu"] = tflops / self.peak
        self.mark, self.mark_step, self.waited = now, step, waited
        self.timed = dict.fromkeys(self.timed, 0.0)
        return line

    def _write(self, step: int, line: Mapping[str, float]) -> None:
        print(f"{self._head(step)} {_words(line)}", flush=True)
        with open(self.home / f"{self.name}.log.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        values = {key: value for key, value in line.items() if key != "step"}
        if self.board is not None:
            for key, value in values.items():
                self.board.add_scalar(key, value, step)
            self.board.flush()
        if self.wandb is not None:
            self.wandb.log(values, step=step)


def _words(line: Mapping[str, float]) -> str:
    """A line for people."""
    shown = [f"{key} {line[key]:.4g}" for key in ("loss", "text_loss", "image_loss", "eval_loss", "eval_text_loss",
                                                  "eval_image_loss") if key in line]
    if "learning_rate" not in line:
        return " ".join(shown)
    shown += [f"lr {line['learning_rate']:.3g}", f"grad {line['grad_norm']:.3g}"]
    mfu = f" ({100 * line['mfu']:.0f} % MFU)" if "mfu" in line else ""
    return (f"{' '.join(shown)} | {line['useful_tokens_per_s']:,.0f} useful of {line['tokens_per_s']:,.0f} tokens/s, "
            f"{line['tflops']:.3g} TFLOP/s{mfu}, fill {100 * line['fill']:.1f} %, "
            f"{line['seconds_per_step']:.3g} s/step, waited for data {100 * line['wait_share']:.0f} %, "
            f"{line['peak_memory_mib'] / 1024:.1f} GiB, {duration(line['eta_seconds'])} left")


def _wandb(settings: TrainerSettings, home: Path) -> Any:
    try:
        wandb = importlib.import_module("wandb")  # not a dependency: used only where someone has it
    except ImportError as error:
        raise ConfigError("trainer: report_to has wandb, but the package is not installed: pip install wandb."
                          ) from error
    return wandb.init(project="seed-multimodal", name=settings.run_name or home.name, dir=str(home), resume="allow")
