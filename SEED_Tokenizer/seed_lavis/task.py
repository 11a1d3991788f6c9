"""The training of a stage as a task of the library's trainer, and the names of LAVIS's task.

From LAVIS come the optimizer (AdamW and its rule of what decays), the learning-rate schedule (by
epoch), log.txt and the content of `checkpoint_N.pth`. An "epoch" is `iters_per_epoch` iterations
(the original: 5000) for any size of the data set; an iteration is a micro-step, so with
`accum_grad_iters` there are fewer optimizer steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from seed_lavis.compat import ImageTextPretrainTask, RunnerBase, registry
from seed_lavis.datasets import joined_splits
from seed_lavis.options import STEP_SCHEDULES
from seed_multimodal.data.stream.loader import StepBatches
from seed_multimodal.device import autocast
from seed_multimodal.disk import replace_text, writing
from seed_multimodal.errors import ConfigError
from seed_multimodal.evaluation.tokenizer import save_neighbours
from seed_multimodal.nn.layers import evaluating
from seed_multimodal.training.codebook import CodebookTask, codebook_use
from seed_multimodal.training.config import StageSettings
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.schedules import learning_rate

# Settings that change no result of the training: not reported when they differ at a resume.
QUIET_KEYS = """
    output_dir resume_ckpt_path log_freq save_seconds save_every_steps keep_checkpoints num_workers
    tensorboard curves valid_splits test_splits evaluate batch_size_eval timeout_minutes device
    world_size distributed dist_url
