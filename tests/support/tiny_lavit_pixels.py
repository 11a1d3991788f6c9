"""LaVIT's pixel decoders of 16 x 16 pixels for tests: diffusion folders of both kinds, laid out as released."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TOKENS, WIDTH, POOLED = 8, 16, 10  # of conditions
NOTHING = 5  # embeddings of the empty text


def unet(kind: str, **changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "norm_num_groups": 4,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": WIDTH,
        "attention_head_dim": (2, 4)}
    if kind == "highres":
        sizes |= {"use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
                  "projection_class_embeddings_input_dim": 6 * 8 + POOLED}
    made = UNet2DConditionModel(**{**sizes, **changes}).eval()
    for name, parameter in made.named_parameters():  # large enough to tell conditions apart
        if parameter.ndim > 1 and ("attn2" in name or "add_embedding" in name):
            torch.nn.init.normal_(parameter, std=0.5)
    return made


def nothing() -> Tensor:
    return torch.randn(1, NOTHING, WIDTH, generator=torch.Generator().manual_seed(2))


def folder(place: Path, kind: str) -> Path:
    """`{vae,scheduler,unet}`; the second kind's with the empty text and the safety checker."""
    from diffusers import AutoencoderKL, DDIMScheduler

    torch.manual_seed(3)
    AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                  up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
                  scaling_factor=0.13025, force_upcast=True).save_pretrained(place / "vae")
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
                  set_alpha_to_one=False).save_pretrained(place / "scheduler")
    unet(kind).save_pretrained(place / "unet", safe_serialization=False)
    if kind == "lowres":
        torch.save(nothing(), place / "uncond_embeddings.bin")
        checker(place)
    return place


def checker(place: Path) -> None:
    """A safety checker that recognises nothing."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "image_size": 16, "patch_size": 8}
    torch.manual_seed(4)
    made = StableDiffusionSafetyChecker(CLIPConfig(vision_config=tower, projection_dim=8))
    with torch.no_grad():
        made.concept_embeds_weights.fill_(2.0)  # no cosine is larger
        made.special_care_embeds_weights.fill_(2.0)
    made.save_pretrained(place / "safety_checker")
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
                       ).save_pretrained(place / "feature_extractor")
