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

from seed_multimodal.detokenizers.pipelines import refuse_unfilled
from seed_multimodal.detokenizers.sdxl import NEEDED, SdxlDetokenizer, pooled_tokens
from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.hub import SDXL_WHERE, find_folder
from seed_multimodal.images.transforms import normalise
from seed_multimodal.vision.qwen_vit import QwenVit, QwenVitConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class PictureFeatures:
    """Tower and autoencoder.

    Args:
        tower: pixels `[B, 3, S, S]` → embeddings `[B, N, W]`. vae: SDXL's autoencoder, in float32.
        tokens: embeddings of a picture after pooling; 0: as many as the tower gives.
    """

    def __init__(self, tower: nn.Module, vae: Any, tokens: int, device: torch.device) -> None:
        self.tower, self.vae = (part.eval().requires_grad_(False).to(device) for part in (tower, vae))
        self.tokens, self.device = tokens, device

    @classmethod
    def from_pretrained(cls, sdxl: str | Path, tower: str | Path, tower_sizes: QwenVitConfig | None, tokens: int,
                        device: torch.device, dtype: torch.dtype) -> PictureFeatures:
        """Load both; `dtype` is the tower's.

        Raises:
            CheckpointError: one is not there (names what to put where), damaged, or of another model.
        """
        return cls(QwenVit.from_pretrained(tower, config=tower_sizes, device=device, dtype=dtype),
                   load_autoencoder(sdxl), tokens, device)

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Features of samples of `DrawnPairs`, on the device.

        Returns:
            `embeds` `[B, N, W]`; `moments` `[B, 2 C, h, w]`, mean and logarithm of the variance of the latents, not
            scaled; with pictures to condition on `condition` `[B, C, h, w]`, zeros where a sample has none.
        """
        with torch.autocast(self.device.type, enabled=False):
            made = {"embeds": self._embeds(normalise(batch["seen"].to(self.device))),
                    "moments": self._moments(batch["image"])}
            if "condition" in batch:
                channels = made["moments"].shape[1] // 2
                made["condition"] = torch.zeros_like(made["moments"][:, :channels])
                for row in batch["conditioned"].nonzero().flatten().tolist():
                    made["condition"][row] = self._moments(batch["condition"][row:row + 1])[0, :channels]
        return made

    @torch.no_grad()
    def empty(self, size: int) -> Tensor:
        """What the tower sees in nothing, normalised pixels of zero: `[1, N, W]`."""
        with torch.autocast(self.device.type, enabled=False):
            return self._embeds(torch.zeros(1, 3, size, size, device=self.device))

    def _embeds(self, pixels: Tensor) -> Tensor:
        seen = self.tower(pixels.to(next(self.tower.parameters()).dtype)).float()
        if self.tokens and seen.shape[1] % self.tokens:
            raise ConfigError(f"model: the tower's {seen.shape[1]} embeddings of a picture cannot be pooled to "
                              f"{self.tokens}; tokens must divide them.")
        return pooled_tokens(seen, self.tokens or seen.shape[1])

    def _moments(self, pixels: Tensor) -> Tensor:
        return torch.cat([self.vae.encode(one.to(self.device).float() / 127.5 - 1.0).latent_dist.parameters
                          for one in pixels.split(1)])


def load_autoencoder(sdxl: str | Path) -> Any:
    """SDXL's autoencoder in float32. Raises CheckpointError: not there, or not complete."""
    from diffusers import AutoencoderKL

    place = find_folder(sdxl, NEEDED, SDXL_WHERE)
    with SdxlDetokenizer.reading(place):
        vae = AutoencoderKL.from_pretrained(place, subfolder="vae", torch_dtype=torch.float32, local_files_only=True)
    refuse_unfilled(vae, place / "vae")
    return vae


def load_schedule(sdxl: str | Path) -> Any:
    """The noise schedule of SDXL's folder, for training. Raises CheckpointError: not there."""
    from seed_multimodal.detokenizers.schedulers import scheduler_class
    from seed_multimodal.detokenizers.sdxl_training import training_schedule

    place = find_folder(sdxl, NEEDED, SDXL_WHERE)
    settings = read_json_object(place / "scheduler" / "scheduler_config.json", CheckpointError, SDXL_WHERE)
    return training_schedule(scheduler_class(str(settings.get("_class_name"))).from_config(settings))


def drawn_latents(moments: Tensor, scaling: float) -> Tensor:
    """Latents `[B, C, h, w]` of their distributions, times the autoencoder's factor, by torch's CPU generator."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    noise = torch.randn(mean.shape).to(mean.device)
    return (mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise) * scaling
