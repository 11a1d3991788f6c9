"""Cost of a tokenizer and its training: floating-point operations of its matrix products, by sizes.

A multiply-add counts as two. Counted as dense: convolutions, linear layers, both products of attention (also where a
mask hides half of them) and the code search. Not counted, as usual for a model-FLOP utilisation (MFU): normalisation,
softmax, activations, biases, lookups, and activations computed again (checkpointing). `torch.utils.flop_counter` gives
the same numbers. Backward counts as twice the forward, less gradients that no layer before needs.
"""

from __future__ import annotations

from seed_multimodal.tokenizers.lavit import LavitTokenizerConfig
from seed_multimodal.tokenizers.lavit_decoder import LavitDecoderConfig
from seed_multimodal.tokenizers.lavit_training import TRIED
from seed_multimodal.tokenizers.qformer import QFormerConfig
from seed_multimodal.tokenizers.seed1 import Seed1Config
from seed_multimodal.tokenizers.seed2 import DOWN_WIDTHS, Seed2Config
from seed_multimodal.vision.eva import EvaConfig


def vision_flops(config: EvaConfig) -> int:
    """Pixels → tower output, one image."""
    n, width = config.tokens, config.width
    block = n * (linear_flops(width, 4 * width) + 2 * linear_flops(width, config.mlp_width))
    return _patch_flops(config) + config.depth * (block + attention_flops(n, n, width))


def query_flops(config: QFormerConfig, queries: int, tokens: int, source_width: int) -> int:
    """Queries reading `tokens` features of `source_width` through a Q-Former, one image."""
    width = config.width
    cross = queries * linear_flops(width, 2 * width) + tokens * linear_flops(source_width, 2 * width)
    cross += attention_flops(queries, tokens, width)
    return text_flops(config, queries) + len(range(0, config.depth, config.cross_attention_freq)) * cross


def encode_flops(config: Seed2Config) -> int:
    """Pixels → codes, one image (released size: 533 · 10⁹)."""
    return encoder_flops(config) + _to_codes_flops(config) + _search_flops(config)


def encoder_flops(config: Seed2Config | Seed1Config) -> int:
    """Pixels → Q-Former output, one image: what stage 2 keeps frozen."""
    return vision_flops(config.vit) + _reading_flops(config)


def decode_flops(config: Seed2Config) -> int:
    """Codes → image embedding, one image."""
    q, width, d = config.num_query, config.qformer.width, config.codebook_dim
    total = q * (linear_flops(d, d) + linear_flops(d, width)) + _blocks_flops(config)
    if config.use_qformer_image:
        return total + query_flops(config.reverse_qformer, 1, q, width) + linear_flops(width, config.image_features_dim)
    first, second, last = DOWN_WIDTHS
    total += q * (linear_flops(width, first) + linear_flops(first, second) + linear_flops(second, last))
    return total + linear_flops(q * last, config.image_features_dim)


def seed1_decode_flops(config: Seed1Config) -> int:
    """Codes → SEED-1's embeddings in the place of a text's, one image."""
    q, tokens, width, d = config.num_query, config.text_tokens, config.qformer.width, config.codebook_dim
    return (q * (linear_flops(d, d) + linear_flops(d, width)) + _blocks_flops(config)
            + query_flops(config.reverse_qformer, tokens, q, width)
            + tokens * linear_flops(width, config.text_features_dim))


def stage1_flops(config: Seed2Config, *, words: int, pairs: int, embed_dim: int = 256, freeze_vit: bool = True,
                 embedding_dim: int | None = None) -> int:
    """One pair through one step of stage 1, forward and backward. Without a CLIP model that makes targets.

    Args:
        words: word pieces of a caption, padding included.
        pairs: pictures that a caption is compared with (those of all processes).
    """
    vit, q, width = config.vit, config.num_query, config.qformer.width
    trained = _reading_flops(config) + text_flops(config.qformer, words)
    trained += (q + 1) * linear_flops(width, embed_dim) + 2 * linear_flops(embed_dim, pairs)
    if embedding_dim is not None:
        trained += linear_flops(q * width, embedding_dim)
    if freeze_vit:
        return vision_flops(vit) + 3 * trained
    return 3 * (vision_flops(vit) + trained) - _patch_flops(vit)  # pixels need no gradient


