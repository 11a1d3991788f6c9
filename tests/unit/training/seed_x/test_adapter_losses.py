"""Dropped conditions in the training of the SDXL adapters."""

from __future__ import annotations

import pytest
import torch
from tiny.diffusion import FEATURES
from torch import Tensor, nn

from seed_multimodal.diffusion.objectives import build_objective
from seed_multimodal.models.seed_x.losses import ConditionDropout, adapter_losses


class Recorder(nn.Module):
    """An adapter that stores its conditions and predicts zeros."""

    def forward(self, noisy: Tensor, steps: Tensor, *conditions: Tensor) -> Tensor:
        self.embeds, _, self.condition = conditions
        return torch.zeros_like(noisy, requires_grad=True)


def test_condition_dropout():
    from diffusers import DDPMScheduler

    # Dropped embeddings are those of an empty image, dropped conditions zeros.
    adapter = Recorder()
    embeds = torch.randn(4000, 4, FEATURES)
    adapter_losses(
        adapter,
        build_objective(DDPMScheduler()),
        latents=torch.randn(4000, 4, 2, 2),
        image_embeds=embeds,
        time_ids=torch.zeros(4000, 6),
        empty_features=torch.full((1, 4, FEATURES), 0.5),
        condition_latents=torch.randn(4000, 4, 2, 2),
        dropout=ConditionDropout(embeds=0.2, image=0.3, both=0.1),
        generator=torch.Generator().manual_seed(0),
    )
    no_embeds = (adapter.embeds == 0.5).all((1, 2))
    no_condition = (adapter.condition == 0).all((1, 2, 3))
    shares = {(True, False): 0.2, (False, True): 0.3, (True, True): 0.1}
    for (without_embeds, without_condition), share in shares.items():
        chosen = (no_embeds == without_embeds) & (no_condition == without_condition)
        assert float(chosen.float().mean()) == pytest.approx(share, abs=0.02)
    torch.testing.assert_close(adapter.embeds[~no_embeds], embeds[~no_embeds])
