"""The runner `runner_seed`: LAVIS's runner, and the training of a stage as a task of the library's
trainer.

From LAVIS come the optimizer (AdamW and its rule of what decays), the learning-rate schedule (by
epoch), log.txt and the content of `checkpoint_N.pth`. An "epoch" is `iters_per_epoch` iterations
(the original: 5000) for any size of the data set; an iteration is a micro-step, so with
`accum_grad_iters` there are fewer optimizer steps.

`checkpoint_{epoch}.pth` holds `{"model", "optimizer", "config", "scaler", "epoch"}`, the model
without frozen parameters; the next stage, an export or another LAVIS reads it. A killed run resumes
from the trainer's own checkpoints instead.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from seed_lavis import log
from seed_lavis.compat import ImageTextPretrainTask, RunnerBase, registry
from seed_lavis.datasets import joined_splits
from seed_lavis.options import APPLICATION, STEP_SCHEDULES, locate
from seed_multimodal.data.stream.step_batches import StepBatches
from seed_multimodal.device import copy_to
from seed_multimodal.disk import replace_text, writable_folder, writing
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.evaluation.tokenizer import COLUMNS, paired_sheet
from seed_multimodal.images.sheet import Cell
from seed_multimodal.images.transforms import ImageTransform
from seed_multimodal.nn.layers import evaluating
from seed_multimodal.state_dicts import assign_strictly, read_training_state, save_torch
from seed_multimodal.training.checkpoint import checkpoints
from seed_multimodal.training.codebook import CodebookTask, codebook_use
from seed_multimodal.training.config import SCHEDULES, StageSettings
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.engine import autocast
from seed_multimodal.training.meters import Meter
from seed_multimodal.training.optimizers import MuonWithAdamW
from seed_multimodal.training.task import RunView, frozen_names
from seed_multimodal.training.trainer import train_stage

# Settings that change no result of the training: not reported when they differ at a resume.
QUIET_KEYS = (
    "output_dir", "resume_ckpt_path", "log_freq", "save_seconds", "save_every_steps",
    "keep_checkpoints", "num_workers", "tensorboard", "curves", "valid_splits", "test_splits",
    "evaluate", "batch_size_eval", "timeout_minutes", "device", "world_size", "distributed",
    "dist_url",
)  # fmt: skip


@registry.register_task("image_gen_pretrain")
class ImageGenPretrainTask(ImageTextPretrainTask):
    """LAVIS's `image_text_pretrain` by another name, which some of the original's files use."""


class EpochMeter(Meter):
    """With the loss of the last step (`loss` is smoothed)."""

    def line(self, steps: int, seconds: float, world: int) -> dict[str, float]:
        return {**super().line(steps, seconds, world), "last_loss": self.last["loss"]}


class TokenizerTask(CodebookTask):
    """One stage of one model; batches: those of the training split."""

    quiet_keys = [f"run.{key}" for key in QUIET_KEYS]
    start_hint = "run.resume_ckpt_path"

    def __init__(self, runner: RunnerSeed, batches: StepBatches) -> None:
        run = runner.options
        # The trainer's settings from LAVIS's keys, its own schedules (by epoch) excepted; a
        # completed run continues with a higher max_epoch.
        schedule = STEP_SCHEDULES.get(run.lr_sched, "cosine")
        has_floor = run.init_lr and "min_lr_ratio" not in SCHEDULES[schedule]
        settings = StageSettings(
            max_steps=runner.steps_per_epoch * run.max_epoch,
            batch_size=run.batch_size_train,
            learning_rate=run.init_lr,
            lr_scheduler_type=schedule,
            warmup_steps=run.warmup_steps,
            min_lr_ratio=run.min_lr / run.init_lr if has_floor else 0.0,
            schedule_per_micro_batch=True,
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
            n_images=batches.n_samples,
        )
        self.runner = runner
        if run.lr_sched not in STEP_SCHEDULES:
            self.learning_rate = self.epoch_rate
        self.meter = EpochMeter(self.meter.samples)
        self.data = batches
        self.parts = [batches, *self.parts]
        self.options = run
        self.sample_steps = runner.steps_per_epoch
        self.eval_steps = runner.steps_per_epoch if run.valid_splits else 0
        self.config = runner.config.to_dict()

    def epoch_rate(self, step: int) -> float:
        """The rate of the optimizer step's last iteration, by LAVIS's schedule."""
        run = self.options
        last_iteration = (step + 1) * run.accum_grad_iters - 1
        epoch, iteration = divmod(last_iteration, run.iters_per_epoch)
        self.runner.lr_scheduler.step(cur_epoch=epoch, cur_step=iteration)
        return self.optimizer.param_groups[0]["lr"]

    def batch(self, micro_step: int) -> dict[str, Any]:
        return self.data.at(micro_step)

    def codebook_points(self, batch: dict[str, Any]) -> Tensor:
        """As the base's, of the images."""
        return self.model.codebook_points(self.runner.with_images(batch)["image"])

    def prepare(self) -> None:
        """Write the run's settings."""
        folder = self.runner.output_dir
        if self.runner.group.first:
            with writing(folder):
                self.runner.log_config()
                replace_text(folder / "config.yaml", OmegaConf.to_yaml(self.runner.config.config))
                sizes = json.dumps(self.model.config.to_dict(), indent=2)
                replace_text(folder / "config.json", sizes + "\n")

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Mapping[str, Any]]:
        """As LAVIS's training step, with all of the model's losses."""
        losses = model(self.runner.with_images(batch))
        return losses.pop("loss"), losses

    def write_samples(self, run: RunView) -> None:
        """The checkpoint of an epoch."""
        runner = self.runner
        epoch = run.step // runner.steps_per_epoch - 1
        with writing(runner.output_dir):
            runner.save_epoch(epoch, run.weights())
            runner.log_stats({"epoch": epoch, **self.meter.metrics()}, "train")

    def evaluate(self, run: RunView) -> dict[str, float]:
        """Held-out losses and samples at the end of an epoch, as `valid/SPLIT/NAME`."""
        runner = self.runner
        epoch = run.step // runner.steps_per_epoch - 1
        validation = {}
        for split in self.options.valid_splits:
            means = mean_losses(runner, split)
            if runner.group.first:
                sheet = runner.output_dir / "samples" / f"{split}-{epoch}.png"
                save_neighbours(sheet, *runner.samples, runner.preprocessing)
                with writing(runner.output_dir):
                    runner.log_stats({"epoch": epoch, "split": split, **means}, "valid")
            for name, value in means.items():
                if isinstance(value, float):  # a loss, not a count
                    validation[f"valid/{split}/{name}"] = value
        return validation

    def finish(self, run: RunView) -> dict[str, Any]:
        """The record of the run."""
        file = self.runner.output_dir / f"checkpoint_{self.options.max_epoch - 1}.pth"
        return {**super().finish(run), "checkpoint": str(file)}


