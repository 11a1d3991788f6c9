"""The training of a stage as a task of the library's trainer, and the names of LAVIS's task.

From LAVIS come the optimizer (AdamW and its rule of what decays), the learning-rate schedule (by epoch), log.txt and
the content of `checkpoint_N.pth`. An "epoch" is `iters_per_epoch` iterations (the original: 5000) whatever the size of
the set; an iteration is a micro-step, so with `accum_grad_iters` there are fewer optimizer steps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import Tensor, nn

from seed_lavis.compat import ImageTextPretrainTask, registry
from seed_lavis.datasets import split_of, to_device
from seed_multimodal.data.stream.loader import StepBatches
from seed_multimodal.disk import replace_text, writing
from seed_multimodal.errors import ConfigError
from seed_multimodal.evaluation.tokenizer import save_neighbours
from seed_multimodal.training.codebook import CodebookTask, codebook_use, evaluation_mode
from seed_multimodal.training.config import StageSettings
from seed_multimodal.training.distributed import ProcessGroup

# Settings that change no number of the training: not reported when they differ at a resume.
QUIET = tuple(
    f"run.{key}"
    for key in (
        "output_dir",
        "resume_ckpt_path",
        "log_freq",
        "save_seconds",
        "save_every_steps",
        "keep_checkpoints",
        "num_workers",
        "tensorboard",
        "curves",
        "valid_splits",
        "test_splits",
        "evaluate",
        "batch_size_eval",
        "timeout_minutes",
        "device",
        "world_size",
        "distributed",
        "dist_url",
    )
)
REMEMBERED = ("latest", "codes", "features")  # attributes that `forward` leaves on the models


@registry.register_task("image_gen_pretrain")
class ImageGenPretrainTask(ImageTextPretrainTask):
    """LAVIS's `image_text_pretrain` by another name, which some of the original's files use."""


class TokenizerTask(CodebookTask):
    """One stage of one model; `runner` is the `runner_seed`, `batches` are of its training split."""

    quiet_keys = QUIET
    start_hint = "run.resume_ckpt_path"

    def __init__(self, runner: Any, batches: StepBatches) -> None:
        self.runner, self.batches, self.options = runner, batches, runner.options
        run, self.last_loss = runner.options, None
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
        )
        self.config = OmegaConf.to_container(runner.config.config)

    def learning_rate(self, step: int) -> float:
        """LAVIS's schedule as a function of the optimizer step: that of its last iteration."""
        epoch, inside = divmod(
            (step + 1) * self.settings.gradient_accumulation_steps - 1, self.options.iters_per_epoch
        )
        self.runner.lr_scheduler.step(cur_epoch=epoch, cur_step=inside)
        return float(self.runner.optimizer.param_groups[0]["lr"])

    def batch(self, micro_step: int) -> dict[str, Any]:
        """One batch on the device."""
        return to_device(self.batches.at(micro_step), self.runner.device)

    def before_training(self, run: Any) -> None:
        """All checks have passed: write the run's settings."""
        if self.runner.rank == 0:
            with writing(folder := self.runner.folder):
                self.runner.log_config()
                replace_text(folder / "config.yaml", OmegaConf.to_yaml(self.runner.config.config))
                replace_text(
                    folder / "config.json",
                    json.dumps(self.runner.model.config.to_dict(), indent=2) + "\n",
                )

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Mapping[str, Any]]:
        """LAVIS's training step."""
        loss = self.runner.task.train_step(model, batch)
        self.last_loss = loss.detach()
        return loss, self.runner.model.latest

    def after_step(self, step: int) -> dict[str, float]:
        """Codebook restarts; after each epoch its checkpoint, the held-out losses (`valid/SPLIT/NAME`) and samples."""
        super().after_step(step)
        epochs, inside = divmod(step, self.runner.steps_per_epoch)
        if inside:
            return {}
        if self.runner.rank == 0:
            self.runner.save_epoch(epochs - 1)
            self._note(
                "train",
                epochs,
                {name: float(value) for name, value in self.runner.model.latest.items()},
            )
        numbers: dict[str, float] = {}
        for split in self.options.valid_splits:
            means = mean_losses(self.runner, split)
            if self.runner.rank == 0:
                save_neighbours(
                    self.runner.folder / "samples" / f"{split}-{epochs - 1}.png", *self.runner.shown
                )
            self._note("valid", epochs, {"split": split, **means})
            numbers |= {
                f"valid/{split}/{name}": value
                for name, value in means.items()
                if isinstance(value, float)
            }
        return numbers

    def status(self) -> dict[str, float]:
        """Seconds spent waiting for data, bad samples, the loss as it is (`loss` is smoothed), the use of codes."""
        last = {} if self.last_loss is None else {"last_loss": float(self.last_loss)}
        return {
            "wait_seconds": self.batches.wait_seconds,
            "bad_samples": len(self.batches.bad_samples()),
            **last,
            **super().status(),
        }

    def finish(self, group: ProcessGroup) -> dict[str, Any]:
        """Write the last checkpoint again if averaged weights are the result; count all processes' bad samples."""
        last = self.options.max_epoch - 1
        if self.settings.ema and group.first:
            self.runner.save_epoch(last)
        bad = {
            tuple(sample)
            for own in group.gather({"bad": self.batches.bad_samples()})
            for sample in own["bad"]
        }
        numbers = {name: round(float(value), 6) for name, value in self.runner.model.latest.items()}
        return {
            **super().finish(group),
            "checkpoint": str(self.runner.folder / f"checkpoint_{last}.pth"),
            **numbers,
            "bad_samples": len(bad),
        }

    def state_dict(self, step: int) -> dict[str, Any]:
        """The bad samples that this process found."""
        return {**super().state_dict(step), **self.batches.dataset.state_dict()}

    def load_state_dict(self, states: list[dict[str, Any]], rank: int) -> None:
        """Inverse of `state_dict`; there may have been more processes, or fewer."""
        super().load_state_dict(states, rank)
        for state in states[rank :: self.runner.world]:
            self.batches.dataset.load_state_dict(state)

    def _note(self, kind: str, epochs: int, numbers: Mapping[str, Any]) -> None:
        with writing(self.runner.folder):
            self.runner.log_stats({"epoch": epochs - 1, **numbers}, kind)


