"""SEED-X's de-tokenizer: visual embeddings → image by SDXL, in the second stage with a condition image.

    detokenizer = SdxlDetokenizer.from_pretrained("pretrained/stable-diffusion-xl-base-1.0",
                                                  "pretrained/seed_detokenizer/second_stage")
    detokenizer.set_null_embeds(vision_encoder, 448)
    images = detokenizer(features, condition_images=[source], seeds=[42])

The unconditional embeddings are the vision encoder's for zero pixels, CLIP's mean colour. The second stage guides as
InstructPix2Pix (Brooks et al. 2023, equation 3), with three runs of the U-Net a step:

    none + guidance_scale · (both − image) + image_guidance_scale · (image − none)

SEED-X's own pipeline combined predicted images instead of noises, which is the same (both are linear in one another).
The autoencoder computes in float32: SDXL's overflows in float16. There is no watermark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.diffusion.base import Detokenizer, DrawingSettings, Generators, guidance
from seed_multimodal.diffusion.layout import LAYOUT, LayoutDecoder, pooled_tokens
from seed_multimodal.diffusion.training import size_ids
from seed_multimodal.hub import SDXL_DOWNLOAD, find_folder
from seed_multimodal.images.transforms import resize_passes, to_bytes
from seed_multimodal.progress import quiet_loading
from seed_multimodal.seed_x.adapter import ResamplerXLConfig, SDXLAdapter
from seed_multimodal.settings import setting


@dataclass(frozen=True)
class SdxlSettings(DrawingSettings):
    """Defaults of SEED-X's original programs; `image_guidance_scale`: of the second stage, at least 1 to guide."""

    num_inference_steps: int = setting(50, minimum=1, maximum=1000)
    guidance_scale: float = 7.5
    image_guidance_scale: float = 1.5


class SdxlDetokenizer(Detokenizer):
    """Embeddings `[B, N, W]` (N: 64 of an MLLM, or 256 of the vision encoder) → images; guidance steers away from
    `null_embeds` `[1, N, W]`, those of an empty image, where no others are given."""

    label, download_hint, settings_class = "SDXL", SDXL_DOWNLOAD, SdxlSettings
    part_names = ("layout", "resampler", "unet", "vae")
    folders = ("scheduler", "vae")  # of SDXL

    def __init__(
        self,
        adapter: SDXLAdapter,
        vae: Any,
        scheduler: Any,
        *,
        null_embeds: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(adapter.unet, vae, scheduler, **options)
        self.adapter, self.resampler, self.null_embeds = adapter, adapter.resampler, null_embeds
        self.embedding_dim, self.reads_condition = (
            adapter.resampler.config.embedding_dim,
            adapter.reads_condition,
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        adapter: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        sizes: ResamplerXLConfig | None = None,
    ) -> SdxlDetokenizer:
        """Load autoencoder and scheduler of SDXL (a diffusers folder or hub name; its U-Net's weights and text encoders
        are not read), and an adapter of either stage, as `SDXLAdapter.from_pretrained`. Raises `CheckpointError`."""
        place = find_folder(folder, ("unet/config.json", "vae/*", "scheduler/*"), SDXL_DOWNLOAD)
        cls.check_parts(place, *cls.folders)
        parts = cls.load_parts(place, dtype, "scheduler", "vae")
        with quiet_loading("diffusers"):
            weights = SDXLAdapter.from_pretrained(
                adapter, place, device=device, dtype=dtype, sizes=sizes
            )
        if (Path(adapter) / LAYOUT).is_dir():
            parts["layout"] = LayoutDecoder.from_pretrained(Path(adapter) / LAYOUT)
        return cls(weights, **parts).to(device)

    @torch.no_grad()
    def set_null_embeds(self, encoder: nn.Module, image_size: int) -> None:
        """Set `null_embeds` to what a vision encoder `[B, 3, S, S]` → `[B, N, W]` gives for normalised zeros."""
        like = next(encoder.parameters())
        self.null_embeds = encoder(
            torch.zeros(1, 3, image_size, image_size, device=like.device, dtype=like.dtype)
        )

    def condition_rows(
        self, embeds: Tensor, negatives: Tensor | None, settings: Any
    ) -> dict[str, Any]:
        """See `Detokenizer`; negatives `[B or 1, M, W]` are averaged to N if M is a multiple of it."""
        return super().condition_rows(
            embeds, self.null_embeds if negatives is None else negatives, settings
        )

    def guides(self, settings: Any) -> bool:
        """Whether the U-Net also runs without embeddings."""
        return settings.guidance_scale > 1 and (
            settings.image_guidance_scale >= 1 or not self.reads_condition
        )

    def denoise(
        self,
        settings: Any,
        generators: Generators,
        embeds: Tensor,
        negatives: Tensor | None = None,
        images: Sequence[Image.Image | None] | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Latents `[B, C, h, w]`; start: noise, None for the generators'."""
        size, guided, condition = self.image_size(settings), self.guides(settings), None
        if self.reads_condition:
            condition = torch.stack(
                [self.encode_image(image, size) for image in images or [None] * len(embeds)]
            )
        embeds = embeds.to(self.device, self.unet.dtype)
        start = (
            self.initial_latents(generators, size, embeds, condition) if start is None else start
        )
        prompt, pooled = self.prompts(embeds, negatives if guided else None)
        conditions = {
            "encoder_hidden_states": prompt,
            "added_cond_kwargs": {
                "text_embeds": pooled,
                "time_ids": size_ids(size, count=len(prompt)).to(self.device),
            },
        }
        guide = guidance(settings.guidance_scale if guided else 1.0)

        def three_way(prediction: Tensor) -> Tensor:
            both, image, none = prediction.chunk(3)
            return (
                none
                + settings.guidance_scale * (both - image)
                + settings.image_guidance_scale * (image - none)
            )

        if guided and condition is not None:
            condition, guide = (
                torch.cat([condition, condition, torch.zeros_like(condition)]),
                three_way,
            )
        return self.sample(start, conditions, guide, settings, generators, condition)

    def prompts(self, embeds: Tensor, negatives: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Prompt and pooled embeddings of all runs: in the second stage of both, image, none; else of none, both."""
        given = self.resampler(embeds)
        if negatives is None:
            return given
        away = self.resampler(pooled_tokens(negatives.to(embeds), embeds.shape[1]))
        runs = (given, away, away) if self.reads_condition else (away, given)
        return torch.cat([prompt for prompt, _ in runs]), torch.cat([pooled for _, pooled in runs])

    def encode_image(self, image: Image.Image | None, size: tuple[int, int]) -> Tensor:
        """Latents `[C, h, w]` of an image squashed to (height, width), zeros without one: the distribution's mode,
        without the scaling factor, as in InstructPix2Pix and SEED-X's original code."""
        if image is None:
            height, width = (side // self.factor for side in size)
            return torch.zeros(self.adapter.latent_channels, height, width, device=self.device)
        pixels = to_bytes(resize_passes(image.convert("RGB"), size[::-1], Image.Resampling.BICUBIC))
        mode: Tensor = self.vae.encode(
            (pixels / 127.5 - 1.0)[None].to(self.device)
        ).latent_dist.mode()
        return mode[0]
