"""How far an image is from those that a system learned.

    image ─► codes or features ─► conditioner ─► latents ─► VAE ─► expected picture ─┐
      └───────────────────────────────► pixels ─────────────────────────────────────┴─► distance

An image that the system learned looks as its codes or features lead to expect; others do not. A
small network compares both; it was trained on pairs of known images, and of others. Nothing is
denoised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.diffusion.conditioner import Conditioner, load_conditioner
from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.nn.pretrained import PretrainedNetwork, without_memory
from seed_multimodal.pipelines.world import Familiarity
from seed_multimodal.state_dicts import assign_strictly, load_checkpoint, tensors_below

# What `TinyDecoder` reads of the configuration of an autoencoder.
TINY_AUTOENCODER = {"_class_name": "AutoencoderTiny", "act_fn": "relu", "upsample_fn": "nearest"}


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


class TinyDecoder(nn.Module):
    """The decoder of an `AutoencoderTiny` of diffusers, whose import takes longer than an answer.

    sizes: its `config.json`.
    """

    def __init__(self, sizes: Mapping[str, Any]) -> None:
        super().__init__()
        self.scaling_factor: float = sizes["scaling_factor"]
        blocks = sizes["num_decoder_blocks"]
        width = sizes["decoder_block_out_channels"][0]
        layers = [nn.Conv2d(sizes["latent_channels"], width, 3, padding=1), nn.ReLU()]
        for n_blocks in blocks[:-1]:
            layers += [_residual_layers(width) for _ in range(n_blocks)]
            layers.append(nn.Upsample(scale_factor=sizes["upsampling_scaling_factor"]))
            layers.append(nn.Conv2d(width, width, 3, padding=1, bias=False))
        layers += [_residual_layers(width) for _ in range(blocks[-1])]
        layers.append(nn.Conv2d(width, sizes["out_channels"], 3, padding=1))
        self.layers = nn.Sequential(*layers)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The decoder of an autoencoder's folder. Raises `CheckpointError`; ConfigError: it is of
        another kind."""
        file = folder / "config.json"
        sizes = read_json_object(file, CheckpointError)
        for key, value in TINY_AUTOENCODER.items():
            if sizes.get(key) != value:
                raise ConfigError(f"{file}: {key} must be {value} for known_images.")
        decoder = without_memory(lambda: cls(sizes))
        tensors = tensors_below(load_checkpoint(folder), "decoder.")
        state = {name.replace(".conv.", "."): value for name, value in tensors.items()}
        assign_strictly(decoder, state, folder)
        decoder.eval()
        return decoder

    def forward(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` → RGB `[B, 3, H, W]` from -1 to 1."""
        x = torch.tanh(latents / self.scaling_factor / 3) * 3
        for layer in self.layers:
            if isinstance(layer, nn.Upsample):  # its nearest values, 25 times faster on a CPU
                factor = int(layer.scale_factor)
                x = x.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
            elif isinstance(layer, nn.Sequential):
                x = F.relu(layer(x) + x)
            else:
                x = layer(x)
        return x * 2 - 1


def _residual_layers(width: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(width, width, 3, padding=1)]
    for _ in range(2):
        layers += [nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)]
    return nn.Sequential(*layers)


class ImageFamiliarity(Familiarity):
    """Distances of images, on the CPU.

    conditioner, vae: of the system's de-tokenizer.
    """

    measures = True

    def __init__(self, comparison: Comparison, conditioner: Conditioner, vae: TinyDecoder) -> None:
        self.comparison = comparison
        self.conditioner = conditioner
        self.vae = vae

    @classmethod
    def load(cls, comparison: Path, decoder: Path, pictures: Path) -> Self:
        """comparison: folder of the network. decoder, pictures: folders with the conditioner and
        the VAE.

        Raises ConfigError: there is no conditioner, or another autoencoder.
        """
        conditioner = load_conditioner(decoder)
        if conditioner is None:
            raise ConfigError(f"{decoder}: known_images needs a conditioner, and it has none.")
        vae = TinyDecoder.load(pictures / "vae")
        return cls(Comparison.from_pretrained(comparison), conditioner, vae)

    @torch.inference_mode()
    def distances(self, embed: Callable[[], Tensor], pixels: Tensor) -> list[float]:
        return self.comparison(*self.pictures(embed(), pixels)).tolist()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def pictures(self, embeds: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The pixels, and the picture that their codes or features lead to expect, in the
        comparison's size."""
        latents = self.conditioner.expected_latents(embeds.cpu().float())
        images = [pixels.cpu().float(), self.vae(latents)]
        side = self.comparison.config.side
        for index, image in enumerate(images):
            if image.shape[-1] != side:
                images[index] = F.interpolate(image, (side, side), mode="bilinear", antialias=True)
        return images[0], images[1]