# ---- held-out losses


def share_out(total: int, batch_size: int, world: int = 1) -> tuple[int, int]:
    """Size and number of each process's batches: equal, because a contrast depends on how many are compared; fewer
    images are left over than there are batches."""
    count = max(
        1, min(-(-total // (batch_size * world)), total // world)
    )  # a batch has at least one image
    return total // (count * world), count


def mean_losses(runner: Any, split: str) -> dict[str, float]:
    """Mean of every loss over `samples` images of a split, and `codebook_used` and `perplexity` of all their codes; the
    same in all processes, which call it together."""
    data, model, options = (
        split_of(runner.datasets, [f"{split}:eval"]),
        runner.model,
        runner.options,
    )
    if len(data) < runner.world:
        raise ConfigError(
            f"Split {split!r} has {len(data)} images, too few for {runner.world} processes."
        )
    size, count = share_out(len(data), options.batch_size_eval, runner.world)
    dtype = torch.float16 if runner.precision == "fp16" else torch.bfloat16
    found: list[dict[str, torch.Tensor]] = []
    codes = torch.zeros(
        model.quantize.size if hasattr(model, "quantize") else 0,
        dtype=torch.long,
        device=runner.device,
    )
    before = {name: getattr(model, name) for name in REMEMBERED if hasattr(model, name)}
    with (
        evaluation_mode(model),
        StepBatches(
            data,
            size,
            seed=0,
            rank=runner.rank,
            world=runner.world,
            workers=min(options.num_workers, count),
            shuffle=False,
        ) as batches,
    ):
        for step in range(count):
            with torch.autocast(runner.device.type, dtype, enabled=runner.precision != "fp32"):
                found.append(model(samples := to_device(batches.at(step), runner.device)))
            if step == 0:
                runner.shown = samples["image"], getattr(model, "matched", None)
            if getattr(model, "codes", None) is not None:
                codes += torch.bincount(model.codes.flatten(), minlength=len(codes))
        bad = len(batches.bad_samples())
    for name, value in before.items():
        setattr(model, name, value)
    sums = {name: sum(one[name].detach().float() for one in found) for name in sorted(found[0])}
    if runner.world > 1:
        for total in (*sums.values(), *([codes] if len(codes) else [])):
            dist.all_reduce(total)
    means = {name: float(value) / (count * runner.world) for name, value in sums.items()}
    return {
        "samples": count * size * runner.world,
        **means,
        **codebook_use(codes),
        "bad_samples": bad,
    }
