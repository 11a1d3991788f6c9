"""Stage `unet`: the unCLIP decoder of nano, a latent U-Net that stock `StableUnCLIPImg2ImgPipeline` runs.

v-prediction under a cosine schedule that ends at a signal share of `FINAL_SIGNAL`: sampling starts from the latents
that the embedding already determines (detokenizers/layout.py), so the U-Net spends its steps on what they leave open.
A tenth of the conditions are dropped for guidance. Once the tokenizer is trained, embeddings decoded from
(partly corrupted) codes are mixed in, because those are what the decoder meets in use.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.detokenizers.layout import LayoutReadout
from seed_multimodal.training.group_norm import restore_group_norm, use_fast_group_norm
from seed_multimodal.training.nano.config import NanoConfig, training_device
from seed_multimodal.training.old.loop import StageSettings, batch_indices, run_stage

TRAIN_STEPS = 1000
FINAL_SIGNAL = 0.15
# Best of 10–20 steps and guidance 1–4 on val pictures by the judge (docs/LOG.md).
DECODE_DEFAULTS = {"num_inference_steps": 12, "guidance_scale": 4.0}


def cosine_betas(steps: int = TRAIN_STEPS, final_signal: float = FINAL_SIGNAL) -> list[float]:
    """Betas whose cumulative signal share falls as cos² from 1 to `final_signal`."""
    last = math.acos(math.sqrt(final_signal))
    shares = [math.cos(last * (i / steps)) ** 2 for i in range(steps + 1)]
    return [1.0 - shares[i + 1] / shares[i] for i in range(steps)]


def build_unet(config: NanoConfig, latent_channels: int, grid: int, embedding: int) -> Any:
    """An untrained `UNet2DConditionModel`; in cross-attention blocks `attention_head_dim` is the number of heads."""
    from diffusers import UNet2DConditionModel

    sizes = config.unet
    levels = len(sizes.channels)
    return UNet2DConditionModel(
        sample_size=grid, in_channels=latent_channels, out_channels=latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) + ("DownBlock2D",) * (levels - 1),
        up_block_types=("UpBlock2D",) * (levels - 1) + ("CrossAttnUpBlock2D",),
        block_out_channels=tuple(sizes.channels), layers_per_block=sizes.layers, norm_num_groups=8,
        cross_attention_dim=sizes.cross_dim, attention_head_dim=sizes.heads, use_linear_projection=True,
        class_embed_type="projection", projection_class_embeddings_input_dim=2 * embedding)


def build_normaliser(embeddings: Tensor) -> Any:
    """unCLIP's image normaliser with the mean and standard deviation of `embeddings [N, E]`."""
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    normaliser = StableUnCLIPImageNormalizer(embedding_dim=embeddings.shape[1])
    with torch.no_grad():
        normaliser.mean.copy_(embeddings.mean(0, keepdim=True))
        normaliser.std.copy_(embeddings.std(0, keepdim=True).clamp_min(1e-4))
    return normaliser


def class_labels(embedding: Tensor, level: Tensor, normaliser: Any, noising: Any) -> Tensor:
    """unCLIP's noised embedding and sinusoid of the level, `[B, 2E]`, as the pipeline makes them."""
    from diffusers.models.embeddings import get_timestep_embedding

    scaled = normaliser.scale(embedding)
    noised = normaliser.unscale(noising.add_noise(scaled, torch.randn_like(scaled), level))
    sinusoid = get_timestep_embedding(level, embedding.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0)
    return torch.cat([noised, sinusoid], 1)


class Decoder(nn.Module):
    """U-Net and layout read-out trained together."""

    def __init__(self, unet: nn.Module, layout: LayoutReadout) -> None:
        super().__init__()
        self.unet, self.layout = unet, layout


