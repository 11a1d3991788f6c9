"""The training loop.

Random numbers of torch's generators in a step are determined by (seed, step, process), so a killed
and resumed run has bit-equal losses (on a CPU). Python's and numpy's generators are not seeded.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.disk import (
    JsonObject,
    folder_lock,
    read_json_object,
    replace_text,
    strict_json,
    writing,
)
from seed_multimodal.errors import CheckpointError
from seed_multimodal.nn.layers import evaluating
from seed_multimodal.training.checkpoint import (
    CheckpointStore,
    check_all_saved,
    checkpoints,
    frozen_state,
    load_task,
    load_unaveraged,
    read_states,
    resume_remarks,
    settings_remark,
    warm_start,
)
from seed_multimodal.training.distributed import (
    STOPPED,
    ProcessGroup,
    TrainingError,
    stop_request,
    translate_errors,
)
from seed_multimodal.training.engine import Engine
from seed_multimodal.training.meters import LINE_NAMES, MIN_WEIGHT, Metrics, check_names, to_floats
from seed_multimodal.training.optimizers import Ema, averaged_weights
from seed_multimodal.training.run_log import RunLog
from seed_multimodal.training.task import RunView, StageTask, Task
from seed_multimodal.training.zero_engine import ZeroEngine

SAMPLED_RATES = 1000  # of the schedule, to find the highest
FIRST_STEPS = 3  # whose gradients are checked


def train(
    task: Task,
    folder: str | Path,
    *,
    group: ProcessGroup | None = None,
    device: torch.device | None = None,
    first_step: int = 0,
) -> JsonObject:
    """Train a task for `settings.max_steps` steps, from its newest checkpoint in `folder` if any.

    Under torchrun every process calls it with the same shared folder.
    group: by default torch.distributed's default group, or this process.
    device: by default that of the task's module.
    first_step: steps of an earlier run in another format, whose weights and optimizer are already
        loaded.

    Returns the run's record, also written to `folder/task.record_file`: steps, seconds and the
    task's metrics.

    Raises:
        ConfigError: conflicting settings. CheckpointError: a checkpoint of another run.
        TrainingError: non-finite loss or gradient, disk error, dead process.
        SystemExit: 143 after SIGTERM or Ctrl-C, with the step saved.
    """
    output_dir = Path(folder)
    with contextlib.ExitStack() as stack:
        group = group or ProcessGroup(task.settings.timeout_minutes)
        if group.first:
            lock = folder_lock(
                output_dir / task.checkpoint_folder,
                CheckpointError,
                "using this output folder",
                3.0,
                ".run.lock",
            )
            stack.enter_context(lock)
        return Trainer(task, output_dir, group, device, first_step, stack).train()


class Trainer:
    """One training run of a task, in one process."""

    def __init__(
        self,
        task: Task,
        output_dir: Path,
        group: ProcessGroup,
        device: torch.device | None,
        first_step: int,
        stack: contextlib.ExitStack,
    ) -> None:
        """Find the checkpoint to resume from, build the task's module and restore both. Raises as
        `train`.

        stack: closes what the trainer opens.
        """
        self.task = task
        self.settings = settings = task.settings
        self.output_dir = output_dir
        self.group = group
        folder = output_dir / task.checkpoint_folder
        self.store = CheckpointStore(folder, group, settings, self.log_line)
        stack.callback(self.store.close)

        # 1. Compare the checkpoint's settings with this run's before anything is built.
        identity = task.identity(group.world)
        self.identity = {**identity.reported, **identity.fixed}
        saved, process_states = self.store.find()
        checkpoint = self.store.last_folder
        if checkpoint is not None:
            self.log_line(*resume_remarks(checkpoint, saved, task, group.world))
        self.step = int(saved.get("global_step", first_step))
        self.start_step = self.step

        # 2. Load the weights before the engine wraps or shards the module, and the optimizer after
        #    that.
        with self.store.reading(), translate_errors("the start", self.store.description):
            task.prepare()
            check_all_saved(task)
            self.frozen = frozen_state(task)
            if checkpoint is not None:
                load_task(checkpoint, saved, task, self.frozen)
            elif settings.start:
                start_step = warm_start(Path(settings.start), task)
                self.log_line(f"weights loaded from {settings.start} (step {start_step}).")
            # A checkpoint's weights are the averaged ones.
            self.ema = Ema(task.module, settings.ema) if settings.ema else None
            if checkpoint is not None:
                load_unaveraged(checkpoint, task.module)
            self.device = device or next(task.module.parameters()).device
            engine_class = Engine if task.deepspeed is None else ZeroEngine
            self.engine = engine_class(task, group, self.device)
            stack.callback(self.engine.close)
            if checkpoint is not None:
                self.engine.load(checkpoint, self.step)

        # 3. Restore metrics and data positions.
        if checkpoint is not None:
            task.meter.load_state_dict(saved.get("meter", saved))  # earlier versions: one mapping
            for index, part in enumerate(task.parts):
                # Earlier versions saved the states of all parts as one.
                states = [state.get("parts", {index: state})[index] for state in process_states]
                part.load_state_dict(states)
            self.log_line(f"resumes from {checkpoint} (step {self.step}).")

        # 4. Open the logs.
        self.start_time = time.monotonic() - saved.get("seconds", 0.0)
        self.evaluation: Mapping[str, float] = saved.get("evaluation", {})  # the latest one
        self.sampled_step: int | None = saved.get("sampled_step")
        self.names: list[str] = []  # of the numbers of a step, in the order of their sums
        self.log = RunLog(task, self.step, output_dir, group, self.device)
        stack.callback(self.log.close)
        self.zero_gradients = 0  # in the first steps
        self.log_line(self._idle_reason())

    def train(self) -> JsonObject:
        """Run the remaining steps; returns the record."""
        self.engine.model.train()
        self.task.module.train()
        self.last_save_time = time.monotonic()
        with stop_request() as stop_event:
            self.stop_event = stop_event
            data_ended = False
            # 1. The steps.
            while True:
                with translate_errors(f"step {self.step + 1}", self.store.description):
                    # Before each step, so that SIGTERM during an evaluation or a checkpoint costs
                    # no further step.
                    writing = self.store.writing
                    stopped, save, is_written = self.group.agree(
                        stop_event.is_set(),
                        self._save_seconds_passed(),
                        writing is not None and writing.done(),
                    )
                    if is_written:
                        self.store.wait()
                    if stopped or data_ended or self.step >= self.settings.max_steps:
                        break
                    data_ended = not self._train_step()
                    if not data_ended:
                        self._after_step(save)

            # 2. Last evaluation, checkpoint and record.
            with translate_errors(f"the end (step {self.step})", self.store.description):
                self._end(stopped, data_ended and not stopped)
                if stopped or self.stop_requested():
                    checkpoint = self.store.folder / f"checkpoint-{self.step}"
                    left = f"after step {self.step} of {self.settings.max_steps}"
                    if self.step >= self.settings.max_steps:
                        left = f"after the last step ({self.step}), before the end of the run"
                    self.log_line(
                        f"stopped by SIGTERM or Ctrl-C {left}; the same command resumes from "
                        f"{checkpoint}."
                    )
                    raise SystemExit(STOPPED)
                return self._record()

    def view(self) -> RunView:
        """What the task sees of the run after its last step."""
        return RunView(
            step=self.step,
            group=self.group,
            model=self.engine.model,
            autocast=self.engine.autocast,
            weights=self.engine.weights,
            stop_requested=self.stop_requested,
            evaluation=self.evaluation,
            checkpoint=self.store.last_folder,
            board=self.log.board,
        )

    def stop_requested(self) -> bool:
        """Whether a process received SIGTERM or Ctrl-C; collective."""
        return self.group.agree(self.stop_event.is_set())[0]

    def log_line(self, *texts: str) -> None:
        """As `ProcessGroup.log`."""
        self.group.log(self.task.name, *texts)

    # ------------------------------------------------------------------------------------- one step

    def _train_step(self) -> bool:
        """Make one optimizer step in all processes; False: the data of all processes have ended.

        Raises TrainingError: non-finite loss or gradient norm in any process.
        """
        task = self.task
        lr = task.learning_rate(self.step)
        self.engine.set_learning_rate(lr)

        # 1. This process's micro-batches, and the weight of all processes' ones.
        self._seed(0)
        with self.engine.attention():
            batches = list(task.batches(self.step))
        weights = sum(map(task.weight, batches))
        n_micro_steps = self.settings.gradient_accumulation_steps
        n_batches, weight, has_more = self.group.sum(
            [len(batches), weights, len(batches) > n_micro_steps]
        )
        if has_more:
            raise TrainingError(
                f"[{task.name}] `batches` returned more micro-batches than "
                f"gradient_accumulation_steps ({n_micro_steps}) at step {self.step + 1}."
            )
        if not n_batches:
            return False
        weight = max(weight, MIN_WEIGHT)

        # 2. Accumulate the gradients; engines average them over the processes.
        sums = self._accumulate(batches, self.group.world / weight)
        norm = self.engine.clip()
        metrics = to_floats(sums if norm is None else {**sums, "grad": norm})
        grad = metrics.pop("grad", None)

        # 3. If a number is not finite in one process, all of them leave the weights unchanged and
        #    stop.
        error = self.engine.gradient_error(grad)
        if not math.isfinite(metrics["loss"]):
            error = f"The loss became {metrics['loss']}"
        n_failed, total = self._sums(error, metrics)
        rates = {"grad": math.nan if grad is None else grad, "lr": lr}

        # 4. Update the weights. DeepSpeed returns the gradient norm only then.
        if not n_failed:
            rates |= self.engine.update()
            error = self.engine.gradient_error(rates["grad"])
        if n_failed or error:
            self.store.wait()
            raise TrainingError(
                f"{error or 'Another process had a non-finite number'} at step "
                f"{self.step + 1}; {self.store.description()}."
            )
        task.meter.add({name: total[name] for name in metrics}, weight, rates)
        self._check_gradient(rates["grad"])
        return True

    def _seed(self, index: int) -> None:
        """Seed torch's generators for a micro-step of this step."""
        micro_step = self.step * self.settings.gradient_accumulation_steps + index
        torch.manual_seed(micro_step_seed(self.settings.seed, micro_step, self.group.rank))

    def _accumulate(self, batches: Sequence[Any], scale: float) -> Metrics:
        """Add the gradients of a step's micro-batches, of their losses times `scale`; returns the
        sums of losses and numbers to log.

        batches: may be fewer than those of other processes.
        """
        sums: dict[str, Tensor | float] = {}
        n_micro_steps = self.settings.gradient_accumulation_steps
        missing = [None] * (n_micro_steps - len(batches))
        for index, batch in enumerate([*batches, *missing]):
            if index:  # the first one was seeded before the step's batches were drawn
                self._seed(index)
            is_last = index == n_micro_steps - 1
            with self.engine.accumulating(is_last):
                with self.engine.autocast(), self.engine.attention():
                    loss, metrics = self.task.loss(self.engine.model, batch)
                check_names(metrics, self.task.meter.reserved, f"[{self.task.name}] `loss`")
                self.engine.backward(loss * scale, is_last)
            for key, value in {"loss": loss.detach(), **metrics}.items():
                sums[key] = sums[key] + value if key in sums else value
        return sums

    def _sums(self, error: str, metrics: Metrics) -> tuple[float, Metrics]:
        """The number of processes with an error, and the sums of their numbers; collective.

        Raises TrainingError: processes have other numbers.
        """
        # 1. In the order of the last step. All see whether a process has others now.
        names = sorted(metrics)
        values = [metrics.get(name, 0.0) for name in self.names]
        n_failed, n_changed, *sums = self.group.sum([bool(error), names != self.names, *values])

        # 2. In a new order.
        if n_changed:
            self.names = names
            for process in self.group.gather({"names": names}):
                if process["names"] != names:
                    raise TrainingError(
                        f"[{self.task.name}] `loss` must return the same numbers in all processes, "
                        f"also for None; at step {self.step + 1} one has {', '.join(names)}, "
                        f"another {', '.join(process['names'])}."
                    )
            sums = self.group.sum([metrics[name] for name in names])
        return n_failed, dict(zip(names, sums, strict=True))

    def _after_step(self, save: bool) -> None:
        """Log, evaluate and save when due."""
        # The average has what the task changes.
        if self.task.after_step is not None:
            self.task.after_step(self.step + 1)
        if self.ema is not None:
            self.ema.update(self.task.module, self.step)
        self.step += 1
        is_last = self.step >= self.settings.max_steps
        if is_last or self.step % self.settings.logging_steps == 0:
            self.log.write_line(self.step)

        # The time of evaluations and checkpoints is no training time.
        start = time.monotonic()
        is_paused = self._evaluate(is_last)
        save_steps = self.settings.save_steps
        is_scheduled = save_steps > 0 and self.step % save_steps == 0
        if save or is_scheduled:
            self._save(kept=is_scheduled or not save_steps)
            is_paused = True
        if is_paused:
            self.log.pause(time.monotonic() - start)

    def _evaluate(self, is_last: bool) -> bool:
        """The task's samples and evaluation when due, once a step, of the averaged weights if the
        run averages, in eval mode and without gradients; logs the evaluation. Whether one was due.

        is_last: no step follows.
        """
        task = self.task
        is_sampled = task.sample_steps > 0 and self.step % task.sample_steps == 0
        is_evaluated = task.eval_steps > 0 and (is_last or self.step % task.eval_steps == 0)
        is_sampled = is_sampled and self.sampled_step != self.step
        is_evaluated = is_evaluated and self.evaluation.get("step") != self.step
        if not (is_sampled or is_evaluated):
            return False
        activity = f"the evaluation after step {self.step}"
        with (
            translate_errors(activity, self.store.description),
            averaged_weights(self.ema, task.module),
            evaluating(self.engine.model),
            torch.no_grad(),
        ):
            if is_sampled:
                self.sampled_step = self.step
                if self.group.first:
                    task.write_samples(self.view())
            if is_evaluated:
                evaluation = task.evaluate(self.view())
                check_names(evaluation, LINE_NAMES, f"[{task.name}] `evaluate`")
                if evaluation:
                    self.evaluation = {"step": self.step, **evaluation}
                    self.log.write(self.evaluation)
        return True

    # ---------------------------------------------------------------------------------- checkpoints

    def _save_seconds_passed(self) -> bool:
        """Whether the first process's last checkpoint is `save_seconds` old."""
        seconds = time.monotonic() - self.last_save_time
        return self.group.first and 0 < self.settings.save_seconds < seconds

    def _save(self, kept: bool) -> None:
        """Write a checkpoint; `kept`: until there are more than `save_total_limit`."""
        # `identity` and the settings are compared when a run resumes; sums of metrics continue.
        state = {
            "global_step": self.step,
            "kept": kept,
            "branch": self.store.branch,
            "identity": self.identity,
            "seconds": time.monotonic() - self.start_time,
            "frozen": self.frozen,
            "evaluation": self.evaluation,
            "sampled_step": self.sampled_step,
            "meter": self.task.meter.state_dict(),
            "config": self.task.config,
        }
        with translate_errors(f"saving step {self.step}", self.store.description):
            process_state = {"parts": [part.state_dict() for part in self.task.parts]}
            self.store.save(self.step, self.task, self.engine, self.ema, state, process_state)
        self.last_save_time = time.monotonic()

    # -------------------------------------------------------------------------------------- the end

    def _idle_reason(self) -> str:
        """Why the run cannot change anything, or hardly so, or ""."""
        max_steps = self.settings.max_steps
        if self.step >= max_steps:
            return f"nothing is left to train: step {self.step} of max_steps {max_steps}."
        rates = map(self.task.learning_rate, range(self.step, max_steps))
        scales = [group.get("lr_scale", 1.0) for group in self.task.optimizer.param_groups]
        if not any(scales) or not any(rates):
            return "warning: the learning rate is 0 at every step, so no weight will change."

        # A warm-up as long as the run.
        steps = [*range(0, max_steps, 1 + max_steps // SAMPLED_RATES), max_steps - 1]
        highest = max(map(self.task.learning_rate, steps))
        if highest < self.task.peak_rate / 2:
            return (
                f"warning: the learning rate reaches {highest:.3g} of {self.task.peak_rate:.3g} in "
                f"{max_steps} steps; the warm-up is too long for them."
            )
        return ""

    def _check_gradient(self, norm: float) -> None:
        """Log once if the gradients of the first steps are all 0."""
        self.zero_gradients += norm == 0
        n_steps = self.step + 1 - self.start_step
        n_checked = min(FIRST_STEPS, self.settings.max_steps - self.start_step)
        if n_steps == self.zero_gradients == n_checked:
            self.log_line(
                f"warning: the gradient was exactly 0 in {n_steps} steps, so nothing is learned: "
                "the loss depends on no trained weight, or its batches have nothing to compare."
            )

    def _end(self, stopped: bool, data_ended: bool) -> None:
        """Last evaluation and checkpoint."""
        # 1. Data that ended before `max_steps`.
        if data_ended and not self.step:
            raise TrainingError(
                "No source has a usable sequence (skipped records are listed above), "
                "so nothing was trained; see `seed data check`."
            )
        if data_ended:
            self.log.write_line(self.step)
            self.log_line(f"all sources are exhausted after step {self.step}; the run ends.")

        # 2. The evaluation, if the last step had none (it may have been stopped).
        if not stopped:
            self._evaluate(is_last=True)

        # 3. The checkpoint. Wait first: one of this step may still be in writing.
        self.store.wait()
        if self.store.last_step != self.step and (self.step or stopped):
            self._save(kept=not stopped)
        self.store.wait()
        if not stopped:
            self.store.keep_last()

    def _record(self) -> JsonObject:
        """Finish the task and write the record (first process); returned by every process."""
        # 1. The final weights, which stay in the module.
        if self.ema is not None:
            self.ema.swap(self.task.module)
        self.task.module.eval()
        record: JsonObject = {
            "steps": self.step,
            "seconds": round(time.monotonic() - self.start_time, 1),
            **self.task.finish(self.view()),
            **self.log.counts(),
        }

        # 2. The files, and the summary.
        if self.group.first:
            file = self.output_dir / self.task.record_file
            with writing(file):
                replace_text(file, strict_json(record, indent=1))
            if self.settings.curves:
                from seed_multimodal.plots import save_curves  # imports matplotlib

                save_curves(self.output_dir, log=self.log_line)
        return self.group.gather(record)[0]


def micro_step_seed(seed: int, micro_step: int, rank: int) -> int:
    """Of torch's generators in a process; the rank is multiplied by more than any number of
    micro-steps, so seeds are distinct."""
    return seed * 1_000_003 + micro_step + rank * 1_000_003**2


def train_stage(
    task: StageTask, folder: str | Path, group: ProcessGroup | None = None, first_step: int = 0
) -> JsonObject:
    """Train a stage, or return the record `folder/NAME.done.json` of a completed one; see `train`.

    A completed stage continues only if `further` is set, `max_steps` was raised and a checkpoint
    exists.
    """
    settings = task.settings
    group = group or ProcessGroup(settings.timeout_minutes)
    record_file = Path(folder) / task.record_file
    checkpoint_folder = Path(folder) / task.checkpoint_folder
    saved = checkpoints(checkpoint_folder)
    is_done = group.agree(record_file.is_file())[0]
    record = read_json_object(record_file) if is_done else {}
    if not record or (settings.further and record["steps"] < settings.max_steps and saved):
        record = train(task, folder, group=group, first_step=first_step)
        group.log(task.name, f"done: {strict_json(record)}")
        return record

    # The stage is complete: only report changed settings.
    if group.first:
        seconds = record.get("seconds", 0)
        group.log(task.name, f"already done ({seconds:.0f} s): {record_file}")
        saved_config = None
        if saved:
            _, newest = saved[0]
            saved_config = read_states(newest)[0]["config"]
        remark = settings_remark(saved_config, task.config, task.quiet_keys)
        if remark:
            advice = f"remove {record_file} and {checkpoint_folder} to train it again."
            group.log(task.name, f"{remark}; {advice}")
    return record
