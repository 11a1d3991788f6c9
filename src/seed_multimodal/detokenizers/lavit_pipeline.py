"""Denoising for LaVIT: diffusers' U-Net, autoencoder and scheduler, conditioned by embeddings alone.

Imported lazily (diffusers is heavy). The stock pipelines of both kinds of U-Net do not serve: SDXL's rounds the size
conditions to the U-Net's precision (in bfloat16 a height of 375 pixels becomes 376), Stable Diffusion's passes no mask
for the unconditional prompt. Latents, size conditions and what the scheduler computes are float32 here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor


class LavitPipeline(DiffusionPipeline):
    """U-Net of SDXL's or of Stable Diffusion 1's kind, autoencoder, scheduler."""

    def __init__(self, unet: Any, vae: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(self.vae_scale_factor,  # of so many channels, it leaves alone
                                                 vae_latent_channels=vae.config.latent_channels)

    @torch.no_grad()
    def __call__(self, latents: Tensor, prompt: Tensor, nothing: Tensor | None = None, mask: Tensor | None = None,
                 pooled: Tensor | None = None, time_ids: Tensor | None = None, *, steps: int, guidance: float,
                 generators: list[torch.Generator] | None = None,
                 on_step: Callable[[int, int], None] | None = None) -> Tensor:
        """Latents without noise `[B, C, h, w]`, in float32.

        Args:
            latents: noise `[B, C, h, w]`. prompt: `[B, N, W]`, in the U-Net's precision.
            nothing: the unconditional prompt `[B, N, W]`, of which `mask` `[B, N]` tells the embeddings that are there
                (None: all). None: no guidance, and the U-Net runs once a step for each picture instead of twice.
            pooled, time_ids: `[B, P]`, `[B, 6]` for a U-Net of SDXL's kind. The unconditional pooled embedding is zero,
                the sizes are the same.
            on_step: called after each step with the number of steps done and of all.
        """
        scheduler, runs = self.scheduler, 1 if nothing is None else 2
        told: dict[str, Any] = {"encoder_hidden_states": prompt if nothing is None else torch.cat([nothing, prompt])}
        if nothing is not None and mask is not None:
            told["encoder_attention_mask"] = torch.cat([mask, torch.ones_like(mask)])
        if pooled is not None and time_ids is not None:
            both = pooled if nothing is None else torch.cat([torch.zeros_like(pooled), pooled])
            told["added_cond_kwargs"] = {"text_embeds": both, "time_ids": time_ids.repeat(runs, 1)}
        scheduler.set_timesteps(steps, device=prompt.device)
        latents = latents.to(prompt.device, torch.float32) * scheduler.init_noise_sigma
        own = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
        for done, step in enumerate(scheduler.timesteps, start=1):
            sample = scheduler.scale_model_input(latents.repeat(runs, 1, 1, 1), step).to(prompt.dtype)
            noise = self.unet(sample, step, **told).sample.float()
            if nothing is not None:
                away, toward = noise.chunk(2)
                noise = away + guidance * (toward - away)
            latents = scheduler.step(noise, step, latents, **own).prev_sample
            if on_step is not None:
                on_step(done, len(scheduler.timesteps))
        return latents
