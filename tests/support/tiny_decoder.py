"""Tiny parts and configurations for tests of SEED's decoders: denoisers and autoencoders of each
class, as a flow or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_detokenizer
import tiny_sdxl
import tiny_system
import torch
from llm_runs import merged

from seed_multimodal.models.seed.code_adapter import (
    CODE_ADAPTER,
    CodeAdapter,
    CodeAdapterConfig,
)

CONFIGS = tiny_detokenizer.APPLICATION / "configs" / "seed_decoder"
DENOISERS: dict[str, dict[str, Any]] = {
    "UNet2DConditionModel": {
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
    },
    "SanaTransformer2DModel": {
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
    },
    "SD3Transformer2DModel": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 4,
        "pos_embed_max_size": 16,
    },
}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


def vae(name: str) -> Any:
    """`kl`: 4 channels; `kl16`: 16 with a shift, as Stable Diffusion 3's; `dc`: 32, as SANA's."""
    from diffusers import AutoencoderDC

    if name == "kl":
        return tiny_sdxl.vae(scaling_factor=0.5)
    if name == "kl16":
        return tiny_sdxl.vae(latent_channels=16, scaling_factor=1.5, shift_factor=0.06)
    torch.manual_seed(3)
    return AutoencoderDC(
        latent_channels=32,
        encoder_block_out_channels=(8, 32),
        decoder_block_out_channels=(8, 32),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.4,
    )


def write_parts(root: Path) -> Path:
    """`tokenizer`, and the diffusers folders `kl`, `kl16`, `dc`; the first has a U-Net."""
    from diffusers import DDIMScheduler

    torch.manual_seed(0)
    tiny_system.write_image_tokenizer(root / "tokenizer")
    for name in ("kl", "kl16", "dc"):
        vae(name).save_pretrained(root / name / "vae")
        DDIMScheduler(clip_sample=False).save_pretrained(root / name / "scheduler")
    tiny_sdxl.unet().save_pretrained(root / "kl" / "unet")
    return root


def write_decoder(folder: Path) -> Path:
    """A decoder of codes: SANA's transformer and autoencoder as a flow, with weights large enough
    to tell codes apart."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel

    torch.manual_seed(1)
    denoiser = SanaTransformer2DModel(
        **DENOISERS["SanaTransformer2DModel"],
        in_channels=32,
        out_channels=32,
        sample_size=8,
        caption_channels=tiny_system.CROSS,
    )
    adapter = CodeAdapter(
        CodeAdapterConfig(width=tiny_system.WIDTH, tokens=32, context_dim=tiny_system.CROSS)
    )
    for parameter in [*denoiser.parameters(), *adapter.parameters()]:
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.6)
    denoiser.save_pretrained(folder / "transformer")
    adapter.save_pretrained(folder / CODE_ADAPTER)
    vae("dc").save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    return folder


def config(
    parts: Path, output: Path, vae: str = "kl", denoiser: str = "", **changes: dict[str, Any]
) -> dict[str, Any]:
    """A resolved configuration; `denoiser`: of a new one, which learns a flow."""
    model: dict[str, Any] = {
        "diffusion": str(parts / vae),
        "tokenizer": str(parts / "tokenizer"),
    }
    if denoiser:
        model |= {
            "denoiser": {"_class_name": denoiser, **DENOISERS[denoiser]},
            "scheduler": FLOW,
        }
    sources = [{"name": "scenes", "format": "nano", "options": {"number": 16}}]
    data = {"sources": sources, "batch_size": 4, "resolution": 16}
    return merged(
        {
            "output_dir": str(output),
            **tiny_detokenizer.RUN,
            "model": model,
            "data": {**data, "encoder_size": tiny_system.IMAGE_SIZE},
        },
        changes,
    )
