"""Stages `stage1` and `stage2`: the causal Q-Former, then codebook and decode head, by the library's own losses.

Peculiar, and different from the released recipe: stage 1 also regresses the CLIP image embedding from the first k
queries, and trains the vision tower; stage 2 trains the Q-Former too, starts the codebook by k-means after a warm-up
without quantiser, restarts dead codes, corrupts up to 30 % of the codes, decodes half of the samples from their first
k codes only, takes the unshifted picture's embedding as target of every view, and weighs the error by a read-out of
the VAE latents, contrasts the decoded embedding with captions, and gives each position its own part of the codebook.
`faithful=True` is SEED-2's literal recipe: contrast only, frozen Q-Former, 8,192 codes from a uniform start, plain VQ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seed_multimodal.tokenizers.qformer import QFormerConfig
from seed_multimodal.tokenizers.seed2 import Seed2Tokenizer
from seed_multimodal.tokenizers.seed2_config import Seed2Config
from seed_multimodal.tokenizers.stage1 import Stage1Model
from seed_multimodal.tokenizers.stage2 import Stage2Model, Stage2Weights
from seed_multimodal.training.loop import batch_indices, run_stage
from seed_multimodal.training.nano.clip import TEXT_FILE, draw_caption_ids, text_tower
from seed_multimodal.training.nano.config import NanoConfig, training_device
from seed_multimodal.training.nano.views import augment, to_clip
from seed_multimodal.vision.eva import EvaConfig
from seed_multimodal.weights import assign_strictly, load_state_dict, save_state_dict

FAITHFUL_CODES = 8192
NUM_QUERY = Seed2Config.num_query
ITC_WEIGHT, ITC_SCALE = 0.1, 14.0


def tokenizer_config(config: NanoConfig, faithful: bool = False) -> Seed2Config:
    """The SEED-2 configuration at nano size."""
    sizes = config.tokenizer
    return Seed2Config(
        vit=EvaConfig(image_size=config.image_size, patch_size=sizes.patch, width=sizes.vit_width,
                      depth=sizes.vit_layers, heads=sizes.vit_heads, mlp_width=4 * sizes.vit_width),
        qformer=QFormerConfig(width=sizes.hidden, depth=sizes.layers, heads=sizes.heads, mlp_width=4 * sizes.hidden,
                              max_positions=64, dropout=0.1 if faithful else 0.0),
        codebook_size=FAITHFUL_CODES if faithful else sizes.codes, codebook_dim=sizes.code_dim,
        decode_depth=sizes.decode_depth, recon_s=faithful, image_features_dim=config.clip.embedding,
        codebook_sections=NUM_QUERY if sizes.sections and not faithful else 1)


def eva_from_clip(clip: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Start the EVA tower from transformers' CLIP vision weights (whose key bias softmax ignores anyway)."""
    prefix = "vision_model."
    names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
             "attn.proj": "self_attn.out_proj"}
    patch = clip[prefix + "embeddings.patch_embedding.weight"]
    state = {"cls_token": clip[prefix + "embeddings.class_embedding"].view(1, 1, -1),
             "pos_embed": clip[prefix + "embeddings.position_embedding.weight"][None],
             "patch_embed.proj.weight": patch, "patch_embed.proj.bias": torch.zeros(len(patch))}
    for i in range(depth):
        layer = f"{prefix}encoder.layers.{i}."
        for ours, theirs in names.items():
            for part in ("weight", "bias"):
                state[f"blocks.{i}.{ours}.{part}"] = clip[f"{layer}{theirs}.{part}"]
        attention = layer + "self_attn."
        state[f"blocks.{i}.attn.qkv.weight"] = torch.cat([clip[f"{attention}{p}_proj.weight"] for p in "qkv"])
        state[f"blocks.{i}.attn.q_bias"] = clip[attention + "q_proj.bias"]
        state[f"blocks.{i}.attn.v_bias"] = clip[attention + "v_proj.bias"]
    return state


