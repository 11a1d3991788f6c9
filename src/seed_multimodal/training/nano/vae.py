"""Stage `vae`: the small autoencoder whose 8×8 latents the U-Net draws (diffusers' `AutoencoderKL`).

Loss: L1 + L1 of horizontal and vertical differences + L1 of 4×4 means and of their colour differences + 1e-6 KL.
After training, every latent channel is normalised to zero mean and unit variance by folding the numbers into
`quant_conv` and `post_quant_conv`, so that `scaling_factor` is 1 and the released pipeline class needs nothing special.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.training.group_norm import restore_group_norm, use_fast_group_norm
from seed_multimodal.training.nano.config import NanoConfig, training_device
from seed_multimodal.training.nano.views import augment, to_signed
from seed_multimodal.training.old.loop import batch_indices, run_stage


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


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 of pixels, of neighbour differences, of 4×4 means and of the 4×4 means' colour differences.

    Without the last term a short training drops a whole colour axis. Tensors `[B, 3, H, W]` in [-1, 1].
    """
    error = output - target
    pixels = error.abs().mean()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    coarse = F.avg_pool2d(error, 4)
    colours = torch.einsum("oc,bchw->bohw", torch.tensor(OPPONENTS, device=error.device), coarse)
    return pixels + edges + coarse.abs().mean() + 2.0 * colours.abs().mean()


def train_vae(config: NanoConfig, pictures: Tensor, held_out: Tensor, work: Path, out: Path) -> dict[str, Any]:
    """Train on uint8 `pictures [N, 3, H, W]`, measure PSNR on `held_out`, save the model to `out`."""
    torch.manual_seed(config.seed)
    device = training_device(config)
    vae = use_fast_group_norm(build_vae(config)).to(device, memory_format=torch.channels_last)
    settings = config.train_vae

    def loss(step: int) -> tuple[Tensor, Mapping[str, float]]:
        generator = torch.Generator().manual_seed(step)
        block = pictures[batch_indices(step, settings.batch_size, len(pictures), settings.seed)]
        x = to_signed(augment(block, generator, flip=True), device).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        output = vae.decode(posterior.sample()).sample
        value = reconstruction_loss(output.float(), x) + 1e-6 * posterior.kl().float().mean()
        return value, {"mse": float((output.detach().float() - x).square().mean())}

    def finish() -> Mapping[str, Any]:
        restore_group_norm(vae).cpu()
        normalise_latents(vae, to_signed(pictures[:1024]))
        vae.save_pretrained(out)
        return {"psnr": psnr(vae, held_out), "parameters": sum(p.numel() for p in vae.parameters())}

    return run_stage("vae", vae, loss, settings, work, finish)


def train_decoder(
    config: NanoConfig, views: Tensor, latents: Tensor, index: Tensor, held_out: Tensor, work: Path, folder: Path
) -> dict[str, Any]:
    """Stage `vae2`: go on with the decoder alone, on cached latents `[N, V, C, h, w]`; the encoder stays as it is.

    Latents get 10 % noise, because in use they come from a U-Net. Overwrites the model in `folder`.
    """
    from diffusers import AutoencoderKL

    torch.manual_seed(config.seed + 6)
    device = training_device(config)
    vae = use_fast_group_norm(AutoencoderKL.from_pretrained(folder)).to(device, memory_format=torch.channels_last)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    settings = config.train_vae2

    def loss(step: int) -> tuple[Tensor, Mapping[str, float]]:
        chosen = index[batch_indices(step, settings.batch_size, len(index), settings.seed)]
        view = torch.randint(0, views.shape[1], (len(chosen),))
        x = to_signed(views[chosen, view], device)
        z = latents[chosen, view].to(device).float()
        output = vae.decode(z + 0.1 * torch.randn_like(z)).sample
        return reconstruction_loss(output.float(), x), {"mse": float((output.detach().float() - x).square().mean())}

    def finish() -> Mapping[str, Any]:
        restore_group_norm(vae).cpu()
        vae.save_pretrained(folder)
        return {"psnr": psnr(vae, held_out), "parameters": sum(p.numel() for p in vae.parameters())}

    return run_stage("vae2", vae, loss, settings, work, finish)


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
def psnr(vae: Any, images: Tensor) -> float:
    """Mean PSNR in dB of round trips of uint8 `images` (posterior mean, no noise)."""
    values = []
    for chunk in images.split(64):
        x = to_signed(chunk)
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        mse = ((y - x) / 2).square().mean((1, 2, 3))
        values.append(10 * torch.log10(1.0 / mse.clamp_min(1e-8)))
    value = torch.cat(values).mean().item()
    return round(value, 2) if math.isfinite(value) else 0.0


@torch.no_grad()
def encode_latents(vae: Any, images: Tensor, batch: int = 128) -> Tensor:
    """Posterior means of uint8 `images [N, 3, H, W]` as float16 `[N, C, h, w]`."""
    vae.eval()
    parts = []
    for chunk in images.split(batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            parts.append(vae.encode(to_signed(chunk)).latent_dist.mean.half())
    return torch.cat(parts)
