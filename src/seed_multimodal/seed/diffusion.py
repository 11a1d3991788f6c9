"""De-tokenizers of SEED-1 (Stable Diffusion 1.4) and SEED-2 (stable-unCLIP).

    detokenizer = UnclipDetokenizer.from_pretrained("pretrained/stable-diffusion-2-1-unclip")
    images = detokenizer(tokenizer.decode(codes), seeds=[0])

SEED-1's embeddings replace a text prompt's; SEED-2's is a CLIP image embedding. Noise level 0 of unCLIP still adds a
little noise to it, so it depends on the seed, too. The original programs generate one image at a time from one noise
tensor; here every image has its own noise. There is no watermark.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from seed_multimodal.diffusion import base
from seed_multimodal.diffusion.base import Detokenizer, Generators, guidance
from seed_multimodal.hub import UNCLIP_DOWNLOAD, find_folder
from seed_multimodal.seed.single_file import SUFFIXES, load_single_file
from seed_multimodal.settings import setting

SD_FOLDER = "pretrained/stable-diffusion-v1-4"
SD_ADVICE = (
    f"put Stable Diffusion 1.4 there: the original's sd-v1-4.ckpt in pretrained/, or its diffusers folder (hf "
    f"download CompVis/stable-diffusion-v1-4 --local-dir {SD_FOLDER}, or a mirror of it)"
)


class SeedDetokenizer(Detokenizer):
    """Common loading code."""

    float32, decode_batch_size = ("safety_checker",), 8
    folders: tuple[str, ...] = ("unet", "vae", "scheduler", "text_encoder", "tokenizer")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        safety_checker: bool = True,
    ) -> Self:
        """Load a diffusers folder; `safety_checker`: use the folder's, if it holds one (a flagged image is black).

        Raises:
            CheckpointError: missing (with download instructions), incomplete, or damaged.
        """
        names = (*cls.folders, *(("safety_checker", "feature_extractor") if safety_checker else ()))
        place = find_folder(folder, [f"{name}/*" for name in names], cls.download_hint)
        cls.check_parts(place, *names)
        return cls(**cls.load_parts(place, dtype, *names)).to(device)


@dataclass(frozen=True)
class StableDiffusionSettings(base.DrawingSettings):
    """Defaults of the original SEED-1."""

    num_inference_steps: int = setting(50, minimum=1, maximum=1000)
    guidance_scale: float = 7.5


class StableDiffusionDetokenizer(SeedDetokenizer):
    """SEED-1: embeddings `[B, n, W]` (77 of width 768) → images."""

    label, download_hint, settings_class = "Stable Diffusion", SD_ADVICE, StableDiffusionSettings

    def __init__(self, *parts: Any, **options: Any) -> None:
        super().__init__(*parts, **options)
        self.embedding_dim = int(self.unet.config.cross_attention_dim)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        safety_checker: bool = True,
        config: str | Path | None = None,
    ) -> Self:
        """As `SeedDetokenizer`; also the original's single file, which has no safety checker (`config`: its YAML)."""
        file = Path(folder)
        if file.suffix not in SUFFIXES or not file.is_file():
            return super().from_pretrained(
                folder, device=device, dtype=dtype, safety_checker=safety_checker
            )
        return cls(**load_single_file(file, dtype, config)).to(device)

    def denoise(
        self,
        settings: Any,
        generators: Generators,
        embeds: Tensor,
        negatives: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Latents `[B, C, h, w]`; start: noise, None for the generators'."""
        prompt = embeds.to(self.device, self.unet.dtype)
        if settings.guidance_scale > 1:
            if negatives is None and self.text_encoder is not None:
                negatives = base.empty_prompt(
                    self.text_encoder, self.tokenizer, self.device, prompt.shape[1]
                )
            negatives = torch.zeros_like(prompt) if negatives is None else negatives.to(prompt)
            prompt = torch.cat([negatives.expand_as(prompt), prompt])
        start = (
            self.initial_latents(generators, self.image_size(settings), embeds)
            if start is None
            else start
        )
        return self.sample(
            start,
            {"encoder_hidden_states": prompt},
            guidance(settings.guidance_scale),
            settings,
            generators,
        )


@dataclass(frozen=True)
class UnclipSettings(base.DrawingSettings):
    """`noise_level`: how much noise is added to the embedding, in steps of the noising schedule."""

    noise_level: int = setting(0, minimum=0, maximum=999)


class UnclipDetokenizer(SeedDetokenizer):
    """SEED-2: image embeddings `[B, E]` → images. Without text encoder the prompt is zeros, or the layout's tokens."""

    label, download_hint, settings_class = "stable-unCLIP", UNCLIP_DOWNLOAD, UnclipSettings
    folders = (*SeedDetokenizer.folders, "image_normalizer", "image_noising_scheduler")

    def __init__(
        self,
        unet: Any,
        vae: Any,
        scheduler: Any,
        image_normalizer: Any,
        image_noising_scheduler: Any,
        **options: Any,
    ) -> None:
        super().__init__(unet, vae, scheduler, **options)
        self.image_normalizer, self.image_noising_scheduler = (
            image_normalizer,
            image_noising_scheduler,
        )
        self.embedding_dim = int(image_normalizer.mean.shape[1])

    def denoise(
        self,
        settings: Any,
        generators: Generators,
        embeds: Tensor,
        negatives: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Latents `[B, C, h, w]`; start: noise, None for the generators'."""
        embeds = embeds.to(self.device)
        if (
            self.layout is not None and start is None
        ):  # without a layout as the stock pipeline: after the embeddings'
            start = self.initial_latents(generators, self.image_size(settings), embeds)
        labels, prompt = self.noised(embeds, settings.noise_level, generators), self.prompt(embeds)
        if settings.guidance_scale > 1:
            away = (
                torch.zeros_like(labels)
                if negatives is None
                else self.noised(negatives, 0, generators)
            )
            labels = torch.cat([away, labels])
            prompt = torch.cat(
                [prompt if self.layout is None else torch.zeros_like(prompt), prompt]
            )
        start = (
            self.initial_latents(generators, self.image_size(settings), None)
            if start is None
            else start
        )
        conditions = {"encoder_hidden_states": prompt.to(self.unet.dtype), "class_labels": labels}
        return self.sample(
            start, conditions, guidance(settings.guidance_scale), settings, generators
        )

    def noised(self, embeds: Tensor, level: int, generators: Generators) -> Tensor:
        """The U-Net's class labels `[B, 2 E]`: noised embeddings and the sinusoid of the level."""
        from diffusers.models.embeddings import get_timestep_embedding

        embeds = embeds.to(self.device, self.unet.dtype)
        noise = torch.stack(
            [torch.randn(embeds.shape[1], generator=one, dtype=embeds.dtype) for one in generators]
        )
        levels = torch.full((len(embeds),), level, device=self.device)
        normalizer = self.image_normalizer.to(self.device)
        mixed = normalizer.unscale(
            self.image_noising_scheduler.add_noise(
                normalizer.scale(embeds), noise.to(self.device), levels
            )
        )
        sinusoid = get_timestep_embedding(
            levels, embeds.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return torch.cat([mixed, sinusoid.to(mixed)], dim=1)

    def prompt(self, embeds: Tensor) -> Tensor:
        """Input of the cross-attention `[B, n, D]`: the layout's tokens, the empty prompt, or zeros."""
        if self.layout is not None:
            return self.layout(self.layout.flat(embeds))[1]
        if self.text_encoder is not None:
            empty = base.empty_prompt(self.text_encoder, self.tokenizer, self.device)
            return empty.expand(len(embeds), *empty.shape[1:])
        return torch.zeros(len(embeds), 1, self.unet.config.cross_attention_dim, device=self.device)
