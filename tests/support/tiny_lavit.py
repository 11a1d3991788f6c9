"""A complete LaVIT with random weights in a system folder (fixture `tiny_lavit_folder`), and a
tokenizer alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hub_tokenizers import write_hub_tokenizer
from PIL import Image
from tiny_llama import WIDTH, llama
from tiny_llms import random_llm
from tiny_sdxl import SIZES as SDXL
from tiny_sdxl import sdxl_folder, unet

from seed_multimodal.models.lavit.checkpoints import save_dynamic_tokenizer
from seed_multimodal.models.lavit.decoder import CodeDecoder, LavitDecoderConfig
from seed_multimodal.models.lavit.modeling import DynamicTokenizer, LavitTokenizerConfig
from seed_multimodal.models.lavit.processing import HubLavitTokenizer, LavitTokenizer
from seed_multimodal.nn.vision.eva import EvaConfig
from seed_nano.train.words import train_text_tokenizer

CODES = 24
CODE_DIM = 8
PATCHES = 16
SIZE = 16  # pixels a side of what the vision encoder reads
SIDE = 64  # of a square drawing
SENTENCES = [
    "a red apple beside a blue fish",
    "Question: What is this animal? Answer: It is a cat.",
    "an old photo of a horse and a small house",
    "two dogs run in the snow, near 3 trees",
] * 8
TOKENIZER = LavitTokenizerConfig(
    vit=EvaConfig(image_size=SIZE, patch_size=4, width=32, depth=2, heads=2, mlp_width=48),
    vit_head=6,
    merger_depth=2,
    merger_heads=2,
    merger_mlp_width=48,
    codebook_size=CODES,
    codebook_dim=CODE_DIM,
    llm_width=WIDTH,
)
DECODER = LavitDecoderConfig(
    tokens=PATCHES,
    code_dim=CODE_DIM,
    width=24,
    depth=1,
    heads=2,
    mlp_width=32,
    feature_dim=32,
    prompt_dim=SDXL.output1_dim,
    pooled_dim=SDXL.output2_dim,
)
TINY = LavitTokenizerConfig(
    vit=EvaConfig(image_size=16, patch_size=4, width=16, depth=2, heads=2, mlp_width=24),
    vit_head=8,
    merger_depth=2,
    merger_heads=2,
    merger_mlp_width=24,
    codebook_size=20,
    codebook_dim=4,
    llm_width=12,
)


def build(folder: str | Path, seed: int = 0, hub: bool = False) -> Path:
    """Write a system folder and return it; `hub`: with a Qwen 3 and a hub tokenizer."""
    root = Path(folder)
    write = write_hub_language if hub else write_language
    text_tokenizer = write(root / "llm", seed)
    first = tokenizer(seed)
    second = tokenizer(seed, merger=seed + 1)
    save_dynamic_tokenizer(first, root / "tokenizer", second)
    torch.manual_seed(seed)
    spread(CodeDecoder(DECODER)).eval().save_pretrained(root / "decoder")
    pixels(root / "pixels")
    drawn = {
        "max_new_tokens": text_tokenizer.vocabulary.tokens_per_image,
        "min_new_tokens": 4,
    }
    (root / "system.json").write_text(
        json.dumps(
            {
                "system": "lavit",
                "generation": {
                    "describe": {"max_new_tokens": 6, "min_new_tokens": 1},
                    "draw": drawn,
                    "compose": drawn,
                },
            }
        )
    )
    return root


def spread(model: Any) -> Any:
    """Weights large enough to tell images apart."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def tokenizer(seed: int = 0, merger: int | None = None) -> DynamicTokenizer:
    """A tokenizer; `merger`: seed of a different token merger and projector."""
    torch.manual_seed(seed)
    model = spread(DynamicTokenizer(TOKENIZER))
    if merger is not None:
        torch.manual_seed(100 + merger)
        spread(model.causal_encoder)
        spread(model.vit_proj)
    return model.requires_grad_(False).eval()


def write_hub_language(folder: Path, seed: int) -> HubLavitTokenizer:
    """As `write_language`."""
    hub = write_hub_tokenizer(folder, SENTENCES)
    HubLavitTokenizer.create(hub, CODES, PATCHES).save_pretrained(folder)
    tokenizer = HubLavitTokenizer.from_pretrained(folder)
    ids: dict[str, Any] = dict(tokenizer.special_ids)
    llm = random_llm("qwen3", len(tokenizer), seed, hidden_size=WIDTH, **ids)
    llm.save_pretrained(folder)
    return tokenizer


def write_language(folder: Path, seed: int, patches: int = PATCHES) -> LavitTokenizer:
    """A language model with its tokenizer in the same folder."""
    tokenizer = train_text_tokenizer(LavitTokenizer, SENTENCES, folder, 330, CODES, patches)
    torch.manual_seed(seed)
    llama(tokenizer.vocabulary.size, mlp_width=48, context=256).save_pretrained(folder)
    return tokenizer


def pixels(folder: Path) -> None:
    """A pixel decoder."""
    from diffusers import DDIMScheduler

    sdxl_folder(folder, complete=False)
    model = unet()
    model.register_to_config(sample_size=SIDE // 2)
    model.save_pretrained(folder / "unet")
    DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1).save_pretrained(
        folder / "scheduler"
    )
    (folder / "seed_decode.json").write_text(json.dumps({"num_inference_steps": 2}))


def tiny_tokenizer(seed: int = 0) -> DynamicTokenizer:
    """Built in milliseconds; about half of the tokens are selected, by clear margins, and counts
    differ by image."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DynamicTokenizer(TINY)
        with torch.no_grad():
            for layer in (model.token_predictor.in_conv[1], *model.token_predictor.out_conv[:4:2]):
                layer.weight.mul_(3)
            last = model.token_predictor.out_conv[4]
            last.weight.mul_(20)
            last.bias.zero_()
            features = model.patch_features(torch.randn(8, 3, 16, 16))
            lead = model.token_predictor(features)
            last.bias[0] = -(lead[..., 0] - lead[..., 1]).median()
    return model.requires_grad_(False).eval()


def same(image: Image.Image, other: Image.Image) -> bool:
    """Equal within one grey level."""
    return (
        image.size == other.size
        and np.abs(np.asarray(image, int) - np.asarray(other, int)).max() <= 1
    )
