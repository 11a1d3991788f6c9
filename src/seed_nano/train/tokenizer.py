"""The SEED-2 tokenizer at nano size: its sizes, codes of scenes, and what of a scene survives in them.

Its two training stages run through the LAVIS application, see tokenizer_recipe.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.tokenizers.clip_weights import load_clip_vision
from seed_multimodal.tokenizers.qformer import QFormerConfig
from seed_multimodal.tokenizers.quantizer import CodebookUsage
from seed_multimodal.tokenizers.seed2 import Seed2Config, Seed2Tokenizer
from seed_multimodal.vision.eva import EvaConfig
from seed_multimodal.weights import load_state_dict
from seed_nano.train.clip import HEADS_FILE, READOUT_FILE, embed_images, load_label_heads, named_right
from seed_nano.train.config import NanoConfig
from seed_nano.train.pixels import scene_pixels, to_clip
from seed_nano.train.workspace import Workspace
from seed_nano.world.scene import Scene

JUDGED_SPLITS = ("val", "pairs")
PREFIXES = (4, 8, 16)


def tokenizer_config(config: NanoConfig) -> Seed2Config:
    """The SEED-2 configuration at nano size; its vision tower is that of stage `clip`."""
    sizes, tower = config.tokenizer, config.clip
    return Seed2Config(
        vit=EvaConfig(image_size=config.image_size, patch_size=tower.patch, width=tower.width, depth=tower.layers,
                      heads=tower.heads, mlp_width=4 * tower.width, pre_norm=True),
        qformer=QFormerConfig(width=sizes.hidden, depth=sizes.layers, heads=sizes.heads, mlp_width=4 * sizes.hidden,
                              max_positions=64, dropout=0.0),
        codebook_size=sizes.codes, codebook_dim=sizes.code_dim, decode_depth=sizes.decode_depth,
        decode_heads=sizes.heads, recon_s=False, image_features_dim=tower.embedding,
        codebook_sections=Seed2Config.num_query if sizes.sections else 1)


@torch.no_grad()
def encode_scenes(tokenizer: Seed2Tokenizer, scenes: Sequence[Scene], size: int, batch: int = 256) -> Tensor:
    """Codes int16 `[N, 32]` of scenes drawn at `size` pixels, computed in fp32 as in use."""
    parts = [torch.zeros(0, tokenizer.config.num_query, dtype=torch.int16)]
    for at in range(0, len(scenes), batch):
        images = to_clip(scene_pixels(scenes[at:at + batch], size), tokenizer.device)
        parts.append(tokenizer.encode(images).to(torch.int16).cpu())
    return torch.cat(parts)


def load_tokenizer(space: Workspace) -> Seed2Tokenizer:
    """The finished tokenizer; raises `CheckpointError` if stage `tokenizer` was not run."""
    space.need("tokenizer", space.tokenizer_folder / "model.safetensors")
    return Seed2Tokenizer.from_pretrained(space.tokenizer_folder).to(space.device)


def pool_codes(space: Workspace) -> Tensor:
    """Codes int16 `[N, 32]` of the pool; made once by the finished tokenizer."""
    def make() -> Tensor:
        tokenizer = load_tokenizer(space)
        return encode_scenes(tokenizer, space.pool, space.config.image_size)

    return space.cached("codes", "tokenizer", make)


@torch.no_grad()
def code_metrics(tokenizer: Seed2Tokenizer, space: Workspace) -> dict[str, Any]:
    """What 32 codes hold of held-out scenes: unexplained variance of embedding and thumbnail read-out, use of the
    codebook, and for each of `JUDGED_SPLITS` the labels that the tower's heads read right from the true embedding
    (`true`), from the decoded one (`codes`), and from that of the first codes only (`first 4` …)."""
    size = space.config.image_size
    heads = load_label_heads(space.work / HEADS_FILE)
    readout = load_state_dict(space.work / READOUT_FILE)["readout"]
    vision = load_clip_vision(space.decoder_folder / "image_encoder", log=None)
    found: dict[str, Any] = {}
    for split in JUDGED_SPLITS:
        scenes = space.held_out(split)
        true = embed_images(vision, scene_pixels(scenes, size))
        codes = encode_scenes(tokenizer, scenes, size)
        decoded = {first: tokenizer.decode(codes, first=first, batch_size=256).float().cpu()
                   for first in (None, *PREFIXES)}
        whole = decoded.pop(None)
        if split == JUDGED_SPLITS[0]:
            use = CodebookUsage.of_counts(torch.bincount(codes.flatten().long(), minlength=tokenizer.quantize.size))
            found = {"unexplained_embedding": unexplained(true, whole),
                     "unexplained_readout": unexplained(true @ readout.T, whole @ readout.T),
                     "codes_used": use.used, "codebook": use.size, "perplexity": round(use.perplexity, 1),
                     "distinct_sequences": len({tuple(row) for row in codes.tolist()}), "held_out": len(scenes)}
        found[split] = {"true": named_right(heads, true, scenes), "codes": named_right(heads, whole, scenes),
                        **{f"first {first}": named_right(heads, part, scenes) for first, part in decoded.items()}}
    return found


def unexplained(target: Tensor, found: Tensor) -> float:
    """Share of the variance of `target` `[N, E]` over its rows that `found` leaves."""
    return round(((found - target).square().sum() / (target - target.mean(0)).square().sum()).item(), 4)
