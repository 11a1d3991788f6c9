"""A SEED-1 small enough for tests: tokenizer, its files in the original layout, and a Stable
Diffusion folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from tiny_sdxl import unet, vae
from torch import Tensor, nn

from seed_multimodal.models.seed.configuration import QFormerConfig, Seed1Config
from seed_multimodal.models.seed.modeling import Seed1Tokenizer
from seed_multimodal.models.seed.qformer import QFormer
from seed_multimodal.nn.vision.eva import EvaConfig, EvaVit

TEXT_TOKENS = 7
TEXT_WIDTH = 16


# Of SEED-1 and SEED-2.
SIZES: dict[str, Any] = {
    "vit": EvaConfig(image_size=16, patch_size=8, width=16, depth=2, heads=2, mlp_width=24),
    "qformer": QFormerConfig(
        width=24, depth=3, heads=2, mlp_width=32, max_positions=40, dropout=0.1
    ),
    "codebook_size": 50,
    "codebook_dim": 6,
    "decode_depth": 1,
}


def config() -> Seed1Config:
    return Seed1Config(
        **SIZES,
        reverse_depth=2,
        text_tokens=TEXT_TOKENS,
        text_features_dim=TEXT_WIDTH,
    )


def tokenizer(seed: int = 0) -> Seed1Tokenizer:
    """A tokenizer with random weights large enough to tell images apart."""
    torch.manual_seed(seed)
    return loud(Seed1Tokenizer(config())).eval()


def loud(model: nn.Module) -> nn.Module:
    """Larger weights: with the usual initial values, outputs hardly depend on the image."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.startswith("text_encoder."):
                parameter.normal_(
                    std=1.0 if parameter.ndim == 3 or name.startswith("quantize") else 0.3
                )
    return model


def training_name(name: str) -> str:
    """Name of a weight in the original checkpoint → its name in the original training code."""
    return name.replace("Reverse_Qformer.", "Reverse_Qformer_text.").replace(
        "reverse_tokens", "reverse_tokens_text"
    )


def stage_files(
    model: Seed1Tokenizer,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """State dicts of causal_qformer.pth, seed_tokenizer.pth and eva_vit_g.pth, with training-only
    tensors."""
    first = {}
    second = {}
    for name, value in model.state_dict().items():
        part = name.split(".")[0]
        if part != "visual_encoder":
            (first if part in ("query_tokens", "ln_vision", "Qformer") else second)[name] = value
    width = model.config.qformer.width
    sizes = model.config.qformer
    state = QFormer(sizes, model.config.vit.width, vocab_size=30, lm_head=True).state_dict()
    first |= {
        f"Qformer.{name}": value for name, value in state.items() if f"Qformer.{name}" not in first
    }
    first |= {
        "temp": torch.tensor(0.07),
        "vision_proj.weight": torch.zeros(4, width),
        "vision_proj.bias": torch.zeros(4),
        "text_proj.weight": torch.zeros(4, width),
        "text_proj.bias": torch.zeros(4),
    }
    second |= {"pos_embed": torch.zeros_like(model.pos_embed_text)}
    second |= {f"blocks.{name}": value for name, value in model.blocks_text.state_dict().items()}
    deeper = EvaVit(
        dataclasses.replace(model.config.vit, depth=model.config.vit.depth + 1)
    ).state_dict()
    return first, second, deeper | model.visual_encoder.state_dict()


def released_folder(model: Seed1Tokenizer, folder: Path) -> Path:
    """The three files as the original training writes them: weights under the key "model", next to
    other keys."""
    folder.mkdir(parents=True, exist_ok=True)
    first, second, vision = stage_files(model)
    torch.save(
        {"model": first, "epoch": 3, "config": {"run": {"amp": True}}, "scaler": None},
        folder / "causal_qformer.pth",
    )
    torch.save(
        {"model": second, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
        folder / "seed_tokenizer.pth",
    )
    torch.save(vision, folder / "eva_vit_g.pth")
    return folder


def diffusion_folder(folder: Path, *, text: bool = True, checker: bool = False) -> Path:
    """A Stable Diffusion 1 of 16 x 16 pixels, saved by diffusers; `checker` adds one that flags
    every image."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts = _checker() if checker else {"safety_checker": None, "feature_extractor": None}
    StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder() if text else None,
        tokenizer=_words(folder) if text else None,
        unet=unet(sdxl=False, cross_attention_dim=TEXT_WIDTH, attention_head_dim=2),
        scheduler=scheduler,
        requires_safety_checker=checker,
        **parts,
    ).save_pretrained(folder)
    return folder


def text_encoder():
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(2)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=4,
            hidden_size=TEXT_WIDTH,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=TEXT_TOKENS,
            bos_token_id=2,
            eos_token_id=3,
            pad_token_id=3,
        )
    ).eval()


def _words(folder: Path):
    from transformers import CLIPTokenizer

    tokenizer_dir = folder / "tokenizer"
    tokenizer_dir.mkdir(parents=True, exist_ok=True)
    (tokenizer_dir / "vocab.json").write_text(
        json.dumps({"a": 0, "a</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3})
    )
    (tokenizer_dir / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(tokenizer_dir, model_max_length=TEXT_TOKENS)


def _checker() -> dict:
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPVisionConfig

    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=6,
    )
    text = CLIPTextConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = StableDiffusionSafetyChecker(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=6)
    ).eval()
    with torch.no_grad():
        model.concept_embeds_weights.fill_(-2.0)  # every similarity is above that threshold
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return {"safety_checker": model, "feature_extractor": processor}
