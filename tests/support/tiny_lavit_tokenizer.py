"""A LaVIT tokenizer small enough to build in milliseconds, whose pictures differ in their number of tokens."""

from __future__ import annotations

import torch

from seed_multimodal.lavit.modeling import DynamicTokenizer, LavitTokenizerConfig
from seed_multimodal.nn.eva import EvaConfig

TINY = LavitTokenizerConfig(
    vit=EvaConfig(image_size=16, patch_size=4, width=16, depth=2, heads=2, mlp_width=24), vit_head=8, merger_depth=2,
    merger_heads=2, merger_mlp_width=24, codebook_size=20, codebook_dim=4, llm_width=12)


def tiny_tokenizer(seed: int = 0) -> DynamicTokenizer:
    """The same random weights for the same seed; decisions are clear ones, about half of them to keep."""
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
