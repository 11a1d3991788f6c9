"""Objectives: how training noises latents, and what the denoiser learns to predict.

    objective = build_objective(scheduler)
    noisy = NoisyLatents.sample(objective, latents, generator)
    losses = noisy.losses(denoiser(noisy.latents, noisy.steps, conditions))

The scheduler of a diffusion folder determines its objective, so training and sampling agree:

`epsilon`       the noise (DDPM, Ho et al. 2020)
`v_prediction`  the velocity `√ᾱ · noise − √(1 − ᾱ) · x0` (Salimans & Ho 2022)
`flow`          `noise − x0` on the line `(1 − t) · x0 + t · noise` (rectified flow, Esser et al.
                2024)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import nearest

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

FlowTimes = Literal["logit_normal", "uniform"]  # distribution of a flow's t, before its shift


class EpsilonObjective:
    """Predicts the noise of a variance-preserving schedule.

    Time steps are as a scheduler gives them to the denoiser; latents are `[B, C, h, w]`.
    """

    def __init__(self, scheduler: SchedulerMixin) -> None:
        from diffusers import DDPMScheduler

        # Samplers that only sample (PNDM, Euler, …) have the same noise schedule.
        self.schedule = DDPMScheduler.from_config(scheduler.config)

    def sample_timesteps(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Random time steps of training `[count]`, on the CPU."""
        n_steps = self.schedule.config.num_train_timesteps
        return torch.randint(n_steps, (count,), generator=generator)

    def told(self, steps: Tensor) -> Tensor:
        """What the denoiser is told of time steps."""
        return steps

    def add_noise(self, latents: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """Noisy latents at time steps `[B]`."""
        return self.schedule.add_noise(latents, noise, steps)

    def target(self, latents: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """What the denoiser should predict from them."""
        return noise

    def clean(self, noisy: Tensor, prediction: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """The latents x that a prediction means, where `noisy` is `signal · x + noise · e`."""
        return (noisy - noise * prediction) / signal


class VelocityObjective(EpsilonObjective):
    """Predicts the velocity of the same schedule."""

    def target(self, latents: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        return self.schedule.get_velocity(latents, noise, steps)

    def clean(self, noisy: Tensor, prediction: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        return signal * noisy - noise * prediction


class FlowObjective:
    """Predicts the direction from latents to noise; a time step is t times the training steps.

    flow_times: distribution of t; the scheduler's shift then moves it towards noise.
    """

    def __init__(self, scheduler: SchedulerMixin, flow_times: FlowTimes = "logit_normal") -> None:
        config = scheduler.config
        if config.get("use_dynamic_shifting"):
            raise ConfigError(
                "scheduler/scheduler_config.json: use_dynamic_shifting is not supported; set shift."
            )
        self.n_steps = int(config.num_train_timesteps)
        self.shift = flow_shift(scheduler)
        self.flow_times = flow_times

    def sample_timesteps(self, count: int, generator: torch.Generator | None) -> Tensor:
        if self.flow_times == "uniform":
            times = torch.rand(count, generator=generator)
        else:
            times = torch.randn(count, generator=generator).sigmoid()
        shifted = self.shift * times / (1 + (self.shift - 1) * times)
        return shifted * self.n_steps

    def told(self, steps: Tensor) -> Tensor:
        return steps

    def add_noise(self, latents: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        times = (steps / self.n_steps)[:, None, None, None]
        return (1 - times) * latents + times * noise

    def target(self, latents: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        return noise - latents

    def clean(self, noisy: Tensor, prediction: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        return noisy - noise * prediction


Objective = EpsilonObjective | FlowObjective
# By a scheduler's `prediction_type`; those of flows have others.
OBJECTIVES = {"epsilon": EpsilonObjective, "v_prediction": VelocityObjective}


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler samples a flow: a flow scheduler, or DPM-Solver++ set to one."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        return True
    return bool(scheduler.config.get("prediction_type") == "flow_prediction")


def flow_shift(scheduler: SchedulerMixin) -> float:
    """How far a flow's times are moved towards noise (1: not at all)."""
    config = scheduler.config
    return float(config.get("shift", config.get("flow_shift", 1.0)))


def build_objective(scheduler: SchedulerMixin, flow_times: FlowTimes = "logit_normal") -> Objective:
    """The objective of a folder's scheduler. Raises ConfigError: a prediction type without one."""
    if is_flow(scheduler):
        return FlowObjective(scheduler, flow_times)
    name = str(scheduler.config.get("prediction_type"))
    if name not in OBJECTIVES:
        raise ConfigError(
            f"scheduler/scheduler_config.json: there is no training objective for prediction_type "
            f"{name!r}{nearest(name, OBJECTIVES)}; there are {', '.join(OBJECTIVES)} and flows."
        )
    return OBJECTIVES[name](scheduler)


@dataclass(frozen=True)
class NoisyLatents:
    """Noised latents of training."""

    latents: Tensor  # [B, C, h, w]
    steps: Tensor  # time steps that the denoiser is told [B]
    target: Tensor  # what the denoiser should predict: [B, C, h, w]

    @classmethod
    def sample(
        cls, objective: Objective, latents: Tensor, generator: torch.Generator | None = None
    ) -> NoisyLatents:
        """Noise and time steps by `generator`, on the CPU."""
        noise = torch.randn(latents.shape, generator=generator).to(latents.device, latents.dtype)
        steps = objective.sample_timesteps(len(latents), generator).to(latents.device)
        noisy = objective.add_noise(latents, noise, steps)
        return cls(noisy, objective.told(steps), objective.target(latents, noise, steps))

    def losses(self, prediction: Tensor) -> dict[str, Tensor]:
        """`total_loss`, the mean squared error in float32; `mse`, the same without gradient."""
        loss = F.mse_loss(prediction.float(), self.target.float())
        return {"total_loss": loss, "mse": loss.detach()}
