"""Count GLM-Image at its published sizes: parameters, memory and tokens, without weights.

    python benchmarks/glm_image_sizes.py       two tables in Markdown

The networks of transformers (class defaults) and of diffusers are built on the meta device, which
allocates nothing. Two numbers are no class defaults: the transformer has 32 heads of 128 and 30
layers, and the letters' encoder is counted with ByT5-small's sizes.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, GlmImageTransformer2DModel
from torch import nn
from transformers import (
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

from seed_glm_image.processing import CONTEXT, answer_grids, n_codes
from seed_glm_image.spec import PIXELS

BYTES = 2  # of a number in bf16
# GLM-Image's width of texts is ByT5-small's; its own configuration is not part of the libraries.
BYT5_SMALL = {
    "vocab_size": 384,
    "d_model": 1472,
    "d_kv": 64,
    "d_ff": 3584,
    "num_layers": 12,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
}
VAE_CHANNELS = (128, 256, 512, 512)  # as Stable Diffusion's, with 16 latent channels


def networks() -> tuple[dict[str, nn.Module], GlmImageConfig]:
    """The parts by name, and the configuration of language model and image tokenizer."""
    config = GlmImageConfig()
    blocks = len(VAE_CHANNELS)
    with torch.device("meta"):
        whole = GlmImageForConditionalGeneration(config)
        parts = {
            "language model": nn.ModuleList([whole.model.language_model, whole.lm_head]),
            "image tokenizer": nn.ModuleList([whole.model.visual, whole.model.vqmodel]),
            "transformer": GlmImageTransformer2DModel(
                num_attention_heads=32, attention_head_dim=128, num_layers=30
            ),
            "ByT5 (assumed small)": T5EncoderModel(T5Config(**BYT5_SMALL)),
            "VAE (assumed)": AutoencoderKL(
                block_out_channels=VAE_CHANNELS,
                latent_channels=16,
                layers_per_block=2,
                down_block_types=["DownEncoderBlock2D"] * blocks,
                up_block_types=["UpDecoderBlock2D"] * blocks,
            ),
        }
    return parts, config


def main() -> None:
    """Print both tables."""
    # 1. The parts.
    parts, config = networks()
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    print("| part | parameters, B | GB in bf16 |\n| --- | ---: | ---: |")
    for name, size in {**sizes, "all": sum(sizes.values())}.items():
        print(f"| {name} | {size / 1e9:.2f} | {BYTES * size / 1e9:.1f} |")

    # 2. Tokens of an answer (its end token included), and keys and values of a row.
    text = config.text_config
    head = text.hidden_size // text.num_attention_heads
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * head * BYTES
    print("\n| image | codes of preview and image | new tokens | keys and values, GiB |")
    print("| --- | ---: | ---: | ---: |")
    for side in (512, 1024, 2048):
        grids = answer_grids((side // PIXELS, side // PIXELS), has_preview=True)
        sums = " + ".join(str(n_codes([grid])) for grid in grids)
        n_tokens = n_codes(grids) + 1
        print(f"| {side} x {side} | {sums} | {n_tokens:,} | {n_tokens * token / 2**30:.2f} |")
    print(f"\nA token: {token:,} bytes; a row of {CONTEXT:,} tokens: {CONTEXT * token / 2**30:.2f}")
    print(f"GiB; of the model's {text.max_position_embeddings:,}: ", end="")
    print(f"{text.max_position_embeddings * token / 2**30:.2f} GiB.")


if __name__ == "__main__":
    main()