def train_stage1(
    config: NanoConfig, views: Tensor, embeddings: Tensor, captions: Sequence[Sequence[Sequence[int]]],
    train: Sequence[int], work: Path, clip_folder: Path, text_vocabulary: int, faithful: bool = False,
) -> dict[str, Any]:
    """Train the causal Q-Former on views `[N, V, 3, S, S]`; the weights go to `work/NAME.safetensors`."""
    name = "stage1-faithful" if faithful else "stage1"
    torch.manual_seed(config.seed + 2)
    seed2 = tokenizer_config(config, faithful)
    model = Stage1Model(seed2, vocab_size=text_vocabulary + 1, embed_dim=128, lm_head=False, freeze_vit=faithful,
                        embedding_dim=None if faithful else embeddings.shape[-1], embedding_weight=2.0)
    start = eva_from_clip(load_state_dict(clip_folder / "model.safetensors"), config.tokenizer.vit_layers)
    model.visual_encoder.load_state_dict(start)
    device = training_device(config)
    model.to(device)
    settings = replace(config.train_stage1, start="") if faithful else config.train_stage1
    pool = torch.tensor(list(train))

    def loss(step: int) -> tuple[Tensor, Mapping[str, float]]:
        chosen = pool[batch_indices(step, settings.batch_size, len(pool), settings.seed)]
        view = torch.randint(0, views.shape[1], (len(chosen),))
        ids = draw_caption_ids(captions, chosen, text_vocabulary).to(device)
        target = None if faithful else embeddings[chosen, view].to(device).float()
        out = model(to_clip(views[chosen, view], device), ids, (ids > 0).long(), target_embedding=target)
        parts = {"itc": float(out.loss_itc.detach())}
        if out.loss_embedding is not None:
            parts["embedding"] = float(out.loss_embedding.detach())
        return (out.loss if faithful else 0.2 * out.loss_itc + out.loss - out.loss_itc), parts

    def finish() -> Mapping[str, Any]:
        save_state_dict(model.state_dict(), work / f"{name}.safetensors")
        return {"parameters": sum(p.numel() for p in model.parameters())}

    return run_stage(name, model, loss, settings, work, finish)


