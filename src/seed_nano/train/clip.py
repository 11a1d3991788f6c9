"""Stage `clip`: the small vision tower whose image embedding the codes must carry and the U-Net draws from.

Its architecture is CLIP's, its objective is not: a contrast with captions leaves the identity of things out (background
and layout nearly suffice to tell the pictures of a batch apart). Linear heads on the embedding name the thing in each
place, style, background and layout, and a linear read-out gives the picture reduced to 16×16 pixels, where pixels of
things weigh four times. The stage ends with a gate on the labels of held-out scenes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.tokenizers.clip_weights import load_clip_vision
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.vision.label_heads import LabelHeads
from seed_multimodal.weights import save_state_dict
from seed_nano.train.config import NanoConfig
from seed_nano.train.pixels import scene_pixels, to_clip, to_signed
from seed_nano.train.task import SceneTask
from seed_nano.train.vae import THINGS_WEIGHT
from seed_nano.train.workspace import Workspace
from seed_nano.world.scene import Scene
from seed_nano.world.targets import CLASSES, label_tensor

HEADS_FILE, READOUT_FILE = "heads.safetensors", "readout.safetensors"
REDUCED = 16  # side of the picture that is read out of an embedding


class Tower(nn.Module):
    """Vision tower (transformers' `CLIPVisionModelWithProjection`), label heads and picture read-out."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        sizes = config.clip
        self.vision = CLIPVisionModelWithProjection(CLIPVisionConfig(
            hidden_size=sizes.width, intermediate_size=4 * sizes.width, num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads, image_size=config.image_size, patch_size=sizes.patch,
            projection_dim=sizes.embedding, hidden_act="gelu"))
        self.vision.set_attn_implementation("eager")  # the fused bf16 kernel's backward is slow on CPUs
        self.heads = label_heads(sizes.embedding)
        self.readout = nn.Linear(sizes.embedding, 3 * REDUCED**2)


def label_heads(width: int) -> LabelHeads:
    """Untrained heads of all labels of a scene."""
    return LabelHeads(width, {name: len(found) for name, found in CLASSES.items()})


def load_label_heads(file: Path) -> LabelHeads:
    """The heads that stage `clip` has written, in the order of `CLASSES`; raises `CheckpointError` for another file."""
    return LabelHeads.load(file, list(CLASSES))


class ClipTask(SceneTask):
    """Stage `clip`: train on scenes; the vision tower goes to `decoder_folder/image_encoder`, heads and read-out to
    `work`."""

    sections = (*SceneTask.sections, "clip")

    def __init__(self, space: Workspace) -> None:
        torch.manual_seed(space.config.seed + 1)
        self.tower = Tower(space.config).to(space.device)
        super().__init__(space, "clip", self.tower)

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        batch, device = self.scenes.at(micro_step), self.space.device
        labels = batch["labels"].to(device)
        embedding = self.tower.vision(pixel_values=to_clip(batch["image"], device)).image_embeds
        naming = self.tower.heads.loss(embedding, labels)
        pool = batch["image"].shape[-1] // REDUCED
        target = F.avg_pool2d(to_signed(batch["image"], device), pool)
        weight = 1.0 + THINGS_WEIGHT * F.avg_pool2d(batch["mask"].to(device), pool)
        error = (self.tower.readout(embedding).float().view_as(target) - target).square()
        right = self.tower.heads.right(embedding.detach(), labels).float().mean(0)
        numbers = {"naming": naming.detach(), "mse": error.detach().mean(), "first": right[0], "second": right[1],
                   "style": right[2]}
        return naming + 2.0 * (error * weight).mean(), numbers

    def made(self) -> Sequence[Path]:
        work = self.space.work
        return self.space.decoder_folder / "image_encoder" / "model.safetensors", work / HEADS_FILE, work / READOUT_FILE

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        space, tower = self.space, self.tower.cpu().eval()
        size = space.config.image_size
        unit_scale(tower, scene_pixels(space.pool[:1024], size))
        tower.vision.save_pretrained(space.decoder_folder / "image_encoder")
        save_state_dict(tower.heads.state_dict(), space.work / HEADS_FILE)
        save_state_dict({"readout": tower.readout.weight}, space.work / READOUT_FILE)
        found = gated(space, tower.heads, lambda scenes: embed_images(tower.vision, scene_pixels(scenes, size)),
                      space.config.gate_named)
        return {**super().finish(group), **found, "parameters": sum(p.numel() for p in tower.vision.parameters())}


def gated(space: Workspace, heads: LabelHeads, see: Callable[[list[Scene]], Tensor], gate: float) -> dict[str, Any]:
    """Shares of labels of held-out scenes that are named right from what is seen, and whether the worst reaches the
    gate, which is said."""
    found: dict[str, Any] = {}
    for split in ("val", "pairs", "styles"):
        scenes = space.held_out(split)
        found[split] = named_right(heads, see(scenes), scenes)
    worst = min(found["val"][name] for name in ("first", "second", "style"))
    if worst < gate:
        print(f"The gate was missed: {worst} of a label of val scenes named right < {gate}.", flush=True)
    return {**found, "gate": gate, "gate_passed": worst >= gate}


@torch.no_grad()
def unit_scale(tower: Tower, images: Tensor) -> None:
    """Scale the projection so that embeddings have unit mean variance; what is read from them does not change."""
    spread = embed_images(tower.vision, images).std(0).square().mean().sqrt().item()
    tower.vision.visual_projection.weight /= spread
    for layer in (*tower.heads.layers.values(), tower.readout):
        layer.weight *= spread  # type: ignore[union-attr,operator]


@torch.no_grad()
def embed_images(vision: Any, images: Tensor, batch: int = 256) -> Tensor:
    """Image embeddings float32 `[N, E]` of uint8 `images [N, 3, S, S]`."""
    vision.eval()
    device = next(vision.parameters()).device
    return torch.cat([vision(pixel_values=to_clip(chunk, device)).image_embeds.float().cpu()
                      for chunk in images.split(batch)])


def named_right(heads: LabelHeads, embeddings: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of scenes of which the heads read each label right, and `all` labels."""
    right = heads.right(embeddings, label_tensor(scenes)).float()
    found = {name: round(value, 4) for name, value in zip(heads.classes, right.mean(0).tolist(), strict=True)}
    return {**found, "all": round(right.amin(1).mean().item(), 4)}


def embeddings(space: Workspace) -> Tensor:
    """Image embeddings of the pool, float16 `[N, E]`; made once by the tower of stage `clip`."""
    def make() -> Tensor:
        space.need("clip", space.decoder_folder / "image_encoder" / "config.json")
        vision = load_clip_vision(space.decoder_folder / "image_encoder", device=space.device, log=None)
        size = space.config.image_size
        return torch.cat([embed_images(vision, scene_pixels(space.pool[at:at + 1024], size)).half()
                          for at in range(0, len(space.pool), 1024)])

    return space.cached("embeddings", "clip", make)
