"""A pixel decoder's trainer task: a denoiser that learns to reconstruct images.

Subclasses (`recipes.seed.train_detokenizer`, `recipes.seed_x.train_detokenizer`,
`recipes.lavit.train_pixels`) define the frozen conditioning model and the trained de-tokenizer.
"""

from __future__ import annotations

import pkgutil
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.data.formats.pairs import Pairs
from seed_multimodal.data.stream.order import sample_seed
from seed_multimodal.data.stream.step_batches import StepBatches
from seed_multimodal.data.stream.targets import (
    RecordedCodes,
    Size,
    TargetBatch,
    TargetPairs,
    by_size,
)
from seed_multimodal.device import copy_to
from seed_multimodal.diffusion.base import DEFAULTS, Detokenizer
from seed_multimodal.diffusion.networks import (
    context_dim,
    denoiser_kind,
    drop_conditions,
    predict,
)
from seed_multimodal.diffusion.objectives import NoisyLatents, Objective, build_objective
from seed_multimodal.diffusion.training import train_denoiser
from seed_multimodal.disk import atomic_folder
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.sheet import Cell, Row, contact_sheet
from seed_multimodal.images.transforms import ImageTransform
from seed_multimodal.nn.frozen import FrozenFeatures
from seed_multimodal.nn.layers import checkpointed
from seed_multimodal.training.distributed import ProcessGroup, TrainingError
from seed_multimodal.training.hydra_task import RunTask
from seed_multimodal.training.meters import Meter, Metrics
from seed_multimodal.training.optimizers import build_optimizer
from seed_multimodal.training.pixel_decoder.config import PixelRunSettings
from seed_multimodal.training.pixel_decoder.encoders import (
    EncodedImages,
    ImageEncoders,
    condition_images,
    latent_moments,
    sample_latents,
    to_image,
)
from seed_multimodal.training.task import Identity, RunView
from seed_multimodal.training.zero_engine import gather_full_weights
from seed_multimodal.weights.find import find_folder

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


NEEDED = (
    "unet/*",
    "transformer/*",
    "vae/*",
    "scheduler/*",
    "code_adapter/*",
    "decoder/*",
    "conditioner/*",
    "layout/*",
    "uncond_embeddings.bin",
    "seed_decode.json",
)  # files of a diffusers repository, and of our results
WHOLE_MODELS = (".ckpt", ".safetensors")  # files next to the parts, which are not copied
SMALL = 256  # pixels a side: the VAE encodes larger images one at a time, smaller ones in batches
SAMPLES = 4  # images during training
# By its name, since its base class is here.
DISTILLATION = "seed_multimodal.training.pixel_decoder.distill:Distillation"


class TrainedDetokenizer(nn.Module):
    """The networks of a de-tokenizer that are trained.

    networks: names in checkpoints → attributes of the de-tokenizer.
    """

    def __init__(self, detokenizer: Detokenizer, networks: Mapping[str, str]) -> None:
        super().__init__()
        self.detokenizer = detokenizer
        for name, attribute in networks.items():
            self.add_module(name, getattr(detokenizer, attribute))

    def forward(
        self,
        noisy: Tensor,
        steps: Tensor,
        embeds: Tensor | Sequence[Tensor],
        time_ids: Tensor,
        without: Tensor,
        condition_latents: Tensor | None = None,
    ) -> Tensor:
        """The denoiser's prediction `[B, C, h, w]` for noisy latents at time steps `[B]`.

        time_ids: `[B, 6]`, see `size_ids`.
        without: bool `[B]`, images whose conditions are the unconditional ones.
        condition_latents: `[B, C, h, w]`, further input channels.
        """
        detokenizer = self.detokenizer
        read, _ = detokenizer.read(embeds)
        conditions, null = detokenizer.conditions(read, None, time_ids, detokenizer.defaults, ())
        conditions = drop_conditions(conditions, null(), without)
        if condition_latents is not None:
            noisy = torch.cat([noisy, condition_latents], dim=1)
        return predict(detokenizer.denoiser, noisy, steps, conditions)


@dataclass
class PixelBatch:
    """A micro-batch: its images by size, and its random numbers, those of its position for any
    number of processes."""

    parts: Sequence[TargetBatch]
    generator: torch.Generator


