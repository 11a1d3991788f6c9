"""Tiny parts and configurations for tests of LaVIT's pixel decoders (both kinds of the
original)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import tiny_detokenizer
import tiny_sdxl
import torch
from llm_runs import merged
from tiny_lavit import PATCHES, TINY, tiny_tokenizer
from torch import Tensor

from seed_multimodal.models.lavit.checkpoints import save_dynamic_tokenizer
from seed_multimodal.models.lavit.decoder import CodeDecoder, Head, LavitDecoderConfig

CONFIGS = tiny_detokenizer.APPLICATION / "configs" / "lavit_detokenizer"
# of conditions
TOKENS = 8
WIDTH = tiny_sdxl.CROSS
POOLED = tiny_sdxl.SIZES.output2_dim
NOTHING = 5  # embeddings of the empty text
DECODER = LavitDecoderConfig(
    tokens=PATCHES,
    code_dim=TINY.codebook_dim,
    width=16,
    depth=1,
    heads=2,
    mlp_width=24,
    feature_dim=TINY.vit.width,
    prompt_dim=tiny_sdxl.SIZES.output1_dim,
    pooled_dim=POOLED,
)


def unet(head: Head, **changes: Any) -> Any:
    """A U-Net with weights large enough to tell conditions apart."""
    model = tiny_sdxl.unet(sdxl=head == "highres", **changes)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and ("attn2" in name or "add_embedding" in name):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def nothing() -> Tensor:
    return torch.randn(1, NOTHING, WIDTH, generator=torch.Generator().manual_seed(2))


def diffusion(folder: Path, head: Head) -> Path:
    """`{vae,scheduler,unet}`; for the low-resolution head also the empty text's embeddings and a
    safety checker."""
    from diffusers import DDIMScheduler

    tiny_sdxl.vae(**tiny_sdxl.SDXL_VAE).save_pretrained(folder / "vae")
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    ).save_pretrained(folder / "scheduler")
    unet(head).save_pretrained(folder / "unet", safe_serialization=False)
    if head == "lowres":
        torch.save(nothing(), folder / "uncond_embeddings.bin")
        checker(folder)
    return folder


def checker(file: Path) -> None:
    """A safety checker that flags nothing."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    torch.manual_seed(4)
    model = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8))
    with torch.no_grad():
        model.concept_embeds_weights.fill_(2.0)  # no cosine is larger
        model.special_care_embeds_weights.fill_(2.0)
    model.save_pretrained(file / "safety_checker")
    CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(file / "feature_extractor")


def code_decoder(head: Head = "highres") -> CodeDecoder:
    """Random weights, large enough to tell codes apart."""
    torch.manual_seed(7)
    model = CodeDecoder(dataclasses.replace(DECODER, head=head)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def write_parts(folder: Path) -> Path:
    """A folder with `highres`, `lowres`, `tokenizer`, `decoder` and images of several aspect
    ratios."""
    for head in ("highres", "lowres"):
        diffusion(folder / head, head)  # type: ignore[arg-type]
    save_dynamic_tokenizer(tiny_tokenizer(), folder / "tokenizer")
    code_decoder().save_pretrained(folder / "decoder")
    tiny_detokenizer.write_images(
        folder / "pictures",
        ((20, 20 + 4 * index) if index % 2 else (20 + 3 * index, 20) for index in range(8)),
    )
    return folder


def config(
    parts: Path, output: Path, head: Head = "highres", **changes: dict[str, Any]
) -> dict[str, Any]:
    """A resolved configuration; `changes` are merged into its groups."""
    return merged(
        {
            "output_dir": str(output),
            **tiny_detokenizer.RUN,
            "model": {
                "diffusion": str(parts / head),
                "tokenizer": str(parts / "tokenizer"),
                "decoder": str(parts / "decoder"),
            },
            "data": {
                "sources": [{"name": "pictures", "files": str(parts / "pictures")}],
                "batch_size": 4,
                "sizes": [[16, 16], [16, 24], [24, 16]],
                "encoder_size": 16,
            },
        },
        changes,
    )
