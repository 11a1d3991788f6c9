"""Count GLM-Image at its published sizes: parameters, memory, tokens and work, without weights.

    python benchmarks/glm_image_sizes.py       two tables in Markdown

The networks of transformers (class defaults) and diffusers are built on the meta device, which
allocates nothing. No defaults: the transformer has 32 heads of 128 and 30 layers. Assumed, without
a configuration in the libraries: ByT5-small; Stable Diffusion's autoencoder with 16 channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, GlmImageTransformer2DModel
from torch import nn
from transformers import GlmImageConfig, GlmImageForConditionalGeneration, T5Config, T5EncoderModel

from seed_glm_image.diffusion import GlmImageSettings
from seed_glm_image.processing import CONTEXT, answer_grids, n_codes
from seed_glm_image.spec import PIXELS

BYTES = 2  # of a number in bf16
BYT5 = {"vocab_size": 384, "d_model": 1472, "d_ff": 3584, "num_layers": 12, "num_heads": 6}
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16}
DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"


def count(parts: Sequence[nn.Module]) -> int:
    """Parameters of several networks."""
    return sum(weight.numel() for part in parts for weight in part.parameters())


def main() -> None:
    """Print both tables."""
    # 1. The parts.
    config = GlmImageConfig()
    with torch.device("meta"):
        whole = GlmImageForConditionalGeneration(config)
        transformer = GlmImageTransformer2DModel(
            num_layers=30, attention_head_dim=128, num_attention_heads=32
        )
        byt5 = T5EncoderModel(T5Config(**BYT5, feed_forward_proj="gated-gelu"))
        vae = AutoencoderKL(**VAE, down_block_types=[DOWN] * 4, up_block_types=[UP] * 4)
    sizes = {
        "language model": count([whole.model.language_model, whole.lm_head]),
        "image tokenizer": count([whole.model.visual, whole.model.vqmodel]),
        "transformer": count([transformer]),
        "text encoder (assumed: ByT5-small)": count([byt5]),
        "VAE (assumed)": count([vae]),
    }
    print("| part | parameters, B | GB in bf16 |\n| --- | ---: | ---: |")
    for name, size in {**sizes, "all": sum(sizes.values())}.items():
        print(f"| {name} | {size / 1e9:.2f} | {BYTES * size / 1e9:.1f} |")

    # 2. An image: each new token reads all weights but the table of tokens; attention's and MLP's
    #    matrices compute two operations a parameter and patch, in two runs a step (guidance).
    text = config.text_config
    head = text.hidden_size // text.num_attention_heads
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * head * BYTES
    read = BYTES * (sizes["language model"] - text.vocab_size * text.hidden_size)
    blocks = transformer.transformer_blocks
    matrices = count([part for block in blocks for part in (block.attn1, block.ff)])
    passes = 2 * GlmImageSettings().num_inference_steps
    print("\n| image | codes | new tokens | keys and values, GiB | weights read, TB | ", end="")
    print(f"patches | PFLOP of {passes} passes |\n|{' --- |' * 7}")
    for side in (512, 1024, 2048):
        grids = answer_grids((side // PIXELS, side // PIXELS), has_preview=True)
        new, patches = n_codes(grids) + 1, 4 * n_codes(grids[-1:])
        codes = " + ".join(f"{n_codes([grid]):,}" for grid in grids)
        row = (codes, f"{new:,}", f"{new * token / 2**30:.2f}", f"{new * read / 1e12:.0f}")
        flop = 2 * matrices * patches * passes / 1e15
        print(f"| {side} × {side} | {' | '.join(row)} | {patches:,} | {flop:.1f} |")
    for length in (CONTEXT, text.max_position_embeddings):
        print(f"\n{length:,} tokens of {token:,} bytes: {length * token / 2**30:.2f} GiB.", end="")
    print()


if __name__ == "__main__":
    main()
