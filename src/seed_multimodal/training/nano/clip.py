"""Stage `clip`: the small CLIP pair whose image embedding the codes must carry and the U-Net draws from.

Peculiar: beside the contrastive loss with captions, a linear read-out of the image embedding regresses the VAE latents.
A contrastive-only embedding throws the picture away and nothing downstream can bring it back; the stage ends with
a gate on the held-out R² of that read-out. Caption tokens get one extra id at the end of the vocabulary as end-of-text,
because transformers' CLIP text tower reads its embedding at the largest id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.training.nano.config import NanoConfig, training_device
from seed_multimodal.training.nano.views import to_clip
from seed_multimodal.training.old.loop import batch_indices, run_stage
from seed_multimodal.vision.clip_towers import caption_ids, text_tower
from seed_multimodal.weights import save_state_dict

TEXT_FILE = "clip-text.safetensors"


class ClipPair(nn.Module):
    """Vision tower, text tower, temperature and the latent read-out.

    Shapes: images `[B, 3, S, S]` CLIP-normalised, token ids `[B, L]`, latents `[B, C, h, w]`; embeddings `[B, E]`.
    """

    def __init__(self, config: NanoConfig, text_vocabulary: int, latent_size: int) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        sizes = config.clip
        self.vision = CLIPVisionModelWithProjection(CLIPVisionConfig(
            hidden_size=sizes.width, intermediate_size=4 * sizes.width, num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads, image_size=config.image_size, patch_size=sizes.patch,
            projection_dim=sizes.embedding, hidden_act="gelu"))
        self.text = text_tower(text_vocabulary, width=sizes.text_width, layers=sizes.text_layers,
                               embedding=sizes.embedding)
        for tower in (self.vision, self.text):
            tower.set_attn_implementation("eager")  # the fused bf16 kernel's backward is slow on CPUs
        self.readout = nn.Linear(sizes.embedding, latent_size)
        self.logit_scale = nn.Parameter(torch.tensor(2.66))

    def forward(self, images: Tensor, ids: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Contrastive loss (label smoothing 0.1) and mean squared error of the latent read-out."""
        image = self.vision(pixel_values=images).image_embeds
        text = self.text(input_ids=ids).text_embeds
        scores = F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T
        scores = scores * self.logit_scale.clamp(max=4.6).exp()
        target = torch.arange(len(image), device=image.device)
        contrastive = (F.cross_entropy(scores, target, label_smoothing=0.1)
                       + F.cross_entropy(scores.T, target, label_smoothing=0.1)) / 2
        return contrastive, F.mse_loss(self.readout(image).float(), latents.flatten(1))



def draw_caption_ids(captions: Sequence[Sequence[Sequence[int]]], chosen: Tensor, end: int) -> Tensor:
    """One random caption of each picture in `chosen`, as `caption_ids` rows."""
    texts = [captions[i][int(torch.randint(len(captions[i]), ()))] for i in chosen.tolist()]
    return caption_ids(texts, end)


def train_clip(
    config: NanoConfig, views: Tensor, latents: Tensor, captions: Sequence[Sequence[Sequence[int]]],
    train: Sequence[int], held_out: Sequence[int], work: Path, out: Path, text_vocabulary: int,
) -> dict[str, Any]:
    """Train on views of the `train` pictures; save the vision tower to `out` and report the gate.

    Args:
        views: uint8 `[N, V, 3, S, S]`; latents: `[N, V, C, h, w]`.
        captions: per picture, token id lists.
    """
    torch.manual_seed(config.seed + 1)
    device = training_device(config)
    pair = ClipPair(config, text_vocabulary, latents[0, 0].numel()).to(device)
    settings = config.train_clip
    pool = torch.tensor(list(train))

    def loss(step: int) -> tuple[Tensor, Mapping[str, float]]:
        chosen = pool[batch_indices(step, settings.batch_size, len(pool), settings.seed)]
        view = torch.randint(0, views.shape[1], (len(chosen),))
        ids = draw_caption_ids(captions, chosen, text_vocabulary).to(device)
        latent = latents[chosen, view].to(device).float()
        contrastive, error = pair(to_clip(views[chosen, view], device), ids, latent)
        return 0.2 * contrastive + 2.0 * error, {"itc": float(contrastive.detach()), "mse": float(error.detach())}

    def finish() -> Mapping[str, Any]:
        pair.cpu()
        scale = _unit_scale(pair, views[pool[:1024], 0])
        pair.vision.save_pretrained(out)
        save_state_dict(pair.text.state_dict(), work / TEXT_FILE)
        measured = {split: r2(pair, views, latents, index, scale) for split, index in
                    (("train", list(train)[:1024]), ("held_out", list(held_out)))}
        return {"r2_train": measured["train"], "r2": measured["held_out"], "gate_r2": config.gate_r2,
                "gate_passed": measured["held_out"] >= config.gate_r2,
                "parameters": sum(p.numel() for p in pair.vision.parameters())}

    return run_stage("clip", pair, loss, settings, work, finish)


@torch.no_grad()
def _unit_scale(pair: ClipPair, images: Tensor) -> float:
    """Scale the projection so that embeddings have unit mean variance; cosines do not change."""
    spread = embed_images(pair.vision, images).float().std(0).square().mean().sqrt().item()
    pair.vision.visual_projection.weight /= spread
    return spread


@torch.no_grad()
def embed_images(vision: Any, images: Tensor, batch: int = 256) -> Tensor:
    """Image embeddings float32 `[N, E]` of uint8 `images [N, 3, S, S]`."""
    vision.eval()
    return torch.cat([vision(pixel_values=to_clip(chunk)).image_embeds.float() for chunk in images.split(batch)])


@torch.no_grad()
def r2(pair: ClipPair, views: Tensor, latents: Tensor, index: Sequence[int], scale: float) -> float:
    """Held-out R² of the latent read-out over the unaugmented views of the pictures `index`."""
    chosen = torch.tensor(list(index))
    embedding = embed_images(pair.vision, views[chosen, 0]) * scale
    target = latents[chosen, 0].float().flatten(1)
    error = (pair.readout(embedding) - target).square().sum()
    return round(1.0 - (error / (target - target.mean(0)).square().sum()).item(), 4)
