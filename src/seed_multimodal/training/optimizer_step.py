"""One optimiser step of all processes: micro-steps, agreement, and only then the update of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.ema import Ema
from seed_multimodal.training.engine import Engine, seed_generators
from seed_multimodal.training.loop_settings import LoopSettings
from seed_multimodal.training.meter import StepNumbers
from seed_multimodal.training.task import Task


@dataclass
class StepResult:
    """Result of a step. `made`: weights were updated; `stopped`, `save`: some process was asked to stop, or a
    checkpoint is due by time; `ended`: the data of all processes have ended; `problem`: why the run must end, found in
    step number `problem_step`, from 0."""

    made: bool = False
    problem: str = ""
    problem_step: int = 0
    stopped: bool = False
    save: bool = False
    ended: bool = False


class OptimizerStep:
    """Makes steps by number.

    A step's numbers (loss, norm of the gradients) are read and checked before its weights are updated, where they are
    needed: at log lines, checkpoints and whatever the task does after a step. The steps between leave theirs on the
    device, since reading waits for it, and theirs are checked then; until the check nothing is written that follows
    from them, so a run that met a NaN ends as if it had been found at once, a few steps later.
    """

    def __init__(self, task: Task, engine: Engine, settings: LoopSettings, group: ProcessGroup, average: Ema | None
                 ) -> None:
        self.task, self.engine, self.settings, self.group, self.average = task, engine, settings, group, average
        self._unread: list[tuple[int, StepNumbers]] = []  # steps and their numbers
        self._read: list[dict[str, float]] = []  # read, not yet in the meter

    def make(self, step: int, conditions: Callable[[], tuple[bool, bool, bool]]) -> StepResult:
        """Step number `step`, from 0; every process calls it.

        Args:
            conditions: called after the micro-steps: whether this process cannot continue (a file that was not
                written), was asked to stop, and finds a checkpoint due by time.
        """
        task, engine, group = self.task, self.engine, self.group
        rate = task.learning_rate(step)
        engine.set_rate(rate)
        if not task.begin_step(step):
            return self.read_all(StepResult(ended=True))
        found = [self._micro_step(step, micro) for micro in range(self.settings.accumulate)]
        self._unread.append((step, task.meter.combine(found, engine.clip(), rate)))
        result = StepResult()
        if now := self._needed(step + 1):
            self._check(result)
        broken, stop, due = conditions()
        flags = [bool(result.problem) or broken, stop, due]
        failed, stopped, save, *sums = group.sum([*flags, *self._shared()])
        result.stopped, result.save = stopped > 0, save > 0
        if failed:
            return self._failed(result, step)
        if not now and (result.stopped or result.save):
            if self.read_all(result).problem:
                return result
        moved = engine.update(rate)
        if moved is not None:
            self._read[-1]["grad"] = moved
            if problem := engine.problem(moved):
                return StepResult(problem=problem, problem_step=step)
        if self.average is not None:
            self.average.update(task.module, step)
        if now:
            self._note(sums)
        result.made = True
        return result

    def read_all(self, result: StepResult) -> StepResult:
        """Read, check and count the numbers that are left; every process calls it. A problem is put into `result`."""
        if self._unread:
            last = self._unread[-1][0]
            self._check(result)
            failed, *sums = self.group.sum([bool(result.problem), *self._shared()])
            if failed:
                return self._failed(result, last)
            self._note(sums)
        return result

    def _needed(self, done: int) -> bool:
        """Whether the numbers are read in the step that is the `done`-th."""
        settings = self.settings
        return (self.engine.reads_numbers or done % settings.log_every == 0 or done >= settings.steps
                or bool(settings.save_every_steps) and done % settings.save_every_steps == 0
                or self.task.acts_after(done))

    def _check(self, result: StepResult) -> None:
        """Read what is left; the first number that is not finite becomes the result's problem."""
        for step, unread in self._unread:
            numbers = unread.read()
            if (scale := self.engine.loss_scale()) is not None:
                numbers["loss_scale"] = scale
            problem = "" if math.isfinite(numbers["loss"]) else f"The loss became {numbers['loss']}"
            problem = problem or self.engine.problem(numbers.get("grad"))
            if problem and not result.problem:
                result.problem, result.problem_step = problem, step
            self._read.append(numbers)
        self._unread = []

    def _shared(self) -> list[float]:
        return [value for numbers in self._read for value in self.task.meter.shared(numbers)]

    def _note(self, sums: Sequence[float]) -> None:
        """Give the numbers that were read, and their sums over the processes, to the meter."""
        each = len(sums) // len(self._read)
        for place, numbers in enumerate(self._read):
            self.task.meter.add(numbers, sums[place * each:(place + 1) * each])
        self._read = []

    def _failed(self, result: StepResult, step: int) -> StepResult:
        if not result.problem:
            result.problem, result.problem_step = "Another process could not make its part", step
        return result

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
