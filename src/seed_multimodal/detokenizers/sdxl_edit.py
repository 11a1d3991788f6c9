"""SDXL's pipeline for the second stage: a condition picture beside the embeddings, and guidance in three ways.

diffusers' InstructPix2Pix pipeline for SDXL (Brooks et al. 2023, equation 3). The U-Net runs three times a step: with
embeddings and picture (`both`), with the picture alone (`picture`) and with neither (`none`); what counts is

    none + guidance_scale · (both − picture) + image_guidance_scale · (picture − none)

Either scale below its threshold (more than 1, at least 1) leaves one run. SEED-X's own pipeline combined the estimated
pictures instead of the estimated noises, which is the same, since both are linear in one another.

Imported lazily (diffusers is heavy). Only `prepare_image_latents` differs from the stock class: the condition's latents
are given, in the U-Net's precision whatever the autoencoder's.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionXLInstructPix2PixPipeline
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor


class SdxlEditPipeline(StableDiffusionXLInstructPix2PixPipeline):
    """Takes `image=` the condition's latents `[B, C, h, w]`, not multiplied by the autoencoder's scaling factor (as in
    InstructPix2Pix and SEED-X's released code); zeros draw without a condition."""

    @classmethod
    def of(cls, unet: Any, vae: Any, scheduler: Any) -> SdxlEditPipeline:
        """Without text encoders and watermark."""
        made = cls(vae=vae, unet=unet, scheduler=scheduler, text_encoder=None, text_encoder_2=None, tokenizer=None,
                   tokenizer_2=None, add_watermarker=False)
        made.image_processor = VaeImageProcessor(made.vae_scale_factor,  # of so many channels, it leaves alone
                                                 vae_latent_channels=vae.config.latent_channels)
        return made

    def prepare_image_latents(self, image: Tensor, batch_size: int, num_images_per_prompt: int, dtype: torch.dtype,
                              device: torch.device, do_classifier_free_guidance: bool,
                              generator: Any = None) -> Tensor:
        """Latents for the runs `both`, `picture`, `none`: `[3 · B, C, h, w]`; `[B, C, h, w]` without guidance."""
        latents = image.to(device, dtype).repeat_interleave(num_images_per_prompt, dim=0)
        return torch.cat([latents, latents, torch.zeros_like(latents)]) if do_classifier_free_guidance else latents
