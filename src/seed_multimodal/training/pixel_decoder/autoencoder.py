"""A small autoencoder that learns the latents and the pixels of a large one: `AutoencoderTiny` of
diffusers (TAESD).

It reads and writes latents as denoisers do, shifted and scaled, so its own scaling factor is 1. The
result, OUTPUT_DIR/vae, replaces the folder `vae` of a diffusers folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.config import project_path
from seed_multimodal.device import copy_to
from seed_multimodal.diffusion.base import Detokenizer
from seed_multimodal.diffusion.networks import unscaled_latents
from seed_multimodal.diffusion.training import new_part
from seed_multimodal.disk import JsonObject
from seed_multimodal.nn.frozen import FrozenFeatures
from seed_multimodal.settings import non_negative, setting
from seed_multimodal.training.pixel_decoder.config import PixelRunSettings
from seed_multimodal.training.pixel_decoder.encoders import EncodedImages, signed, to_image
from seed_multimodal.training.pixel_decoder.task import PixelTask, Reconstruction

SCALES = (1, 2, 4)  # pixels a side of the means that are compared


@dataclass(kw_only=True)
class AutoencoderModel:
    """The autoencoders.

    Attributes:
        diffusion: a diffusers folder, whose `vae` is learned.
        student: sizes of the `AutoencoderTiny`, as in a `config.json` of diffusers, with one level
            for each of the learned one's.
        seed: of new weights.
    """

    diffusion: Path
    student: JsonObject = setting(factory=dict)
    seed: int = non_negative(0)
    teacher = ""  # no denoiser is distilled

    def __post_init__(self) -> None:
        self.diffusion_folder = project_path(self.diffusion)


@dataclass(kw_only=True)
class AutoencoderRunSettings(PixelRunSettings):
    """Settings of a run."""

    model: AutoencoderModel  # type: ignore[assignment]


class Student(nn.Module):
    """The trained autoencoder."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of pixels in -1…1, and pixels of latents."""
        # Channels last: half the time on CPUs.
        latents = latents.contiguous(memory_format=torch.channels_last)
        return self.vae.encode(pixels).latents, self.vae.decode(latents).sample


class AutoencoderDistillation(Reconstruction):
    """The latents of images, and the teacher's pixels of them."""

    def losses(
        self,
        model: nn.Module,
        images: EncodedImages,
        latents: Tensor,
        generator: torch.Generator,
    ) -> Mapping[str, Tensor]:
        """`mse` is that of the pixels."""
        task = self.task
        with torch.no_grad():
            teacher = task.encoders.moments.model
            wanted = teacher.decode(unscaled_latents(teacher, latents)).sample
        pixels = signed(copy_to(task.device, images.batch["image"]))
        student_latents, output = model(pixels, latents)
        error = output.float() - wanted

        # Edges, and colours of small areas, beside the pixels.
        loss = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        for side in SCALES:
            loss = loss + F.avg_pool2d(error, side).abs().mean()
        loss = loss + F.mse_loss(student_latents.float(), latents)
        return {"total_loss": loss, "mse": error.detach().square().mean()}

    def save(self, module: Any, folder: Path) -> None:
        """Write the student."""
        module.vae.save_pretrained(folder)


class AutoencoderTask(PixelTask):
    """One run in one process."""

    run_type = AutoencoderRunSettings
    model: AutoencoderModel  # type: ignore[assignment]
    module: Any
    result = "vae"
    detokenizer_class = Detokenizer
    frozen_name = "nothing"
    fixed_settings = ("student",)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.learner = AutoencoderDistillation(self)

    def conditions(self) -> FrozenFeatures:
        """Pixels alone suffice."""
        return FrozenFeatures(nn.Identity(), self.device, lambda pixels: pixels)

    def new_module(self) -> Any:
        from diffusers import AutoencoderTiny

        teacher = self.encoders.moments.model
        sizes = {"latent_channels": teacher.config.latent_channels, **self.model.student}
        torch.manual_seed(self.model.seed)
        vae = new_part("model.student", AutoencoderTiny, sizes)
        self.width = vae.config.decoder_block_out_channels[0]
        return Student(vae).train()

    def draw_samples(self, images: EncodedImages) -> list[Image.Image]:
        """The student's reconstructions."""
        output = self.module.vae(signed(copy_to(self.device, images.batch["image"]))).sample
        return list(map(to_image, (output * 127.5 + 127.5).clamp(0, 255).byte().cpu()))
