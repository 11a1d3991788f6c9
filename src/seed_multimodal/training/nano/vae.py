"""Stage `vae`: the small autoencoder whose 8×8 latents the U-Net draws (diffusers' `AutoencoderKL`).

Loss: L1 + L1 of horizontal and vertical differences + L1 of 4×4 means and of their colour differences + 1e-6 KL.
After training, every latent channel is normalised to zero mean and unit variance by folding the numbers into
`quant_conv` and `post_quant_conv`, so that `scaling_factor` is 1 and the released pipeline class needs nothing special.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.group_norm import restore_group_norm, use_fast_group_norm
from seed_multimodal.training.nano.config import NanoConfig
from seed_multimodal.training.nano.task import NanoTask
from seed_multimodal.training.nano.views import augment, to_signed
from seed_multimodal.training.nano.workspace import Workspace


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


class VaeTask(NanoTask):
    """Stage `vae`: train on augmented pictures of the training split; the model goes to `decoder_folder/vae`."""

    def __init__(self, space: Workspace, name: str = "vae") -> None:
        self.folder = space.decoder_folder / "vae"
        self.vae = use_fast_group_norm(self.start(space)).to(space.device, memory_format=torch.channels_last)
        super().__init__(space, name, self.vae)

    def start(self, space: Workspace) -> Any:
        """The model that training begins with."""
        torch.manual_seed(space.config.seed)
        return build_vae(space.config)

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        generator = torch.Generator().manual_seed(micro_step)
        block = self.views[self.chosen(micro_step), 0]
        x = to_signed(augment(block, generator, flip=True), self.space.device)
        x = x.contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(x).latent_dist
        output = self.vae.decode(posterior.sample()).sample
        value = reconstruction_loss(output.float(), x) + 1e-6 * posterior.kl().float().mean()
        return value, {"mse": (output.detach().float() - x).square().mean()}

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        restore_group_norm(self.vae).cpu()
        self.before_saving()
        self.vae.save_pretrained(self.folder)
        return {**super().finish(group), "psnr": psnr(self.vae, self.views[self.space.held_out_index, 0]),
                "parameters": self.parameter_count()}

    def before_saving(self) -> None:
        """Post-processing of the trained model, on the CPU."""
        normalise_latents(self.vae, to_signed(self.views[self.space.train_index[:1024], 0]))


class DecoderTask(VaeTask):
    """Stage `vae2`: train the decoder alone further, on cached latents; the encoder stays as it is.

    Latents get 10 % noise, because in use they come from a U-Net. Replaces the model in `decoder_folder/vae`.
    """

    def __init__(self, space: Workspace) -> None:
        self.latents = latents(space)
        super().__init__(space, "vae2")

    def start(self, space: Workspace) -> Any:
        from diffusers import AutoencoderKL

        torch.manual_seed(space.config.seed + 6)
        vae = AutoencoderKL.from_pretrained(self.folder)
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
        return vae

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        space, chosen = self.space, self.chosen(micro_step)
        view = torch.randint(0, space.views.shape[1], (len(chosen),))
        x = to_signed(space.views[chosen, view], space.device)
        z = self.latents[chosen, view].to(space.device).float()
        output = self.vae.decode(z + 0.1 * torch.randn_like(z)).sample
        return reconstruction_loss(output.float(), x), {"mse": (output.detach().float() - x).square().mean()}

    def before_saving(self) -> None:
        """Nothing: the latents are normalised already."""


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


def latents(space: Workspace) -> Tensor:
    """Posterior means of all views, float16 `[N, V, C, h, w]`; made once by the VAE of stage `vae`."""
    return space.cached("latents", lambda: _encode(space))


@torch.no_grad()
def _encode(space: Workspace) -> Tensor:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(space.decoder_folder / "vae").eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = [vae.encode(to_signed(chunk)).latent_dist.mean.half() for chunk in space.views.flatten(0, 1).split(128)]
    return torch.cat(parts).unflatten(0, space.views.shape[:2])
