"""The training loop. Randomness of a step is determined by (seed, step, process), so a killed and resumed run has
bit-equal losses (on a CPU)."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from seed_multimodal.disk import folder_lock, read_json_object, replace_text, writing
from seed_multimodal.errors import CheckpointError
from seed_multimodal.progress import quiet_libraries
from seed_multimodal.settings import check_settings
from seed_multimodal.training.checkpoint import (
    CheckpointStore,
    checkpoints,
    frozen_state,
    load_average,
    load_task,
    read_states,
    settings_remark,
    warm_start,
)
from seed_multimodal.training.config import TrainerSettings
from seed_multimodal.training.distributed import (
    STOPPED,
    ProcessGroup,
    TrainingError,
    join_processes,
    process_group_cleanup,
    stop_request,
    translate_errors,
)
from seed_multimodal.training.engine import Engine, ZeroEngine
from seed_multimodal.training.metrics import RunLog
from seed_multimodal.training.optimizers import Ema
from seed_multimodal.training.task import StageTask, Task


def train(
    task: Task,
    settings: TrainerSettings,
    folder: str | Path,
    *,
    group: ProcessGroup | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Train a task for `settings.max_steps` steps, from its newest checkpoint in `folder` if there is one.

    Under torchrun every process calls it with the same shared folder. `group`: default torch.distributed's default
    group, or this process; `device`: default that of the task's module. Returns the run's record, also written to
    `folder/task.record_file`: steps, seconds and the task's metrics.

    Raises:
        ConfigError: conflicting settings. CheckpointError: a checkpoint of another run.
        TrainingError: non-finite loss or gradient, disk error, dead process.
        SystemExit: 143 after SIGTERM, with the step saved.
    """
    check_settings(settings, task.name)
    with contextlib.ExitStack() as stack:
        group = group or ProcessGroup(settings.timeout_minutes)
        if group.first:
            stack.enter_context(
                folder_lock(
                    Path(folder) / task.checkpoint_folder,
                    CheckpointError,
                    "using this output folder",
                    3.0,
                    ".run.lock",
                )
            )
        return Trainer(task, settings, Path(folder), group, device, stack).train()


