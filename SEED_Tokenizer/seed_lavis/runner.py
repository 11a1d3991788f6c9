"""The runner `runner_seed`: LAVIS's runner around the library's restartable loop.

From LAVIS come the optimiser (AdamW and its rule of what decays), the learning-rate schedule (by epoch), log.txt and
the checkpoints' make. From the library come the loop, its state and resume, and batches that are functions of the step.
Peculiar: an "epoch" is `iters_per_epoch` iterations (the original: 5000) whatever the size of the set; an iteration is
a micro-step, so with `accum_grad_iters` there are fewer optimiser steps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from seed_lavis.checkpoint import write_checkpoint
from seed_lavis.codebook import CodebookMaintenance, CodebookMixin
from seed_lavis.compat import RunnerBase, registry
from seed_lavis.cost import sample_cost
from seed_lavis.datasets import count_bad, dataset_ratios, mixed_order, split_of, to_device
from seed_lavis.log import log
from seed_lavis.options import RunOptions
from seed_lavis.report import summary
from seed_lavis.resume import prepare_resume
from seed_lavis.validation import mean_losses
from seed_multimodal.data.stream.skip_budget import BadSamples
from seed_multimodal.data.stream.step_batches import StepBatches
from seed_multimodal.disk import replace_text, writing
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import read_settings
from seed_multimodal.training.old.loop import StageSettings, run_stage


class Whole(nn.Module):
    """The model as the loop's trained modules (stage 2 adds its code counts here)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