def mean_losses(runner: RunnerSeed, split: str) -> dict[str, float]:
    """Mean of every loss over `samples` images of a split, and the use of the codebook by them.

    All processes call it together and get the same values.
    """
    model = runner.model
    world = runner.group.world
    data, _ = joined_splits(runner.datasets, [f"{split}:eval"], {})
    n_images = sum(map(len, data))
    if n_images < world:
        raise ConfigError(f"Split {split!r} has {n_images} images, too few for {world} processes.")

    # 1. All batches have one size, because a contrast depends on the number of images that are
    #    compared. Fewer images remain unused than there are batches.
    n_batches = math.ceil(n_images / (runner.options.batch_size_eval * world))
    n_batches = min(n_batches, n_images // world)  # a batch has at least one image
    size = n_images // (n_batches * world)
    batches = StepBatches(
        data,
        size,
        seed=0,
        rank=runner.group.rank,
        world=world,
        workers=min(runner.options.num_workers, n_batches),
        shuffle=False,
        max_bad_in_a_row=runner.options.max_bad_in_a_row,
    )

    # 2. Sums of the losses, and the codes.
    sums = {}
    codes = []
    with torch.no_grad(), evaluating(model), batches:
        for step in range(n_batches):
            samples = runner.with_images(batches.at(step))
            with autocast(runner.device, runner.precision):
                losses = model(samples)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + float(value)
            if model.codes is not None:
                codes.append(model.codes.flatten())
            if step == 0:  # for the contact sheet
                runner.samples = samples["image"], model.matched

    # 3. Means over all processes, and how often each code is used.
    uses = []
    if codes:
        uses = torch.cat(codes).bincount(minlength=model.quantize.size).tolist()
    totals = runner.group.sum([*sums.values(), *uses])
    means = {name: total / (n_batches * world) for name, total in zip(sums, totals, strict=False)}
    return {
        "samples": n_batches * size * world,
        **means,
        **codebook_use(torch.tensor(totals[len(sums) :])),
        "bad_samples": batches.n_bad,
    }


def save_neighbours(
    file: Path, images: Tensor, matched: tuple[Tensor, Tensor] | None, preprocessing: ImageTransform
) -> None:
    """A sheet of held-out images above the images nearest to their decoded embeddings.

    images: pixels `[B, 3, S, S]`, normalised by `preprocessing`.
    matched: embeddings of codes and of images, `[B, E]` each; None: no sheet.
    """
    if matched is None:
        return
    # 1. The nearest image of each embedding that its codes give.
    decoded = nn.functional.normalize(matched[0].detach(), dim=-1)
    targets = nn.functional.normalize(matched[1].detach(), dim=-1)
    nearest = (decoded @ targets.T).argmax(1).tolist()[:COLUMNS]

    # 2. The sheet.
    cells = [Cell(preprocessing.to_image(image)) for image in images[: len(nearest)]]
    nearest_cells = [Cell(preprocessing.to_image(images[index])) for index in nearest]
    file.parent.mkdir(parents=True, exist_ok=True)
    paired_sheet(cells, nearest_cells, "nearest to its codes", file.stem).save(file)


@registry.register_runner("runner_seed")
class RunnerSeed(RunnerBase):
    """Trains or evaluates one model.

    cfg: the checked configuration of `options.load_config`, whose section `run` has all fields of
        `RunOptions`.
    parts: task, model, data sets and id of the run, see LAVIS's.
    """

    def __init__(self, cfg: Any, *parts: Any) -> None:
        self.options = cfg.run_cfg
        super().__init__(cfg, *parts)
        self.group = ProcessGroup(self.options.timeout_minutes)
        self.steps_per_epoch = self.options.iters_per_epoch // self.options.accum_grad_iters

    def setup_output_dir(self) -> None:
        """Without LAVIS's folder of results."""
        self.output_dir = writable_folder(self.options.output_dir, ConfigError)

    @property
    def model(self) -> nn.Module:
        """The model on its device; the trainer wraps it for several processes."""
        if self._wrapped_model is None:
            self._wrapped_model = self._model.place(self.device)
        return self._wrapped_model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """LAVIS's, Muon, or AdamW on the groups of a model that has its own."""
        options = self.options
        has_groups = hasattr(self._model, "optimizer_groups")
        betas = (0.9, options.beta2)
        if self._optimizer is None and options.optimizer == "muon":
            if has_groups:
                raise ConfigError(
                    "run.optimizer: this model's parts have rates of their own, which muon does "
                    "not read; use adamw."
                )
            self._optimizer = MuonWithAdamW(
                self.model, options.init_lr, options.weight_decay, betas
            )
        elif self._optimizer is None and has_groups:
            self._optimizer = torch.optim.AdamW(
                self.model.optimizer_groups(options.weight_decay),
                options.init_lr,
                betas=betas,
            )
        return super().optimizer

    @property
    def precision(self) -> str:
        """`run.precision`; "auto" with `run.amp` on a GPU: bf16 or fp16, else fp32."""
        if self.options.precision != "auto":
            return self.options.precision
        if not self.options.amp or self.device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"

    @cached_property
    def preprocessing(self) -> ImageTransform:
        """The vision encoder's."""
        return self.model.visual_encoder.preprocessing

    def with_images(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch with its images on the device; uint8 from the workers is normalised there."""
        images = copy_to(self.device, batch["image"])
        if images.dtype == torch.uint8:
            images = self.preprocessing.normalise(images)
        return {**batch, "image": images}

    def train(self) -> dict[str, Any]:
        """Train to the end, from the newest checkpoint in the output folder; returns the record."""
        options = self.options
        world = self.group.world

        # 1. Data; a wrong name of a validation split is an error now, not after the first epoch.
        data, weights = joined_splits(
            self.datasets, options.train_splits, options.train_dataset_ratios
        )
        for split in options.valid_splits:
            joined_splits(self.datasets, [f"{split}:eval"], {})

        # 2. In a contrast an image must not be its own negative.
        n_images = sum(map(len, data))
        if self.model.contrasts and n_images < options.batch_size_train * world:
            options.batch_size_train = n_images // world
            log(
                f"The training set has {n_images} images: a batch contrasts "
                f"{options.batch_size_train} of each process, and none twice."
            )
        if self.model.contrasts and options.batch_size_train * world == 1:
            log(
                "warning: a batch of one pair has no other to contrast it with, so loss_itc is 0; "
                "raise run.batch_size_train."
            )

        # 3. Training; another run's checkpoint is only read if this run has none.
        with StepBatches(
            data,
            options.batch_size_train,
            seed=options.seed,
            rank=self.group.rank,
            world=world,
            nodes=self.group.nodes,
            workers=options.num_workers,
            weights=weights,
            distinct=self.model.contrasts,
            max_bad_in_a_row=options.max_bad_in_a_row,
        ) as batches:
            task = TokenizerTask(self, batches)
            first_step = 0
            if options.resume_ckpt_path and not checkpoints(
                self.output_dir / task.checkpoint_folder
            ):
                self._load_checkpoint(locate(options.resume_ckpt_path))
                first_step = self.steps_per_epoch * self.start_epoch
            record = train_stage(task, self.output_dir, self.group, first_step)

        # A recipe of `seed init` runs its next steps itself.
        if not Path(self.config.args.cfg_path).with_name("run.sh").is_file():
            log(f"Next: {shlex.join(self.next_command(record['checkpoint']))}")
        return record

    def next_command(self, checkpoint: str) -> list[str]:
        """Stage 2 after stage 1, the export after the others; from any folder."""
        config_file = Path(self.config.args.cfg_path)
        model = self.model
        if model.stage == "stage1":
            stage2 = config_file.with_name("pretrain_codebook.yaml")
            config = str(stage2) if stage2.is_file() else "YOUR_STAGE_2.yaml"
            command = ["sh", str(APPLICATION / "train_scripts/codebook.sh")]
            command += ["--cfg-path", config, "--options", f"model.pretrained={checkpoint}"]
            vit = dict(model.options.vit)
            if vit.get("type", "eva") != "eva":
                command.append(f"model.vit={json.dumps(vit)}")
            return command
        # The last stage: its checkpoint, with what an export takes from other files.
        command = ["seed", "export-tokenizer"]
        if model.stage == "lavit-stage1":
            command += ["--lavit", checkpoint]
        else:
            stage1 = locate(str(model.options.pretrained))
            command += ["--stage1", stage1, "--stage2", checkpoint]
        if model.vision_file:
            command += ["--vision", model.vision_file]
        return [*command, "--out", str(self.output_dir / "tokenizer")]

    def evaluate(self) -> dict[str, Any]:
        """Mean losses over each of `run.test_splits`; stage 2 also reports its use of codes."""
        if not self.options.test_splits:
            raise ConfigError(
                "run.test_splits names no split to evaluate: give --options run.test_splits=[val]."
            )
        return {split: mean_losses(self, split) for split in self.options.test_splits}

    def save_epoch(self, epoch: int, weights: Mapping[str, Tensor]) -> None:
        """Write `checkpoint_{epoch}.pth`, and remove old ones.

        The first and the newest `run.keep_checkpoints` ones stay.
        """
        content = {
            "model": weights,
            "optimizer": self.optimizer.state_dict(),
            "config": self.config.to_dict(),
            "scaler": None,
            "epoch": epoch,
        }
        file = self.output_dir / f"checkpoint_{epoch}.pth"
        save_torch(content, file)
        n_newest = self.options.keep_checkpoints
        if n_newest:
            files = sorted(
                self.output_dir.glob("checkpoint_*.pth"),
                key=lambda path: int(path.stem.rpartition("_")[2]),
            )
            for old_file in files[1:-n_newest]:
                old_file.unlink()
        log(f"[{self.model.stage}] epoch {epoch} is done: {file}")

    def _load_checkpoint(self, file: str) -> None:
        """As LAVIS's: model, optimizer and `start_epoch` of a checkpoint without frozen weights."""
        content = read_training_state(Path(file))
        frozen = frozen_names(self.model)
        try:
            assign_strictly(self.model, content["model"], file, allow_missing=frozen)
            self.optimizer.load_state_dict(content["optimizer"])
            self.start_epoch = int(content["epoch"]) + 1
        except (TypeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{file}: not a LAVIS checkpoint with model, optimizer and epoch, or of another "
                f"optimizer ({error}); to take its weights only, use model.finetuned."
            ) from error
        log(f"{file}: weights and optimizer loaded; continuing after {self.start_epoch} epochs.")
