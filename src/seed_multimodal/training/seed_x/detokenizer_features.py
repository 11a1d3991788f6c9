"""What a de-tokenizer learns from: the tower's embeddings of pictures and the autoencoder's latents, both frozen.

The autoencoder computes in float32 whatever the run's precision (SDXL's overflows in float16), one picture at a time;
the tower in the run's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.detokenizers.autoencoder import read_autoencoder
from seed_multimodal.detokenizers.sdxl import NEEDED, SdxlDetokenizer
from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError
from seed_multimodal.hub import SDXL_WHERE, find_folder
from seed_multimodal.training.frozen_features import FrozenFeatures
from seed_multimodal.training.seed_x.tower_features import TowerFeatures

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class LatentMoments(FrozenFeatures):
    """Pictures → mean and logarithm of the variance of their latents `[N, 2 C, h, w]`, not scaled."""

    def __init__(self, vae: Any, device: torch.device, cache: str | Path | None = None, at_once: int = 1) -> None:
        super().__init__(vae, device, at_once=at_once, cache=cache)

    def compute(self, pixels: Tensor) -> Tensor:
        """See `FrozenFeatures`."""
        return self.model.encode(pixels.float() / 127.5 - 1.0).latent_dist.parameters


class PictureFeatures:
    """Tower and autoencoder.

    Args:
        tower: pixels `[B, 3, S, S]` → embeddings `[B, N, W]`. vae: SDXL's autoencoder, in float32.
        tokens: embeddings of a picture after pooling; 0: as many as the tower gives.
        cache: folder where what both make of a picture is kept; None: they run whenever they are asked.
        at_once: pictures in a pass of the autoencoder.

    Attributes:
        record: a file that says that everything is kept; removed once that turns out to be wrong.
    """

    def __init__(self, tower: nn.Module, vae: Any, tokens: int, device: torch.device, cache: str | Path | None = None,
                 at_once: int = 1) -> None:
        self.tower = TowerFeatures(tower, device, cache=cache, tokens=tokens)
        self.moments, self.device = LatentMoments(vae, device, cache, at_once), device
        self.record: Path | None = None

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Features of samples of `DrawnPairs`, on the device.

        Returns:
            `embeds` `[B, N, W]`; `moments` as of `LatentMoments`; with pictures to condition on `condition`
            `[B, C, h, w]`, the means of their latents, zeros where a sample has none.

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
            made = {"embeds": self.tower(batch["seen"]).float(), "moments": self.moments(batch["image"])}
            if "condition" in batch:
                channels = made["moments"].shape[1] // 2
                made["condition"] = torch.zeros_like(made["moments"][:, :channels])
                rows = batch["conditioned"].nonzero().flatten()
                if len(rows):
                    made["condition"][rows.to(self.device)] = self.moments(batch["condition"][rows])[:, :channels]
        return made

    def keep(self, batch: Mapping[str, Any]) -> None:
        """Make and write what is not kept of samples of `DrawnPairs`. Raises as a call."""
        with torch.autocast(self.device.type, enabled=False):
            self.tower.keep(batch["seen"])
            self.moments.keep(batch["image"])
            if "condition" in batch:
                self.moments.keep(batch["condition"][batch["conditioned"]])

    @property
    def folders(self) -> list[Path]:
        """Of kept features; none without a cache."""
        return [folder for folder in (self.tower.folder, self.moments.folder) if folder is not None]

    def release(self) -> None:
        """Let go of both models; what is asked for from here on must be kept."""
        self.tower.release()
        self.moments.release()

    def empty(self, size: int) -> Tensor:
        """What the tower sees in nothing, normalised pixels of zero: `[1, N, W]`."""
        with torch.autocast(self.device.type, enabled=False):
            return self.tower.see(torch.zeros(1, 3, size, size, device=self.device)).float()


def load_autoencoder(sdxl: str | Path) -> Any:
    """SDXL's autoencoder in float32. Raises CheckpointError: not there, or not complete."""
    return read_autoencoder(find_folder(sdxl, NEEDED, SDXL_WHERE), SdxlDetokenizer)


def load_schedule(sdxl: str | Path) -> Any:
    """The noise schedule of SDXL's folder, for training. Raises CheckpointError: not there."""
    from seed_multimodal.detokenizers.schedulers import scheduler_class
    from seed_multimodal.detokenizers.sdxl_training import training_schedule

    place = find_folder(sdxl, NEEDED, SDXL_WHERE)
    settings = read_json_object(place / "scheduler" / "scheduler_config.json", CheckpointError, SDXL_WHERE)
    return training_schedule(scheduler_class(str(settings.get("_class_name"))).from_config(settings))


def drawn_latents(moments: Tensor, scaling: float, generator: torch.Generator | None = None) -> Tensor:
    """Latents `[B, C, h, w]` of their distributions, times the autoencoder's factor; `generator` on the CPU."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    return (mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise) * scaling
