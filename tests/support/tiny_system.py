"""A complete SEED-LLaMA with random weights and the files of nano (fixture `tiny_folder`)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny_llama import llama

SENTENCES = [
    "USER: Please provide an accurate and concise description of the given image.\n"
    "ASSISTANT: a red apple.",
    "What colour is it? Please provide an accurate answer consisting of only one word or phrase.",
    "Please draw a blue fish in the style of a flat drawing.\nASSISTANT: Here is the picture.",
    "Make it green.\nASSISTANT: Here it is.",
    "USER: What is this animal?\nASSISTANT: It is a cat, and the cat sits on the grass under a "
    "tall tree.",
]
IMAGE_SIZE = 32
N_CODES = 16
EMBEDDING = 16
GRID = 8
CROSS = 16
WIDTH = 24  # of the Q-Former


def build(folder: str | Path, *, seed: int = 0) -> Path:
    """Write the whole system into `folder` and return it."""
    from seed_multimodal.language.tokenizer import MultimodalTokenizer
    from seed_nano.train.words import train_text_tokenizer

    root = Path(folder)
    torch.manual_seed(seed)
    tokenizer = train_text_tokenizer(
        MultimodalTokenizer, SENTENCES * 4, root / "seed_tokenizer", vocab_size=340, n_codes=N_CODES
    )
    write_image_tokenizer(root / "seed_tokenizer")
    llama(len(tokenizer)).save_pretrained(root / "seed_llama")
    write_detokenizer(root / "seed_tokenizer" / "diffusion_model")
    (root / "system.json").write_text(
        json.dumps(
            {
                "tokenizer": "seed_tokenizer",
                "llm": "seed_llama",
                "detokenizer": "seed_tokenizer/diffusion_model",
                "template": "vicuna",
                "image_size": IMAGE_SIZE,
                "transform": {"type": "clip", "keep_ratio": False, "interpolation": "bicubic"},
                "generation": {"max_new_tokens": 12, "do_sample": False},
                "previews": [8, 16],
            }
        )
    )
    return root


def write_image_tokenizer(folder: Path) -> None:
    from seed_multimodal.models.seed.configuration import QFormerConfig, Seed2Config
    from seed_multimodal.models.seed.modeling import Seed2Tokenizer
    from seed_multimodal.nn.vision.eva import EvaConfig

    config = Seed2Config(
        vit=EvaConfig(
            image_size=IMAGE_SIZE, patch_size=8, width=24, depth=1, heads=2, mlp_width=48
        ),
        qformer=QFormerConfig(width=WIDTH, depth=2, heads=2, mlp_width=48),
        codebook_size=N_CODES,
        codebook_dim=8,
        decode_depth=1,
        decode_heads=2,
        image_features_dim=EMBEDDING,
    )
    model = Seed2Tokenizer(config).eval()
    # Initial codebooks lie within 1/K of 0, where nearly all queries select one code.
    with torch.no_grad():
        model.quantize.embedding.weight.copy_(torch.randn(N_CODES, 8) * 0.05)
    model.save_pretrained(folder)


def write_detokenizer(folder: Path) -> None:
    """A stable-unCLIP of 2 x GRID pixels with a layout decoder."""
    from diffusers import (
        DDIMScheduler,
        DDPMScheduler,
        StableUnCLIPImg2ImgPipeline,
        UNet2DConditionModel,
    )
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
        StableUnCLIPImageNormalizer,
    )
    from tiny_sdxl import vae

    from seed_nano.layout import LayoutConfig, LayoutDecoder

    unet = UNet2DConditionModel(
        sample_size=GRID,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=CROSS,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * EMBEDDING,
    )
    schedule = {"beta_schedule": "squaredcos_cap_v2"}
    pipeline = StableUnCLIPImg2ImgPipeline(
        feature_extractor=None,
        image_encoder=None,
        tokenizer=None,
        text_encoder=None,
        unet=unet,
        vae=vae(layers_per_block=1, sample_size=2 * GRID),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=EMBEDDING),
        image_noising_scheduler=DDPMScheduler(**schedule),
        scheduler=DDIMScheduler(**schedule, prediction_type="v_prediction", clip_sample=False),
    )
    pipeline.save_pretrained(folder)
    labels = {"first": 2, "second": 3, "style": 2, "background": 2, "layout": 1}
    sizes = LayoutConfig(
        EMBEDDING, 4, GRID, CROSS, labels, [[(0, 0.5, 0.5, 0.8)]], width=16, coarse=8
    )
    LayoutDecoder(sizes).save_pretrained(folder / "layout")
    (folder / "seed_decode.json").write_text(
        json.dumps({"num_inference_steps": 2, "guidance_scale": 3.0})
    )
