"""What SEED-X's SDXL adapters learn: the losses of both stages, without a loop.

The paper says: a frozen tower's embeddings of a picture condition SDXL, whose own noise-prediction loss trains the
resampler and the U-Net's keys and values; the second stage also reads the latents of a condition picture (the source of
an edit, or nothing). The released repository holds no training program, so the following are our choices:

* conditions are left out at random (`ConditionDropout`, shares as InstructPix2Pix's): the embeddings become those of an
  empty picture, which guidance steers away from, and the condition's latents zeros;
* `min_snr` weighs time steps by their signal-to-noise ratio, capped (Hang et al. 2023); off by default;
* a base model that predicts velocities is trained to do so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.detokenizers.denoising import Noised
from seed_multimodal.detokenizers.pipelines import refuse_unfilled
from seed_multimodal.detokenizers.sdxl import SdxlDetokenizer
from seed_multimodal.detokenizers.sdxl_adapter import SDXLAdapter
from seed_multimodal.detokenizers.sdxl_resampler import ResamplerSizes, ResamplerXLV2
from seed_multimodal.errors import ConfigError
from seed_multimodal.hub import SDXL_WHERE, find_folder
from seed_multimodal.settings import check_settings, setting


@dataclass(frozen=True)
class ConditionDropout:
    """Shares of the samples without embeddings, without the condition picture, and without both."""

    embeds: float = setting(0.05, least=0, most=1)
    picture: float = setting(0.05, least=0, most=1)
    both: float = setting(0.05, least=0, most=1)

    def __post_init__(self) -> None:
        check_settings(self, "condition dropout")
        if self.embeds + self.picture + self.both > 1:
            raise ConfigError("condition dropout: embeds, picture and both must be at most 1 together, not "
                              f"{self.embeds + self.picture + self.both:g}.")

    def draw(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Which samples lose their embeddings, and which their condition picture: bool `[count]` each, on the CPU."""
        at = torch.rand(count, generator=generator)
        both = at < self.both
        embeds = both | (at - self.both < self.embeds)
        picture = both | (~embeds & (at - self.both - self.embeds < self.picture))
        return embeds, picture


@dataclass(frozen=True)
class AdapterLoss:
    """The loss of a training step of either stage.

    Attributes:
        dropout: of conditions; min_snr: cap γ of the weights, None for the same weight at every time step.
    """

    dropout: ConditionDropout = field(default_factory=ConditionDropout)
    min_snr: float | None = setting(None, above=0)

    def __post_init__(self) -> None:
        check_settings(self, "adapter loss")

    def __call__(self, adapter: SDXLAdapter, schedule: Any, latents: Tensor, image_embeds: Tensor, time_ids: Tensor, *,
                 empty_features: Tensor, condition_latents: Tensor | None = None,
                 generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Noise the latents at random time steps, and compare what the adapter predicts.

        Args:
            adapter: the adapter, or a wrapper of it (DDP) that is called alike.
            schedule: of `training_schedule`.
            latents: `[B, C, h, w]` of the pictures, multiplied by the autoencoder's scaling factor.
            image_embeds: `[B, N, W]`. empty_features: `[1, N, W]`, the tower's of an empty picture.
            time_ids: `[B, 6]` (`size_ids`).
            condition_latents: `[B, C, h, w]` not so multiplied, for a second stage; None: every sample without.
            generator: on the CPU, of all random choices.

        Returns:
            `total_loss`, the weighted mean; `mse`, the plain mean, without gradient.
        """
        count, device = len(latents), latents.device
        without_embeds, without_picture = self.dropout.draw(count, generator)
        noised = Noised.draw(schedule, latents, self.min_snr, generator)
        embeds = torch.where(without_embeds.to(device)[:, None, None], empty_features.to(image_embeds), image_embeds)
        if condition_latents is not None:
            condition_latents = condition_latents * ~without_picture.to(device)[:, None, None, None]
        return noised.losses(adapter(noised.latents, noised.steps, embeds, time_ids, condition_latents))


def adapter_from_sdxl(folder: str | Path, sizes: ResamplerSizes | None = None, *, seed: int = 0,
                      dtype: torch.dtype = torch.float32) -> SDXLAdapter:
    """What training begins with: SDXL's own U-Net and an untrained resampler, as a first stage on the CPU.

    Args:
        folder: SDXL's diffusers folder or hub name. sizes: None for the released ones. seed: of the resampler.

    Raises:
        CheckpointError: not there, or not complete.
    """
    from diffusers import UNet2DConditionModel

    place = find_folder(folder, ("unet/*",), SDXL_WHERE)
    with SdxlDetokenizer.reading(place):
        unet = UNet2DConditionModel.from_pretrained(place, subfolder="unet", torch_dtype=dtype, local_files_only=True)
    refuse_unfilled(unet, place / "unet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SDXLAdapter(unet, ResamplerXLV2(sizes).to(dtype)).train()