class Reconstruction:
    """A denoiser that learns to reconstruct images from their conditions."""

    drawing_steps = 20  # of the images that are sampled

    def __init__(self, task: PixelTask) -> None:
        self.task = task
        self.fixed_settings = task.fixed_settings
        self.frozen_models: dict[str, str] = {}  # fingerprints

    def scheduler(self) -> SchedulerMixin:
        """The scheduler that determines the objective."""
        return self.task.load_scheduler()

    @cached_property
    def objective(self) -> Objective:
        """What the denoiser predicts."""
        return self.task.new_objective(self.scheduler())

    def build(self) -> TrainedDetokenizer:
        """The initial module on the CPU."""
        vae = self.task.encoders.moments.model
        detokenizer = self.task.new_detokenizer(vae, self.scheduler())
        return TrainedDetokenizer(detokenizer, detokenizer.trained)

    def losses(
        self,
        model: nn.Module,
        images: EncodedImages,
        latents: Tensor,
        generator: torch.Generator,
    ) -> Mapping[str, Tensor]:
        """`total_loss` and `mse` of images of one size, for some without conditions."""
        task = self.task
        dropout = task.model.condition_dropout
        without, without_image = dropout.draw(len(latents), generator)
        noisy = NoisyLatents.sample(self.objective, latents, generator)
        condition_latents = images.condition_latents
        if condition_latents is not None:
            without_image = without_image.to(latents.device)[:, None, None, None]
            condition_latents = condition_latents * ~without_image
        prediction = model(
            noisy.latents,
            noisy.steps,
            task.embeds(images.conditions),
            copy_to(task.device, images.batch["time_ids"]),
            without.to(latents.device),
            condition_latents,
        )
        return noisy.losses(prediction)

    def save(self, module: TrainedDetokenizer, folder: Path) -> None:
        """Write the complete result."""
        self.task.save_trained(module.detokenizer, folder)
        for name in self.task.copied:
            copy_part(self.task.folder / name, folder / name)


