"""SEED-X's de-tokenizer: visual embeddings → image by SDXL, also with a condition image.

    detokenizer = SdxlDetokenizer.from_pretrained("pretrained/stable-diffusion-xl-base-1.0",
                                                  "pretrained/seed_detokenizer/second_stage")
    detokenizer.set_null_embeds(vision_encoder, 448)
    images = detokenizer(features, condition_images=[source], seeds=[42])

The unconditional embeddings are the vision encoder's for zero pixels, CLIP's mean colour. The
second stage guides as InstructPix2Pix (Brooks et al. 2023, equation 3), with three runs of the
U-Net a step:

    none + guidance_scale · (both − image) + image_guidance_scale · (image − none)

SEED-X's own pipeline combined predicted images instead of noises, which gives the same, because
each is linear in the other. The autoencoder computes in float32: SDXL's overflows in float16. There
is no watermark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.diffusion.base import (
    Denoising,
    Detokenizer,
    DrawingSettings,
    guidance,
)
from seed_multimodal.diffusion.conditioner import (
    Conditioner,
    Generators,
    pooled_tokens,
)
from seed_multimodal.diffusion.networks import DenoiserConditions
from seed_multimodal.diffusion.training import size_ids
from seed_multimodal.images.transforms import resize_passes, to_bytes
from seed_multimodal.models.seed_x.adapter import ResamplerXLConfig, SDXLAdapter
from seed_multimodal.progress import quiet_loading
from seed_multimodal.settings import setting
from seed_multimodal.weights.catalogue import download_advice
from seed_multimodal.weights.find import find_folder

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


@dataclass(frozen=True)
class SdxlSettings(DrawingSettings):
    """Defaults of SEED-X's original programs.

    image_guidance_scale: of the second stage; below 1 there is no guidance at all.
    """

    num_inference_steps: int = setting(50, minimum=1, maximum=1000)
    guidance_scale: float = 7.5
    image_guidance_scale: float = 1.5


class SdxlDetokenizer(Detokenizer[SdxlSettings]):
    """Embeddings `[B, N, W]` → images; N: 64 of a language model, 256 of the vision encoder.

    null_embeds: unconditional embeddings `[1, N, W]`, those of an empty image.
    """

    label = "SDXL"
    download_hint = download_advice("sdxl")
    settings_class = SdxlSettings
    part_names = ("conditioner", "resampler", "unet", "vae")
    folders = ("scheduler", "vae")  # of SDXL

    def __init__(
        self,
        adapter: SDXLAdapter,
        vae: nn.Module,
        scheduler: SchedulerMixin,
        *,
        null_embeds: Tensor | None = None,
        defaults: SdxlSettings | None = None,
        conditioner: Conditioner | None = None,
    ) -> None:
        super().__init__(adapter.unet, vae, scheduler, defaults=defaults, conditioner=conditioner)
        self.adapter = adapter
        self.resampler = adapter.resampler
        self.null_embeds = null_embeds
        self.embedding_dim = adapter.resampler.config.embedding_dim
        self.reads_condition = adapter.reads_condition

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
        """Load autoencoder and scheduler of SDXL, and an adapter of either stage.

        folder: SDXL's diffusers folder or hub name; the weights of its U-Net and text encoders are
            not read.
        adapter, sizes: see `SDXLAdapter.from_pretrained`.

        Raises:
            CheckpointError: missing, incomplete or damaged.
        """
        sdxl = find_folder(folder, ("unet/config.json", "vae/*", "scheduler/*"), cls.download_hint)
        cls.check_parts(sdxl, *cls.folders)
        parts = cls.load_parts(sdxl, dtype, "scheduler", "vae")
        with quiet_loading("diffusers"):
            network = SDXLAdapter.from_pretrained(
                adapter, sdxl, device=device, dtype=dtype, sizes=sizes
            )
        parts |= cls.adapter_parts(Path(adapter))
        return cls(network, **parts).to(device)

    @classmethod
    def adapter_parts(cls, folder: Path) -> dict[str, Any]:
        """Conditioner of an adapter's folder, scheduler and settings of a student's."""
        parts = cls.load_parts(folder, torch.float32)
        if (folder / "scheduler").is_dir():
            parts["scheduler"] = cls.load_part(folder, "scheduler")
        return {name: part for name, part in parts.items() if part is not None}

    @torch.no_grad()
    def set_null_embeds(self, encoder: nn.Module, image_size: int) -> None:
        """Set `null_embeds` to the features of normalised zeros, of `image_size` pixels a side."""
        weight = next(encoder.parameters())
        self.null_embeds = encoder(weight.new_zeros(1, 3, image_size, image_size))

    def condition_rows(
        self, embeds: Tensor, negatives: Tensor | None, settings: SdxlSettings
    ) -> dict[str, Sequence[object]]:
        """See `Detokenizer`.

        negatives: `[B or 1, M, W]`, averaged to N if M is a multiple of it; None: `null_embeds`.
        """
        if negatives is None:
            negatives = self.null_embeds
        return super().condition_rows(embeds, negatives, settings)

    def guides(self, settings: SdxlSettings) -> bool:
        """Whether the U-Net also runs without embeddings."""
        if settings.guidance_scale <= 1:
            return False
        return not self.reads_condition or settings.image_guidance_scale >= 1

    def prepare(
        self,
        settings: SdxlSettings,
        generators: Generators,
        embeds: Tensor,
        negatives: Tensor | None = None,
        images: Sequence[Image.Image | None] | None = None,
        start: Tensor | None = None,
    ) -> Denoising:
        """What the denoising loop reads.

        negatives: unconditional embeddings `[B, N, W]`, used if there is guidance.
        images: condition images of the second stage, None for zeros.
        start: initial latents; None: noise of the generators.
        """
        size = self.image_size(settings)
        is_guided = self.guides(settings)

        # 1. Latents of the condition images, and the initial latents.
        condition = None
        if self.reads_condition:
            latents = [self.encode_image(image, size) for image in images or [None] * len(embeds)]
            condition = torch.stack(latents)
        embeds = embeds.to(self.device, self.unet.dtype)
        if start is None:
            start = self.initial_latents(generators, size, embeds, condition)

        # 2. The U-Net's conditions, with a row for each run of each image.
        prompt, pooled = self.prompts(embeds, negatives if is_guided else None)
        time_ids = size_ids(size, count=len(prompt)).to(self.device)
        conditions: DenoiserConditions = {
            "encoder_hidden_states": prompt,
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids},
        }

        # 3. Guidance by two runs, or by three with a condition image.
        guide = guidance(settings.guidance_scale if is_guided else 1.0)
        if is_guided and condition is not None:
            condition = torch.cat([condition, condition, torch.zeros_like(condition)])
            guide = partial(_three_way_guidance, settings)
        return Denoising(start, conditions, guide, condition)

    def prompts(self, embeds: Tensor, negatives: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Prompt and pooled embeddings of all runs.

        The runs of the second stage are both, image, none; those of the first are none, both.
        """
        # 1. Of the images' embeddings, and of the unconditional ones.
        prompt, pooled = self.resampler(embeds)
        if negatives is None:
            return prompt, pooled
        negatives = pooled_tokens(negatives.to(embeds), embeds.shape[1])
        negative_prompt, negative_pooled = self.resampler(negatives)

        # 2. In the order of the runs.
        if self.reads_condition:
            return (
                torch.cat([prompt, negative_prompt, negative_prompt]),
                torch.cat([pooled, negative_pooled, negative_pooled]),
            )
        return torch.cat([negative_prompt, prompt]), torch.cat([negative_pooled, pooled])

    def encode_image(self, image: Image.Image | None, size: tuple[int, int]) -> Tensor:
        """Latents `[C, h, w]` of an image, which is squashed; None: zeros.

        The mode of the distribution, without the scaling factor, as in InstructPix2Pix and SEED-X's
        original code.

        size: height and width in pixels.
        """
        height, width = size
        if image is None:
            shape = (self.adapter.latent_channels, height // self.factor, width // self.factor)
            return torch.zeros(shape, device=self.device)
        image = resize_passes(image.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
        pixels = to_bytes(image) / 127.5 - 1.0
        distribution = self.vae.encode(pixels[None].to(self.device)).latent_dist
        latents: Tensor = distribution.mode()[0]
        return latents


def _three_way_guidance(settings: SdxlSettings, prediction: Tensor) -> Tensor:
    """Noise of the runs with both conditions, the image, and none `[3 · B, …]` → `[B, …]`."""
    both, image, none = prediction.chunk(3)
    towards_embeds = settings.guidance_scale * (both - image)
    towards_image = settings.image_guidance_scale * (image - none)
    return none + towards_embeds + towards_image