def train_unet(
    config: NanoConfig, settings: StageSettings, name: str, latents: Tensor, embeddings: Tensor, index: Tensor,
    work: Path, out: Path, start: Path | None = None, decoded: Tensor | None = None,
) -> dict[str, Any]:
    """Train on latents `[N, V, C, h, w]` and embeddings `[N, V, E]` of the pictures `index`.

    Args:
        start: folder of an earlier `unet`/`layout` to continue from.
        decoded: embeddings `[M, N, V, E]` decoded from codes (M corruption draws), used for two thirds of the samples.
    """
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel

    torch.manual_seed(config.seed + 3)
    channels, grid = latents.shape[2], latents.shape[3]
    if start is not None:
        unet = UNet2DConditionModel.from_pretrained(start / "unet")
        layout = LayoutReadout.from_pretrained(start / "layout")
    else:
        unet = build_unet(config, channels, grid, embeddings.shape[-1])
        layout = LayoutReadout(embeddings.shape[-1], channels, grid, config.unet.cross_dim)
    unet = use_fast_group_norm(unet).to(memory_format=torch.channels_last)
    device = training_device(config)
    if device.type == "cpu":
        _eager_attention(unet)
    decoder = Decoder(unet, layout).to(device)
    scheduler = DDIMScheduler(num_train_timesteps=TRAIN_STEPS, trained_betas=cosine_betas(), clip_sample=False,
                              prediction_type="v_prediction", timestep_spacing="trailing", set_alpha_to_one=True)
    noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    normaliser = build_normaliser(embeddings[index, 0].float()).to(device)

    def loss(step: int) -> tuple[Tensor, Mapping[str, float]]:
        chosen = index[batch_indices(step, settings.batch_size, len(index), settings.seed)]
        view = torch.randint(0, latents.shape[1], (len(chosen),))
        x0 = latents[chosen, view].float()
        embedding = embeddings[chosen, view].float()
        if decoded is not None:
            draw = torch.randint(0, decoded.shape[0], (len(chosen),))
            mixed = torch.rand(len(chosen), 1) < 2 / 3
            embedding = torch.where(mixed, decoded[draw, chosen, view].float(), embedding)
        return _diffusion_loss(decoder, x0.to(device), embedding.to(device), scheduler, normaliser, noising)

    def finish() -> Mapping[str, Any]:
        restore_group_norm(unet)
        decoder.cpu()
        normaliser.cpu()
        save_decoder(decoder, scheduler, noising, normaliser, out)
        return {"parameters": sum(p.numel() for p in decoder.parameters())}

    return run_stage(name, decoder, loss, settings, work, finish)


def _diffusion_loss(
    decoder: Decoder, x0: Tensor, embedding: Tensor, scheduler: Any, normaliser: Any, noising: Any
) -> tuple[Tensor, Mapping[str, float]]:
    count, device = len(x0), x0.device
    level = torch.randint(0, 300, (count,), device=device) * (torch.rand(count, device=device) < 0.25)
    labels = class_labels(embedding, level, normaliser, noising)
    keep = (torch.rand(count, device=device) >= 0.1).float()
    mean = decoder.layout.latents(embedding)
    tokens = decoder.layout.prompt_embeds(embedding) * keep[:, None, None]
    noise, step = torch.randn_like(x0), torch.randint(0, TRAIN_STEPS, (count,), device=device)
    noisy = scheduler.add_noise(x0, noise, step)
    target = scheduler.get_velocity(x0, noise, step)
    output = decoder.unet(noisy, step, encoder_hidden_states=tokens, class_labels=labels * keep[:, None]).sample
    error = F.mse_loss(output.float(), target)
    layout_error = F.mse_loss(mean.float(), x0)
    return error + 0.5 * layout_error, {"v": float(error.detach()), "layout": float(layout_error.detach())}


def _eager_attention(unet: Any) -> None:
    """Plain matrix-product attention while training: SDPA's backward in bf16 is slow on CPUs."""
    from diffusers.models.attention_processor import AttnProcessor

    unet.set_attn_processor(AttnProcessor())


def save_decoder(decoder: Decoder, scheduler: Any, noising: Any, normaliser: Any, out: Path) -> None:
    """Write the diffusers folders `unet`, `scheduler`, `image_noising_scheduler`, `image_normalizer` and `layout`."""
    decoder.unet.save_pretrained(out / "unet")  # type: ignore[operator]
    scheduler.save_pretrained(out / "scheduler")
    noising.save_pretrained(out / "image_noising_scheduler")
    normaliser.save_pretrained(out / "image_normalizer")
    decoder.layout.save_pretrained(out / "layout")
    (out / "seed_decode.json").write_text(json.dumps(DECODE_DEFAULTS))


@torch.no_grad()
def decoded_embeddings(tokenizer_folder: Path, codes: Tensor, draws: int = 2, corrupt: float = 0.15) -> Tensor:
    """Embeddings float16 `[draws + 1, N, V, E]` of codes `[N, V, 32]`: as they are, then up to `corrupt` replaced."""
    from seed_multimodal.tokenizers.seed2 import Seed2Tokenizer

    tokenizer = Seed2Tokenizer.from_pretrained(tokenizer_folder)
    flat = codes.flatten(0, 1).long()
    generator = torch.Generator().manual_seed(0)
    size = tokenizer.config.codebook_size
    results = []
    for draw in range(draws + 1):
        current = flat
        if draw:
            share = corrupt * torch.rand(len(flat), 1, generator=generator)
            swap = torch.rand(flat.shape, generator=generator) < share
            current = torch.where(swap, torch.randint(size, flat.shape, generator=generator), flat)
        results.append(tokenizer.decode(current, batch_size=512).half().unflatten(0, codes.shape[:2]))
    return torch.stack(results)