def stage2_flops(config: Seed2Config | Seed1Config, *, freeze_qformer: bool = True) -> int:
    """One image through one step of stage 2 (either tokenizer's): the frozen part forward, the trained part forward
    and backward. Without the CLIP model that makes the targets, and without the optimiser.

    Args:
        freeze_qformer: the Q-Former is not trained.
    """
    width = config.qformer.width
    trained = _to_codes_flops(config)
    trained += seed1_decode_flops(config) if isinstance(config, Seed1Config) else decode_flops(config)
    if isinstance(config, Seed1Config) or config.recon_s:
        trained += _blocks_flops(config)
    total = vision_flops(config.vit) + _search_flops(config) + 3 * trained
    if freeze_qformer:
        return total + _reading_flops(config) - config.num_query * linear_flops(width, width)
    return total + 3 * _reading_flops(config)


def lavit_stage1_flops(config: LavitTokenizerConfig, decoder: LavitDecoderConfig, keep: float = 1 / 3,
                       freeze_selector: bool = False) -> int:
    """One image through one step of LaVIT's stage 1: the tower forward, the rest forward and backward, and for one
    picture in `TRIED` forward again. Without rows that pad a shorter picture.

    Args:
        keep: share of the patches that are kept: only they are looked up in the codebook and read by the decoder.
        freeze_selector: no decision is tried.
    """
    n, width, inner = config.patches, config.vit.width, decoder.width
    kept = round(keep * n)
    selector = linear_flops(width, width + width // 2) + linear_flops(width // 2, width // 4)
    selector += linear_flops(width // 4, 2)
    merger = n * (linear_flops(width, 8 * width) + 2 * linear_flops(width, config.merger_mlp_width))
    merger = config.merger_depth * (merger + 2 * attention_flops(n, n, width))
    rows = linear_flops(width, width) + linear_flops(width, config.codebook_dim) + linear_flops(decoder.code_dim, inner)
    block = n * (linear_flops(inner, 6 * inner) + 2 * linear_flops(inner, decoder.mlp_width))
    block += kept * linear_flops(inner, 2 * inner) + attention_flops(n, n + kept, inner)
    back = decoder.depth * block + n * (linear_flops(inner, inner) + linear_flops(inner, decoder.feature_dim))
    search = kept * linear_flops(config.codebook_dim, config.codebook_size)
    rebuilt = merger + kept * rows + back
    learned = 3 * (n * selector + rebuilt)
    if freeze_selector:
        return vision_flops(config.vit) + search + learned - 2 * n * selector
    return vision_flops(config.vit) + search + learned + (search + rebuilt) // TRIED


def text_flops(config: QFormerConfig, words: int) -> int:
    """One caption of `words` word pieces through the Q-Former's text path, which has no cross-attention."""
    width = config.width
    layer = words * (linear_flops(width, 4 * width) + 2 * linear_flops(width, config.mlp_width))
    return config.depth * (layer + attention_flops(words, words, width))


def linear_flops(inputs: int, outputs: int) -> int:
    """One row through a linear layer."""
    return 2 * inputs * outputs


def attention_flops(queries: int, keys: int, width: int) -> int:
    """Scores and weighted sum over all heads together `width` wide, without the projections."""
    return 4 * queries * keys * width


def _patch_flops(config: EvaConfig) -> int:
    return config.grid**2 * linear_flops(3 * config.patch_size**2, config.width)


def _reading_flops(config: Seed2Config | Seed1Config) -> int:
    return query_flops(config.qformer, config.num_query, config.vit.tokens, config.vit.width)


def _to_codes_flops(config: Seed2Config | Seed1Config) -> int:
    width = config.qformer.width
    return config.num_query * (linear_flops(width, width) + linear_flops(width, config.codebook_dim))


def _search_flops(config: Seed2Config | Seed1Config) -> int:
    return config.num_query * linear_flops(config.codebook_dim, config.codebook_size)


def _blocks_flops(config: Seed2Config | Seed1Config) -> int:
    q, width = config.num_query, config.qformer.width
    block = q * (linear_flops(width, 4 * width) + 2 * linear_flops(width, 4 * width)) + attention_flops(q, q, width)
    return config.decode_depth * block
