"""Stage `vae`: the small autoencoder whose 16×16 latents the U-Net draws (diffusers' `AutoencoderKL`).

Loss: absolute and squared error of pixels, absolute error of neighbour differences, of 4×4 means and of their colour
differences, with the pixels of things weighing four times: backgrounds are easy, and hide what things look like. The
gate is the PSNR over the pixels of things. After training, every latent channel is normalised to zero mean and unit
variance by folding the numbers into `quant_conv` and `post_quant_conv`, so that `scaling_factor` is 1 and the released
pipeline class needs nothing special.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.training.distributed import ProcessGroup
from seed_nano.train.config import NanoConfig
from seed_nano.train.group_norm import restore_group_norm, use_fast_group_norm
from seed_nano.train.pixels import scene_pixels, to_signed
from seed_nano.train.task import SceneTask
from seed_nano.train.workspace import Workspace, read_part
from seed_nano.world.scene import Scene, thing_mask

THINGS_WEIGHT = 3.0  # of a thing's pixel, beside the one of every pixel


def build_vae(config: NanoConfig) -> Any:
    """An untrained `AutoencoderKL` of the configured size."""
    from diffusers import AutoencoderKL

    sizes = config.vae
    levels = len(sizes.channels)
    return AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, block_out_channels=tuple(sizes.channels),
        layers_per_block=sizes.layers, latent_channels=sizes.latent_channels, norm_num_groups=sizes.groups,
        sample_size=config.image_size, scaling_factor=1.0, mid_block_add_attention=False)


# Rows: red against green, yellow against blue, green against magenta.
OPPONENTS = ((1.0, -1.0, 0.0), (0.5, 0.5, -1.0), (-0.5, 1.0, -0.5))


def reconstruction_loss(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The loss above. Without its colour differences a short training drops a whole colour axis.

    Tensors `[B, 3, H, W]` in [-1, 1], `mask` `[B, 1, H, W]` in 0..1.
    """
    error, weight = output - target, 1.0 + THINGS_WEIGHT * mask
    pixels = ((error.abs() + 2.0 * error.square()) * weight).mean()
    edges = ((error.diff(dim=2).abs() * weight[:, :, 1:]).mean() + (error.diff(dim=3).abs() * weight[..., 1:]).mean())
    coarse = F.avg_pool2d(error * weight, 4)
    colours = torch.einsum("oc,bchw->bohw", torch.tensor(OPPONENTS, device=error.device), coarse)
    return pixels + edges + coarse.abs().mean() + 2.0 * colours.abs().mean()


class VaeTask(SceneTask):
    """Stage `vae`: train on scenes; the model goes to `decoder_folder/vae`."""

    sections = (*SceneTask.sections, "vae")

    def __init__(self, space: Workspace) -> None:
        torch.manual_seed(space.config.seed)
        self.vae = use_fast_group_norm(build_vae(space.config)).to(space.device, memory_format=torch.channels_last)
        super().__init__(space, "vae", self.vae)

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        batch, device = self.scenes.at(micro_step), self.space.device
        x = to_signed(batch["image"], device).contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(x).latent_dist
        output = self.vae.decode(posterior.sample()).sample.float()
        value = reconstruction_loss(output, x, batch["mask"].to(device)) + 1e-6 * posterior.kl().float().mean()
        return value, {"mse": (output.detach() - x).square().mean()}

    def made(self) -> Sequence[Path]:
        return (self.space.decoder_folder / "vae" / "diffusion_pytorch_model.safetensors",)

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        space = self.space
        restore_group_norm(self.vae).cpu()
        normalise_latents(self.vae, to_signed(scene_pixels(space.pool[:1024], space.config.image_size)))
        self.vae.save_pretrained(space.decoder_folder / "vae")
        val = space.held_out()
        images = scene_pixels(val, space.config.image_size)
        rebuilt = round_trip(self.vae, images)
        found = things_psnr(rebuilt, images, val)
        if found["psnr_things"] < space.config.gate_psnr:
            print(f"The gate was missed: {found['psnr_things']} dB on things < {space.config.gate_psnr}.", flush=True)
        return {**super().finish(group), **found, "parameters": self.parameter_count()}


@torch.no_grad()
def normalise_latents(vae: Any, images: Tensor) -> None:
    """Fold per-channel mean and standard deviation of the latents into the 1×1 convolutions around them."""
    moments = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images.split(64)])
    mean, std = moments.mean((0, 2, 3)), moments.std((0, 2, 3))
    quant: nn.Conv2d = vae.quant_conv
    post: nn.Conv2d = vae.post_quant_conv
    channels = mean.numel()
    quant.weight[:channels] /= std[:, None, None, None]
    assert quant.bias is not None and post.bias is not None
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()  # the log-variance half shrinks with the scale
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= std[None, :, None, None]


@torch.no_grad()
def round_trip(vae: Any, images: Tensor) -> Tensor:
    """uint8 `[N, 3, S, S]` → what the autoencoder makes of them (posterior mean, no noise), float32 in [-1, 1]."""
    return torch.cat([vae.decode(vae.encode(to_signed(chunk)).latent_dist.mean).sample.clamp(-1, 1)
                      for chunk in images.split(64)])


def things_psnr(output: Tensor, images: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """Mean PSNR in dB over all pixels (`psnr`) and over those of things (`psnr_things`), and on the latter the root
    mean squared error of each colour axis (-1..1).

    Args:
        output: float32 `[N, 3, S, S]` in [-1, 1]; images: uint8 of the same shape.
    """
    error = (output - to_signed(images)) / 2
    mask = torch.from_numpy(np.stack([thing_mask(scene, images.shape[-1]) for scene in scenes]))[:, None] > 0.5
    count = mask.sum((1, 2, 3)).clamp_min(1)
    things = (error.square() * mask).sum((1, 2, 3)) / (3 * count)
    axes = torch.einsum("oc,bchw->bohw", torch.tensor(OPPONENTS), error * mask).square().sum((0, 2, 3)) / count.sum()
    found = {"psnr": decibels(error.square().mean((1, 2, 3))), "psnr_things": decibels(things)}
    names = ("red_green", "yellow_blue", "green_magenta")
    return {**found, **{f"rmse_{name}": round(value, 4) for name, value in zip(names, axes.sqrt().tolist(),
                                                                              strict=True)}}


def decibels(errors: Tensor) -> float:
    """Mean PSNR in dB of mean squared errors `[N]` of pictures in 0..1."""
    return round((-10 * torch.log10(errors.clamp_min(1e-8))).mean().item(), 2)


def latents(space: Workspace) -> Tensor:
    """Posterior means of the pool, float16 `[N, C, h, w]`; made once by the VAE of stage `vae`."""
    return space.cached("latents", "vae", lambda: _encode(space))


def _encode(space: Workspace) -> Tensor:
    from diffusers import AutoencoderKL

    space.need("vae", space.decoder_folder / "vae" / "config.json")
    return scene_latents(read_part(AutoencoderKL, space.decoder_folder / "vae"), space.pool, space.config.image_size,
                         space.device)


@torch.no_grad()
def scene_latents(vae: Any, scenes: Sequence[Scene], size: int, device: torch.device) -> Tensor:
    """Posterior means of scenes, float16 `[N, C, h, w]`."""
    vae = vae.eval().to(device, memory_format=torch.channels_last)
    parts = []
    with torch.autocast(device.type, dtype=torch.bfloat16):
        for at in range(0, len(scenes), 256):
            x = to_signed(scene_pixels(scenes[at:at + 256], size), device)
            parts.append(vae.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist.mean.half().cpu())
    return torch.cat(parts).contiguous()