@registry.register_runner("runner_seed")
class RunnerSeed(RunnerBase):
    """Trains or evaluates one model; `cfg` is the checked configuration of `settings.load_config`."""

    def __init__(self, cfg: Any, task: Any, model: Any, datasets: Mapping[str, Any], job_id: str = "") -> None:
        self.options = read_settings(RunOptions, cfg.run_cfg, "run")
        super().__init__(cfg, task, model, datasets, job_id)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.stage = model.stage
        self.accumulate = self.options.accum_grad_iters
        self.steps_per_epoch = self.options.iters_per_epoch // self.accumulate
        self.steps = self.steps_per_epoch * self.options.max_epoch
        self.care: CodebookMaintenance | None = None
        self._last_loss: Tensor | None = None
        self._aside = 0.0
        self._bad = 0  # different bad samples of all processes, known at the end

    def setup_output_dir(self) -> None:
        """As LAVIS's, but a second run in one process may register its own folders."""
        for name in ("result_dir", "output_dir"):
            registry.mapping["paths"].pop(name, None)
        try:
            super().setup_output_dir()
        except OSError as error:
            raise ConfigError(f"{error.filename or self.options.output_dir}: the folder cannot be made "
                              f"({error.strerror}); choose another run.output_dir.") from error

    @property
    def device(self) -> torch.device:
        """This process's device."""
        if self._device is None:
            self._device = torch.device(self.options.device)
            if self._device.type == "cuda":
                self._device = torch.device("cuda", self.config.run_cfg.get("gpu", 0))
        return self._device

    @property
    def model(self) -> nn.Module:
        """The model on its device, in DistributedDataParallel if several processes (or torchrun's one) train it."""
        if self._wrapped_model is None:
            self._wrapped_model = self._model.place(self.device)
            if dist.is_initialized():
                # Buffers are equal by construction, or (code counts) each process's own.
                self._wrapped_model = DistributedDataParallel(
                    self._model, device_ids=[self.device.index] if self.device.type == "cuda" else None,
                    broadcast_buffers=False, find_unused_parameters=getattr(self._model, "skips_parameters", False))
        return self._wrapped_model

    @property
    def scaler(self) -> None:
        """The loop has its own; LAVIS's would need CUDA."""
        return None

    # ---- training

    def train(self) -> dict[str, Any]:
        """Train to the end, from the state in the output folder if there is one; returns the stage's record."""
        model, run = self.model, self.options
        data = split_of(self.datasets, run.train_splits)
        for split in run.valid_splits:
            split_of(self.datasets, [split])  # refused now, not after the first epoch
        if getattr(self._model.options, "cache_vision", False):
            if not hasattr(data, "cache_tower"):
                raise ConfigError("model.cache_vision needs the data set nano_views: others make new views each time.")
            data.cache_tower(self._model.tower, self.device)
        ratios = dataset_ratios(self.config.datasets_cfg, run.train_dataset_ratios)
        self.cost = sample_cost(self._model, run, self.precision(), self.device, self.world)
        started = time.monotonic()
        # The loop's deaf ear for SIGTERM is its data workers' too: only the end of `with` ends them.
        with StepBatches(data, run.batch_size_train, seed=run.seed, rank=self.rank, world=self.world,
                         workers=run.num_workers,
                         order=mixed_order(self.datasets, run.train_splits, ratios, run.seed)) as self.batches:
            modules = self._modules()
            settings = self._settings()
            prepare_resume(self, modules, settings)
            record = run_stage(
                self.stage, modules, self._loss, settings, self.output_dir, self._finish, self._after_step,
                optimizer=self.optimizer, schedule=self.learning_rate,
                wrapped=model if dist.is_initialized() else None, status=self._status, cost=self.cost,
                own=data if isinstance(data, BadSamples) else None)
        for line in summary(self, record, time.monotonic() - started):
            log(line)
        return record

    def learning_rate(self, step: int) -> float:
        """LAVIS's schedule as a function of the optimiser step: that of its last iteration."""
        iteration = (step + 1) * self.accumulate - 1
        epoch, inside = divmod(iteration, self.options.iters_per_epoch)
        self.lr_scheduler.step(cur_epoch=epoch, cur_step=inside)
        return float(self.optimizer.param_groups[0]["lr"])

    def batch(self, micro_step: int) -> dict[str, Any]:
        """One batch on the device, with the places in time that LAVIS adds."""
        samples = to_device(self.batches.at(micro_step), self.device)
        epoch, inside = divmod(micro_step, self.options.iters_per_epoch)
        return {**samples, "epoch": epoch, "iters": inside, "num_iters_per_epoch": self.options.iters_per_epoch}

    def _modules(self) -> nn.Module:
        if not isinstance(self._model, CodebookMixin):
            return Whole(self._model)
        self.care = CodebookMaintenance(self._model, self.batch, self.steps, self.options.batch_size_train)
        return self.care.counts

    def _settings(self) -> StageSettings:
        run = self.options
        return StageSettings(
            steps=self.steps, batch_size=run.batch_size_train, lr=run.init_lr, weight_decay=run.weight_decay,
            clip=run.clip_grad, ema=run.ema, precision=self.precision(), seed=run.seed, save_seconds=run.save_seconds,
            log_every=run.log_freq, accumulate=self.accumulate, save_every_steps=run.save_every_steps,
            save_frozen=False, tensorboard=run.tensorboard, further=True)

    def precision(self) -> str:
        """`run.precision`, or what `run.amp` means on this device: bf16 or fp16 on a GPU, fp32 elsewhere."""
        if self.options.precision != "auto":
            return self.options.precision
        if not self.options.amp or self.device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"

    def _write_settings(self) -> None:
        """What this run is, as soon as nothing refuses it any more."""
        if self.rank:
            return
        with writing(self.output_dir):
            self.log_config()
            replace_text(self.output_dir / "config.yaml", OmegaConf.to_yaml(self.config.config))
            replace_text(self.output_dir / "config.json", json.dumps(self._model.config.to_dict(), indent=2) + "\n")

    def _loss(self, micro_step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        if self._last_loss is None:
            self._write_settings()
        step, inside = divmod(micro_step, self.accumulate)
        if self.care is not None:
            self.care.before(step, inside == 0)
        loss = self.task.train_step(self.model, self.batch(micro_step))
        if self.care is not None:
            self.care.after_micro_step()
        self._last_loss = loss.detach()
        return loss, self._model.latest

    def _after_step(self, step: int) -> dict[str, float]:
        if self.care is not None:
            self.care.after(step)
        epochs, inside = divmod(step, self.steps_per_epoch)
        if inside:
            return {}
        if step == self.steps:
            self._bad = count_bad(self.batches.bad_samples())
        if self.rank == 0:
            self._save(epochs - 1)
        return {} if epochs % self.options.valid_every_epochs else self._validate(epochs - 1)

    def _validate(self, epoch: int) -> dict[str, float]:
        """`valid/SPLIT/NAME` of each of `run.valid_splits`, for the log; log.txt gets a line of each."""
        started, numbers = time.monotonic(), {}
        for split in self.options.valid_splits:
            means = self._evaluated(split, self.options.valid_batches)
            if self.rank == 0:
                with writing(self.output_dir):
                    self.log_stats({"epoch": epoch, "split": split, **means}, "valid")
            numbers |= {f"valid/{split}/{name}": value for name, value in means.items() if isinstance(value, float)}
        self._aside += time.monotonic() - started
        return numbers

    def _evaluated(self, split: str, most: int = 0) -> dict[str, float]:
        return mean_losses(
            self._model, split_of(self.datasets, [split]), batch_size=self.options.batch_size_eval, device=self.device,
            precision=self.precision(), workers=self.options.num_workers, most=most, where=f"Split {split!r}")

    def _save(self, epoch: int) -> None:
        file = write_checkpoint(self.output_dir, epoch, self._model, self.optimizer, self.config.to_dict(),
                                self.options.keep_checkpoints)
        log(f"[{self.stage}] epoch {epoch} is done: {file}")
        with writing(self.output_dir):
            self.log_stats({"epoch": epoch, **{name: float(value) for name, value in self._model.latest.items()}},
                           "train")

    def _finish(self) -> dict[str, Any]:
        if self.options.ema:  # the averaged weights are in place now
            self._save(self.options.max_epoch - 1)
        return {"checkpoint": str(self.output_dir / f"checkpoint_{self.options.max_epoch - 1}.pth"),
                **{name: round(float(value), 6) for name, value in self._model.latest.items()},
                "bad_samples": max(self._bad, len(self.batches.bad_samples()))}  # no step may have been left to make

    def _status(self) -> dict[str, float]:
        codes = self.care.status() if self.care is not None else {}
        last = {} if self._last_loss is None else {"last_loss": float(self._last_loss)}  # `loss` itself is smoothed
        return {"wait_seconds": self.batches.wait_seconds, "aside_seconds": self._aside,
                "bad_samples": len(self.batches.bad_samples()), **last, **codes}

    # ---- evaluation

    def evaluate(self, cur_epoch: str | int = "best", skip_reload: bool = False) -> dict[str, dict[str, float]]:
        """Mean losses over each of `run.test_splits`, one process; stage 2 also reports its codes."""
        if self.world > 1:
            raise ConfigError("Evaluation runs as one process.")
        if not self.options.test_splits:
            raise ConfigError("run.test_splits names no split to evaluate: give --options run.test_splits=[val].")
        self._model.place(self.device)
        return {split: self._evaluated(split) for split in self.options.test_splits}
