"""PLMS with the time steps of the CompVis programs, which SEED-1's demo samples with.

Imported lazily (diffusers is heavy). diffusers' `PNDMScheduler(skip_prk_steps=True)` is the same sampler, but its time
steps differ where the number of steps does not divide the training steps: CompVis keeps the stride and takes every step
below the end (7 asked: 995, 853, …, 1: 8 done), diffusers takes the first 7 of them (853, …, 1).
Unlike there, a step that would lie past the end (3, 9, 27, … steps asked) is left out instead of failing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import PNDMScheduler


class PlmsScheduler(PNDMScheduler):
    """`PNDMScheduler` with CompVis' time steps; build it with `from_sampler`."""

    @classmethod
    def from_sampler(cls, config: Mapping[str, Any]) -> PlmsScheduler:
        """With the noise schedule of another scheduler's `config` and the original's fixed choices."""
        return cls.from_config(config, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1,
                               timestep_spacing="leading")

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """About `num_inference_steps` steps, the second one twice (its two predictions are averaged, as Heun does)."""
        super().set_timesteps(num_inference_steps, device)
        total = self.config.num_train_timesteps
        steps = np.arange(0, total, total // num_inference_steps) + self.config.steps_offset
        steps = steps[steps < total]
        self._timesteps = steps
        self.plms_timesteps = np.concatenate([steps[:-1], steps[-2:-1], steps[-1:]])[::-1].astype(np.int64)
        self.timesteps = torch.from_numpy(self.plms_timesteps).to(device)
