"""A pixel decoder's trainer task: settings, and a U-Net that learns to reconstruct images.

Subclasses (`training/seed_x/detokenizer.py`, `training/lavit/detokenizer.py`) define the frozen conditioning model, the
trained modules, the loss of a batch and sampling.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from seed_multimodal.data.formats.pairs import Pairs
from seed_multimodal.data.stream.loader import StepBatches
from seed_multimodal.data.stream.pairs_dataset import (
    JoinedPairs,
    Size,
    SourceDataset,
    TargetPairs,
    TargetView,
    by_size,
    open_images,
    sample_seed,
)
from seed_multimodal.data.stream.sampler import MixedOrder
from seed_multimodal.device import copy_to
from seed_multimodal.diffusion.base import Detokenizer
from seed_multimodal.disk import atomic_folder
from seed_multimodal.errors import ConfigError
from seed_multimodal.hub import find_folder
from seed_multimodal.images.sheet import Cell, Row, contact_sheet
from seed_multimodal.settings import setting
from seed_multimodal.training.config import OptimSettings, TrainerSettings
from seed_multimodal.training.distributed import ProcessGroup, TrainingError
from seed_multimodal.training.engine import gather_full_weights
from seed_multimodal.training.frozen_models import FrozenFeatures
from seed_multimodal.training.metrics import Meter
from seed_multimodal.training.optimizers import build_optimizer
from seed_multimodal.training.run import RunSettings, RunTask

NEEDED = ("unet/*", "vae/*", "vae.json", "scheduler/*")  # files of a diffusers repository
SMALL = 256  # the VAE encodes larger images one at a time, smaller ones in batches
SAMPLES, SAMPLE_STEPS = 4, 20  # sample images during training, and their denoising steps


@dataclass
class ImageSource:
    """One source of images.

    Attributes:
        files: folders of images, tars, lists (jsonl, json) or tables; options: further arguments of `formats.pairs`.
        condition_key: for edits, the key of the image before the edit (`source_image`; `image_key`: after it).
        weight: relative share of draws.
    """

    name: str
    files: str | list[str] = ""
    format: str = "auto"
    image_root: str | None = None
    image_key: str | None = None
    condition_key: str | None = None
    weight: float = setting(1.0, above=0)
    options: dict[str, Any] = setting(factory=dict)

    def open(self) -> Pairs:
        """Open the images. Raises as `open_images`."""
        keys = ("files", "format", "image_root", "image_key", "condition_key")
        return open_images(
            {key: getattr(self, key) for key in keys if getattr(self, key)} | self.options
        )


@dataclass
class ImageData:
    """The images of a run; `batch_size`: of a micro-step in each process.

    Attributes:
        resolution, sizes, keep_ratio, encoder_size: see `pairs_dataset.TargetView`.
        max_bad_in_a_row: consecutive unusable images that stop the run.
        held_out: source of the sample images during training; None: the first source.
    """

    sources: list[ImageSource]
    batch_size: int = setting(4, minimum=1)
    resolution: int = setting(1024, minimum=8)
    sizes: tuple[Size, ...] = ()
    encoder_size: int = setting(448, minimum=1)
    keep_ratio: bool = True
    seed: int = setting(0, minimum=0)
    max_bad_in_a_row: int = setting(20, minimum=1)
    held_out: ImageSource | None = None
    encoder_interpolation: ClassVar[str] = "bilinear"

    @property
    def view(self) -> TargetView:
        """Target and conditioning crops of an image."""
        return TargetView(
            self.resolution,
            self.encoder_size,
            self.keep_ratio,
            self.sizes,
            self.encoder_interpolation,
        )


@dataclass
class PixelTrainer(TrainerSettings):
    """Settings of the trainer. Without `save_frozen`, resuming loads the frozen part of the U-Net from its original
    files; the result of a run is always complete.

    Attributes:
        sample_steps: interval of sample images in `samples/` (0: never; None: `save_steps`).
    """

    save_frozen: bool = False
    sample_steps: int | None = setting(None, minimum=0)


class PixelTask(RunTask):
    """One run in one process; subclasses set the class attributes without a value."""

    start_hint = "model.start"
    group_types: ClassVar[Mapping[str, Any]] = {
        "data": ImageData,
        "optim": OptimSettings,
        "trainer": PixelTrainer,
    }
    reads_condition = False  # whether samples have a condition image
    result: ClassVar[str]  # subfolder of the result
    kind: ClassVar[type[Detokenizer]]  # detokenizer class of the result
    frozen: ClassVar[str]  # name of the conditioning model
    diffusion: ClassVar[str]  # setting with the diffusers folder of VAE and noise schedule
    same: ClassVar[tuple[str, ...]]  # settings that must not change on resume
    conditions: Callable[[], FrozenFeatures]  # features of `seen` pixels
    build: Callable[
        [], Any
    ]  # the initial module on the CPU, with `requires_grad` set; has a `unet`
    losses: Callable[
        ..., Mapping[str, Tensor]
    ]  # `total_loss` and `mse` of samples of one size, see `micro_step`
    save_result: Callable[[Any, Path], None]  # writes the complete result
    detokenizer: Callable[[Any], Detokenizer]  # from the trained modules and a scheduler

    def __init__(self, run: RunSettings, group: ProcessGroup, device: torch.device) -> None:
        """Open the sources. Raises as `RunTask.train`."""
        super().__init__(run, group, device)
        if not run.data.sources:
            raise ConfigError("data: sources must list at least one source of images.")
        if run.deepspeed and (run.trainer.ema or self.zero_stage not in (1, 2)):
            raise ConfigError(
                "deepspeed: pixel decoders train with ZeRO stage 1 or 2, and without trainer.ema."
            )
        self.model, self.rows = run.model, run.data.batch_size
        self.folder = find_folder(
            getattr(run.model, self.diffusion), NEEDED, self.kind.download_hint
        )
        self.sources = [source.open() for source in run.data.sources]
        self.meter = Meter(run.data.batch_size * self.settings.gradient_accumulation_steps)
        self.held_out: list[tuple[dict[str, Any], dict[str, Tensor]]] = []

    def embeds(self, seen: Tensor) -> Any:
        """Features of images for `detokenizer`."""
        return seen.float()

    def prepare(self) -> None:
        """Build data, models and optimizer."""
        super().prepare()
        run, data = self.run, self.run.data
        self.schedule = DDPMScheduler.from_config(
            self.kind.load_part(self.folder, "scheduler").config
        )
        parts: list[SourceDataset] = [self._drawn(source) for source in self.sources]
        self.account = parts[0] if len(parts) == 1 else JoinedPairs(parts)
        order = (
            None
            if len(parts) == 1
            else MixedOrder(
                [len(part) for part in parts],
                [source.weight for source in data.sources],
                data.seed,
                layouts=[part.layout for part in parts],
            )
        )
        self.batches = StepBatches(
            self.account,
            data.batch_size,
            seed=data.seed,
            rank=self.group.rank,
            world=self.group.world,
            workers=self.settings.dataloader_num_workers,
            order=order,
            collate=by_size,
        )
        vae = self.kind.load_part(self.folder, "vae")
        self.scaling = float(vae.config.scaling_factor)
        largest = max(height * width for height, width in data.sizes or [(data.resolution,) * 2])
        moments = latent_moments(vae, self.device, max(1, SMALL**2 // largest))
        self.features = ImageFeatures(self.conditions(), moments)
        self.module = self.build().to(self.device)
        self.optimizer = build_optimizer(self.module, run.optim)

    def check_side(self, side: int) -> None:
        """Raise ConfigError if views have another size than the encoder's input."""
        if side != self.run.data.encoder_size:
            raise ConfigError(
                f"data: encoder_size is {self.run.data.encoder_size}, but the {self.frozen} expects "
                f"{side} pixels a side."
            )

    def _drawn(self, source: Any) -> TargetPairs:
        data = self.run.data
        return TargetPairs(
            source,
            data.view,
            reads_condition=self.reads_condition,
            seed=data.seed,
            max_bad_in_a_row=data.max_bad_in_a_row,
            log=self._log,
        )

    def before_training(self, run: Any) -> None:
        """Log what is trained."""
        self.board = run.log.board
        self.log_sizes(
            f"{self.result}: {sum(map(len, self.sources)):,} images, {self._samples(self.group.world)} a "
            "step; "
        )

    def micro_step(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        """The loss of a batch, by image size; randomness is determined by the sample's position, independent of the
        number of processes. On CPUs attention uses plain matrix products, as in `StageTask`."""
        place = micro_step * self.group.world + self.group.rank
        generator = torch.Generator().manual_seed(sample_seed(self.settings.seed, 0, place))
        kernel = (
            sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else contextlib.nullcontext()
        )
        groups = self.batches.at(micro_step)
        count = sum(len(batch["key"]) for batch in groups)
        loss, mse = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        with kernel:
            for batch in groups:
                features = self.features(batch)
                latents = sample_latents(features["moments"], self.scaling, generator)
                made = self.losses(
                    model, latents, features, copy_to(self.device, batch["time_ids"]), generator
                )
                share = len(batch["key"]) / count
                loss, mse = loss + share * made["total_loss"], mse + share * made["mse"]
        return loss, {"mse": mse}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Reconstruct held-out images next to the originals, with fixed noise."""
        if not self.should_write_samples(step):
            return
        if not self.held_out:
            data = self._drawn(
                self.run.data.held_out.open() if self.run.data.held_out else self.sources[0]
            )
            groups = by_size([data.get(number) for number in range(min(SAMPLES, len(data)))])
            self.held_out = [(batch, self.features(batch)) for batch in groups]
        drawn, originals = list[Image.Image](), list[Image.Image]()
        self.module.eval()
        detokenizer = self.detokenizer(self.kind.load_part(self.folder, "scheduler"))
        for batch, features in self.held_out:
            height, width = (max(8, side // 8 * 8) for side in batch["image"].shape[2:])
            befores = (
                [
                    _image(pixels) if edited else None
                    for pixels, edited in zip(batch["condition"], batch["conditioned"], strict=True)
                ]
                if "condition" in batch
                else None
            )
            drawn += detokenizer(
                self.embeds(features["seen"]),
                condition_images=befores,
                height=height,
                width=width,
                seeds=range(len(batch["key"])),
                batch_size=1,
                num_inference_steps=SAMPLE_STEPS,
            )
            originals += map(_image, batch["image"])
        self.module.train()
        rows = [Row("image", list(map(Cell, originals))), Row("drawn", list(map(Cell, drawn)))]
        sheet = contact_sheet(rows, f"step {step}", cell=256)
        (self.run.output_dir / "samples").mkdir(exist_ok=True)
        sheet.save(self.run.output_dir / "samples" / f"step-{step}.png")
        if self.board is not None:
            self.board.add_image("samples", np.asarray(sheet), step, dataformats="HWC")

    def close(self) -> None:
        """Stop the data workers, if started."""
        if hasattr(self, "batches"):
            self.batches.close()

    def status(self) -> Mapping[str, float]:
        return {
            "wait_seconds": self.batches.wait_seconds,
            "bad_samples": len(self.batches.bad_samples()),
        }

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        folder, module = self.run.output_dir / self.result, self.module
        if (
            self.run.deepspeed is not None
        ):  # its weights are in half precision; the trained fp32 weights are sharded
            trained = gather_full_weights(module)
            module = self.build() if group.first else module
            if group.first:
                module.load_state_dict(trained, strict=False)
        if group.first:
            with atomic_folder(
                folder, folder, TrainingError
            ) as made:  # U-Net and decoder are replaced together
                self.save_result(module, made)
        return {
            "processes": group.world,
            "samples_per_step": self._samples(group.world),
            "bad_samples": len(self.batches.bad_samples()),
            self.result: str(folder),
            **{key: round(value, 6) for key, value in self.meter.smooth.items()},
        }

    # ---------------------------------------------------------------------------------------------- the checkpoints

    def frozen_models(self) -> dict[str, list[float]]:
        """Conditioning model and VAE."""
        return {
            self.frozen: self.features.seen.fingerprint,
            "autoencoder": self.features.moments.fingerprint,
        }

    def identity(self, world: int) -> dict[str, Any]:
        """See `RunTask`; the sample order depends on the samples per step."""
        model = asdict(self.model)
        return {
            **super().identity(world),
            "model": {name: model[name] for name in self.same},
            "samples_per_step": self._samples(world),
        }

    def state_dict(self, step: int) -> dict[str, Any]:
        """Bad samples of this process."""
        return self.account.state_dict()

    def load_state_dict(self, states: list[dict[str, Any]], rank: int) -> None:
        for state in states[rank :: self.group.world]:  # the number of processes may differ
            self.account.load_state_dict(state)

    def _samples(self, world: int) -> int:
        return self.run.data.batch_size * self.settings.gradient_accumulation_steps * world


def latent_moments(vae: Any, device: torch.device, at_once: int = 16) -> FrozenFeatures:
    """Images → mean and log variance of their unscaled latents `[N, 2 C, h, w]`; always float32, because SDXL's VAE
    overflows in float16."""
    return FrozenFeatures(
        vae,
        device,
        lambda pixels: vae.encode(pixels.float() / 127.5 - 1.0).latent_dist.parameters,
        at_once,
    )


class ImageFeatures:
    """Conditions and latents of a batch of `TargetPairs` of one size, computed on the device by frozen models."""

    def __init__(self, seen: FrozenFeatures, moments: FrozenFeatures) -> None:
        self.seen, self.moments, self.device = seen, moments, moments.device

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`seen`; `moments`; with condition images `condition` `[B, C, h, w]`, their mean latents (zeros if none)."""
        with torch.autocast(self.device.type, enabled=False):
            made = {
                "seen": self.seen(batch["encoder_image"]),
                "moments": self.moments(batch["image"]),
            }
            if "condition" in batch:
                channels = made["moments"].shape[1] // 2
                made["condition"] = torch.zeros_like(made["moments"][:, :channels])
                rows = batch["conditioned"].nonzero().flatten()
                if len(rows):
                    made["condition"][rows.to(self.device)] = self.moments(
                        batch["condition"][rows]
                    )[:, :channels]
        return made


def sample_latents(
    moments: Tensor, scaling: float, generator: torch.Generator | None = None
) -> Tensor:
    """Latents `[B, C, h, w]` sampled from `moments`, times the VAE's scaling factor; `generator` on the CPU."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    return (mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise) * scaling


def _image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
