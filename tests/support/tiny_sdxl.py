"""An SDXL of 16 x 16 pixels: its diffusers folder, adapters of both stages, and a vision
encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.models.seed_x.adapter import ResamplerXLConfig, ResamplerXLV2, SDXLAdapter

WIDTH = 24  # of visual embeddings
CROSS = 16  # of prompt embeddings: both outputs of the resampler
SDXL_VAE = {"scaling_factor": 0.13025, "force_upcast": True}
SIZES = ResamplerXLConfig(
    dim=16,
    depth=1,
    dim_head=4,
    heads=2,
    num_queries=4,
    embedding_dim=WIDTH,
    output1_dim=6,
    output2_dim=10,
    ff_mult=2,
)


def unet(channels: int = 4, *, sdxl: bool = True, **changes: Any) -> Any:
    """A U-Net of SDXL or of Stable Diffusion 1."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": channels,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "norm_num_groups": 4,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": CROSS,
        "attention_head_dim": (2, 4),
    }
    if sdxl:
        sizes |= {
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + SIZES.output2_dim,
        }
    return UNet2DConditionModel(**{**sizes, **changes}).eval()


def vae(**more: Any) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(3)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        **more,
    )


def adapter(stage: int = 1) -> SDXLAdapter:
    """An adapter with weights large enough to tell embeddings and, in the second stage, condition
    images apart."""
    torch.manual_seed(2)
    model = SDXLAdapter(unet(4 * stage), ResamplerXLV2(SIZES)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and ("resampler" in name or "attn2" in name or "conv_in" in name):
                parameter.normal_(std=0.5)
    return model


def sdxl_folder(folder: Path, *, complete: bool = True) -> Path:
    """SDXL's diffusers folder; without `model_index.json` and the U-Net's weights if not
    `whole`."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    StableDiffusionXLPipeline(
        vae=vae(**SDXL_VAE),
        unet=unet(),
        scheduler=scheduler,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        add_watermarker=False,
    ).save_pretrained(folder)
    if not complete:
        (folder / "model_index.json").unlink()
        for file in (folder / "unet").glob("*.safetensors"):
            file.unlink()
    return folder


class Tower(nn.Module):
    """Pixels `[B, 3, S, S]` → embeddings `[B, (S / 4)², WIDTH]`; pixels of zero are not embeddings
    of zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.conv = nn.Conv2d(3, WIDTH, 4, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.conv(pixels).flatten(2).mT
