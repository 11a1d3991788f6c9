"""Frozen encoders of a pixel decoder's training: conditions and latents of images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.data.stream.targets import TargetBatch
from seed_multimodal.diffusion.networks import encode_moments, scaled_latents
from seed_multimodal.nn.frozen import FrozenFeatures


def latent_moments(vae: nn.Module, device: torch.device, batch_size: int = 16) -> FrozenFeatures:
    """Images → mean and log variance of their unscaled latents `[N, 2 C, h, w]`.

    Always float32, because SDXL's VAE overflows in float16.
    """

    def moments(pixels: Tensor) -> Tensor:
        return encode_moments(vae, signed(pixels))

    return FrozenFeatures(vae, device, moments, batch_size)


@dataclass
class EncodedImages:
    """A batch, and what frozen models compute of it."""

    batch: TargetBatch
    conditions: Tensor  # codes or embeddings of the encoder's images
    moments: Tensor  # of `latent_moments`, of the targets
    condition_latents: Tensor | None = None  # [B, C, h, w], mean latents of the condition images


@dataclass
class ImageEncoders:
    """Conditions and latents of a batch of `TargetPairs` of one size, computed on the device.

    conditions: of the encoder's images.
    moments: `latent_moments`.
    """

    conditions: FrozenFeatures
    moments: FrozenFeatures

    @torch.no_grad()
    def __call__(self, batch: TargetBatch) -> EncodedImages:
        device = self.moments.device
        with torch.autocast(device.type, enabled=False):
            encoded = EncodedImages(
                batch,
                conditions=self.conditions(batch["encoder_image"]),
                moments=self.moments(batch["image"]),
            )
            if "condition" not in batch:
                return encoded
            # Samples without a condition image have zeros.
            channels = encoded.moments.shape[1] // 2
            latents = torch.zeros_like(encoded.moments[:, :channels])
            rows = batch["conditioned"].nonzero().flatten()
            if len(rows):
                means = self.moments(batch["condition"][rows])[:, :channels]
                latents[rows.to(device)] = means
            encoded.condition_latents = latents
        return encoded


def sample_latents(vae: nn.Module, moments: Tensor, generator: torch.Generator) -> Tensor:
    """A denoiser's latents `[B, C, h, w]`, sampled from `moments` of the autoencoder.

    generator: on the CPU.
    """
    posterior = DiagonalGaussianDistribution(moments.float())
    return scaled_latents(vae, posterior.sample(generator))


def signed(pixels: Tensor) -> Tensor:
    """uint8 pixels in -1…1, as an autoencoder reads them."""
    return pixels.float() / 127.5 - 1.0


def to_image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def condition_images(batch: TargetBatch) -> list[Image.Image | None] | None:
    """The images before edits; None: the batch has none."""
    if "condition" not in batch:
        return None
    return [
        to_image(pixels) if is_edit else None
        for pixels, is_edit in zip(batch["condition"], batch["conditioned"], strict=True)
    ]
