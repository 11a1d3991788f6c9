"""diffusers' stable-unCLIP pipeline with the one thing SEED adds: negative image embeddings.

Imported lazily (diffusers is heavy). Only `_encode_image` differs from the stock class: the unconditional half may be
a noised negative embedding instead of zeros, and no image encoder is needed when embeddings are given.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableUnCLIPImg2ImgPipeline
from torch import Tensor


class SeedUnclipPipeline(StableUnCLIPImg2ImgPipeline):
    """Set `negative_image_embeds` `[B, E]` (or None) before a call; it is the caller's to clear."""

    negative_image_embeds: Tensor | None = None

    def _encode_image(self, image: Any, device: torch.device, batch_size: int, num_images_per_prompt: int,
                      do_classifier_free_guidance: bool, noise_level: int,
                      generator: torch.Generator | list[torch.Generator] | None, image_embeds: Tensor | None) -> Tensor:
        """Class labels of the U-Net `[2 · B, 2 · E]`, unconditional half first; `[B, 2 · E]` without guidance.

        Negatives are noised at level 0 whatever `noise_level` is, and draw their noise after the positives.
        """
        if image_embeds is None:
            return super()._encode_image(image, device, batch_size, num_images_per_prompt,
                                         do_classifier_free_guidance, noise_level, generator, image_embeds)
        labels = self._noised(image_embeds, int(noise_level), device, num_images_per_prompt, generator)
        if not do_classifier_free_guidance:
            return labels
        if self.negative_image_embeds is None:
            unconditional = torch.zeros_like(labels)
        else:
            unconditional = self._noised(self.negative_image_embeds, 0, device, num_images_per_prompt, generator)
        return torch.cat([unconditional, labels])

    def _noised(self, embeds: Tensor, level: int, device: torch.device, repeats: int,
                generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
        embeds = embeds.to(device=device, dtype=self.unet.dtype)
        return self.noise_image_embeddings(embeds, level, generator=generator).repeat_interleave(repeats, dim=0)
