"""One optimiser step of all processes: micro-steps, agreement, and only then the update of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.ema import Ema
from seed_multimodal.training.engine import Engine, seed_generators
from seed_multimodal.training.loop_settings import LoopSettings
from seed_multimodal.training.task import Task


@dataclass
class StepResult:
    """Result of a step. `made`: weights were updated; `stopped`, `save`: some process was asked to stop, or a
    checkpoint is due by time; `ended`: the data of all processes have ended; `problem`: why the run must end."""

    made: bool = False
    problem: str = ""
    stopped: bool = False
    save: bool = False
    ended: bool = False


class OptimizerStep:
    """Makes steps by number."""

    def __init__(self, task: Task, engine: Engine, settings: LoopSettings, group: ProcessGroup, average: Ema | None
                 ) -> None:
        self.task, self.engine, self.settings, self.group, self.average = task, engine, settings, group, average

    def make(self, step: int, conditions: Callable[[], tuple[bool, bool, bool]]) -> StepResult:
        """Step number `step`, from 0; every process calls it. Weights are updated only if the numbers of all are
        finite.

        Args:
            conditions: called after the micro-steps: whether this process cannot continue (a file that was not
                written), was asked to stop, and finds a checkpoint due by time.
        """
        task, engine, group = self.task, self.engine, self.group
        rate = task.learning_rate(step)
        engine.set_rate(rate)
        if not task.begin_step(step):
            return StepResult(ended=True)
        found = [self._micro_step(step, micro) for micro in range(self.settings.accumulate)]
        norm = engine.clip()
        numbers = task.meter.combine(found, norm, rate)
        if (scale := engine.loss_scale()) is not None:
            numbers["loss_scale"] = scale
        problem = "" if math.isfinite(numbers["loss"]) else f"The loss became {numbers['loss']}"
        problem = problem or engine.problem(numbers.get("grad"))
        broken, stop, due = conditions()
        flags = [bool(problem) or broken, stop, due]
        failed, stopped, save, *sums = group.sum([*flags, *task.meter.shared(numbers)])
        if failed:
            return StepResult(problem=problem or "Another process could not make its part")
        moved = engine.update(rate)
        if moved is not None:
            numbers["grad"] = moved
            if problem := engine.problem(moved):
                return StepResult(problem=problem)
        if self.average is not None:
            self.average.update(task.module, step)
        task.meter.add(numbers, sums)
        return StepResult(made=True, stopped=stopped > 0, save=save > 0)

    def _micro_step(self, step: int, micro: int) -> dict[str, Any]:
        task, engine, count = self.task, self.engine, self.settings.accumulate
        number = step * count + micro
        # Processes differ by more than any number of micro-steps, so no two draw the same numbers.
        seed_generators(self.settings.seed * 1_000_003 + number + self.group.rank * 1_000_003**2, engine.device)
        last = micro == count - 1
        with engine.accumulating(last):
            with engine.autocast():
                loss, numbers = task.micro_step(engine.model, number)
            engine.backward(loss / count if task.averages and count > 1 else loss, last)
        return {"loss": loss.detach(), **numbers}
