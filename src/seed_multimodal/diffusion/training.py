"""Shared training code of denoisers: trained parameters, dropped conditions, start."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError, first_line
from seed_multimodal.settings import check_keys, fraction

TrainedLayers = Literal["key_value", "all"]  # of a denoiser
# Of all attentions; Stable Diffusion 3 has others for the conditions.
KEY_VALUE = ("to_k", "to_v", "add_k_proj", "add_v_proj")


def reads_images(denoiser: nn.Module) -> bool:
    """Whether a denoiser reads latents of a condition image, too, as further input channels."""
    config = denoiser.config
    return int(config.in_channels) > int(config.out_channels)


def train_denoiser(denoiser: nn.Module, which: TrainedLayers) -> None:
    """Enable gradients of a whole denoiser ("all"), or of its attention keys and values.

    With these the first convolution, if it reads a condition image.
    """
    for name, parameter in denoiser.named_parameters():
        layer = name.rpartition(".")[0].rpartition(".")[2]
        parameter.requires_grad_(which == "all" or layer in KEY_VALUE)
    if reads_images(denoiser):
        denoiser.conv_in.requires_grad_(True)


@dataclass(frozen=True)
class ConditionDropout:
    """Shares of samples without embeddings, without condition image, and without both.

    Our choice, as in InstructPix2Pix.
    """

    embeds: float = fraction(0.05)
    image: float = fraction(0.05)
    both: float = fraction(0.05)

    def draw(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Samples without embeddings, and without condition image: bool `[count]`, on the CPU."""
        uniform = torch.rand(count, generator=generator)
        both = uniform < self.both
        embeds = both | (uniform - self.both < self.embeds)
        image = both | (~embeds & (uniform - self.both - self.embeds < self.image))
        return embeds, image


def new_diffusion(source: Path, target: Path) -> None:
    """Write a diffusers folder: a new U-Net with the sizes of the source's, the source's
    autoencoder, and SDXL's noise schedule."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    sizes = UNet2DConditionModel.load_config(source / "unet")
    UNet2DConditionModel.from_config(sizes).save_pretrained(target / "unet")
    shutil.copytree(source / "vae", target / "vae")
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(target / "scheduler")


def new_part(label: str, part_class: Any, values: Mapping[str, Any]) -> Any:
    """A network or scheduler of diffusers from its settings.

    label: in messages.

    Raises ConfigError: an unknown setting, a wrong value.
    """
    # Names with "_" are those that diffusers adds to a saved config.
    settings = {key: value for key, value in values.items() if not key.startswith("_")}
    check_keys(settings, inspect.signature(part_class.__init__).parameters, label)
    try:
        return part_class(**settings)
    except (TypeError, ValueError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"{label}: {part_class.__name__} cannot have these sizes ({reason})."
        ) from error
