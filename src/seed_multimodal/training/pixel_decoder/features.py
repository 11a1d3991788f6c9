"""What a pixel decoder learns from: the conditions of pictures and the autoencoder's latents, both of frozen models.

The autoencoder computes in float32 whatever the run's precision (SDXL's overflows in float16), one picture at a time;
the conditions' model in the run's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.diffusion.base import Detokenizer
from seed_multimodal.diffusion.training import training_schedule
from seed_multimodal.errors import CheckpointError
from seed_multimodal.hub import find_folder
from seed_multimodal.training.frozen_features import FrozenFeatures

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NEEDED = ("unet/config.json", "vae/*", "vae.json", "scheduler/*")


class LatentMoments(FrozenFeatures):
    """Pictures → mean and logarithm of the variance of their latents `[N, 2 C, h, w]`, not scaled."""

    def __init__(self, vae: Any, device: torch.device, cache: str | Path | None = None, at_once: int = 1) -> None:
        super().__init__(vae, device, at_once=at_once, cache=cache)

    def compute(self, pixels: Tensor) -> Tensor:
        """See `FrozenFeatures`."""
        return self.model.encode(pixels.float() / 127.5 - 1.0).latent_dist.parameters


class PictureFeatures:
    """Conditions and latents of samples of `DrawnPairs`.

    Args:
        seen: what conditions are made of: of `seen` pixels `[B, 3, S, S]`. moments: of the drawn pictures.

    Attributes:
        record: a file that says that everything is kept; removed once that turns out to be wrong.
    """

    def __init__(self, seen: FrozenFeatures, moments: LatentMoments) -> None:
        self.seen, self.moments, self.device = seen, moments, moments.device
        self.record: Path | None = None

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Features of a batch of one size, on the device.

        Returns:
            `seen`; `moments` as of `LatentMoments`; with pictures to condition on `condition` `[B, C, h, w]`, the means
            of their latents, zeros where a sample has none.

        Raises:
            CheckpointError: as of `FrozenFeatures`.
        """
        try:
            return self._features(batch)
        except CheckpointError:
            if self.record is not None:  # the next start shall look at every picture
                self.record.unlink(missing_ok=True)
            raise

    def _features(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, enabled=False):
            made = {"seen": self.seen(batch["seen"]), "moments": self.moments(batch["image"])}
            if "condition" in batch:
                channels = made["moments"].shape[1] // 2
                made["condition"] = torch.zeros_like(made["moments"][:, :channels])
                rows = batch["conditioned"].nonzero().flatten()
                if len(rows):
                    made["condition"][rows.to(self.device)] = self.moments(batch["condition"][rows])[:, :channels]
        return made

    def keep(self, batch: Mapping[str, Any]) -> None:
        """Make and write what is not kept of a batch of one size. Raises as a call."""
        with torch.autocast(self.device.type, enabled=False):
            self.seen.keep(batch["seen"])
            self.moments.keep(batch["image"])
            if "condition" in batch:
                self.moments.keep(batch["condition"][batch["conditioned"]])

    @property
    def folders(self) -> list[Path]:
        """Of kept features; none without a cache."""
        return [folder for folder in (self.seen.folder, self.moments.folder) if folder is not None]

    def release(self) -> None:
        """Let go of both models; what is asked for from here on must be kept."""
        self.seen.release()
        self.moments.release()


def load_autoencoder(folder: str | Path, kind: type[Detokenizer]) -> Any:
    """A diffusers folder's autoencoder in float32; `kind` says in errors what the folder should be.

    Raises:
        CheckpointError: not there, or not complete.
    """
    return kind.load_part(find_folder(folder, NEEDED, kind.where), "vae")


def load_schedule(folder: str | Path, kind: type[Detokenizer]) -> Any:
    """The noise schedule of a diffusers folder, for training. Raises CheckpointError: not there."""
    place = find_folder(folder, NEEDED, kind.where)
    return training_schedule(kind.load_part(place, "scheduler"))


def drawn_latents(moments: Tensor, scaling: float, generator: torch.Generator | None = None) -> Tensor:
    """Latents `[B, C, h, w]` of their distributions, times the autoencoder's factor; `generator` on the CPU."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    return (mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise) * scaling
