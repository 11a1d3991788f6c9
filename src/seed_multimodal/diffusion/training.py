"""Training losses of U-Nets: noise, targets, and the loss of SEED-X's SDXL adapters.

SEED-X's paper trains the adapters by SDXL's own loss. The original repository has no training program, so the shares of
samples without conditions are our choice (as InstructPix2Pix's).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import setting

Trained = Literal["key_value", "all"]  # of a U-Net


@dataclass(frozen=True)
class Noised:
    """Noised latents `[B, C, h, w]`, their time steps `[B]`, and what the U-Net should predict: noise or velocity."""

    latents: Tensor
    steps: Tensor
    target: Tensor

    @classmethod
    def draw(cls, schedule: Any, latents: Tensor, generator: torch.Generator | None = None) -> Noised:
        """Noise and time steps by `generator`, on the CPU."""
        noise = torch.randn(latents.shape, generator=generator).to(latents.device, latents.dtype)
        steps = torch.randint(schedule.config.num_train_timesteps, (len(latents),), generator=generator).to(
            latents.device)
        is_noise = schedule.config.prediction_type == "epsilon"
        target = noise if is_noise else schedule.get_velocity(latents, noise, steps)
        return cls(schedule.add_noise(latents, noise, steps), steps, target)

    def losses(self, prediction: Tensor) -> dict[str, Tensor]:
        """`total_loss`, the mean squared error in float32; `mse`, the same without gradient."""
        loss = F.mse_loss(prediction.float(), self.target.float())
        return {"total_loss": loss, "mse": loss.detach()}


def training_schedule(scheduler: Any) -> Any:
    """A `DDPMScheduler` with a sampler's noise schedule (SDXL's sampler, Euler, adds noise on another scale)."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(scheduler.config)


def size_ids(size: tuple[int, int], *, original: tuple[int, int] | None = None, crop: tuple[int, int] = (0, 0),
             count: int = 1) -> Tensor:
    """SDXL's conditions `[count, 6]` (Podell et al. 2023, 2.2): original size, crop (top, left), target size."""
    return torch.tensor([[*(original or size), *crop, *size]], dtype=torch.float32).expand(count, -1)


def train_unet(unet: Any, which: Trained) -> None:
    """Switch on the gradients of a whole U-Net ("all"), or of the keys and values of its attentions."""
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(which == "all" or name.split(".")[-2] in ("to_k", "to_v"))


@dataclass(frozen=True)
class ConditionDropout:
    """Shares of the samples without embeddings, without the condition image, and without both."""

    embeds: float = setting(0.05, least=0, most=1)
    picture: float = setting(0.05, least=0, most=1)
    both: float = setting(0.05, least=0, most=1)

    def __post_init__(self) -> None:
        if self.embeds + self.picture + self.both > 1:
            raise ConfigError("condition dropout: embeds, picture and both must be at most 1 together, not "
                              f"{self.embeds + self.picture + self.both:g}.")

    def draw(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Which samples lose their embeddings, and which their condition image: bool `[count]` each, on the CPU."""
        at = torch.rand(count, generator=generator)
        both = at < self.both
        embeds = both | (at - self.both < self.embeds)
        picture = both | (~embeds & (at - self.both - self.embeds < self.picture))
        return embeds, picture


def adapter_losses(adapter: Any, schedule: Any, latents: Tensor, image_embeds: Tensor, time_ids: Tensor, *,
                   dropout: ConditionDropout, empty_features: Tensor, condition_latents: Tensor | None = None,
                   generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Losses (`Noised.losses`) of an `SDXLAdapter` at random time steps, by a `generator` on the CPU.

    Args:
        latents: `[B, C, h, w]`, times the autoencoder's scaling factor. image_embeds: `[B, N, W]`.
        time_ids: `[B, 6]` (`size_ids`). empty_features: `[1, N, W]`, the vision encoder's of an empty image.
        condition_latents: `[B, C, h, w]` without that factor, for a second stage.
    """
    without_embeds, without_picture = (which.to(latents.device) for which in dropout.draw(len(latents), generator))
    noised = Noised.draw(schedule, latents, generator)
    embeds = torch.where(without_embeds[:, None, None], empty_features.to(image_embeds), image_embeds)
    if condition_latents is not None:
        condition_latents = condition_latents * ~without_picture[:, None, None, None]
    return noised.losses(adapter(noised.latents, noised.steps, embeds, time_ids, condition_latents))
