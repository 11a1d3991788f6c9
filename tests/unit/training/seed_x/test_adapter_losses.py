"""Losses of the SDXL adapters: noising, targets, condition dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from tiny.diffusion import FEATURES
from torch import Tensor, nn

from seed_multimodal.diffusion.objectives import NoisyLatents, build_objective
from seed_multimodal.diffusion.training import size_ids
from seed_multimodal.models.seed_x.losses import ConditionDropout, adapter_losses

NEVER = ConditionDropout(0.0, 0.0, 0.0)


class Recorder(nn.Module):
    """An adapter that stores its inputs and predicts zeros."""

    def forward(
        self, noisy: Tensor, steps: Tensor, embeds: Tensor, ids: Tensor, condition: Tensor | None
    ) -> Tensor:
        self.noisy = noisy
        self.steps = steps
        self.embeds = embeds
        self.ids = ids
        self.condition = condition
        return torch.zeros_like(noisy, requires_grad=True)


@pytest.fixture(scope="module")
def schedule() -> Any:
    sampler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    return DDPMScheduler.from_config(sampler.config)


def _batch(count: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(count, 4, 8, 8, generator=rng),
        "image_embeds": torch.randn(count, 4, FEATURES, generator=rng),
        "time_ids": size_ids((16, 16), count=count),
        "empty_features": torch.full((1, 4, FEATURES), 0.5),
        "condition_latents": torch.randn(count, 4, 8, 8, generator=rng),
    }


def test_adapter_losses_noise_latents_by_the_ddpm_schedule(schedule):
    """Betas and prediction type are the sampler's; Euler's `add_noise` has another scale."""
    assert isinstance(schedule, DDPMScheduler)
    assert (schedule.config.beta_start, schedule.config.prediction_type) == (0.00085, "epsilon")
    batch = _batch(64)
    adapter = Recorder()
    losses = adapter_losses(
        adapter,
        build_objective(schedule),
        **batch,
        dropout=NEVER,
        generator=torch.Generator().manual_seed(0),
    )
    signal = schedule.alphas_cumprod[adapter.steps][:, None, None, None]
    noise = (adapter.noisy - signal.sqrt() * batch["latents"]) / (1 - signal).sqrt()
    assert (
        0 <= int(adapter.steps.min())
        and int(adapter.steps.max()) < 1000
        and len(adapter.steps.unique()) > 50
    )
    assert float(noise.std()) == pytest.approx(1, abs=0.03)
    torch.testing.assert_close(losses["total_loss"], noise.square().mean(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(losses["mse"], losses["total_loss"].detach())
    assert losses["total_loss"].requires_grad and not losses["mse"].requires_grad
    torch.testing.assert_close(adapter.embeds, batch["image_embeds"])
    torch.testing.assert_close(adapter.condition, batch["condition_latents"])


def test_condition_dropout(schedule):
    dropout = ConditionDropout(embeds=0.2, image=0.3, both=0.1)
    no_embeds, no_condition = dropout.draw(4000, torch.Generator().manual_seed(0))
    assert float((no_embeds & ~no_condition).float().mean()) == pytest.approx(0.2, abs=0.02)
    assert float((~no_embeds & no_condition).float().mean()) == pytest.approx(0.3, abs=0.02)
    assert float((no_embeds & no_condition).float().mean()) == pytest.approx(0.1, abs=0.02)
    batch = _batch(200)
    adapter = Recorder()
    adapter_losses(
        adapter,
        build_objective(schedule),
        **batch,
        dropout=dropout,
        generator=torch.Generator().manual_seed(0),
    )
    no_embeds, no_condition = dropout.draw(200, torch.Generator().manual_seed(0))
    assert bool((adapter.embeds[no_embeds] == 0.5).all()), "embeddings of an empty image, not zeros"
    torch.testing.assert_close(adapter.embeds[~no_embeds], batch["image_embeds"][~no_embeds])
    assert not adapter.condition[no_condition].any()
    torch.testing.assert_close(
        adapter.condition[~no_condition], batch["condition_latents"][~no_condition]
    )
    assert not any(dropped.any() for dropped in NEVER.draw(100))


def test_noised_target_of_v_prediction(schedule):
    velocity = DDPMScheduler.from_config(schedule.config, prediction_type="v_prediction")
    latents = torch.randn(3, 4, 8, 8)
    noised = NoisyLatents.sample(build_objective(velocity), latents)
    signal = schedule.alphas_cumprod[noised.steps][:, None, None, None]
    torch.testing.assert_close(
        signal.sqrt() * noised.latents - (1 - signal).sqrt() * noised.target, latents
    )
