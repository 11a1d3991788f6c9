"""The runner `runner_seed`: LAVIS's runner around the library's trainer, and LAVIS's checkpoints.

`checkpoint_{epoch}.pth` holds `{"model", "optimizer", "config", "scaler", "epoch"}`, the model
without frozen parameters; the next stage, an export or another LAVIS reads it. A killed run resumes
from the trainer's own checkpoints instead.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from seed_lavis import log
from seed_lavis.compat import RunnerBase, registry
from seed_lavis.datasets import joined_splits
from seed_lavis.options import APPLICATION, RunOptions, locate
from seed_lavis.task import TokenizerTask, mean_losses
from seed_multimodal.data.stream.loader import StepBatches
from seed_multimodal.device import copy_to
from seed_multimodal.disk import writable_folder, writing
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.images.transforms import ImageTransform
from seed_multimodal.settings import read_settings
from seed_multimodal.state_dicts import assign_strictly, read_training_state, save_torch
from seed_multimodal.training.checkpoint import checkpoints
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.task import frozen_names
from seed_multimodal.training.trainer import train_stage


@registry.register_runner("runner_seed")
class RunnerSeed(RunnerBase):
    """Trains or evaluates one model.

    cfg: the checked configuration of `options.load_config`.
    """

    # Held-out images `[B, 3, S, S]` for a contact sheet, and of stage 2 their decoded and target
    # embeddings.
    samples: tuple[Tensor, tuple[Tensor, Tensor] | None]

    def __init__(
        self, cfg: Any, task: Any, model: Any, datasets: Mapping[str, Any], job_id: str = ""
    ) -> None:
        self.options = read_settings(RunOptions, cfg.run_cfg, "run")
        super().__init__(cfg, task, model, datasets, job_id)
        self.group = ProcessGroup(self.options.timeout_minutes)
        self.steps_per_epoch = self.options.iters_per_epoch // self.options.accum_grad_iters

    def setup_output_dir(self) -> None:
        """Without LAVIS's folder of results."""
        self.output_dir = self.folder = writable_folder(self.options.output_dir, ConfigError)

    @property
    def preprocessing(self) -> ImageTransform:
        """Of the model's vision encoder."""
        transform: ImageTransform = self._model.visual_encoder.preprocessing
        return transform

    @property
    def model(self) -> nn.Module:
        """The model on its device; the trainer wraps it for several processes."""
        if self._wrapped_model is None:
            self._wrapped_model = self._model.place(self.device)
        return self._wrapped_model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """LAVIS's, or AdamW on the groups of a model that has its own."""
        if self._optimizer is None and hasattr(self._model, "optimizer_groups"):
            run = self.options
            groups = self.model.optimizer_groups(run.weight_decay)
            self._optimizer = torch.optim.AdamW(groups, run.init_lr, betas=(0.9, run.beta2))
        return super().optimizer

    @property
    def precision(self) -> str:
        """`run.precision`; "auto" with `run.amp` on a GPU: bf16 or fp16, else fp32."""
        if self.options.precision != "auto":
            return self.options.precision
        if not self.options.amp or self.device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"

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
        data, order = joined_splits(
            self.datasets, options.train_splits, options.train_dataset_ratios, options.seed
        )
        for split in options.valid_splits:
            joined_splits(self.datasets, [f"{split}:eval"], {})

        # 2. In a contrast an image must not be its own negative.
        if self.model.contrasts and len(data) < options.batch_size_train * world:
            options.batch_size_train = len(data) // world
            if not options.batch_size_train:
                raise ConfigError(f"{len(data)} images are too few for {world} processes.")
            log(
                f"The training set has {len(data)} images: a batch contrasts "
                f"{options.batch_size_train} of each process, and none twice."
            )

        # 3. Training; another run's checkpoint is only read if this run has none.
        with StepBatches(
            data,
            options.batch_size_train,
            seed=options.seed,
            rank=self.group.rank,
            world=world,
            workers=options.num_workers,
            order=order,
            distinct=self.model.contrasts,
        ) as batches:
            task = TokenizerTask(self, batches)
            if options.resume_ckpt_path and not checkpoints(self.folder / task.checkpoint_folder):
                self._load_checkpoint(locate(options.resume_ckpt_path))
                task.first_step = self.steps_per_epoch * self.start_epoch
            record = train_stage(task, self.folder, self.group)

        # 4. The report.
        losses = ", ".join(
            f"{name} {value:.4g}" for name, value in record.items() if name.startswith("loss")
        )
        duration = tqdm.format_interval(record["seconds"])
        log(
            f"{task.name}: {record['steps']:,} steps in {duration}; at the end {losses}; "
            f"{record['bad_samples']} bad samples were replaced.\nNext: "
            f"{shlex.join(self.next_command(record['checkpoint']))}"
        )
        return record

    def next_command(self, checkpoint: str) -> list[str]:
        """Stage 2 after stage 1, the export after the others; from any folder."""
        model = self.model
        if model.stage == "stage1":
            stage2 = Path(self.config.args.cfg_path).absolute().with_name("pretrain_codebook.yaml")
            config = str(stage2) if stage2.is_file() else "YOUR_STAGE_2.yaml"
            command = ["sh", str(APPLICATION / "train_scripts/codebook.sh")]
            command += ["--cfg-path", config, "--options", f"model.pretrained={checkpoint}"]
            vit = dict(model.options.vit)
            if vit.get("type", "eva") != "eva":
                if "path" in vit:
                    vit["path"] = _absolute(vit["path"])
                command.append(f"model.vit={json.dumps(vit)}")
            return command
        # The last stage: its checkpoint, with what an export takes from other files.
        command = ["seed", "export-tokenizer"]
        if model.stage == "lavit-stage1":
            command += ["--lavit", checkpoint]
        else:
            stage1 = _absolute(str(model.options.pretrained))
            command += ["--stage1", stage1, "--stage2", checkpoint]
        if model.vision_file:
            command += ["--vision", _absolute(model.vision_file)]
        return [*command, "--out", str(self.folder / "tokenizer")]

    def evaluate(
        self, cur_epoch: str | int = "best", skip_reload: bool = False
    ) -> dict[str, dict[str, float]]:
        """Mean losses over each of `run.test_splits`; stage 2 also reports its use of codes."""
        if not self.options.test_splits:
            raise ConfigError(
                "run.test_splits names no split to evaluate: give --options run.test_splits=[val]."
            )
        return {split: mean_losses(self, split) for split in self.options.test_splits}

    def log_epoch(self, split_name: str, epoch: int, values: Mapping[str, Any]) -> None:
        """A line of log.txt."""
        with writing(self.folder):
            self.log_stats({"epoch": epoch, **values}, split_name)

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
        file = self.folder / f"checkpoint_{epoch}.pth"
        with writing(file):
            save_torch(content, file)
        n_newest = self.options.keep_checkpoints
        if n_newest:
            files = sorted(
                self.folder.glob("checkpoint_*.pth"),
                key=lambda path: int(path.stem.rpartition("_")[2]),
            )
            for old_file in files[1:-n_newest]:
                old_file.unlink()
        log(f"[{self.model.stage}] epoch {epoch} is done: {file}")

    def _load_checkpoint(self, file: str) -> None:
        """As LAVIS's: model, optimizer and `start_epoch` of a checkpoint without frozen weights."""
        content: Any = read_training_state(Path(file))
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
        if self.start_epoch >= self.options.max_epoch:
            raise ConfigError(
                f"{file}: has {self.start_epoch} epochs behind it, so "
                f"run.max_epoch={self.options.max_epoch} leaves nothing to train."
            )
        log(f"{file}: weights and optimizer loaded; continuing after {self.start_epoch} epochs.")


def _absolute(source: str) -> str:
    """The absolute path of a file or folder of the YAML; a hub id stays as it is."""
    path = Path(locate(source))
    return str(path.absolute()) if path.exists() else source
