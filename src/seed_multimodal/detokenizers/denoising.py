"""How a U-Net is taught to remove noise: latents at random time steps, what it should predict of them, and the loss.

* `min_snr` weighs time steps by their signal-to-noise ratio, capped (Hang et al. 2023);
* a base model that predicts velocities is trained to do so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seed_multimodal.errors import ConfigError


@dataclass(frozen=True)
class Noised:
    """A batch with noise.

    Attributes:
        latents: `[B, C, h, w]`; steps: `[B]`, of how much noise. target: `[B, C, h, w]`, what is to be predicted.
        weight: `[B]` of the samples in the loss, None: all alike.
    """

    latents: Tensor
    steps: Tensor
    target: Tensor
    weight: Tensor | None

    @classmethod
    def draw(cls, schedule: Any, latents: Tensor, min_snr: float | None = None,
             generator: torch.Generator | None = None) -> Noised:
        """Noise and time steps by `generator`, on the CPU; min_snr: cap γ of the weights, None for none."""
        noise = torch.randn(latents.shape, generator=generator).to(latents.device, latents.dtype)
        steps = torch.randint(schedule.config.num_train_timesteps, (len(latents),), generator=generator).to(
            latents.device)
        weight = None if min_snr is None else min_snr_weight(schedule, steps, min_snr)
        return cls(schedule.add_noise(latents, noise, steps), steps, noise_target(schedule, latents, noise, steps),
                   weight)

    def losses(self, prediction: Tensor) -> dict[str, Tensor]:
        """`total_loss`, the weighted mean; `mse`, the plain mean, without gradient."""
        return {"total_loss": denoising_loss(prediction, self.target, self.weight),
                "mse": denoising_loss(prediction.detach(), self.target)}


def training_schedule(scheduler: Any) -> Any:
    """A `DDPMScheduler` with the noise schedule of a folder's sampler (SDXL's, Euler, adds noise on another scale)."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(scheduler.config)


def denoising_loss(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error in float32 of `[B, C, h, w]`, samples weighted by `weight` `[B]`."""
    if weight is None:
        return F.mse_loss(prediction.float(), target.float())
    each = F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(1)
    return (each * weight).mean()


def noise_target(schedule: Any, latents: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
    """What the U-Net should predict: the noise, or the velocity.

    Raises:
        ConfigError: the schedule is for neither.
    """
    kind = schedule.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return schedule.get_velocity(latents, noise, steps)
    raise ConfigError(f"The scheduler's prediction_type is {kind!r}; adapters are trained with 'epsilon' or "
                      f"'v_prediction'.")


def min_snr_weight(schedule: Any, steps: Tensor, cap: float) -> Tensor:
    """Weights `[B]` of time steps: min(SNR, cap) / SNR for noise, / (SNR + 1) for velocity (Hang et al. 2023)."""
    share = schedule.alphas_cumprod.to(steps.device)[steps]
    ratio = share / (1 - share)
    return ratio.clamp(max=cap) / (ratio + (schedule.config.prediction_type == "v_prediction"))
