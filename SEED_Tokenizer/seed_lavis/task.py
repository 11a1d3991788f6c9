"""The training of a stage as a task of the library's loop.

From LAVIS come the optimiser (AdamW and its rule of what decays), the learning-rate schedule (by epoch), log.txt and
the make of `checkpoint_N.pth`. An "epoch" is `iters_per_epoch` iterations (the original: 5000) whatever the size of
the set; an iteration is a micro-step, so with `accum_grad_iters` there are fewer optimiser steps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor, nn

from seed_lavis.checkpoint import write_checkpoint
from seed_lavis.compat import RunnerBase
from seed_lavis.context import RunContext
from seed_lavis.datasets import count_bad, split_of, to_device
from seed_lavis.log import log
from seed_lavis.validation import mean_losses
from seed_multimodal.data.stream.skip_budget import BadSamples
from seed_multimodal.data.stream.step_batches import StepBatches
from seed_multimodal.disk import replace_text, writing
from seed_multimodal.training.codebook import CodebookMaintenance
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.task import StageTask

# Settings that change no number of the training: not reported when they differ at a resume.
QUIET = tuple(f"run.{key}" for key in (
    "output_dir", "resume", "resume_ckpt_path", "log_freq", "save_seconds", "save_every_steps", "keep_checkpoints",
    "num_workers", "tensorboard", "valid_splits", "valid_every_epochs", "valid_batches", "test_splits", "evaluate",
    "batch_size_eval", "timeout_minutes", "device", "gpu", "rank", "world_size", "distributed",
    "dist_url"))


class TokenizerTask(StageTask):
    """One stage of one model.

    Args:
        lavis: LAVIS's runner: its task, optimiser, schedule, data sets and log.txt.
        batches: of the training split; account: its bad samples, if it keeps any.
    """

    quiet_keys = QUIET
    start_hint = "run.resume_ckpt_path"

    def __init__(self, run: RunContext, lavis: RunnerBase, batches: StepBatches, account: BadSamples | None) -> None:
        self.run, self.lavis, self.batches, self.account = run, lavis, batches, account
        self.codebook: CodebookMaintenance | None = None
        self.last_loss: Tensor | None = None
        self.bad = 0  # different bad samples of all processes, known at the end
        model = run.model
        if hasattr(model, "codebook_points"):
            self.codebook = CodebookMaintenance(model, model.options, self.batch, run.steps,
                                                run.options.batch_size_train)
        super().__init__(run.stage, model if self.codebook is None else self.codebook.counts, run.settings(),
                         optimizer=lavis.optimizer)
        # Buffers are equal by construction, or (code counts) each process's own.
        self.ddp_options = {"broadcast_buffers": False,
                            "find_unused_parameters": getattr(model, "skips_parameters", False)}
        self.config = OmegaConf.to_container(run.config.config)

    @property
    def wrapped_part(self) -> nn.Module:
        """The model; `module` may hold code counts beside it."""
        return self.run.model

    def learning_rate(self, step: int) -> float:
        """LAVIS's schedule as a function of the optimiser step: that of its last iteration."""
        iteration = (step + 1) * self.settings.accumulate - 1
        epoch, inside = divmod(iteration, self.run.options.iters_per_epoch)
        self.lavis.lr_scheduler.step(cur_epoch=epoch, cur_step=inside)
        return float(self.lavis.optimizer.param_groups[0]["lr"])

    def batch(self, micro_step: int) -> dict[str, Any]:
        """One batch on the device, with the places in time that LAVIS adds."""
        samples = to_device(self.batches.at(micro_step), self.run.device)
        iterations = self.run.options.iters_per_epoch
        epoch, inside = divmod(micro_step, iterations)
        return {**samples, "epoch": epoch, "iters": inside, "num_iters_per_epoch": iterations}

    def prepared(self, run: Any) -> None:
        """All checks have passed: write the run's settings."""
        if self.run.rank:
            return
        with writing(self.run.folder):
            self.lavis.log_config()
            replace_text(self.run.folder / "config.yaml", OmegaConf.to_yaml(self.run.config.config))
            replace_text(self.run.folder / "config.json", json.dumps(self.run.model.config.to_dict(), indent=2) + "\n")

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        """LAVIS's training step, with the codebook's maintenance before and after it."""
        step, inside = divmod(micro_step, self.settings.accumulate)
        if self.codebook is not None:
            self.codebook.before(step, inside == 0)
        loss = self.lavis.task.train_step(model, self.batch(micro_step))
        if self.codebook is not None:
            self.codebook.after_micro_step()
        self.last_loss = loss.detach()
        return loss, self.run.model.latest

    def after_step(self, step: int) -> dict[str, float]:
        """Codebook restarts; after each epoch its checkpoint and the held-out losses."""
        if self.codebook is not None:
            self.codebook.after(step)
        epochs, inside = divmod(step, self.run.steps_per_epoch)
        if inside:
            return {}
        if step == self.run.steps:
            self.bad = count_bad(self.batches.bad_samples())
        if self.run.rank == 0:
            self._write_checkpoint(epochs - 1)
        return {} if epochs % self.run.options.valid_every_epochs else self._validate(epochs - 1)

    def acts_after(self, step: int) -> bool:
        """At the ends of epochs and at restarts of codes."""
        return step % self.run.steps_per_epoch == 0 or (self.codebook is not None and self.codebook.restarts(step))

    def status(self) -> dict[str, float]:
        """Seconds spent waiting for data, bad samples, the loss as it is (`loss` is smoothed), the use of codes."""
        codes = self.codebook.status() if self.codebook is not None else {}
        last = {} if self.last_loss is None else {"last_loss": float(self.last_loss)}
        return {"wait_seconds": self.batches.wait_seconds, "bad_samples": len(self.batches.bad_samples()), **last,
                **codes}

    def finish(self, group: ProcessGroup) -> dict[str, Any]:
        """Write the last checkpoint again if the averaged weights are the result."""
        if self.settings.ema and group.first:
            self._write_checkpoint(self.run.options.max_epoch - 1)
        return {**super().finish(group), "checkpoint": str(self.run.last_checkpoint),
                **{name: round(float(value), 6) for name, value in self.run.model.latest.items()},
                "bad_samples": max(self.bad, len(self.batches.bad_samples()))}  # no step may have been left to make

    def state_dict(self, step: int) -> dict[str, Any]:
        """The bad samples that this process found; the counts of codes, which are saved with the module, are added
        up."""
        if self.codebook is not None:
            self.codebook.add_up()
        return {} if self.account is None else self.account.state_dict()

    def load_state_dict(self, states: list[dict[str, Any]], rank: int) -> None:
        """Inverse of `state_dict`."""
        if self.account is not None:
            for state in states[rank::self.run.world]:  # there may have been more processes, or fewer
                self.account.load_state_dict(state)

    def _write_checkpoint(self, epoch: int) -> None:
        model, keep = self.run.model, self.run.options.keep_checkpoints
        file = write_checkpoint(self.run.folder, epoch, model, self.lavis.optimizer, self.run.config.to_dict(), keep)
        log(f"[{self.name}] epoch {epoch} is done: {file}")
        with writing(self.run.folder):
            losses = {name: float(value) for name, value in model.latest.items()}
            self.lavis.log_stats({"epoch": epoch, **losses}, "train")

    def _validate(self, epoch: int) -> dict[str, float]:
        """`valid/SPLIT/NAME` of each of `run.valid_splits`, for the log; log.txt gets a line of each."""
        numbers: dict[str, float] = {}
        for split in self.run.options.valid_splits:
            means = split_losses(self.run, self.lavis.datasets, split, self.run.options.valid_batches)
            if self.run.rank == 0:
                with writing(self.run.folder):
                    self.lavis.log_stats({"epoch": epoch, "split": split, **means}, "valid")
            numbers |= {f"valid/{split}/{name}": value for name, value in means.items() if isinstance(value, float)}
        return numbers


def split_losses(run: RunContext, datasets: Mapping[str, Any], split: str, most: int = 0) -> dict[str, float]:
    """Mean losses of the model over a split, of at most `most` batches of each process (0: all)."""
    return mean_losses(
        run.model, split_of(datasets, [split]), batch_size=run.options.batch_size_eval, device=run.device,
        precision=run.precision, workers=run.options.num_workers, most=most, where=f"Split {split!r}")
