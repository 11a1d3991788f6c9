"""The training of a stage as a task of the library's trainer, and the names of LAVIS's task.

From LAVIS come the optimizer (AdamW and its rule of what decays), the learning-rate schedule (by
epoch), log.txt and the content of `checkpoint_N.pth`. An "epoch" is `iters_per_epoch` iterations
(the original: 5000) for any size of the data set; an iteration is a micro-step, so with
`accum_grad_iters` there are fewer optimizer steps.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import Tensor, nn

from seed_lavis.compat import ImageTextPretrainTask, RunnerBase, registry
from seed_lavis.datasets import split_of, to_device
from seed_lavis.options import STEP_SCHEDULES
from seed_multimodal.data.stream.loader import StepBatches
from seed_multimodal.disk import replace_text, writing
from seed_multimodal.errors import ConfigError
from seed_multimodal.evaluation.tokenizer import save_neighbours
from seed_multimodal.nn.layers import evaluating
from seed_multimodal.training.codebook import CodebookTask, codebook_use
from seed_multimodal.training.config import StageSettings
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.schedules import learning_rate

# Settings that change no result of the training: not reported when they differ at a resume.
QUIET_KEYS = (
    "run.output_dir",
    "run.resume_ckpt_path",
    "run.log_freq",
    "run.save_seconds",
    "run.save_every_steps",
    "run.keep_checkpoints",
    "run.num_workers",
    "run.tensorboard",
    "run.curves",
    "run.valid_splits",
    "run.test_splits",
    "run.evaluate",
    "run.batch_size_eval",
    "run.timeout_minutes",
    "run.device",
    "run.world_size",
    "run.distributed",
    "run.dist_url",
)


@registry.register_task("image_gen_pretrain")
class ImageGenPretrainTask(ImageTextPretrainTask):
    """LAVIS's `image_text_pretrain` by another name, which some of the original's files use."""


class TokenizerTask(CodebookTask):
    """One stage of one model.

    runner: the `RunnerSeed`.
    batches: those of its training split.
    """

    quiet_keys = QUIET_KEYS
    start_hint = "run.resume_ckpt_path"

    def __init__(self, runner: RunnerBase, batches: StepBatches) -> None:
        run = runner.options
        self.runner = runner
        self.batches = batches
        self.options = run
        self.last_loss: Tensor | None = None
        self.eval_steps = runner.steps_per_epoch
        # The trainer's settings from LAVIS's keys; a completed run continues with a higher
        # max_epoch.
        settings = StageSettings(
            max_steps=runner.steps,
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
        super().__init__(
            runner.model.stage,
            runner.model,
            settings,
            runner.model.options,
            optimizer=runner.optimizer,
            n_images=len(batches.dataset),
        )
        self.config = OmegaConf.to_container(runner.config.config)

    def learning_rate(self, step: int) -> float:
        """The rate of the optimizer step's last iteration."""
        run = self.options
        last_iteration = (step + 1) * self.settings.gradient_accumulation_steps - 1
        if run.lr_sched not in STEP_SCHEDULES:  # LAVIS's
            epoch, iteration = divmod(last_iteration, run.iters_per_epoch)
            self.runner.lr_scheduler.step(cur_epoch=epoch, cur_step=iteration)
            return float(self.runner.optimizer.param_groups[0]["lr"])
        schedule = StageSettings(
            max_steps=run.max_epoch * run.iters_per_epoch,
            learning_rate=run.init_lr,
            warmup_steps=run.warmup_steps,
            min_lr_ratio=run.min_lr / run.init_lr if run.init_lr else 0.0,
            lr_scheduler_type=STEP_SCHEDULES[run.lr_sched],
        )
        return learning_rate(last_iteration, schedule)

    def batch(self, micro_step: int) -> dict[str, Any]:
        """One batch on the device."""
        return to_device(self.batches.at(micro_step), self.runner.device, self.runner.preprocessing)

    def before_training(self) -> None:
        """All checks have passed: write the run's settings."""
        if self.runner.rank == 0:
            folder = self.runner.folder
            with writing(folder):
                self.runner.log_config()
                replace_text(folder / "config.yaml", OmegaConf.to_yaml(self.runner.config.config))
                replace_text(
                    folder / "config.json",
                    json.dumps(self.runner.model.config.to_dict(), indent=2) + "\n",
                )

    def batch_loss(
        self, model: nn.Module, batch: dict[str, Any]
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """LAVIS's training step."""
        loss = self.runner.task.train_step(model, batch)
        self.last_loss = loss.detach()
        return loss, self.runner.model.latest

    def evaluate(self, step: int) -> dict[str, float]:
        """At the end of an epoch its checkpoint, held-out losses and samples.

        Returns the held-out losses as `valid/SPLIT/NAME`.
        """
        epoch = step // self.runner.steps_per_epoch - 1

        # 1. The checkpoint.
        if self.runner.rank == 0:
            self.runner.save_epoch(epoch)
            losses = {name: float(value) for name, value in self.runner.model.latest.items()}
            self._log_epoch("train", epoch, losses)

        # 2. Held-out losses.
        validation: dict[str, float] = {}
        for split in self.options.valid_splits:
            means = mean_losses(self.runner, split)
            if self.runner.rank == 0:
                sheet = self.runner.folder / "samples" / f"{split}-{epoch}.png"
                save_neighbours(sheet, *self.runner.samples, self.runner.preprocessing)
            self._log_epoch("valid", epoch, {"split": split, **means})
            for name, value in means.items():
                if isinstance(value, float):  # a loss, not a count
                    validation[f"valid/{split}/{name}"] = value
        return validation

    def status(self) -> dict[str, float]:
        """Seconds of waiting for data, bad samples, the last loss (`loss` is smoothed), codes."""
        status: dict[str, float] = {
            "wait_seconds": self.batches.wait_seconds,
            "bad_samples": self.batches.dataset.bad.total,
        }
        if self.last_loss is not None:
            status["last_loss"] = float(self.last_loss)
        return {**status, **super().status()}

    def finish(self, group: ProcessGroup) -> dict[str, Any]:
        """The record of the run."""
        gathered = group.gather({"bad": self.batches.dataset.bad.total})
        losses = {name: round(float(value), 6) for name, value in self.runner.model.latest.items()}
        return {
            **super().finish(group),
            "checkpoint": str(self.runner.folder / f"checkpoint_{self.options.max_epoch - 1}.pth"),
            **losses,
            "bad_samples": sum(process["bad"] for process in gathered),
        }

    def state_dict(self) -> dict[str, Any]:
        """The bad samples that this process found."""
        return {**super().state_dict(), **self.batches.dataset.state_dict()}

    def load_state_dict(self, states: list[dict[str, Any]], rank: int) -> None:
        """Inverse of `state_dict`; there may have been more processes, or fewer."""
        super().load_state_dict(states, rank)
        for state in states[rank :: self.runner.world]:
            self.batches.dataset.load_state_dict(state)

    def _log_epoch(self, split_name: str, epoch: int, values: Mapping[str, Any]) -> None:
        with writing(self.runner.folder):
            self.runner.log_stats({"epoch": epoch, **values}, split_name)


# ---- held-out losses


def share_out(total: int, batch_size: int, world: int = 1) -> tuple[int, int]:
    """Size and number of each process's batches.

    All batches are equal, because a contrast depends on the number of images that are compared.
    Fewer images remain unused than there are batches.
    """
    n_batches = math.ceil(total / (batch_size * world))
    n_batches = min(n_batches, total // world)  # a batch has at least one image
    n_batches = max(n_batches, 1)
    return total // (n_batches * world), n_batches


def mean_losses(runner: RunnerBase, split: str) -> dict[str, float]:
    """Mean of every loss over `samples` images of a split, and the use of the codebook by them.

    runner: a `RunnerSeed`.
    All processes call it together and get the same values.
    """
    options = runner.options
    model = runner.model
    data = split_of(runner.datasets, [f"{split}:eval"])
    if len(data) < runner.world:
        raise ConfigError(
            f"Split {split!r} has {len(data)} images, too few for {runner.world} processes."
        )

    size, n_batches = share_out(len(data), options.batch_size_eval, runner.world)
    bad_before = data.bad.total

    # 1. Losses and codes of each batch.
    sums: dict[str, Tensor] = {}
    codes: list[Tensor] = []
    counting: Any = contextlib.nullcontext()
    if hasattr(model, "quantize"):
        counting = model.quantize.register_forward_hook(
            lambda module, inputs, outputs: codes.append(outputs[2].flatten())
        )
    dtype = torch.float16 if runner.precision == "fp16" else torch.bfloat16
    with (
        torch.no_grad(),
        evaluating(model),
        counting,
        StepBatches(
            data,
            size,
            seed=0,
            rank=runner.rank,
            world=runner.world,
            workers=min(options.num_workers, n_batches),
            shuffle=False,
        ) as batches,
    ):
        for step in range(n_batches):
            samples = to_device(batches.at(step), runner.device, runner.preprocessing)
            with torch.autocast(runner.device.type, dtype, enabled=runner.precision != "fp32"):
                losses = model(samples)
            for name in sorted(losses):  # the order in which processes add them up
                sums[name] = sums.get(name, 0) + losses[name].detach().float()
            if step == 0:
                runner.samples = samples["image"], getattr(model, "matched", None)

    # 2. Means over all processes.
    uses = torch.zeros(1, dtype=torch.long, device=runner.device)
    if codes:
        uses = torch.cat(codes).bincount(minlength=model.quantize.size)
    if runner.world > 1:
        for total in (*sums.values(), uses):
            dist.all_reduce(total)
    means = {name: float(value) / (n_batches * runner.world) for name, value in sums.items()}
    return {
        "samples": n_batches * size * runner.world,
        **means,
        **codebook_use(uses),
        "bad_samples": data.bad.total - bad_before,
    }