"""


@registry.register_task("image_gen_pretrain")
class ImageGenPretrainTask(ImageTextPretrainTask):
    """LAVIS's `image_text_pretrain` by another name, which some of the original's files use."""


class TokenizerTask(CodebookTask):
    """One stage of one model.

    runner: the `RunnerSeed`.
    batches: those of its training split.
    """

    quiet_keys = [f"run.{key}" for key in QUIET_KEYS.split()]
    start_hint = "run.resume_ckpt_path"
    last_loss: Tensor | None = None

    def __init__(self, runner: RunnerBase, batches: StepBatches) -> None:
        run = runner.options
        # The trainer's settings from LAVIS's keys; a completed run continues with a higher
        # max_epoch.
        settings = StageSettings(
            max_steps=runner.steps_per_epoch * run.max_epoch,
            batch_size=run.batch_size_train,
            learning_rate=run.init_lr,
            weight_decay=run.weight_decay,
            max_grad_norm=run.clip_grad,
            ema=run.ema,
            precision=runner.precision,
            seed=run.seed,
            save_seconds=run.save_seconds,
            logging_steps=run.log_freq,
            save_steps=run.save_every_steps,
            gradient_accumulation_steps=run.accum_grad_iters,
            save_frozen=False,
            report_to=["tensorboard"] if run.tensorboard else [],
            curves=run.curves,
            further=True,
            timeout_minutes=run.timeout_minutes,
        )
        model = runner.model
        super().__init__(
            model.stage,
            model,
            settings,
            model.options,
            optimizer=runner.optimizer,
            n_images=len(batches.dataset),
        )
        self.runner = runner
        self.step_batches = batches
        self.options = run
        self.eval_steps = runner.steps_per_epoch
        self.config = runner.config.to_dict()

    def learning_rate(self, step: int) -> float:
        """The rate of the optimizer step's last iteration."""
        run = self.options
        last_iteration = (step + 1) * run.accum_grad_iters - 1
        if run.lr_sched in STEP_SCHEDULES:
            schedule = StageSettings(
                max_steps=run.max_epoch * run.iters_per_epoch,
                learning_rate=run.init_lr,
                warmup_steps=run.warmup_steps,
                min_lr_ratio=run.min_lr / run.init_lr if run.init_lr else 0.0,
                lr_scheduler_type=STEP_SCHEDULES[run.lr_sched],
            )
            return learning_rate(last_iteration, schedule)

        # LAVIS's.
        epoch, iteration = divmod(last_iteration, run.iters_per_epoch)
        self.runner.lr_scheduler.step(cur_epoch=epoch, cur_step=iteration)
        return float(self.optimizer.param_groups[0]["lr"])

    def batch(self, micro_step: int) -> dict[str, Any]:
        """One batch, its images on the device."""
        return self.runner.with_images(self.step_batches.at(micro_step))

    def before_training(self) -> None:
        """All checks have passed: write the run's settings."""
        folder = self.runner.folder
        if self.runner.group.first:
            with writing(folder):
                self.runner.log_config()
                replace_text(folder / "config.yaml", OmegaConf.to_yaml(self.runner.config.config))
                sizes = json.dumps(self.model.config.to_dict(), indent=2)
                replace_text(folder / "config.json", sizes + "\n")

    def batch_loss(
        self, model: nn.Module, batch: dict[str, Any]
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """LAVIS's training step."""
        loss = self.runner.task.train_step(model, batch)
        self.last_loss = loss.detach()
        return loss, self.model.latest

    def evaluate(self, step: int) -> dict[str, float]:
        """At the end of an epoch its checkpoint, held-out losses and samples.

        Returns the held-out losses as `valid/SPLIT/NAME`.
        """
        runner = self.runner
        epoch = step // runner.steps_per_epoch - 1

        # 1. The checkpoint.
        if runner.group.first:
            runner.save_epoch(epoch, self.trainer.engine.weights())
            losses = {name: float(value) for name, value in self.model.latest.items()}
            runner.log_epoch("train", epoch, losses)

        # 2. Held-out losses.
        validation: dict[str, float] = {}
        for split in self.options.valid_splits:
            means = mean_losses(runner, split)
            if runner.group.first:
                sheet = runner.folder / "samples" / f"{split}-{epoch}.png"
                save_neighbours(sheet, *runner.samples, runner.preprocessing)
                runner.log_epoch("valid", epoch, {"split": split, **means})
            for name, value in means.items():
                if isinstance(value, float):  # a loss, not a count
                    validation[f"valid/{split}/{name}"] = value
        return validation

    def status(self) -> dict[str, float]:
        """As the base's, and the last loss (`loss` is smoothed)."""
        status = super().status()
        if self.last_loss is not None:
            status["last_loss"] = float(self.last_loss)
        return status

    def finish(self, group: ProcessGroup) -> dict[str, Any]:
        """The record of the run."""
        losses = {name: round(float(value), 6) for name, value in self.model.latest.items()}
        (bad_samples,) = group.sum([self.step_batches.dataset.bad.total])
        return {
            **super().finish(group),
            "checkpoint": str(self.runner.folder / f"checkpoint_{self.options.max_epoch - 1}.pth"),
            **losses,
            "bad_samples": int(bad_samples),
        }


def mean_losses(runner: RunnerBase, split: str) -> dict[str, float]:
    """Mean of every loss over `samples` images of a split, and the use of the codebook by them.

    runner: a `RunnerSeed`.
    All processes call it together and get the same values.
    """
    options = runner.options
    model = runner.model
    world = runner.group.world
    data, _ = joined_splits(runner.datasets, [f"{split}:eval"], {})
    if len(data) < world:
        raise ConfigError(f"Split {split!r} has {len(data)} images, too few for {world} processes.")

    # 1. All batches have one size, because a contrast depends on the number of images that are
    #    compared. Fewer images remain unused than there are batches.
    n_batches = math.ceil(len(data) / (options.batch_size_eval * world))
    n_batches = min(n_batches, len(data) // world)  # a batch has at least one image
    size = len(data) // (n_batches * world)
    bad_before = data.bad.total
    batches = StepBatches(
        data,
        size,
        seed=0,
        rank=runner.group.rank,
        world=world,
        workers=min(options.num_workers, n_batches),
        shuffle=False,
    )

    # 2. Sums of the losses, and how often each code is used.
    sums: dict[str, float] = {}
    uses = torch.zeros(0)
    with torch.no_grad(), evaluating(model), batches:
        for step in range(n_batches):
            samples = runner.with_images(batches.at(step))
            with autocast(runner.device, runner.precision):
                losses = model(samples)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + float(value)
            if model.codes is not None:
                counts = model.codes.flatten().bincount(minlength=model.quantize.size)
                uses = counts + (uses if step else 0)
            if step == 0:
                runner.samples = samples["image"], getattr(model, "matched", None)

    # 3. Means over all processes.
    totals = runner.group.sum([*sums.values(), *uses.tolist()])
    means = [total / (n_batches * world) for total in totals[: len(sums)]]
    return {
        "samples": n_batches * size * world,
        **dict(zip(sums, means, strict=True)),
        **codebook_use(torch.tensor(totals[len(sums) :])),
        "bad_samples": data.bad.total - bad_before,
    }