@torch.no_grad()
def cache_vision(model: Seed2Tokenizer, views: Tensor, batch: int = 256) -> Tensor:
    """Vision-tower output of all views, float16 `[N, V, T, W]` (the tower is frozen in stage 2)."""
    flat = views.flatten(0, 1)
    parts = []
    for start in range(0, len(flat), batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            parts.append(model.visual_encoder(to_clip(flat[start:start + batch])).half())
    return torch.cat(parts).unflatten(0, views.shape[:2])


def train_stage2(
    config: NanoConfig, views: Tensor, embeddings: Tensor, latents: Tensor, captions: Sequence[Sequence[Sequence[int]]],
    train: Sequence[int], held_out: Sequence[int], work: Path, out: Path | None, text_vocabulary: int,
    faithful: bool = False,
) -> dict[str, Any]:
    """Train codebook and decode head; save a `Seed2Tokenizer` folder to `out`, report codebook and embedding."""
    name = "stage2-faithful" if faithful else "stage2"
    torch.manual_seed(config.seed + 4)
    pool = torch.tensor(list(train))
    readout = _latent_readout(embeddings[pool, 0].float(), latents[pool, 0].float().flatten(1))
    weights = Stage2Weights() if faithful else Stage2Weights(embed=1.0, recon_s=0.1, distil_image=1.0, readout=1.0)
    model = Stage2Model(tokenizer_config(config, faithful), weights=weights, freeze_qformer=faithful,
                        corrupt=0.0 if faithful else 0.3, nested=0.0 if faithful else 0.5,
                        readout_weight=None if faithful else readout)
    stage1 = "stage1-faithful" if faithful else "stage1"
    model.load_stage1(load_state_dict(work / f"{stage1}.safetensors"), stage1)
    model.eval()
    vision = cache_vision(model, views)
    device = training_device(config)
    model.to(device).train()
    naming = None if faithful else _Naming(config, captions, text_vocabulary, work, device)
    settings = replace(config.train_stage2, start="") if faithful else config.train_stage2
    warm_up = 0 if faithful or settings.start else settings.steps // 5  # a codebook to start from needs none
    state = {"recent": torch.zeros(0)}

    def loss(step: int) -> tuple[Tensor, Mapping[str, float]]:
        chosen = pool[batch_indices(step, settings.batch_size, len(pool), settings.seed)]
        view = torch.randint(0, views.shape[1], (len(chosen),))
        # Whatever the view, the target is the picture itself: small shifts should not change the codes.
        seen = view if faithful else torch.zeros_like(view)
        result = model(None, embeddings[chosen, seen].to(device).float(),
                       vit_features=vision[chosen, view].to(device).float(), quantize=step >= warm_up)
        state["recent"] = result.pre_quant.detach().float()
        parts = {"embed": float(result.loss_embed_raw.detach()), "image": float(result.loss_distil_image.detach()),
                 "readout": float(result.loss_readout.detach())}
        if naming is None:
            return result.loss, parts
        named = naming(result.image_embeds, chosen)
        return result.loss + ITC_WEIGHT * named, {**parts, "itc": float(named.detach())}

    def on_step(step: int) -> None:
        if faithful:
            return
        if step == warm_up:
            with torch.no_grad():
                some = pool[torch.randperm(len(pool))[:1024]]
                model.quantize.init_from(model.pre_quant_from_features(
                    model.encoder_output(None, vision[some, 0].to(device).float())).float())
        elif step > warm_up and step % 100 == 0 and step < 0.8 * settings.steps:
            model.quantize.restart_dead(state["recent"])

    def finish() -> Mapping[str, Any]:
        tokenizer = model.to_tokenizer().cpu()
        if out is not None:
            tokenizer.save_pretrained(out)
        return {"parameters": sum(p.numel() for p in tokenizer.parameters()),
                **code_metrics(tokenizer, views, embeddings, latents, readout, held_out)}

    return run_stage(name, model, loss, settings, work, finish, on_step)


class _Naming:
    """Contrast of decoded image embeddings with captions under the frozen CLIP text tower.

    The squared error alone spends the codes on layout; what a caption would name is a small part of the variance.
    """

    def __init__(self, config: NanoConfig, captions: Sequence[Sequence[Sequence[int]]], text_vocabulary: int,
                 work: Path, device: torch.device) -> None:
        self.captions, self.end, self.device = captions, text_vocabulary, device
        self.tower = text_tower(config, text_vocabulary)
        assign_strictly(self.tower, load_state_dict(work / TEXT_FILE), work / TEXT_FILE)
        self.tower.requires_grad_(False).eval().to(device)

    def __call__(self, image_embeds: Tensor, chosen: Tensor) -> Tensor:
        """Loss `[]` of embeddings `[B, E]` of the pictures `chosen` `[B]` against one caption of each."""
        ids = draw_caption_ids(self.captions, chosen, self.end).to(self.device)
        text = self.tower(input_ids=ids).text_embeds
        scores = ITC_SCALE * F.normalize(image_embeds.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T
        target = torch.arange(len(scores), device=self.device)
        return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


def _latent_readout(embedding: Tensor, latent: Tensor) -> Tensor:
    """Least-squares `W [M, E]` from image embedding to latents, over the training pictures."""
    centred = embedding - embedding.mean(0)
    ridge = 1e-3 * len(embedding) * torch.eye(embedding.shape[1])
    return torch.linalg.solve(centred.T @ centred + ridge, centred.T @ (latent - latent.mean(0))).T.contiguous()


@torch.no_grad()
def encode_views(tokenizer: Seed2Tokenizer, views: Tensor, code_views: int, seed: int) -> Tensor:
    """Codes int16 `[N, code_views, 32]`: of the pictures themselves (view 0), the kept views, then fresh ones.

    Only the pictures themselves, which the language model learns to write, are encoded in fp32 as in use.
    """
    kept = views[:, :code_views]
    generator = torch.Generator().manual_seed(seed + 7)
    rounds = [kept[:, v] for v in range(kept.shape[1])]
    rounds += [augment(views[:, 0], generator) for _ in range(code_views - len(rounds))]
    codes = []
    for number, images in enumerate(rounds, 1):
        with torch.autocast(tokenizer.device.type, dtype=torch.bfloat16, enabled=number > 1):
            codes.append(torch.cat([tokenizer.encode(to_clip(part, tokenizer.device)).to(torch.int16).cpu()
                                    for part in images.split(512)]))
        print(f"[codes] view {number} of {code_views}", flush=True)
    return torch.stack(codes, 1)


@torch.no_grad()
def code_metrics(tokenizer: Seed2Tokenizer, views: Tensor, embeddings: Tensor, latents: Tensor, readout: Tensor,
                 index: Sequence[int]) -> dict[str, Any]:
    """Held-out unexplained variance of embedding and latents, codebook usage, distinct code sequences."""
    chosen = torch.tensor(list(index))
    codes = tokenizer.encode(to_clip(views[chosen, 0]), batch_size=256)
    target = embeddings[chosen, 0].float()
    decoded = tokenizer.decode(codes, batch_size=256).float()
    spread = (target - target.mean(0)).square().sum()
    through = (decoded - target) @ readout.T
    latent = latents[chosen, 0].float().flatten(1)
    usage = tokenizer.quantize.usage(codes)
    return {"unexplained_embedding": round(((decoded - target).square().sum() / spread).item(), 4),
            "unexplained_readout": round((through.square().sum()
                                          / (latent - latent.mean(0)).square().sum()).item(), 4),
            "codes_used": usage.used, "codebook": usage.size, "perplexity": round(usage.perplexity, 1),
            "distinct_sequences": len({tuple(row) for row in codes.tolist()}), "held_out": len(chosen)}
