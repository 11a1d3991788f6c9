"""The one restartable training loop: from a nano stage on one core to a language model on many nodes.

Every number of a step follows from (seed, step, process): sample order from the task, dropout and augmentation from a
seed per micro-step. A run killed at any step and started again continues with bit-equal losses (on a CPU). With bf16,
the default, products are computed under autocast with fp32 master weights on every device, which on recent CPUs is
about twice as fast as fp32.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import torch

from seed_multimodal.disk import replace_text, writing
from seed_multimodal.errors import first_line
from seed_multimodal.settings import check_settings
from seed_multimodal.training.checkpoint import CheckpointStore, frozen_check_sum
from seed_multimodal.training.checkpoint_folders import output_folder_lock
from seed_multimodal.training.distributed import ProcessGroup, StopRequest, wait_limit
from seed_multimodal.training.ema import Ema
from seed_multimodal.training.engine import Engine, stop_accelerate
from seed_multimodal.training.failures import STOPPED, TrainingError, Watchdog, translate_errors
from seed_multimodal.training.loop_settings import LoopSettings
from seed_multimodal.training.optimizer_step import OptimizerStep, StepResult
from seed_multimodal.training.resume import (
    SavedState,
    load_average,
    load_engine,
    load_task,
    read_states,
    refuse_other_frozen,
    settings_remark,
    warm_start,
)
from seed_multimodal.training.run_log import RunLog
from seed_multimodal.training.task import Task
from seed_multimodal.training.zero import ZeroEngine


def train(task: Task, settings: LoopSettings, folder: str | Path, *, group: ProcessGroup | None = None,
          device: torch.device | None = None) -> dict[str, Any]:
    """Train a task for `settings.steps` steps, from its newest checkpoint in `folder` if there is one.

    Under torchrun every process calls it, with a folder that all of them see.

    Args:
        group: the processes; by default those of torch.distributed's default group, or this one alone.
        device: by default that of the task's module.

    Returns:
        The run's record, also `folder/task.record_file`: steps, seconds and the task's own measures.

    Raises:
        ConfigError: settings that contradict each other. CheckpointError: a checkpoint of another run, or none that is
        complete.
        TrainingError: a loss or gradient that is not finite, a disk that cannot be written, a process that died.
            Checkpoints stay as they were.
        SystemExit: 143 after SIGTERM: the step was finished and saved. With several processes, data workers must
            ignore the signal for that (torchrun sends it to them, too).
    """
    check_settings(settings, task.name)
    with contextlib.ExitStack() as stack:
        group = group or stack.enter_context(ProcessGroup(wait_limit(settings.timeout_minutes)))
        stack.enter_context(output_folder_lock(Path(folder) / task.checkpoint_folder, group))
        stack.callback(stop_accelerate)
        watchdog = stack.enter_context(
            Watchdog(60 * settings.timeout_minutes if group.world > 1 else 0, task.name))
        run = Run(task, settings, Path(folder), group, watchdog, device)
        stack.callback(run.close)
        return run.train()


class Run:
    """One training run of a task, in one process."""

    def __init__(self, task: Task, settings: LoopSettings, home: Path, group: ProcessGroup, watchdog: Watchdog,
                 device: torch.device | None) -> None:
        """Find the checkpoint to resume from, let the task build its module, restore. Raises as `train`."""
        self.task, self.settings, self.home, self.group, self.watchdog = task, settings, home, group, watchdog
        self.store = CheckpointStore(home / task.checkpoint_folder, group, limit=settings.keep,
                                     asynchronous=settings.async_save, save_frozen=settings.save_frozen,
                                     log=self.log_line)
        folder = self.store.find(settings.resume)
        self.identity = task.identity(group.world)
        saved = self._saved(folder)
        self.step, self.begun = (task.first_step,) * 2 if folder is None else (
            saved.step, int(saved.trainer.get("begun", 0)))
        with translate_errors("the start", self.store.description()):
            task.prepare()
            self._frozen_models = dict(task.frozen_models())
            if folder is not None:
                refuse_other_frozen(folder, saved, self._frozen_models, task.start_hint)
                load_task(folder, saved, task)
            elif settings.start:
                self.log_line(f"weights taken from {settings.start} (step {warm_start(Path(settings.start), task)}).")
            self._check_sum = None if settings.save_frozen else frozen_check_sum(task.module)
            self.average = Ema(task.module, settings.ema) if settings.ema else None
            self.device = device or next(task.module.parameters()).device
            deepspeed = task.deepspeed_config(group.world)
            self.engine = Engine(task, settings, group, self.device) if deepspeed is None else ZeroEngine(
                task, settings, group, self.device, deepspeed)
            if folder is not None:
                load_engine(folder, self.step, self.engine)
                if self.average is not None:
                    load_average(folder, self.average)
        task.meter.load_state_dict(saved.trainer)
        meters = saved.trainer.get("meters", [])
        if len(meters) == group.world and meters[group.rank]:
            task.meter.load_state_dict(meters[group.rank])
        if saved.states:
            task.load_state_dict(saved.states, group.rank)
        if folder is not None:
            self.log_line(f"resumes from {folder} (step {self.step}).")
        self.started = time.monotonic() - saved.trainer.get("seconds", 0.0)
        self.log = RunLog(task.name, settings, self.step, home, group, self.device, task.meter, task.status,
                          kept=saved.step)
        self.evaluation: dict[str, float] = saved.trainer.get("evaluation", {})
        self.optimizer_step = OptimizerStep(task, self.engine, settings, group, self.average)
        task.prepared(self)

    def close(self) -> None:
        """Finish logs and the checkpoint that is being written."""
        self.store.join()
        self.log.close()
        self.engine.close()

    def train(self) -> dict[str, Any]:
        """Make the remaining steps; returns the record."""
        task, settings = self.task, self.settings
        self.engine.model.train()
        task.module.train()
        self.last_save = time.monotonic()
        stopped = ended = False
        with StopRequest() as stop:
            while self.step < settings.steps and not stopped and not ended:
                where = f"step {self.step + 1}"
                self.watchdog.beat(where, self.store.description())
                with translate_errors(where, self.store.description()):
                    try:
                        result = self.optimizer_step.make(self.step, lambda: self._conditions(stop))
                    except RuntimeError as error:
                        # A signal to the whole process group ends data workers, too; the weights are unchanged.
                        if not stop.requested or self.group.world > 1:
                            raise
                        self.log_line(f"step {self.step} was abandoned: {first_line(error)}")
                        result = self.optimizer_step.read_all(StepResult(stopped=True))
                if result.problem:
                    raise self._failure(result)
                stopped, ended = result.stopped, result.ended
                if result.made:
                    with translate_errors(where, self.store.description()):
                        self._after_step(result.save)
            with translate_errors(f"the end (step {self.step})", self.store.description()):
                self._end(stopped, ended, stop)
                return self._record()

    def _conditions(self, stop: StopRequest) -> tuple[bool, bool, bool]:
        """For `OptimizerStep.make`."""
        broken = self.store.problem is not None or self.log.problem is not None
        due = 0 < self.settings.save_seconds < time.monotonic() - self.last_save
        return broken, stop.requested, due and self.group.first

    def _after_step(self, save: bool) -> None:
        self.step += 1
        begun = time.monotonic()
        self.watchdog.beat(f"the work after step {self.step}", self.store.description())  # of an evaluation
        numbers = self.task.after_step(self.step)
        if numbers:  # an evaluation
            self.evaluation = {"step": self.step, **numbers}
            self.log.pause(time.monotonic() - begun)
        self.log.add(self.step, numbers)
        every = self.settings.save_every_steps
        if save or (every and self.step % every == 0):
            begun = time.monotonic()
            self._save()
            self.log.pause(time.monotonic() - begun)

    def _failure(self, result: StepResult) -> Exception:
        """Why the weights must not be updated, as a sentence."""
        self.store.join()
        own = self.store.problem or self.log.problem
        return own or TrainingError(f"{result.problem} at step {result.problem_step + 1}; {self.store.description()}.")

    # ---------------------------------------------------------------------------------------------- saving, the end

    def _save(self) -> None:
        self.watchdog.beat(f"saving step {self.step}", self.store.description())
        with translate_errors(f"saving step {self.step}", self.store.description()):
            self.store.save(self.step, self.task, self.engine, self.average, self._state(),
                            self.task.state_dict(self.step))
        self.last_save = time.monotonic()

    def _state(self) -> dict[str, Any]:
        meters = self.group.gather(self.task.meter.own_state()) if self.group.world > 1 else []
        return {"global_step": self.step, **self.identity, "seconds": time.monotonic() - self.started,
                "begun": self.begun, "frozen": self._check_sum, "frozen_models": self._frozen_models,
                "evaluation": self.evaluation, **self.task.meter.state_dict(), "meters": meters,
                "config": self.task.config}

    def _end(self, stopped: bool, ended: bool, stop: StopRequest) -> None:
        """The last evaluation and checkpoint; exits if the run was stopped.

        Raises:
            TrainingError: the data ended before the first step, so there is nothing to save.
        """
        log = self.log
        if ended and not self.step:
            raise TrainingError("No source gave a single sequence to learn from (skipped records are named above), "
                                "so nothing was trained; see `seed data check`.")
        if ended:
            log.finish(self.step)
            self.log_line(f"every source is used up after step {self.step}; the run ends here.")
        if not stopped:
            numbers = self.task.after_last_step(self.step)
            if numbers:
                self.evaluation = {"step": self.step, **numbers}
                log.write(self.step, self.evaluation)
        self.store.finish()  # in all processes, so that they agree on what is saved
        if self.store.saved != self.step and (self.step or stopped):
            self._save()
        self.store.finish()
        if self.group.agree(stopped or stop.requested)[0]:
            self.log_line(f"stopped by SIGTERM after step {self.step} of {self.settings.steps}; the same command "
                          f"resumes from {self.store.home / f'checkpoint-{self.step}'}.")
            raise SystemExit(STOPPED)
        log.close()
        if log.problem is not None:
            raise log.problem

    def _record(self) -> dict[str, Any]:
        """The first process finishes the task and writes the record; every process returns it."""
        if self.average is not None:
            self.average.copy_to(self.task.module)
        self.task.module.eval()
        record: dict[str, Any] = {"steps": self.step, **({"begun": self.begun} if self.begun else {}),
                                  "seconds": round(time.monotonic() - self.started, 1),
                                  **self.task.finish(self.group)}
        if self.group.first:
            file = self.home / self.task.record_file
            with writing(file):
                replace_text(file, json.dumps(record, indent=1))
            if self.settings.curves:
                from seed_multimodal.training.plots import save_curves  # here: it needs matplotlib

                save_curves(self.home, log=self.log_line)
            for line in self.task.summary(record):
                self.log_line(line)
        return self.group.gather(record)[0]

    # ---------------------------------------------------------------------------------------------------- the start

    def _saved(self, folder: Path | None) -> SavedState:
        """State of the checkpoint to resume from, if this run may."""
        if folder is None:
            return SavedState()
        saved = read_states(folder)
        remarks = self.task.check_resume(folder, saved.trainer, self.identity)
        if saved.trainer.get("config") and self.task.config:
            remarks.append(settings_remark(saved.trainer["config"], self.task.config, self.task.quiet_keys))
        for remark in filter(None, remarks):
            self.log_line(f"{remark}.")
        return saved

    def log_line(self, text: str) -> None:
        """Log a line of text, in the first process only."""
        if self.group.first:
            print(f"[{self.task.name}] {text}", flush=True)
