"""De-tokenizers of SEED-1 (Stable Diffusion 1.4) and SEED-2 (stable-unCLIP).

    detokenizer = UnclipDetokenizer.from_pretrained("pretrained/stable-diffusion-2-1-unclip")
    images = detokenizer(tokenizer.decode(codes), seeds=[0])

SEED-1's embeddings stand in the place of a text prompt's; SEED-2's is a CLIP image embedding. Noise level 0 of unCLIP
still adds a little noise to it, so an image also depends on its seed there. Unlike the original programs, which drew
one image at a time from one noise tensor, every image has its own noise. There is no watermark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.diffusion.base import (
    Callback,
    Detokenizer,
    DrawingSettings,
    Generators,
    SizedSettings,
    each,
    empty_prompt,
    guidance,
)
from seed_multimodal.errors import CheckpointError
from seed_multimodal.hub import UNCLIP_WHERE, find_folder
from seed_multimodal.settings import setting

SD_FOLDER = "pretrained/stable-diffusion-v1-4"
SD_WHERE = (f"download the diffusers folder of Stable Diffusion 1.4 (hf download CompVis/stable-diffusion-v1-4 "
            f"--local-dir {SD_FOLDER}, or a mirror of it; a single .ckpt file is not read)")
NEEDED = ("unet/*", "vae/*", "scheduler/*", "text_encoder/*", "tokenizer/*", "safety_checker/*", "feature_extractor/*",
          "image_normalizer/*", "image_noising_scheduler/*")


class SeedDetokenizer(Detokenizer):
    """Shared by both: a call with embeddings of images, and an empty prompt to steer away from."""

    decode_at_once = 8

    @property
    def embedding_dim(self) -> int:
        """Width of the embeddings that the model was trained on."""
        raise NotImplementedError

    def __call__(self, embeds: Tensor, *, negative_embeds: Tensor | None = None, seeds: Sequence[int] | None = None,
                 batch_size: int | None = None, callback: Callback | None = None, **settings: Any
                 ) -> list[Image.Image]:
        """Draw B embeddings, as the tokenizer's `decode` gives them.

        Args:
            negative_embeds: to steer away from, one for all images or one each.
            seeds, batch_size, callback: as of `Detokenizer.draw`. settings: fields of `settings_class`.

        Raises:
            ConfigError: unknown settings, or out of range. CheckpointError: embeddings of another width.
        """
        if embeds.shape[-1] != self.embedding_dim:
            raise CheckpointError(f"The embeddings have width {embeds.shape[-1]}, but this diffusion model needs width "
                                  f"{self.embedding_dim}: tokenizer and de-tokenizer do not belong together.")
        negatives = None if negative_embeds is None else each(negative_embeds, len(embeds))
        return self.draw({"embeds": embeds, "negatives": negatives}, seeds, batch_size, callback,
                         self.check_settings(**settings))


@dataclass(frozen=True)
class StableDiffusionSettings(SizedSettings):
    """Defaults of the original SEED-1."""

    num_inference_steps: int = setting(50, least=1)
    guidance_scale: float = 7.5


class StableDiffusionDetokenizer(SeedDetokenizer):
    """SEED-1: embeddings `[B, n, W]` (77 of width 768) → images."""

    kind, where = "Stable Diffusion", SD_WHERE
    settings_class = StableDiffusionSettings

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu",
                        dtype: torch.dtype = torch.float32, safety_checker: bool = True) -> StableDiffusionDetokenizer:
        """Load a diffusers folder; `safety_checker`: use the folder's, if it holds one (a flagged image is black).

        Raises:
            CheckpointError: not there (with what to download), not complete, or damaged.
        """
        place = find_folder(folder, NEEDED, SD_WHERE)
        checker = cls.load_safety_checker(place) if safety_checker else {}
        return cls(cls.load_unet(place, dtype), cls.load_vae(place, dtype), cls.load_scheduler(place),
                   defaults=cls.read_defaults(place), **cls.load_text_encoder(place, dtype), **checker).to(device)

    @property
    def embedding_dim(self) -> int:
        """Width W."""
        return int(self.unet.config.cross_attention_dim)

    def denoise(self, settings: Any, generators: Generators, embeds: Tensor, negatives: Tensor | None = None,
                start: Tensor | None = None, callback: Callback | None = None) -> Tensor:
        """Latents `[B, C, h, w]`; start: noise, None for the generators'."""
        prompt = embeds.to(self.device, self.unet.dtype)
        if settings.guidance_scale > 1:
            if negatives is None and self.text_encoder is not None:
                negatives = empty_prompt(self.text_encoder, self.tokenizer, self.device, prompt.shape[1])
            negatives = torch.zeros_like(prompt) if negatives is None else negatives
            prompt = torch.cat([each(negatives, len(prompt)).to(prompt), prompt])
        start = self.noise(generators, self.size(settings)) if start is None else start
        return self.sample(start, {"encoder_hidden_states": prompt}, guidance(settings.guidance_scale), settings,
                           generators, callback)


