"""How much arithmetic a SEED-2 tokenizer is: floating-point operations of its matrix products, from its sizes alone.

A multiply-add counts as two. Counted as dense: convolutions, linear layers, both products of attention (also where a
mask hides half of them) and the code search. Not counted, as usual for a model-FLOP utilisation (MFU): normalisation,
softmax, activations, biases, lookups. `torch.utils.flop_counter` gives the same numbers.
"""

from __future__ import annotations

from seed_multimodal.tokenizers.qformer import QFormerConfig
from seed_multimodal.tokenizers.seed2 import DOWN_WIDTHS
from seed_multimodal.tokenizers.seed2_config import Seed2Config
from seed_multimodal.vision.eva import EvaConfig


def vision_flops(config: EvaConfig) -> int:
    """Pixels → tower output, one image."""
    n, width = config.tokens, config.width
    patches = config.grid**2 * linear_flops(3 * config.patch_size**2, width)
    block = n * (linear_flops(width, 4 * width) + 2 * linear_flops(width, config.mlp_width))
    return patches + config.depth * (block + attention_flops(n, n, width))


def query_flops(config: QFormerConfig, queries: int, tokens: int, source_width: int) -> int:
    """Queries reading `tokens` features of `source_width` through a Q-Former, one image."""
    width = config.width
    layer = queries * (linear_flops(width, 4 * width) + 2 * linear_flops(width, config.mlp_width))
    layer += attention_flops(queries, queries, width)
    cross = queries * linear_flops(width, 2 * width) + tokens * linear_flops(source_width, 2 * width)
    cross += attention_flops(queries, tokens, width)
    return config.depth * layer + len(range(0, config.depth, config.cross_attention_freq)) * cross


def encode_flops(config: Seed2Config) -> int:
    """Pixels → codes, one image (released size: 533 · 10⁹)."""
    return encoder_flops(config) + _to_codes_flops(config) + _search_flops(config)


def encoder_flops(config: Seed2Config) -> int:
    """Pixels → Q-Former output, one image: what stage 2 keeps frozen."""
    vit = config.vit
    return vision_flops(vit) + query_flops(config.qformer, config.num_query, vit.tokens, vit.width)


def decode_flops(config: Seed2Config) -> int:
    """Codes → image embedding, one image."""
    q, width, d = config.num_query, config.qformer.width, config.codebook_dim
    total = q * (linear_flops(d, d) + linear_flops(d, width)) + _blocks_flops(config)
    if config.use_qformer_image:
        return total + query_flops(config.reverse_qformer, 1, q, width) + linear_flops(width, config.image_features_dim)
    first, second, last = DOWN_WIDTHS
    total += q * (linear_flops(width, first) + linear_flops(first, second) + linear_flops(second, last))
    return total + linear_flops(q * last, config.image_features_dim)


def stage2_flops(config: Seed2Config) -> int:
    """One image through one step of stage 2: the frozen encoder forward, the trained part forward and backward.

    Backward is twice the forward, less the gradient that the first trained layer need not pass on. Without the CLIP
    model that makes the targets, and without the optimiser.
    """
    width = config.qformer.width
    trained = _to_codes_flops(config) + decode_flops(config)
    if config.recon_s:
        trained += _blocks_flops(config)
    unneeded = config.num_query * linear_flops(width, width)
    return encoder_flops(config) + _search_flops(config) + 3 * trained - unneeded


def linear_flops(inputs: int, outputs: int) -> int:
    """One row through a linear layer."""
    return 2 * inputs * outputs


def attention_flops(queries: int, keys: int, width: int) -> int:
    """Scores and weighted sum over all heads together `width` wide, without the projections."""
    return 4 * queries * keys * width


def _to_codes_flops(config: Seed2Config) -> int:
    width = config.qformer.width
    return config.num_query * (linear_flops(width, width) + linear_flops(width, config.codebook_dim))


def _search_flops(config: Seed2Config) -> int:
    return config.num_query * linear_flops(config.codebook_dim, config.codebook_size)


def _blocks_flops(config: Seed2Config) -> int:
    q, width = config.num_query, config.qformer.width
    block = q * (linear_flops(width, 4 * width) + 2 * linear_flops(width, 4 * width)) + attention_flops(q, q, width)
    return config.decode_depth * block
