"""How far an image is from those that a system learned.

    image ─► codes or features ─► conditioner ─► latents ─► VAE ─► expected picture ─┐
      └───────────────────────────────► pixels ─────────────────────────────────────┴─► distance

An image that the system learned looks as its codes or features lead to expect; others do not. A
small network compares both; it was trained on pairs of known images, and of others. Nothing is
denoised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.diffusion.base import Detokenizer
from seed_multimodal.diffusion.conditioner import Conditioner, load_conditioner
from seed_multimodal.errors import ConfigError
from seed_multimodal.nn.pretrained import PretrainedNetwork

PREFACE = "I do not know this kind of picture. Nearest: "  # of an answer about an unlike image


@dataclass(frozen=True)
class ComparisonConfig:
    """Sizes of a `Comparison`."""

    side: int = 64  # of both pictures, in pixels
    widths: tuple[int, ...] = (24, 48, 72, 96)  # channels; each level has half the side


class Comparison(PretrainedNetwork[ComparisonConfig]):
    """Pixels and the picture that was expected, `[B, 3, S, S]` each → distances `[B]`: logits of
    their being unlike what was learned."""

    config_class = ComparisonConfig
    model_type = "comparison"

    def __init__(self, config: ComparisonConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        channels = 6
        for width in config.widths:
            convolution = nn.Conv2d(channels, width, 3, stride=2, padding=1)
            layers += [convolution, nn.GroupNorm(8, width), nn.SiLU()]
            channels = width
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(2 * channels, 1)

    def forward(self, pixels: Tensor, expected: Tensor) -> Tensor:
        """Distances `[B]`; above 0 an image is unlike."""
        features = self.layers(torch.cat([pixels, expected], 1)).flatten(2)
        pooled = torch.cat([features.mean(2), features.amax(2)], 1)
        return self.head(pooled)[:, 0]  # type: ignore[no-any-return]


class ImageFamiliarity:
    """Distances of images, on the CPU.

    conditioner, vae: of the system's de-tokenizer.
    """

    def __init__(self, comparison: Comparison, conditioner: Conditioner, vae: Any) -> None:
        self.comparison = comparison
        self.conditioner = conditioner
        self.vae = vae

    @classmethod
    def load(
        cls, comparison: Path | None, decoder: Path | None, pictures: Path | None
    ) -> Self | None:
        """None: the system does not measure it, or has no de-tokenizer.

        comparison: folder of the network. decoder, pictures: folders with the conditioner and the
            VAE.

        Raises ConfigError: there is no conditioner.
        """
        if comparison is None or decoder is None or pictures is None or not decoder.is_dir():
            return None
        conditioner = load_conditioner(decoder)
        if conditioner is None:
            raise ConfigError(f"{decoder}: known_images needs a conditioner, and it has none.")
        vae = Detokenizer.load_part(pictures, "vae")
        return cls(Comparison.from_pretrained(comparison), conditioner, vae)

    @torch.inference_mode()
    def distances(self, embeds: Tensor, pixels: Tensor) -> list[float]:
        """Of each image; above 0 it is unlike what was learned.

        embeds: what the conditioner reads, `[B, E]` or `[B, N, W]`.
        pixels: normalised, `[B, 3, S, S]`.
        """
        return self.comparison(*self.pictures(embeds, pixels)).tolist()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def pictures(self, embeds: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The pixels, and the picture that their codes or features lead to expect, in the
        comparison's size."""
        latents = self.conditioner.expected_latents(embeds.cpu().float())
        expected = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        side = self.comparison.config.side
        return _resized(pixels.cpu().float(), side), _resized(expected, side)


def _resized(images: Tensor, side: int) -> Tensor:
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


def unknown_images_note(distances: Sequence[float | None], notice: str) -> str:
    """A note about images unlike those that the system learned, or empty; `notice`: its own."""
    unknown = [index for index, value in enumerate(distances) if value is not None and value > 0]
    if not unknown:
        return ""
    if len(distances) == 1:
        which = "The image is"
    elif len(unknown) == 1:
        which = f"Image {unknown[0]} is"
    else:
        which = f"Images {', '.join(map(str, unknown))} are"
    note = f"{which} unlike those that this system learned, so the answer may be wrong."
    return f"{note} {notice}".strip()
