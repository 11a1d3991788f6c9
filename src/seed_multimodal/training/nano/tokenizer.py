"""The SEED-2 tokenizer at nano size: its sizes, its start from the CLIP pair, codes of the pictures and metrics.

Its two training stages run through the LAVIS application, see tokenizer_recipe.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seed_multimodal.tokenizers.qformer import QFormerConfig
from seed_multimodal.tokenizers.seed2 import Seed2Config, Seed2Tokenizer
from seed_multimodal.training.nano.clip import embeddings
from seed_multimodal.training.nano.config import NanoConfig
from seed_multimodal.training.nano.vae import latents
from seed_multimodal.training.nano.views import augment, to_clip
from seed_multimodal.training.nano.workspace import Workspace
from seed_multimodal.vision.eva import EvaConfig


def tokenizer_config(config: NanoConfig) -> Seed2Config:
    """The SEED-2 configuration at nano size."""
    sizes = config.tokenizer
    return Seed2Config(
        vit=EvaConfig(image_size=config.image_size, patch_size=sizes.patch, width=sizes.vit_width,
                      depth=sizes.vit_layers, heads=sizes.vit_heads, mlp_width=4 * sizes.vit_width),
        qformer=QFormerConfig(width=sizes.hidden, depth=sizes.layers, heads=sizes.heads, mlp_width=4 * sizes.hidden,
                              max_positions=64, dropout=0.0),
        codebook_size=sizes.codes, codebook_dim=sizes.code_dim, decode_depth=sizes.decode_depth, recon_s=False,
        image_features_dim=config.clip.embedding,
        codebook_sections=Seed2Config.num_query if sizes.sections else 1)


def latent_readout(embedding: Tensor, latent: Tensor) -> Tensor:
    """Least-squares `W [M, E]` from image embedding to latents, over the training pictures."""
    centred = embedding - embedding.mean(0)
    ridge = 1e-3 * len(embedding) * torch.eye(embedding.shape[1])
    return torch.linalg.solve(centred.T @ centred + ridge, centred.T @ (latent - latent.mean(0))).T.contiguous()


def codes(space: Workspace) -> Tensor:
    """Codes int16 `[N, code_views, 32]`: of the pictures themselves (view 0), the kept views, then fresh ones."""
    return space.cached("codes", lambda: _encode(space))


@torch.no_grad()
def _encode(space: Workspace) -> Tensor:
    """Only the pictures themselves, which the language model learns to write, are encoded in fp32 as in use."""
    tokenizer, count = Seed2Tokenizer.from_pretrained(space.tokenizer_folder), space.config.code_views
    kept = space.views[:, :count]
    generator = torch.Generator().manual_seed(space.config.seed + 7)
    rounds = [kept[:, v] for v in range(kept.shape[1])]
    rounds += [augment(space.views[:, 0], generator) for _ in range(count - len(rounds))]
    found = []
    for number, images in enumerate(rounds, 1):
        with torch.autocast(tokenizer.device.type, dtype=torch.bfloat16, enabled=number > 1):
            found.append(torch.cat([tokenizer.encode(to_clip(part, tokenizer.device)).to(torch.int16).cpu()
                                    for part in images.split(512)]))
        print(f"[codes] view {number} of {count}", flush=True)
    return torch.stack(found, 1)


@torch.no_grad()
def code_metrics(tokenizer: Seed2Tokenizer, space: Workspace, readout: Tensor) -> dict[str, Any]:
    """Held-out unexplained variance of embedding and latents, codebook usage, distinct code sequences."""
    chosen = space.held_out_index
    found = tokenizer.encode(to_clip(space.views[chosen, 0]), batch_size=256)
    target = embeddings(space)[chosen, 0].float()
    decoded = tokenizer.decode(found, batch_size=256).float()
    spread = (target - target.mean(0)).square().sum()
    through = (decoded - target) @ readout.T
    latent = latents(space)[chosen, 0].float().flatten(1)
    usage = tokenizer.quantize.usage(found)
    return {"unexplained_embedding": round(((decoded - target).square().sum() / spread).item(), 4),
            "unexplained_readout": round((through.square().sum()
                                          / (latent - latent.mean(0)).square().sum()).item(), 4),
            "codes_used": usage.used, "codebook": usage.size, "perplexity": round(usage.perplexity, 1),
            "distinct_sequences": len({tuple(row) for row in found.tolist()}), "held_out": len(chosen)}
