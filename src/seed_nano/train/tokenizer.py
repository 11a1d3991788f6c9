"""nano's SEED-2 tokenizer: its sizes, the join of both LAVIS stages, codes of scenes and what they hold."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.disk import replace_copy
from seed_multimodal.tokenizers.clip_weights import load_clip_vision
from seed_multimodal.tokenizers.export import export_tokenizer
from seed_multimodal.tokenizers.qformer import QFormerConfig
from seed_multimodal.tokenizers.seed2 import Seed2Config, Seed2Tokenizer
from seed_multimodal.vision.clip_towers import eva_from_clip
from seed_multimodal.vision.eva import EvaConfig
from seed_multimodal.weights import load_state_dict, save_state_dict
from seed_nano.train.pixels import scene_pixels, to_clip
from seed_nano.train.vision import HEADS_FILE, READOUT_FILE, embed, load_label_heads, named_right
from seed_nano.train.workspace import Workspace
from seed_nano.world.scene import Scene

CHECKPOINT = "checkpoint_0.pth"  # a LAVIS stage is one epoch
PREFIXES = (4, 8, 16)


def tokenizer_config(config: Any) -> Seed2Config:
    """The SEED-2 configuration at nano size; its vision encoder is that of stage `clip`."""
    sizes, vision = config.tokenizer, config.clip
    return Seed2Config(
        vit=EvaConfig(image_size=config.image_size, patch_size=vision.patch, width=vision.width, depth=vision.layers,
                      heads=vision.heads, mlp_width=4 * vision.width, pre_norm=True),
        qformer=QFormerConfig(width=sizes.hidden, depth=sizes.layers, heads=sizes.heads, mlp_width=4 * sizes.hidden,
                              max_positions=64, dropout=0.0),
        codebook_size=sizes.codes, codebook_dim=sizes.code_dim, decode_depth=sizes.decode_depth,
        decode_heads=sizes.heads, recon_s=False, image_features_dim=vision.embedding,
        codebook_sections=Seed2Config.num_query if sizes.sections else 1)


def join_stages(space: Workspace) -> dict[str, Any]:
    """Stage `tokenizer`: write the system's tokenizer from both stages' checkpoints; returns what its codes hold."""
    new, vision = space.work / "tokenizer", space.work / "tokenizer-vision.safetensors"
    sizes = tokenizer_config(space.config)
    clip = load_clip_vision(space.decoder_folder / "image_encoder", log=None)
    save_state_dict(eva_from_clip(clip.state_dict(), sizes.vit), vision)
    export_tokenizer(space.work / "stage2" / CHECKPOINT, new, stage1=space.work / "stage1" / CHECKPOINT, vision=vision,
                     config=sizes, force=True)
    space.words_folder.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "config.json"):
        replace_copy(new / name, space.words_folder)
    shutil.rmtree(new)
    vision.unlink()
    return code_metrics(space)


def load_tokenizer(space: Workspace) -> Seed2Tokenizer:
    """The finished tokenizer, on the device."""
    return Seed2Tokenizer.from_pretrained(space.words_folder).to(space.device)


@torch.no_grad()
def encode_scenes(tokenizer: Seed2Tokenizer, scenes: Sequence[Scene], size: int, batch: int = 256) -> Tensor:
    """Codes int16 `[N, 32]` of scenes drawn at `size` pixels, computed in fp32 as in use."""
    parts = [torch.zeros(0, tokenizer.config.num_query, dtype=torch.int16)]
    for at in range(0, len(scenes), batch):
        images = to_clip(scene_pixels(scenes[at:at + batch], size), tokenizer.device)
        parts.append(tokenizer.encode(images).to(torch.int16).cpu())
    return torch.cat(parts)


def pool_codes(space: Workspace) -> Tensor:
    """Codes int16 `[N, 32]` of the pool; computed once."""
    return space.cached("codes", "tokenizer", lambda: encode_scenes(
        load_tokenizer(space), space.pool, space.config.image_size))


@torch.no_grad()
def code_metrics(space: Workspace) -> dict[str, Any]:
    """Of held-out scenes: unexplained variance of embedding and read-out, codes used, and the labels that the heads
    read right from the true embedding, from the decoded one, and from that of the first codes only."""
    size, tokenizer = space.config.image_size, Seed2Tokenizer.from_pretrained(space.words_folder)
    heads = load_label_heads(space.work / HEADS_FILE)
    readout = load_state_dict(space.work / READOUT_FILE)["readout"]
    vision = load_clip_vision(space.decoder_folder / "image_encoder", log=None)
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in tokenizer.parameters()),
                             "codebook": tokenizer.quantize.size}
    for split in ("val", "pairs"):
        scenes = space.held_out(split)
        true, codes = embed(vision, scene_pixels(scenes, size)), encode_scenes(tokenizer, scenes, size)
        decoded = {first: tokenizer.decode(codes, first=first, batch_size=256).float().cpu()
                   for first in (None, *PREFIXES)}
        if split == "val":
            found |= {"unexplained_embedding": unexplained(true, decoded[None]),
                      "unexplained_readout": unexplained(true @ readout.T, decoded[None] @ readout.T),
                      "codes_used": len(codes.unique()), "held_out": len(scenes)}
        found[split] = {"true": named_right(heads, true, scenes),
                        **{f"first {first}" if first else "codes": named_right(heads, part, scenes)
                           for first, part in decoded.items()}}
    return found


def unexplained(target: Tensor, found: Tensor) -> float:
    """Share of the variance of `target` `[N, E]` over its rows that `found` leaves."""
    return round(((found - target).square().sum() / (target - target.mean(0)).square().sum()).item(), 4)
