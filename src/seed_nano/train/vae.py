"""Stage `vae`: the small autoencoder whose 16×16 latents the U-Net draws (diffusers'
`AutoencoderKL`).

Pixels of things have four times the weight, since backgrounds are easy. After training, latents are
normalized to zero mean and unit variance inside `quant_conv` and `post_quant_conv`, so that
`scaling_factor` is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.diffusion.base import Detokenizer
from seed_multimodal.diffusion.networks import encode_moments
from seed_nano.train.task import Loss, NanoTask, SceneStream, map_scenes, scene_pixels, to_signed
from seed_nano.train.workspace import Workspace, has_bf16

THINGS_WEIGHT = 3.0  # of a thing's pixel, added to the one of every pixel
# Rows: red against green, yellow against blue, green against magenta.
OPPONENTS = ((1.0, -1.0, 0.0), (0.5, 0.5, -1.0), (-0.5, 1.0, -0.5))


def reconstruction_loss(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Errors of pixels, of neighbour differences, of 4×4 means and of their colour differences,
    without which a short training drops a whole colour axis.

    Tensors `[B, 3, H, W]` in [-1, 1], `mask` `[B, 1, H, W]` in 0..1.
    """
    error = output - target
    weight = 1.0 + THINGS_WEIGHT * mask
    pixels = ((error.abs() + 2.0 * error.square()) * weight).mean()
    # Differences of neighbours keep edges sharp.
    rows = error.diff(dim=2).abs() * weight[:, :, 1:]
    columns = error.diff(dim=3).abs() * weight[..., 1:]
    edges = rows.mean() + columns.mean()
    # Means of 4×4 pixels and their colour axes keep the colours.
    coarse = F.avg_pool2d(error * weight, 4)
    colours = torch.einsum("oc,bchw->bohw", torch.tensor(OPPONENTS, device=error.device), coarse)
    return pixels + edges + coarse.abs().mean() + 2.0 * colours.abs().mean()


class VaeTask(NanoTask):
    """Train on scenes; stage `tiny` distils it."""

    def __init__(self, space: Workspace) -> None:
        from diffusers import AutoencoderKL

        torch.manual_seed(space.config.seed)
        sizes = space.config.vae
        levels = len(sizes.channels)
        # Latents need no scaling: `normalise_latents` folds it into the weights.
        self.vae: Any = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(sizes.channels),
            layers_per_block=sizes.layers,
            latent_channels=sizes.latent_channels,
            norm_num_groups=sizes.groups,
            sample_size=space.config.image_size,
            scaling_factor=1.0,
            mid_block_add_attention=False,
        ).to(memory_format=torch.channels_last)
        super().__init__(space, "vae", self.vae, SceneStream(space))

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        x = to_signed(batch["image"]).contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(x).latent_dist
        output = self.vae.decode(posterior.sample()).sample.float()
        error = reconstruction_loss(output, x, batch["mask"])
        value = error + 1e-6 * posterior.kl().float().mean()
        return value, {"mse": (output.detach() - x).square().mean()}

    def save_result(self) -> None:
        space = self.space
        images = to_signed(scene_pixels(space.pool[:1024], space.config.image_size))
        normalise_latents(self.vae.cpu(), images)
        self.vae.save_pretrained(space.autoencoder)


@torch.no_grad()
def normalise_latents(vae: Any, images: Tensor) -> None:
    """Fold per-channel mean and standard deviation of the latents into the 1×1 convolutions around
    them."""
    moments = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images.split(64)])
    mean = moments.mean((0, 2, 3))
    std = moments.std((0, 2, 3))
    quant = vae.quant_conv
    post = vae.post_quant_conv
    channels = len(mean)
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()  # the log-variance half shrinks with the scale
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= std[None, :, None, None]


def latents(space: Workspace) -> Tensor:
    """Posterior means of the pool, float16 `[N, C, h, w]` (nano-lavit: of its first `drawn`
    scenes); computed once."""
    n_scenes = getattr(space.config, "drawn", None)

    def make() -> Tensor:
        vae = Detokenizer.load_part(space.autoencoder.parent, "vae")
        vae.to(space.device, memory_format=torch.channels_last)
        autocast = torch.autocast(space.device.type, torch.bfloat16, has_bf16(space.device))

        def encoded(images: Tensor) -> Tensor:
            x = to_signed(images).contiguous(memory_format=torch.channels_last)
            with autocast:
                return encode_moments(vae, x).chunk(2, dim=1)[0].half()

        return map_scenes(encoded, space.pool[:n_scenes], space, batch=256).contiguous()

    return space.cached("latents", "vae", make, drawn=n_scenes)
