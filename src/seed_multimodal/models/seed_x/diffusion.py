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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.diffusion.base import Conditions, Detokenizer, DrawingSettings
from seed_multimodal.diffusion.conditioner import Generators, pooled_tokens
from seed_multimodal.diffusion.networks import DenoiserConditions, conditions_of, encode_moments
from seed_multimodal.diffusion.training import reads_images
from seed_multimodal.images.transforms import resize_passes, to_bytes
from seed_multimodal.models.seed_x.adapter import ResamplerXLConfig, ResamplerXLV2, SDXLAdapter
from seed_multimodal.progress import quiet_loading
from seed_multimodal.settings import positive
from seed_multimodal.weights.catalogue import download_advice
from seed_multimodal.weights.find import find_folder


@dataclass(frozen=True)
class SdxlSettings(DrawingSettings):
    """Defaults of SEED-X's original programs.

    image_guidance_scale: of the second stage; below 1 there is no guidance at all.
    """

    num_inference_steps: int = positive(50, maximum=1000)
    guidance_scale: float = 7.5
    image_guidance_scale: float = 1.5


@dataclass(eq=False)
class SdxlDetokenizer(Detokenizer[SdxlSettings]):
    """Embeddings `[B, N, W]` → images; N: 64 of a language model, 256 of the vision encoder.

    denoiser, resampler: of an `SDXLAdapter`.
    null_embeds: unconditional embeddings `[1, M, W]`, those of an empty image, averaged to N if M
        is a multiple of it; None: zeros.
    """

    resampler: ResamplerXLV2
    null_embeds: Tensor | None = None

    label = "SDXL"
    download_hint = download_advice("sdxl")
    settings_class = SdxlSettings
    folders = ("scheduler", "vae")  # of SDXL
    float32 = ("vae",)
    trained = {"unet": "denoiser", "resampler": "resampler"}

    @property
    def reads_condition(self) -> bool:  # type: ignore[override]
        """Whether this is the second stage, which reads the latents of a condition image."""
        return reads_images(self.denoiser)

    @property
    def embedding_dim(self) -> int:
        return self.resampler.config.embedding_dim

    @classmethod
    def from_pretrained(  # type: ignore[override]
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
        parts = cls.load_parts(sdxl, dtype, *cls.folders)
        with quiet_loading("diffusers"):
            network = SDXLAdapter.from_pretrained(
                adapter, sdxl, device=device, dtype=dtype, sizes=sizes
            )

        # An adapter's folder may have a conditioner, a student's also its scheduler and settings.
        names = ["scheduler"] if (Path(adapter) / "scheduler").is_dir() else []
        own_parts = cls.load_parts(Path(adapter), torch.float32, *names)
        parts |= {name: part for name, part in own_parts.items() if part is not None}
        return cls(network.unet, resampler=network.resampler, **parts).to(device)

    @torch.no_grad()
    def set_null_embeds(self, encoder: nn.Module, image_size: int) -> None:
        """Set `null_embeds` to the features of normalised zeros, of `image_size` pixels a side."""
        weight = next(encoder.parameters())
        self.null_embeds = encoder(weight.new_zeros(1, 3, image_size, image_size))

    def conditions(
        self,
        embeds: Tensor,
        negatives: Tensor | None,
        time_ids: Tensor | None,
        settings: SdxlSettings,
        generators: Generators,
    ) -> Conditions:
        """See `Detokenizer`; without `negatives` `null_embeds` are unconditional."""
        if negatives is None:
            negatives = self.null_embeds

        def null() -> DenoiserConditions:
            null_embeds = torch.zeros_like(embeds)
            if negatives is not None:
                null_embeds = pooled_tokens(negatives.to(embeds), embeds.shape[1])
            null_prompt, null_pooled = self.resampler(null_embeds.expand_as(embeds))
            return conditions_of(self.denoiser, null_prompt, null_pooled, time_ids)

        prompt, pooled = self.resampler(embeds)
        return conditions_of(self.denoiser, prompt, pooled, time_ids), null

    def guide(self, settings: SdxlSettings) -> tuple[int, Callable[[Tensor], Tensor]]:
        """Two runs, or with a condition image three: without both, with the image, with both."""
        scale = settings.guidance_scale
        image_scale = settings.image_guidance_scale
        if not self.reads_condition or scale <= 1:
            return super().guide(settings)
        if image_scale < 1:
            return 1, lambda prediction: prediction

        def guided(prediction: Tensor) -> Tensor:
            none, image, both = prediction.chunk(3)
            return none + scale * (both - image) + image_scale * (image - none)

        return 3, guided

    def condition_latents(
        self, images: Sequence[Image.Image | None], size: tuple[int, int]
    ) -> Tensor:
        return torch.stack([self.encode_image(image, size) for image in images])

    def encode_image(self, image: Image.Image | None, size: tuple[int, int]) -> Tensor:
        """Latents `[C, h, w]` of an image, which is squashed; None: zeros.

        The mode of the distribution, without the scaling factor, as in InstructPix2Pix and SEED-X's
        original code.

        size: height and width in pixels.
        """
        height, width = size
        if image is None:
            shape = (self.vae.config.latent_channels, height // self.factor, width // self.factor)
            return torch.zeros(shape, dtype=torch.float32, device=self.device)
        image = resize_passes(image.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
        pixels = to_bytes(image).float() / 127.5 - 1.0
        moments = encode_moments(self.vae, pixels[None].to(self.device))
        return moments.chunk(2, dim=1)[0][0]
