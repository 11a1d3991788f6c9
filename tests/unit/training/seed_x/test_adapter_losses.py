"""Losses of the SDXL adapters: noising, targets, condition dropout."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_sdxl
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from torch import Tensor, nn

from seed_multimodal.diffusion.training import Noised, size_ids
from seed_multimodal.training.seed_x.detokenizer import ConditionDropout, adapter_losses

NEVER = ConditionDropout(0.0, 0.0, 0.0)


class Recorder(nn.Module):
    """In the place of an adapter: keeps what it was called with, and predicts zeros."""

    def forward(self, noisy: Tensor, steps: Tensor, embeds: Tensor, ids: Tensor, condition: Tensor | None) -> Tensor:
        self.noisy, self.steps, self.embeds, self.ids, self.condition = noisy, steps, embeds, ids, condition
        return torch.zeros_like(noisy, requires_grad=True)


@pytest.fixture(scope="module")
def schedule() -> Any:
    sampler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                     timestep_spacing="leading", steps_offset=1)
    return DDPMScheduler.from_config(sampler.config)


def _batch(count: int) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(1)
    return {"latents": torch.randn(count, 4, 8, 8, generator=make),
            "image_embeds": torch.randn(count, 4, tiny_sdxl.WIDTH, generator=make),
            "time_ids": size_ids((16, 16), count=count), "empty_features": torch.full((1, 4, tiny_sdxl.WIDTH), 0.5),
            "condition_latents": torch.randn(count, 4, 8, 8, generator=make)}


def test_latents_are_noised_by_the_samplers_schedule(schedule: Any) -> None:
    """Euler's own `add_noise` has another scale; the training schedule keeps betas and prediction type."""
    assert isinstance(schedule, DDPMScheduler)
    assert (schedule.config.beta_start, schedule.config.prediction_type) == (0.00085, "epsilon")
    batch, watched = _batch(64), Recorder()
    made = adapter_losses(watched, schedule, **batch, dropout=NEVER, generator=torch.Generator().manual_seed(0))
    share = schedule.alphas_cumprod[watched.steps][:, None, None, None]
    noise = (watched.noisy - share.sqrt() * batch["latents"]) / (1 - share).sqrt()
    assert 0 <= int(watched.steps.min()) and int(watched.steps.max()) < 1000 and len(watched.steps.unique()) > 50
    assert float(noise.std()) == pytest.approx(1, abs=0.03)
    torch.testing.assert_close(made["total_loss"], noise.square().mean(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(made["mse"], made["total_loss"].detach())
    assert made["total_loss"].requires_grad and not made["mse"].requires_grad
    torch.testing.assert_close(watched.embeds, batch["image_embeds"])
    torch.testing.assert_close(watched.condition, batch["condition_latents"])


def test_dropped_conditions(schedule: Any) -> None:
    count, share = 4000, {"embeds": 0.2, "picture": 0.3, "both": 0.1}
    dropout = ConditionDropout(**share)
    no_embeds, no_condition = dropout.draw(count, torch.Generator().manual_seed(0))
    assert float((no_embeds & ~no_condition).float().mean()) == pytest.approx(0.2, abs=0.02)
    assert float((~no_embeds & no_condition).float().mean()) == pytest.approx(0.3, abs=0.02)
    assert float((no_embeds & no_condition).float().mean()) == pytest.approx(0.1, abs=0.02)
    batch, watched = _batch(200), Recorder()
    adapter_losses(watched, schedule, **batch, dropout=dropout, generator=torch.Generator().manual_seed(0))
    no_embeds, no_condition = dropout.draw(200, torch.Generator().manual_seed(0))
    assert bool((watched.embeds[no_embeds] == 0.5).all()), "an empty image's embeddings, not zeros"
    torch.testing.assert_close(watched.embeds[~no_embeds], batch["image_embeds"][~no_embeds])
    assert not watched.condition[no_condition].any()
    torch.testing.assert_close(watched.condition[~no_condition], batch["condition_latents"][~no_condition])
    assert all(not which.any() for which in NEVER.draw(100))
    assert all(which.all() for which in ConditionDropout(0.0, 0.0, 1.0).draw(100))


def test_target_of_velocities(schedule: Any) -> None:
    velocity = DDPMScheduler.from_config(schedule.config, prediction_type="v_prediction")
    latents = torch.randn(3, 4, 8, 8)
    noised = Noised.draw(velocity, latents)
    share = schedule.alphas_cumprod[noised.steps][:, None, None, None]
    torch.testing.assert_close(share.sqrt() * noised.latents - (1 - share).sqrt() * noised.target, latents)