class Trainer:
    """One training run of a task, in one process."""

    def __init__(
        self,
        task: Task,
        settings: TrainerSettings,
        home: Path,
        group: ProcessGroup,
        device: torch.device | None,
        stack: contextlib.ExitStack,
    ) -> None:
        """Find the checkpoint to resume from, build the task's module, restore; `stack` closes resources. Raises as
        `train`."""
        self.task, self.settings, self.home, self.group = task, settings, home, group
        self.store = CheckpointStore(home / task.checkpoint_folder, group, settings)
        stack.callback(self.store.finish)
        self.identity = task.identity(group.world)
        saved, states = self.store.find()
        folder = self.store.place
        if folder is not None:
            remarks = [
                *task.check_resume(folder, saved, self.identity),
                settings_remark(saved["config"], task.config, task.quiet_keys),
            ]
            for remark in filter(None, remarks):
                self.log_line(f"{remark}.")
        self.step = int(saved.get("global_step", task.first_step))
        with translate_errors("the start", self.store.description()):
            task.prepare()
            if folder is not None:
                load_task(folder, saved, task)
            elif settings.start:
                self.log_line(
                    f"weights loaded from {settings.start} (step {warm_start(Path(settings.start), task)})."
                )
            self.frozen = frozen_state(task, settings.save_frozen)
            self.average = Ema(task.module, settings.ema) if settings.ema else None
            self.device = device or next(task.module.parameters()).device
            deepspeed = task.deepspeed_config(group.world)
            self.engine = (
                Engine(task, settings, group, self.device)
                if deepspeed is None
                else ZeroEngine(task, settings, group, self.device, deepspeed)
            )
            stack.callback(self.engine.close)
            if folder is not None:
                self.engine.load(folder, self.step)
                if self.average is not None:
                    load_average(folder, self.average)
        task.meter.load_state_dict(saved)
        meters = saved.get("meters", [])
        if len(meters) == group.world:
            task.meter.load_state_dict(meters[group.rank])
        if states:
            task.load_state_dict(states, group.rank)
        if folder is not None:
            self.log_line(f"resumes from {folder} (step {self.step}).")
            # Only now, since a command that is refused must not move anything.
            remark = self.store.set_aside()
            if remark:
                self.log_line(remark)
        self.started = time.monotonic() - saved.get("seconds", 0.0)
        self.log = RunLog(
            task.name,
            settings,
            self.step,
            home,
            group,
            self.device,
            task.meter,
            task.status,
            kept=saved.get("global_step", 0),
            starts_branch=self.store.starts_branch,
        )
        stack.callback(self.log.close)
        self.evaluation: dict[str, float] = saved.get("evaluation", {})  # the last one
        task.before_training(self)

    def train(self) -> dict[str, Any]:
        """Run the remaining steps; returns the record."""
        self.engine.model.train()
        self.task.module.train()
        self.last_save = time.monotonic()
        with stop_request() as stop:
            self.stop = stop
            ended = False
            while True:
                with translate_errors(f"step {self.step + 1}", self.store.description()):
                    # Before each step, so that a signal during an evaluation or a checkpoint costs no further step.
                    stopped, save = self.group.agree(stop.is_set(), self._save_seconds_passed())
                    if stopped or ended or self.step >= self.settings.max_steps:
                        break
                    ended = not self._make_step()
                    self.store.check()
                    if not ended:
                        self._after_step(save)
            with translate_errors(f"the end (step {self.step})", self.store.description()):
                self._end(stopped, ended and not stopped)
                if stopped or self.stop_requested():
                    self.log_line(
                        f"stopped by SIGTERM after step {self.step} of {self.settings.max_steps}; the same "
                        f"command resumes from {self.store.home / f'checkpoint-{self.step}'}."
                    )
                    raise SystemExit(STOPPED)
                return self._record()

    def stop_requested(self) -> bool:
        """Whether a process received SIGTERM; collective. Long evaluations call it to end early."""
        return self.group.agree(self.stop.is_set())[0]

    def _save_seconds_passed(self) -> bool:
        """Whether the first process's last checkpoint is `save_seconds` old."""
        return (
            self.group.first and 0 < self.settings.save_seconds < time.monotonic() - self.last_save
        )

    def _make_step(self) -> bool:
        """One optimizer step of all processes; False: the data of all processes have ended. Raises TrainingError:
        non-finite loss or gradient norm in any process."""
        task, engine, count = self.task, self.engine, self.settings.gradient_accumulation_steps
        rate = task.learning_rate(self.step)
        engine.set_learning_rate(rate)
        if not task.begin_step(self.step):
            return False
        found = []
        for micro in range(count):
            number, last = self.step * count + micro, micro == count - 1
            # The rank is multiplied by more than any number of micro-steps, so seeds are distinct.
            torch.manual_seed(
                self.settings.seed * 1_000_003 + number + self.group.rank * 1_000_003**2
            )
            with engine.accumulating(last):
                with engine.autocast():
                    loss, numbers = task.micro_step(engine.model, number)
                engine.backward(loss / count if task.averages and count > 1 else loss, last)
            found.append({"loss": loss.detach(), **numbers})
        numbers = task.meter.combine(found, engine.clip(), rate)
        problem = "" if math.isfinite(numbers["loss"]) else f"The loss became {numbers['loss']}"
        problem = problem or engine.problem(numbers.get("grad"))
        failed, *sums = self.group.sum([bool(problem), *task.meter.shared(numbers)])
        if not failed:
            numbers |= engine.update()
            problem = engine.problem(numbers["grad"])
        if failed or problem:
            self.store.finish()
            raise TrainingError(
                f"{problem or 'Another process had a non-finite number'} at step "
                f"{self.step + 1}; {self.store.description()}."
            )
        task.meter.add(numbers, sums)
        if self.average is not None:
            self.average.update(task.module, self.step)
        return True

    def _after_step(self, save: bool) -> None:
        self.step += 1
        begun = time.monotonic()
        numbers = self.task.after_step(self.step)
        if numbers:  # an evaluation
            self.evaluation = {"step": self.step, **numbers}
            self.log.pause(time.monotonic() - begun)
        self.log.add(self.step, numbers)
        every = self.settings.save_steps
        if save or (every and self.step % every == 0):
            begun = time.monotonic()
            self._save(interim=self._is_between_checkpoints())
            self.log.pause(time.monotonic() - begun)

    def _is_between_checkpoints(self) -> bool:
        """Whether `save_steps` gives no checkpoint of this step."""
        every = self.settings.save_steps
        return every > 0 and self.step % every != 0 and self.step < self.settings.max_steps

    def _save(self, interim: bool) -> None:
        """Write a checkpoint; an `interim` one is removed when the next is complete."""
        state = {
            "global_step": self.step,
            "interim": interim,
            "branch": self.store.branch,
            **self.identity,
            "seconds": time.monotonic() - self.started,
            "frozen": self.frozen,
            "evaluation": self.evaluation,
            **self.task.meter.state_dict(),
            "meters": self.group.gather(self.task.meter.process_state()),
            "config": self.task.config,
        }
        with translate_errors(f"saving step {self.step}", self.store.description()):
            self.store.save(
                self.step,
                self.task,
                self.engine,
                self.average,
                state,
                self.task.state_dict(self.step),
            )
        self.last_save = time.monotonic()

    def _end(self, stopped: bool, ended: bool) -> None:
        """Last evaluation and checkpoint."""
        if ended and not self.step:
            raise TrainingError(
                "No source has a usable sequence (skipped records are listed above), "
                "so nothing was trained; see `seed data check`."
            )
        if ended:
            self.log.finish(self.step)
            self.log_line(f"all sources are exhausted after step {self.step}; the run ends.")
        if not stopped:
            numbers = self.task.after_last_step(self.step)
            if numbers:
                self.evaluation = {"step": self.step, **numbers}
                self.log.write(self.evaluation)
        self.store.finish()
        if self.store.saved != self.step and (self.step or stopped):
            self._save(interim=stopped and self._is_between_checkpoints())
        self.store.finish()

    def _record(self) -> dict[str, Any]:
        """Finish the task and write the record (first process); returned by every process."""
        if self.average is not None:
            self.average.copy_to(self.task.module)
        self.task.module.eval()
        record: dict[str, Any] = {
            "steps": self.step,
            "seconds": round(time.monotonic() - self.started, 1),
            **self.task.finish(self.group),
        }
        if self.group.first:
            file = self.home / self.task.record_file
            with writing(file):
                replace_text(file, json.dumps(record, indent=1))
            if self.settings.curves:
                from seed_multimodal.training.plots import save_curves  # imports matplotlib

                save_curves(self.home, log=self.log_line)
            for line in self.task.summary(record):
                self.log_line(line)
        return self.group.gather(record)[0]

    def log_line(self, text: str) -> None:
        """Log a line of text in the first process."""
        if self.group.first:
            print(f"[{self.task.name}] {text}", flush=True)