class PixelTask(RunTask):
    """One run in one process; subclasses set the class attributes without a value."""

    run: PixelRunSettings
    module: TrainedDetokenizer
    step_batches: StepBatches[list[TargetBatch]]
    start_hint = "model.start"
    reads_condition = False  # whether samples have a condition image
    recorded: RecordedCodes | None = None  # conditions in the records; None: of the images
    result: ClassVar[str]  # subfolder of the result
    detokenizer_class: ClassVar[type[Detokenizer]]  # of the result
    frozen_name: ClassVar[str]  # of the conditioning model, for messages and checkpoints
    fixed_settings: ClassVar[tuple[str, ...]]  # of the model, which must not change on resume
    copied: ClassVar[tuple[str, ...]] = ()  # from the initial folder to the result
    null_embeds: Tensor | None = None  # unconditional embeddings; None: the de-tokenizer's

    def __init__(self, run: PixelRunSettings, group: ProcessGroup, device: torch.device) -> None:
        """Open the sources. Raises as `RunTask.train`."""
        super().__init__(run, group, device)
        if not run.data.sources:
            raise ConfigError("data: sources must list at least one source of images.")
        if run.deepspeed and self.zero_stage not in (1, 2):
            raise ConfigError("deepspeed: pixel decoders train with ZeRO stage 1 or 2.")
        self.model = run.model
        self.view = run.data.view  # how images are cut and resized
        self.rows = run.data.batch_size
        self.folder = find_folder(
            run.model.diffusion_folder, NEEDED, self.detokenizer_class.download_hint
        )
        self.sources = [source.open() for source in run.data.sources]
        self.meter = Meter(run.data.batch_size * self.settings.gradient_accumulation_steps)
        self.learner: Reconstruction = Reconstruction(self)
        if run.model.teacher:
            self.learner = pkgutil.resolve_name(DISTILLATION)(self)
        # Batches of the images that are sampled, from the first samples on.
        self.sample_batches: list[EncodedImages] = []

    # ---- defined by subclasses

    def conditions(self) -> FrozenFeatures:
        """The frozen model that computes conditions of the encoder's images."""
        raise NotImplementedError

    def new_detokenizer(self, vae: nn.Module, scheduler: SchedulerMixin) -> Detokenizer:
        """The initial de-tokenizer on the CPU.

        Its networks but the denoiser have `requires_grad` set.
        """
        raise NotImplementedError

    def save_trained(self, detokenizer: Any, folder: Path) -> None:
        """Write what was trained."""
        raise NotImplementedError

    def load_decoder(self, path: str) -> Detokenizer:
        """A trained decoder, `model.teacher` or `model.start`."""
        raise NotImplementedError

    # ---- shared

    def embeds(self, conditions: Tensor) -> Tensor | Sequence[Tensor]:
        """Conditions as the detokenizer's input."""
        return conditions.float()

    def new_objective(self, scheduler: SchedulerMixin) -> Objective:
        """What the denoiser learns to predict."""
        return build_objective(scheduler, self.model.flow_times)

    def save_student(self, denoiser: nn.Module, teacher: Any, folder: Path) -> None:
        """Write a decoder as `teacher`, with another denoiser, without scheduler and settings."""
        denoiser_folder = denoiser_kind(denoiser).folder
        for path in self.folder.iterdir():
            is_replaced = path.name in (denoiser_folder, "scheduler", DEFAULTS)
            if not is_replaced and path.suffix not in WHOLE_MODELS:
                copy_part(path, folder / path.name)
        denoiser.save_pretrained(folder / denoiser_folder)

    def load_scheduler(self) -> SchedulerMixin:
        """The scheduler that samples, which determines the objective."""
        return self.detokenizer_class.load_part(self.folder, "scheduler")

    # ---- training

    def prepare(self) -> None:
        """Build data, models and optimizer."""
        super().prepare()
        data = self.run.data

        # 1. Frozen models.
        vae = self.detokenizer_class.load_part(self.folder, "vae")
        max_pixels = max(height * width for height, width in self.image_sizes())
        moments = latent_moments(vae, self.device, max(1, SMALL**2 // max_pixels))
        self.encoders = ImageEncoders(self.conditions(), moments)

        # 2. Batches of the sources, mixed by their weights.
        datasets = [self._target_pairs(source) for source in self.sources]
        weights = [source.weight for source in data.sources]
        self.step_batches = StepBatches(
            datasets,
            data.batch_size,
            seed=data.seed,
            weights=weights,
            rank=self.group.rank,
            world=self.group.world,
            nodes=self.group.nodes,
            workers=self.settings.dataloader_num_workers,
            collate=by_size,
            max_bad_in_a_row=data.max_bad_in_a_row,
            log=self._log,
        )
        self.parts = [self.step_batches]

        # 3. What is trained.
        self.module = self.new_module().to(self.device)
        self.optimizer = build_optimizer(self.module, self.run.optim)

        # 4. The samples' images: if they cannot be read, the run ends before its first step.
        if self.sample_steps and self.group.first:
            self.sample_batches = self._held_out_batches()

        self.frozen_models = {
            self.frozen_name: self.encoders.conditions.fingerprint,
            "autoencoder": self.encoders.moments.fingerprint,
            **self.learner.frozen_models,
        }
        n_images = sum(map(len, self.sources))
        n_samples = self._samples_per_step(self.group.world)
        self.log_sizes(f"{self.result}: {n_images:,} images, {n_samples} a step; ")

    def new_module(self) -> TrainedDetokenizer:
        """The initial module on the CPU, with `requires_grad` set."""
        module = self.learner.build()
        module.detokenizer.device = self.device
        denoiser = module.detokenizer.denoiser
        train_denoiser(denoiser, self.model.trained)
        if self.model.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing(checkpointed)
        self.width = context_dim(denoiser)
        return module.train()

    def image_sizes(self) -> Sequence[Size]:
        """Height and width of the targets."""
        data = self.run.data
        return data.sizes or [(data.resolution, data.resolution)]

    def check_side(self, side: int) -> None:
        """Raise ConfigError if views have another size than the encoder's input."""
        if side != self.run.data.encoder_size:
            raise ConfigError(
                f"data: encoder_size is {self.run.data.encoder_size}, but the {self.frozen_name} "
                f"expects {side} pixels a side."
            )

    def resize_as(self, transform: ImageTransform) -> None:
        """Resize the encoder's images as by its preprocessing."""
        self.check_side(transform.image_size)
        self.view = replace(self.view, encoder_interpolation=transform.interpolation)

    def codes_of(self, network: nn.Module, transform: ImageTransform) -> FrozenFeatures:
        """The codes of the images by a frozen network, see `CodeCodec`."""
        self.resize_as(transform)

        def codes(pixels: Tensor) -> Tensor:
            return network.encode(transform.normalise(pixels))

        return FrozenFeatures(network, self.device, codes)

    def _target_pairs(self, source: Pairs) -> TargetPairs:
        data = self.run.data
        return TargetPairs(
            source,
            self.view,
            reads_condition=self.reads_condition,
            recorded=self.recorded,
            seed=data.seed,
        )

    def batches(self, step: int) -> list[PixelBatch]:
        count = self.settings.gradient_accumulation_steps
        batches: list[PixelBatch] = []
        for micro_step in range(step * count, (step + 1) * count):
            position = micro_step * self.group.world + self.group.rank
            generator = torch.Generator().manual_seed(sample_seed(self.settings.seed, 0, position))
            batches.append(PixelBatch(self.step_batches.at(micro_step), generator))
        return batches

    def loss(self, model: nn.Module, batch: PixelBatch) -> tuple[Tensor, Metrics]:
        """The mean over a batch's images, size by size."""
        n_images = sum(len(part["key"]) for part in batch.parts)
        loss = torch.zeros((), device=self.device)
        mse = torch.zeros((), device=self.device)
        for part in batch.parts:
            images = self.encoders(part)
            vae = self.encoders.moments.model
            latents = sample_latents(vae, images.moments, batch.generator)
            losses = self.learner.losses(model, images, latents, batch.generator)
            share = len(part["key"]) / n_images
            loss = loss + share * losses["total_loss"]
            mse = mse + share * losses["mse"]
        return loss, {"mse": mse}

    def write_samples(self, run: RunView) -> None:
        """Reconstruct held-out images next to the originals, with fixed noise."""
        # 1. Draw them.
        drawings: list[Image.Image] = []
        originals: list[Image.Image] = []
        for images in self.sample_batches:
            drawings += self.draw_samples(images)
            originals += map(to_image, images.batch["image"])

        # 2. Write one sheet with both.
        rows = [Row("image", list(map(Cell, originals))), Row("drawn", list(map(Cell, drawings)))]
        sheet = contact_sheet(rows, f"step {run.step}", cell=256)
        folder = self.run.output_dir / "samples"
        folder.mkdir(exist_ok=True)
        sheet.save(folder / f"step-{run.step}.png")
        if run.board is not None:
            run.board.add_image("samples", np.asarray(sheet), run.step, dataformats="HWC")

    def draw_samples(self, images: EncodedImages) -> list[Image.Image]:
        """Drawings of a batch's conditions."""
        detokenizer = self.module.detokenizer
        unit = detokenizer.size_unit
        height, width = images.batch["image"].shape[2:]
        embeds = self.embeds(images.conditions)
        drawings: list[Image.Image] = []
        for row, condition in enumerate(condition_images(images.batch) or [None] * len(embeds)):
            drawings += detokenizer(
                embeds[row : row + 1],
                condition_images=[condition],
                height=max(unit, height // unit * unit),
                width=max(unit, width // unit * unit),
                seeds=[row],
                num_inference_steps=self.learner.drawing_steps,
            )
        return drawings

    def _held_out_batches(self) -> list[EncodedImages]:
        """The first images of the held-out source, by size."""
        held_out = self.run.data.held_out
        dataset = self._target_pairs(held_out.open() if held_out else self.sources[0])
        n_samples = min(SAMPLES, len(dataset))
        data = StepBatches(
            [dataset], n_samples, seed=0, shuffle=False, collate=by_size, log=self._log
        )
        return list(map(self.encoders, data.at(0)))

    def close(self) -> None:
        """Stop the data workers, if started."""
        if self.parts:
            self.step_batches.close()

    def finish(self, run: RunView) -> Mapping[str, object]:
        # 1. The module. DeepSpeed's has half-precision weights; its fp32 weights are sharded, and
        #    all processes gather them.
        module = self.module
        if self.run.deepspeed is not None:
            trained = gather_full_weights(module)
            if run.group.first:
                module = self.new_module()
                module.load_state_dict(trained, strict=False)

        # 2. The result. All its parts are replaced together.
        folder = self.run.output_dir / self.result
        if run.group.first:
            with atomic_folder(folder, folder, TrainingError) as new_folder:
                self.learner.save(module, new_folder)
        return {
            "processes": run.group.world,
            "samples_per_step": self._samples_per_step(run.group.world),
            self.result: str(folder),
            **{key: round(value, 6) for key, value in self.meter.smooth.items()},
        }

    def identity(self, world: int) -> Identity:
        """See `RunTask`; the sample order depends on the samples per step."""
        identity = super().identity(world)
        model = asdict(self.model)
        identity.fixed["model"] = {name: model[name] for name in self.learner.fixed_settings}
        identity.fixed["samples_per_step"] = self._samples_per_step(world)
        return identity

    def _samples_per_step(self, world: int) -> int:
        return self.run.data.batch_size * self.settings.gradient_accumulation_steps * world


def copy_part(source: Path, target: Path) -> None:
    """Copy a file or folder of a decoder, if it exists."""
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    elif source.is_file():
        shutil.copy2(source, target)
