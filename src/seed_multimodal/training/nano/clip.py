"""Stage `clip`: the small CLIP pair whose image embedding the codes must carry and the U-Net draws from.

Beside the contrastive loss with captions, a linear read-out of the image embedding regresses the VAE latents. A
contrastive loss alone gives embeddings from which the picture cannot be rebuilt; the stage ends with a gate on the
held-out R² of that read-out. Caption tokens get one extra id at the end of the vocabulary as end-of-text, because
transformers' CLIP text tower reads its embedding at the largest id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.nano.config import NanoConfig
from seed_multimodal.training.nano.task import NanoTask
from seed_multimodal.training.nano.vae import latents
from seed_multimodal.training.nano.views import to_clip
from seed_multimodal.training.nano.workspace import Workspace
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


class ClipTask(NanoTask):
    """Stage `clip`: train on views of the training pictures; the vision tower goes to `decoder_folder/image_encoder`,
    the text tower to `work/clip-text.safetensors`."""

    def __init__(self, space: Workspace) -> None:
        self.latents, self.captions = latents(space), space.captions
        self.end = space.words.vocabulary.n_text
        torch.manual_seed(space.config.seed + 1)
        self.pair = ClipPair(space.config, self.end, self.latents[0, 0].numel()).to(space.device)
        super().__init__(space, "clip", self.pair)

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        space, chosen = self.space, self.chosen(micro_step)
        view = torch.randint(0, space.views.shape[1], (len(chosen),))
        ids = draw_caption_ids(self.captions, chosen, self.end).to(space.device)
        latent = self.latents[chosen, view].to(space.device).float()
        contrastive, error = self.pair(to_clip(space.views[chosen, view], space.device), ids, latent)
        return 0.2 * contrastive + 2.0 * error, {"itc": contrastive.detach(), "mse": error.detach()}

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        space, pair = self.space, self.pair.cpu()
        first = space.train_index[:1024]
        scale = _unit_scale(pair, space.views[first, 0])
        pair.vision.save_pretrained(space.decoder_folder / "image_encoder")
        save_state_dict(pair.text.state_dict(), space.work / TEXT_FILE)
        gate, held_out = space.config.gate_r2, r2(pair, space.views, self.latents, space.held_out_index, scale)
        if held_out < gate:
            print(f"The gate was missed: held-out R² {held_out} < {gate}; pictures will be less faithful.", flush=True)
        return {**super().finish(group), "r2_train": r2(pair, space.views, self.latents, first, scale),
                "r2": held_out, "gate_r2": gate, "gate_passed": held_out >= gate,
                "parameters": sum(p.numel() for p in pair.vision.parameters())}


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


def embeddings(space: Workspace) -> Tensor:
    """Image embeddings of all views, float16 `[N, V, E]`; made once by the tower of stage `clip`."""
    def make() -> Tensor:
        from transformers import CLIPVisionModelWithProjection

        vision = CLIPVisionModelWithProjection.from_pretrained(space.decoder_folder / "image_encoder")
        return embed_images(vision, space.views.flatten(0, 1)).half().unflatten(0, space.views.shape[:2])

    return space.cached("embeddings", make)


@torch.no_grad()
def r2(pair: ClipPair, views: Tensor, latents: Tensor, chosen: Tensor, scale: float) -> float:
    """R² of the latent read-out over the unaugmented views of the pictures `chosen`."""
    embedding = embed_images(pair.vision, views[chosen, 0]) * scale
    target = latents[chosen, 0].float().flatten(1)
    error = (pair.readout(embedding) - target).square().sum()
    return round(1.0 - (error / (target - target.mean(0)).square().sum()).item(), 4)
