"""A LaVIT whose pixel decoders are tiny: a diffusers folder of either kind, tokenizer and code decoder that fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import tiny_sdxl
import torch
from PIL import Image
from tiny_lavit import TINY, tiny_tokenizer

from seed_multimodal.lavit.checkpoints import save_dynamic_tokenizer
from seed_multimodal.lavit.decoder import CodeDecoder, Head, LavitDecoderConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "MultiModalLLM" / "configs" / "lavit_detokenizer"
DECODER = LavitDecoderConfig(
    tokens=TINY.patches, code_dim=TINY.codebook_dim, width=16, depth=1, heads=2, mlp_width=24,
    feature_dim=TINY.vit.width, prompt_dim=tiny_sdxl.SIZES.output1_dim, pooled_dim=tiny_sdxl.SIZES.output2_dim)


def diffusion(folder: Path, head: Head) -> Path:
    """A U-Net of SDXL's kind, or of Stable Diffusion 1's with the embeddings of an empty text."""
    from diffusers import UNet2DConditionModel

    tiny_sdxl.sdxl_folder(folder)
    if head == "lowres":
        torch.manual_seed(6)
        UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=4, cross_attention_dim=14,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4).save_pretrained(folder / "unet")
        torch.save(torch.randn(1, 3, 14), folder / "uncond_embeddings.bin")
    return folder


def code_decoder(head: Head = "highres") -> CodeDecoder:
    """Random weights, large enough to tell codes apart."""
    torch.manual_seed(7)
    made = CodeDecoder(dataclasses.replace(DECODER, head=head)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made


def write_parts(home: Path) -> Path:
    """A folder with `highres`, `lowres`, `tokenizer`, `decoder` and pictures of many ratios."""
    for head in ("highres", "lowres"):
        diffusion(home / head, head)  # type: ignore[arg-type]
    save_dynamic_tokenizer(tiny_tokenizer(), home / "tokenizer")
    code_decoder().save_pretrained(home / "decoder")
    draw = np.random.default_rng(0)
    (home / "pictures").mkdir()
    for number in range(8):
        size = (20, 20 + 4 * number) if number % 2 else (20 + 3 * number, 20)
        Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)).save(home / "pictures" / f"{number}.png")
    return home


def config(parts: Path, output: Path, head: Head = "highres", **changes: dict[str, Any]) -> dict[str, Any]:
    """A resolved configuration; `changes` are merged into its groups."""
    made: dict[str, Any] = {
        "output_dir": str(output),
        "model": {"diffusion": str(parts / head), "tokenizer": str(parts / "tokenizer"),
                  "decoder": str(parts / "decoder")},
        "data": {"sources": [{"name": "pictures", "files": str(parts / "pictures")}], "batch_size": 4,
                 "sizes": [[16, 16], [16, 24], [24, 16]], "tower_size": 16},
        "optim": {"learning_rate": 3e-3, "weight_decay": 0.0, "warmup_steps": 1},
        "trainer": {"max_steps": 4, "precision": "fp32", "device": "cpu", "dataloader_num_workers": 0,
                    "report_to": [], "logging_steps": 1, "save_steps": 2}}
    for group, values in changes.items():
        made[group] = {**made.get(group, {}), **values}
    return made
