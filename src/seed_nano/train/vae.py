"""Stage `vae`: the small autoencoder whose 16×16 latents the U-Net draws (diffusers' `AutoencoderKL`).

Loss: absolute and squared error of pixels, absolute error of neighbour differences, of 4×4 means and of their colour
differences, with the pixels of things weighing four times: backgrounds are easy and hide what things look like. After
training, every latent channel is normalised to zero mean and unit variance by folding the numbers into `quant_conv` and
`post_quant_conv`, so that `scaling_factor` is 1 and the original pipeline class needs nothing special.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.training.distributed import ProcessGroup
from seed_nano.train.pixels import SceneStream, scene_pixels, to_signed
from seed_nano.train.task import NanoTask
from seed_nano.train.workspace import Workspace
from seed_nano.world.scene import Scene, thing_mask

THINGS_WEIGHT = 3.0  # of a thing's pixel, added to the one of every pixel
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


class VaeTask(NanoTask):
    """Train on scenes; the model goes to `{decoder}/vae`."""

    def __init__(self, space: Workspace) -> None:
        from diffusers import AutoencoderKL

        torch.manual_seed(space.config.seed)
        sizes, levels = space.config.vae, len(space.config.vae.channels)
        self.vae: Any = AutoencoderKL(
            in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels, block_out_channels=tuple(sizes.channels),
            layers_per_block=sizes.layers, latent_channels=sizes.latent_channels, norm_num_groups=sizes.groups,
            sample_size=space.config.image_size, scaling_factor=1.0, mid_block_add_attention=False)
        set_group_norm(self.vae, FastGroupNorm).to(space.device, memory_format=torch.channels_last)
        super().__init__(space, "vae", self.vae, SceneStream(space.config.image_size, space.config.seed))

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        batch, device = self.scenes.at(micro_step), self.space.device
        x = to_signed(batch["image"], device).contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(x).latent_dist
        output = self.vae.decode(posterior.sample()).sample.float()
        value = reconstruction_loss(output, x, batch["mask"].to(device)) + 1e-6 * posterior.kl().float().mean()
        return value, {"mse": (output.detach() - x).square().mean()}

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        space, size = self.space, self.space.config.image_size
        set_group_norm(self.vae, nn.GroupNorm).cpu()
        normalise_latents(self.vae, to_signed(scene_pixels(space.pool[:1024], size)))
        self.vae.save_pretrained(space.decoder_folder / "vae")
        scenes = space.held_out()
        images = scene_pixels(scenes, size)
        found = things_psnr(round_trip(self.vae, images), images, scenes)
        if found["psnr_things"] < space.config.gate_psnr:
            print(f"The gate was missed: {found['psnr_things']} dB on things < {space.config.gate_psnr}.", flush=True)
        return {**super().finish(group), **found}


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
    """Mean PSNR in dB over all pixels (`psnr`) and over those of things (`psnr_things`) of outputs in [-1, 1] and uint8
    images, both `[N, 3, S, S]`."""
    errors = ((output - to_signed(images)) / 2).square()
    mask = torch.from_numpy(np.stack([thing_mask(scene, images.shape[-1]) for scene in scenes]))[:, None] > 0.5
    things = (errors * mask).sum((1, 2, 3)) / (3 * mask.sum((1, 2, 3)).clamp_min(1))
    return {name: round((-10 * torch.log10(error.clamp_min(1e-8))).mean().item(), 2)
            for name, error in (("psnr", errors.mean((1, 2, 3))), ("psnr_things", things))}


def latents(space: Any) -> Tensor:
    """Posterior means of the pool, float16 `[N, C, h, w]` (nano-lavit: of its first `drawn` scenes)."""
    from diffusers import AutoencoderKL

    drawn = getattr(space.config, "drawn", None)
    folder = space.autoencoder if drawn else space.decoder_folder / "vae"
    return space.cached("latents", "vae", lambda: scene_latents(
        AutoencoderKL.from_pretrained(folder, local_files_only=True), space.pool[:drawn], space.config.image_size,
        space.device), drawn=drawn)


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


# Group norm of channels-last training on CPUs: PyTorch's numbers (to rounding), a backward pass several times faster.
# PyTorch's was 40 % of a step. Sums over positions are matrix products with a row of ones.


class _GroupNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        batch, channels, height, width = x.shape
        size = channels // groups
        rows = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        ones = torch.ones(batch, 1, height * width, dtype=x.dtype)
        count = height * width * size
        total = torch.bmm(ones, rows).float().view(batch, groups, size).sum(-1)
        squares = torch.bmm(ones, rows * rows).float().view(batch, groups, size).sum(-1)
        mean = total / count
        inverse = ((squares / count - mean * mean).clamp_min(0) + eps).rsqrt()
        scale = inverse.repeat_interleave(size, 1) * weight
        shift = bias - scale * mean.repeat_interleave(size, 1)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.groups = groups
        return torch.addcmul(_planes(shift, x), x, _planes(scale, x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = x.shape
        groups, size = ctx.groups, channels // ctx.groups
        count = height * width * size
        rows = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        grad_rows = grad.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        ones = torch.ones(batch, 1, height * width, dtype=x.dtype)
        sum_grad = torch.bmm(ones, grad_rows).float().view(batch, channels)
        sum_grad_x = torch.bmm(ones, grad_rows * rows).float().view(batch, channels)
        mean_c, inverse_c = mean.repeat_interleave(size, 1), inverse.repeat_interleave(size, 1)
        sum_grad_hat = (sum_grad_x - sum_grad * mean_c) * inverse_c

        def group_mean(value: Tensor) -> Tensor:
            return ((value * weight).view(batch, groups, size).sum(-1) / count).repeat_interleave(size, 1)

        first, second = group_mean(sum_grad), group_mean(sum_grad_hat)
        slope = -inverse_c * inverse_c * second
        offset = inverse_c * (inverse_c * mean_c * second - first)
        inner = torch.addcmul(_planes(offset, x), x, _planes(slope, x))
        grad_x = torch.addcmul(inner, grad, _planes(inverse_c * weight, x))
        return grad_x, sum_grad_hat.sum(0), sum_grad.sum(0), None, None


def _planes(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype)[:, :, None, None]


class FastGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` whose training pass on CPU uses the function above; input `[B, C, H, W]`."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise; anything but CPU training on 4-D input falls through to PyTorch."""
        if not self.training or input.ndim != 4 or input.device.type != "cpu":
            return super().forward(input)
        if torch.is_autocast_enabled("cpu"):
            input = input.to(torch.bfloat16)
        x = input.contiguous(memory_format=torch.channels_last)
        return _GroupNormFunction.apply(x, self.weight, self.bias, self.num_groups, self.eps)


def set_group_norm(module: nn.Module, kind: type[nn.GroupNorm]) -> nn.Module:
    """Make every group norm inside `module` one of `kind`, in place; returns the module."""
    for child in module.modules():
        if isinstance(child, nn.GroupNorm):
            child.__class__ = kind
    return module
