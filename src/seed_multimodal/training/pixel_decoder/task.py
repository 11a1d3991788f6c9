"""A pixel decoder's training as a task of the loop: a U-Net and what makes its conditions learn to draw pictures.

Whatever the conditions are: a subclass says what a frozen model makes of pictures (`conditions`), what is trained
(`build`), and the loss of a batch (`losses`). SEED-X's: `training/seed_x/detokenizer.py`; LaVIT's:
`training/lavit/detokenizer.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from seed_multimodal.data.stream.drawn_pairs import DrawnPairs, by_size, open_pictures
from seed_multimodal.data.stream.order import MixedOrder
from seed_multimodal.data.stream.pair_dataset import JoinedPairs, SourceDataset, sample_seed
from seed_multimodal.data.stream.step_batches import StepBatches, block_of
from seed_multimodal.device import copy_to
from seed_multimodal.diffusion.base import Detokenizer
from seed_multimodal.disk import making_folder
from seed_multimodal.errors import ConfigError
from seed_multimodal.training.distributed import ProcessGroup, TrainingError
from seed_multimodal.training.engine import fill_config, full_weights, use_offload_threads
from seed_multimodal.training.frozen_features import FrozenFeatures
from seed_multimodal.training.llm.summary import save_config
from seed_multimodal.training.metrics import Meter
from seed_multimodal.training.optimizers import build_optimizer, schedule
from seed_multimodal.training.pixel_decoder.features import (
    LatentMoments,
    PictureFeatures,
    drawn_latents,
    load_autoencoder,
    load_schedule,
)
from seed_multimodal.training.pixel_decoder.kept_features import keep_features
from seed_multimodal.training.pixel_decoder.settings import PixelRun
from seed_multimodal.training.task import Task, other_numbers, refuse_other

SMALL = 256  # side of pictures of which the autoencoder takes one at a time; of smaller ones it takes several
# Settings that change no number of the training, or are reported elsewhere (`PixelTask.check_resume`).
_QUIET = ("output_dir", "data.batch_size", "data.cache", "model.gradient_checkpointing", "trainer.resume",
          "trainer.logging_steps", "trainer.save_steps", "trainer.save_total_limit", "trainer.async_save",
          "trainer.report_to", "trainer.run_name", "trainer.dataloader_num_workers", "trainer.device",
          "trainer.timeout_minutes", "trainer.gradient_accumulation_steps", "trainer.save_frozen", "deepspeed")


class PixelTask(Task):
    """One run in one process.

    Attributes:
        result: folder of what is trained in the run's. kind: what the diffusers folder is called in errors.
        parts: what is trained; frozen: the model of the conditions.
        reads_condition: whether samples hold a picture to draw beside.
        schedule, scaling, latent_channels: of the diffusers folder's noise and autoencoder, after `prepare`.
    """

    name, record_file, checkpoint_folder = "train", "summary.json", ""
    quiet_keys = _QUIET
    start_hint = "model.start"
    result: ClassVar[str]
    kind: ClassVar[type[Detokenizer]]
    parts: ClassVar[str]
    frozen: ClassVar[str]
    reads_condition = False

    def __init__(self, run: PixelRun[Any], group: ProcessGroup, device: torch.device) -> None:
        """Open the sources. Raises as `run_task`."""
        self.run, self.settings, self.group, self.device = run, run.trainer, group, device
        self.config = run.plain
        self.learning_rate(self.settings.max_steps - 1)  # a schedule with impossible options ends here
        self.sources = [open_pictures(source.spec()) for source in run.data.sources]
        self.meter = Meter(run.data.batch_size * self.settings.gradient_accumulation_steps)
        self.features: PictureFeatures
        self.batches: StepBatches

    # ---------------------------------------------------------------------------------------- what a system brings

    @property
    def folder(self) -> Path:
        """The diffusers folder of autoencoder and noise schedule."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Of the conditions (for DeepSpeed's `auto` values)."""
        raise NotImplementedError

    def conditions(self) -> FrozenFeatures:
        """What is made of `seen` pixels."""
        raise NotImplementedError

    def build(self) -> nn.Module:
        """What training begins with, on the CPU, with what is trained switched on; it has a `unet`."""
        raise NotImplementedError

    def losses(self, model: nn.Module, latents: Tensor, features: Mapping[str, Tensor], time_ids: Tensor,
               generator: torch.Generator) -> Mapping[str, Tensor]:
        """`total_loss` and `mse` of samples of one size, with what `PictureFeatures` gives of them."""
        raise NotImplementedError

    def about_model(self) -> dict[str, Any]:
        """What must be the same for a resume."""
        raise NotImplementedError

    def save_result(self, module: nn.Module, folder: Path) -> None:
        """Write what was trained, whole."""
        raise NotImplementedError

    def about_record(self) -> dict[str, Any]:
        """What the run's record says of it."""
        return {}

    @property
    def title(self) -> str:
        """Of the run, in its log."""
        return self.result

    # ------------------------------------------------------------------------------------------------- the training

    def prepare(self) -> None:
        """Write the configuration into the output folder; build data, models and optimiser."""
        run = self.run
        if self.group.first:
            save_config(run.output_dir, run.plain)
        self.schedule = load_schedule(self.folder, self.kind)
        self._prepare_data()
        self._prepare_features()
        self.module = self.build().to(self.device)
        unet: Any = self.module.unet
        if unet.config.out_channels != self.latent_channels:
            raise ConfigError(f"model: the U-Net draws latents of {unet.config.out_channels} channels, but the "
                              f"autoencoder of {self.folder} makes {self.latent_channels}.")
        self.optimizer = build_optimizer(self.module, run.optim)

    def _prepare_data(self) -> None:
        data = self.run.data
        parts: list[SourceDataset] = [
            DrawnPairs(source, data.view, reads_condition=self.reads_condition, seed=data.seed,
                       max_bad_in_a_row=data.max_bad_in_a_row, log=self._log) for source in self.sources]
        self.account = parts[0] if len(parts) == 1 else JoinedPairs(parts)
        self.batches = StepBatches(self.account, data.batch_size, seed=data.seed, rank=self.group.rank,
                                   world=self.group.world, workers=self.settings.dataloader_num_workers,
                                   order=self._order(parts), collate=by_size)

    def _prepare_features(self) -> None:
        data, cache = self.run.data, self.run.data.cache
        vae = load_autoencoder(self.folder, self.kind)
        self.scaling, self.latent_channels = float(vae.config.scaling_factor), int(vae.config.latent_channels)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        odd = next((side for size in data.drawn_sizes for side in size if side % factor), None)
        if odd is not None:
            raise ConfigError(f"data: {'sizes: ' if data.sizes else 'resolution '}{odd} is no multiple of {factor}, "
                              "pixels of a latent.")
        largest = max(height * width for height, width in data.drawn_sizes)
        moments = LatentMoments(vae, self.device, cache or None, at_once=max(1, SMALL**2 // largest))
        self.features = PictureFeatures(self.conditions(), moments)
        if cache:
            about = {key: value for key, value in self.run.plain["data"].items() if key not in ("cache", "batch_size")}
            keep_features(self.features, self.batches, self._samples(self.group.world) * self.settings.max_steps,
                          self.group, folder=self.run.output_dir, batch_size=data.batch_size, about=about,
                          workers=self.settings.dataloader_num_workers, log=self._log)

    def _order(self, parts: list[SourceDataset]) -> MixedOrder | None:
        if len(parts) == 1:
            return None
        data = self.run.data
        return MixedOrder([len(part) for part in parts], [source.weight for source in data.sources], data.seed,
                          sizes=[part.shard_sizes for part in parts], block=min(map(block_of, parts)))

    def prepared(self, run: Any) -> None:
        """Log what is trained."""
        trained = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.module.parameters())
        world, pictures = self.group.world, sum(map(len, self.sources))
        self._log(f"{self.title}: {trained:,} of {total:,} parameters are trained in "
                  f"{self.settings.precision}, {world} process{'es' if world > 1 else ''} on {self.device.type}; "
                  f"{pictures:,} pictures of {len(self.sources)} source{'s' if len(self.sources) > 1 else ''}, "
                  f"{self._samples(world)} a step; output in {self.run.output_dir}.")

    def deepspeed_config(self, world: int) -> Mapping[str, Any] | None:
        """The configuration's DeepSpeed block, filled."""
        if self.run.deepspeed is None:
            return None
        config, remarks = fill_config(self.run.deepspeed, self.settings.loop_settings(), world=world,
                                      rows=self.run.data.batch_size, hidden_size=self.width)
        for remark in filter(None, [*remarks, use_offload_threads(config)]):
            self._log(remark)
        return config

    def learning_rate(self, step: int) -> float:
        """By `OptimSettings`."""
        return schedule(step, self.run.optim, self.settings.max_steps, self.settings.gradient_accumulation_steps)

    def micro_step(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        """The loss of a batch, size by size; what is random follows from the batch's place in the order, so that a
        step's numbers do not depend on how many processes share it. On CPUs attention by plain matrix products, as
        `StageTask`."""
        place = micro_step * self.group.world + self.group.rank
        generator = torch.Generator().manual_seed(sample_seed(self.settings.seed, 0, place))
        kernel = sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else contextlib.nullcontext()
        groups = self.batches.at(micro_step)
        count = sum(len(batch["key"]) for batch in groups)
        loss, mse = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        with kernel:
            for batch in groups:
                features = self.features(batch)
                latents = drawn_latents(features["moments"], self.scaling, generator)
                made = self.losses(model, latents, features, copy_to(self.device, batch["time_ids"]), generator)
                share = len(batch["key"]) / count
                loss, mse = loss + share * made["total_loss"], mse + share * made["mse"]
        return loss, {"mse": mse}

    def close(self) -> None:
        """End what reads data; a run that was not prepared reads none."""
        if hasattr(self, "batches"):
            self.batches.close()

    def status(self) -> Mapping[str, float]:
        """Seconds spent waiting for data, and bad samples."""
        return {"wait_seconds": self.batches.wait_seconds, "bad_samples": len(self.batches.bad_samples())}

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        """Write the result."""
        folder, module = self.run.output_dir / self.result, self.module
        if self.run.deepspeed is not None:  # its weights are in half precision; what is trained is kept in fp32, spread
            trained = full_weights(module)
            module = self.build() if group.first else module
            if group.first:
                module.load_state_dict(trained, strict=False)
        if group.first:
            with making_folder(folder, folder, TrainingError) as made:  # never a new U-Net beside an old decoder
                self.save_result(module, made)
        return {**self.about_record(), "processes": group.world, "samples_per_step": self._samples(group.world),
                "bad_samples": len(self.batches.bad_samples()), self.result: str(folder),
                **{key: round(value, 6) for key, value in self.meter.smooth.items()}}

    # ---------------------------------------------------------------------------------------------- the checkpoints

    def frozen_models(self) -> dict[str, list[float]]:
        """What conditions and latents are made with."""
        return {self.frozen: self.features.seen.some_weights, "autoencoder": self.features.moments.some_weights}

    def identity(self, world: int) -> dict[str, Any]:
        """What is trained, and samples of a step over all processes, from which their order follows."""
        return {"model": self.about_model(), "optimizer": self.run.optim.name, "processes": world,
                "engine": "plain" if self.run.deepspeed is None else "deepspeed", "zero_stage": self._zero_stage(),
                "max_steps": self.settings.max_steps, "samples_per_step": self._samples(world)}

    def check_resume(self, folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
        """Refuse another model or optimiser, and another number of samples per step."""
        refuse_other(folder, saved, now, {"model": "model", "optimizer": "optimiser", "engine": "engine",
                                               "zero_stage": "ZeRO stage"}, self.start_hint)
        if self.run.deepspeed is not None:
            refuse_other(folder, saved, now, {"processes": "processes"}, self.start_hint)
        refuse_other(folder, saved, now, {"samples_per_step": "samples per step"}, self.start_hint)
        return other_numbers(saved, now, {"processes": "processes",
                                          "max_steps": "steps in all (the schedule follows)"})

    def state_dict(self, step: int) -> dict[str, Any]:
        """The bad samples that this process found."""
        return self.account.state_dict()

    def load_state_dict(self, states: list[dict[str, Any]], rank: int) -> None:
        """Inverse of `state_dict`."""
        for state in states[rank::self.group.world]:  # there may have been more processes, or fewer
            self.account.load_state_dict(state)

    def _zero_stage(self) -> int:
        return int(((self.run.deepspeed or {}).get("zero_optimization") or {}).get("stage", 0))

    def _samples(self, world: int) -> int:
        return self.run.data.batch_size * self.settings.gradient_accumulation_steps * world

    def _log(self, text: str) -> None:
        if self.group.first:
            print(f"[{self.name}] {text}", flush=True)