@dataclass(frozen=True)
class UnclipSettings(DrawingSettings):
    """`noise_level`: noise added to the embedding, up to the length of the noising schedule."""

    noise_level: int = setting(0, least=0, most=999)


class UnclipDetokenizer(SeedDetokenizer):
    """SEED-2: image embeddings `[B, E]` → images. Without text encoder the prompt is zeros, or the layout's tokens."""

    kind, where = "stable-unCLIP", UNCLIP_WHERE
    settings_class = UnclipSettings

    def __init__(self, unet: Any, vae: Any, scheduler: Any, image_normalizer: Any, image_noising_scheduler: Any,
                 **options: Any) -> None:
        super().__init__(unet, vae, scheduler, **options)
        self.image_normalizer, self.image_noising_scheduler = image_normalizer, image_noising_scheduler

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu",
                        dtype: torch.dtype = torch.float32) -> UnclipDetokenizer:
        """Load a diffusers folder, without its CLIP image encoder; errors as of `StableDiffusionDetokenizer`."""
        from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

        place = find_folder(folder, NEEDED, UNCLIP_WHERE)
        return cls(cls.load_unet(place, dtype), cls.load_vae(place, dtype), cls.load_scheduler(place),
                   cls.load_part(StableUnCLIPImageNormalizer, place, "image_normalizer", dtype),
                   cls.load_scheduler(place, "image_noising_scheduler"), defaults=cls.read_defaults(place),
                   layout=cls.load_layout(place), **cls.load_text_encoder(place, dtype)).to(device)

    @property
    def embedding_dim(self) -> int:
        """Width E."""
        return int(self.image_normalizer.mean.shape[1])

    def denoise(self, settings: Any, generators: Generators, embeds: Tensor, negatives: Tensor | None = None,
                start: Tensor | None = None, callback: Callback | None = None) -> Tensor:
        """Latents `[B, C, h, w]`; start: noise, None for the generators'."""
        guided, dtype = settings.guidance_scale > 1, self.unet.dtype
        embeds = embeds.to(self.device)
        if start is None and self.layout is not None:
            start = self.layout.warm_latents(embeds, generators, self.scheduler)
        labels = self.noised(embeds, settings.noise_level, generators)
        if guided:
            away = torch.zeros_like(labels) if negatives is None else self.noised(negatives, 0, generators)
            labels = torch.cat([away, labels])
        prompt, no_prompt = self.prompts(embeds)
        start = self.noise(generators, self.size(settings)) if start is None else start
        prompt = torch.cat([no_prompt, prompt]) if guided else prompt
        return self.sample(start, {"encoder_hidden_states": prompt.to(dtype), "class_labels": labels},
                           guidance(settings.guidance_scale), settings, generators, callback)

    def noised(self, embeds: Tensor, level: int, generators: Generators) -> Tensor:
        """The U-Net's class labels `[B, 2 E]`: noised embeddings and the sinusoid of the level."""
        from diffusers.models.embeddings import get_timestep_embedding

        embeds = embeds.to(self.device, self.unet.dtype)
        noise = torch.stack([torch.randn(embeds.shape[1], generator=one, dtype=embeds.dtype) for one in generators])
        levels = torch.full((len(embeds),), level, device=self.device)
        normalizer = self.image_normalizer.to(self.device)
        mixed = normalizer.unscale(self.image_noising_scheduler.add_noise(
            normalizer.scale(embeds), noise.to(self.device), levels))
        sinusoid = get_timestep_embedding(levels, embeds.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0)
        return torch.cat([mixed, sinusoid.to(mixed)], dim=1)

    def prompts(self, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """What the cross-attention reads, and its unconditional half, `[B, n, D]`."""
        if self.layout is not None:
            tokens = self.layout(self.layout.flat(embeds))[1]
        elif self.text_encoder is not None:
            tokens = each(empty_prompt(self.text_encoder, self.tokenizer, self.device), len(embeds))
            return tokens, tokens
        else:
            tokens = torch.zeros(len(embeds), 1, self.unet.config.cross_attention_dim, device=self.device)
        return tokens, torch.zeros_like(tokens)
