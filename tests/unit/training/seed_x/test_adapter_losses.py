"""Losses of the SDXL adapters: noising, targets, condition dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from tiny.diffusion import FEATURES
from torch import Tensor, nn

from seed_multimodal.diffusion.objectives import build_objective
from seed_multimodal.diffusion.training import size_ids
from seed_multimodal.models.seed_x.losses import ConditionDropout, adapter_losses


class Recorder(nn.Module):
    """An adapter that stores its inputs and predicts zeros."""

    def forward(self, noisy: Tensor, steps: Tensor, *conditions: Tensor) -> Tensor:
        self.noisy, self.steps = noisy, steps
        self.embeds, _, self.condition = conditions
        return torch.zeros_like(noisy, requires_grad=True)


def run(count: int, dropout: ConditionDropout) -> tuple[Recorder, dict[str, Tensor], Any]:
    """The losses of a batch, its adapter and the schedule."""
    sampler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012)
    schedule = DDPMScheduler.from_config(sampler.config)
    rng = torch.Generator().manual_seed(1)
    batch = {
        "latents": torch.randn(count, 4, 8, 8, generator=rng),
        "image_embeds": torch.randn(count, 4, FEATURES, generator=rng),
        "time_ids": size_ids((16, 16), count=count),
        "empty_features": torch.full((1, 4, FEATURES), 0.5),
        "condition_latents": torch.randn(count, 4, 8, 8, generator=rng),
    }
    adapter = Recorder()
    adapter.batch = batch
    generator = torch.Generator().manual_seed(0)
    objective = build_objective(schedule)
    losses = adapter_losses(adapter, objective, **batch, dropout=dropout, generator=generator)
    return adapter, losses, schedule


def test_condition_dropout():
    # Dropped embeddings are those of an empty image, dropped conditions zeros.
    adapter, _, _ = run(4000, ConditionDropout(embeds=0.2, image=0.3, both=0.1))
    no_embeds = (adapter.embeds == 0.5).all((1, 2))
    no_condition = (adapter.condition == 0).all((1, 2, 3))
    shares = {(True, False): 0.2, (False, True): 0.3, (True, True): 0.1}
    for (embeds, condition), share in shares.items():
        chosen = (no_embeds == embeds) & (no_condition == condition)
        assert float(chosen.float().mean()) == pytest.approx(share, abs=0.02)
    kept = adapter.batch["image_embeds"][~no_embeds]
    torch.testing.assert_close(adapter.embeds[~no_embeds], kept)
