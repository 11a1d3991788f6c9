"""Objectives: sampling with a perfect denoiser of one pixel, targets, time steps, errors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor, nn

from seed_multimodal.diffusion.base import Denoising, Detokenizer, DrawingSettings, guidance
from seed_multimodal.diffusion.networks import DENOISERS, DenoiserKind
from seed_multimodal.diffusion.objectives import NoisyLatents, build_objective, objective_name
from seed_multimodal.errors import ConfigError

PIXEL = 0.7
TRAILING = {"timestep_spacing": "trailing", "clip_sample": False}
SCHEDULERS = {
    "epsilon": DDIMScheduler(**TRAILING),
    "v_prediction": DDIMScheduler(prediction_type="v_prediction", **TRAILING),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    # SANA's folders.
    "flow_prediction": DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
}


class PerfectDenoiser(nn.Module):
    """Knows that every image is `PIXEL`: its prediction is the target of its input's noise."""

    dtype = torch.float32
    device = torch.device("cpu")
    config = {}

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.objective = build_objective(scheduler)

    def forward(self, noisy: Tensor, step: Tensor) -> Tensor:
        steps = step.expand(len(noisy))
        clean = torch.full_like(noisy, PIXEL)
        # Noisy latents are linear in the noise.
        without_noise = self.objective.add_noise(clean, torch.zeros_like(clean), steps)
        per_noise = self.objective.add_noise(torch.zeros_like(clean), torch.ones_like(clean), steps)
        noise = (noisy - without_noise) / per_noise
        return self.objective.target(clean, noise, steps)


@pytest.mark.parametrize("preset", ["original", "fast"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_sampling_of_a_perfect_denoiser(name, preset, monkeypatch):
    kind = DenoiserKind("unet", "", lambda denoiser, latents, step, _: denoiser(latents, step))
    monkeypatch.setitem(DENOISERS, "PerfectDenoiser", kind)
    scheduler = SCHEDULERS[name]
    vae = SimpleNamespace(config={"block_out_channels": [1]})
    detokenizer = Detokenizer(
        PerfectDenoiser(scheduler), vae, scheduler, defaults=DrawingSettings(preset=preset)
    )
    start = torch.randn(2, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    conditions = {"encoder_hidden_states": torch.zeros(2, 1, 1)}
    denoising = Denoising(start, conditions, guidance(1.0))
    drawn = detokenizer.sample(denoising, detokenizer.defaults, [torch.Generator()] * 2)
    torch.testing.assert_close(drawn, torch.full_like(drawn, PIXEL), rtol=0, atol=2e-3)


@pytest.mark.parametrize("times", ["logit_normal", "uniform"])
def test_time_steps_of_a_flow_are_shifted_towards_noise(times):
    objective = build_objective(SCHEDULERS["flow"], times)
    steps = objective.sample_timesteps(4000, torch.Generator().manual_seed(0))
    unshifted = steps / 1000 / (3 - 2 * steps / 1000)
    assert 0 < float(steps.min()) and float(steps.max()) < 1000
    assert float(unshifted.mean()) == pytest.approx(0.5, abs=0.02)
    deviation = 0.208 if times == "logit_normal" else 0.289
    assert float(unshifted.std()) == pytest.approx(deviation, abs=0.01)


def test_objective_and_noise_schedule_are_the_scheduler_s():
    assert [objective_name(scheduler) for scheduler in SCHEDULERS.values()] == [
        "epsilon",
        "v_prediction",
        "flow",
        "flow",
    ]
    # A sampler without `get_velocity`.
    euler = EulerDiscreteScheduler(prediction_type="v_prediction")
    latents = torch.randn(3, 4, 8, 8)
    noisy = NoisyLatents.sample(build_objective(euler), latents)
    signal = euler.alphas_cumprod[noisy.steps][:, None, None, None]
    torch.testing.assert_close(
        signal.sqrt() * noisy.latents - (1 - signal).sqrt() * noisy.target, latents
    )


def test_unknown_objectives():
    with pytest.raises(ConfigError, match="no training objective for prediction_type 'sample'"):
        build_objective(DDIMScheduler(prediction_type="sample"))
    with pytest.raises(ConfigError, match="use_dynamic_shifting"):
        build_objective(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