def train_stage(
    task: StageTask, folder: str | Path, group: ProcessGroup | None = None
) -> dict[str, Any]:
    """Train a stage, or return the record `folder/NAME.done.json` of a completed one; see `train`.

    A completed stage continues only if `further` is set, `max_steps` was raised and a checkpoint exists.
    """
    home, settings = Path(folder), task.settings
    group = group or ProcessGroup(settings.timeout_minutes)
    done, saved = home / task.record_file, checkpoints(home / task.checkpoint_folder)
    record = read_json_object(done) if group.agree(done.is_file())[0] else {}
    if not record or (settings.further and record["steps"] < settings.max_steps and saved):
        return train(task, settings, home, group=group)
    if group.first:
        print(f"[{task.name}] already done ({record.get('seconds', 0):.0f} s): {done}", flush=True)
        before = read_states(saved[0][1])[0]["config"] if saved else None
        if remark := settings_remark(before, task.config, task.quiet_keys):
            print(
                f"[{task.name}] {remark}; remove {done} and {home / task.checkpoint_folder} to train it again.",
                flush=True,
            )
    return record


def run_task(run: Any, kind: Callable[[Any, ProcessGroup, torch.device], Any]) -> dict[str, Any]:
    """Train with the settings `run` (`trainer`, `deepspeed`, `output_dir`); `kind` builds a `Task` that also has
    `settings` and `close()`. Under torchrun every process calls it. Returns the record, also `output_dir/summary.json`.
    """
    quiet_libraries()
    with process_group_cleanup():
        with translate_errors("the start", "nothing was trained yet"):
            minutes = run.trainer.timeout_minutes
            device = join_processes(
                run.trainer.device, minutes, group_of_one=run.deepspeed is not None
            )
            group = ProcessGroup(minutes)
            task = kind(run, group, device)
        with contextlib.closing(task):
            return train(task, task.settings, run.output_dir, group=group, device=device)
