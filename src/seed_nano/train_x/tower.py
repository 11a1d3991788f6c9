"""Stages `start` and `tower`: the autoencoder of a finished nano, and the Qwen-style vision tower.

The tower begins with the first layers of nano's own, and is trained as that was (`training/nano/clip.py`): linear heads
on all features of a picture name its things, style, background and layout, and a read-out gives the picture at 16 × 16
pixels; beside, a linear map of the features imitates the embedding of nano's tower. New are wide scenes, of which it
sees quarters (as any resolution cuts them) and wholes, and says what is in each quarter of a whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.disk import replace_text
from seed_multimodal.tokenizers.clip_weights import load_clip_vision
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.vision.label_heads import LabelHeads
from seed_multimodal.vision.qwen_vit import QwenVit, QwenVitConfig
from seed_multimodal.weights import save_state_dict
from seed_nano.train.clip import HEADS_FILE, REDUCED, gated, label_heads
from seed_nano.train.pixels import scene_pixels, to_clip, to_signed
from seed_nano.train.scenes import SceneStream, scene_batches
from seed_nano.train.task import NanoTask
from seed_nano.train.vae import THINGS_WEIGHT
from seed_nano.train_x.workspace import XWorkspace
from seed_nano.world.scene import SIZE
from seed_nano.world.targets import CLASSES, IGNORED
from seed_nano.world.things import NAMES
from seed_nano.world.wide import QUARTERS, WideScene, render_wide, wide_at

WIDE_SHARE = 6  # every sixth picture is a quarter of a wide scene, every sixth a whole one
IMITATION = 3.0  # weight of the distance from nano's embedding, whose numbers have unit variance
NOTHING = len(NAMES)
_NAMES = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
          "mlp.c_proj": "mlp.fc2"}  # of a block: ours -> CLIP's


def take_over(space: XWorkspace) -> dict[str, Any]:
    """Stage `start`: copy nano's autoencoder into the system's folder."""
    target = space.decoder_folder / "vae"
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted((space.start / "vae").iterdir()):
        shutil.copyfile(file, target / file.name)
    record = {"stage": "start", "seconds": 0.0, "from": space.config.start}
    replace_text(space.work / "start.done.json", json.dumps(record))
    return record


class WideStream(SceneStream):
    """`SceneStream` with wide scenes among its own: their quarters, which hold one thing or none, and wholes. `labels`
    int64 `[B, 5 + 4]`: the thing in each quarter comes last; what cannot be said is `IGNORED`."""

    def get_batch(self, indices: np.ndarray, epoch: int = 0) -> dict[str, Any]:
        """See `SceneStream`."""
        batch = super().get_batch(indices, epoch)
        batch["labels"] = F.pad(batch["labels"], (0, len(QUARTERS)), value=IGNORED)
        for row, index in enumerate(map(int, indices)):
            if index % WIDE_SHARE < 2:
                scene = wide_at(self.seed, index)
                quarter = index // WIDE_SHARE % len(QUARTERS) if index % WIDE_SHARE else None
                pixels = np.array(_view(scene, quarter, self.size))
                batch["image"][row], batch["mask"][row] = torch.from_numpy(pixels).permute(2, 0, 1), 0.25
                batch["labels"][row] = _wide_labels(scene, quarter)
        return batch


def _view(scene: WideScene, quarter: int | None, size: int) -> np.ndarray:
    if quarter is None:
        return render_wide(scene, size)
    top, left = size * (quarter // 2), size * (quarter % 2)
    return render_wide(scene, 2 * size)[top:top + size, left:left + size]


def _wide_labels(scene: WideScene, quarter: int | None) -> Tensor:
    numbers = [NAMES.index(name) if name else NOTHING for name in scene.things]
    found = dict.fromkeys(CLASSES, IGNORED)
    found["background"] = CLASSES["background"].index(scene.background)
    if quarter is None or scene.things[quarter]:
        found["style"] = CLASSES["style"].index(scene.style)
    if quarter is not None and scene.things[quarter]:
        found |= {"first": numbers[quarter], "second": CLASSES["second"].index("nothing"),
                  "layout": CLASSES["layout"].index("middle")}
    return torch.tensor([*found.values(), *(numbers if quarter is None else [IGNORED] * len(numbers))])


class Tower(nn.Module):
    """The tower, heads of a scene and of the quarters of a wide one, the picture's read-out, and what imitates an
    embedding of `imitated` numbers."""

    def __init__(self, vision: QwenVit, imitated: int) -> None:
        super().__init__()
        self.vision = vision
        width = vision.config.n_queries * vision.config.output_dim
        self.heads = label_heads(width)
        self.quarters = LabelHeads(width, dict.fromkeys(QUARTERS, NOTHING + 1))
        self.readout = nn.Linear(width, 3 * REDUCED**2)
        self.imitate = nn.Linear(width, imitated)


def tower_from_nano(folder: Path, config: QwenVitConfig) -> QwenVit:
    """A tower with the first layers of a CLIP tower and a new attention pool.

    Raises:
        CheckpointError: no such tower.
    """
    clip = load_clip_vision(folder, log=None).float().state_dict()
    tower = QwenVit(config)
    width, heads = config.width, config.heads
    prefix = "vision_model."
    found = {"conv1.weight": clip[f"{prefix}embeddings.patch_embedding.weight"],
             "positional_embedding": clip[f"{prefix}embeddings.position_embedding.weight"][1:]}  # without class token
    found |= {f"ln_pre.{kind}": clip[f"{prefix}pre_layrnorm.{kind}"] for kind in ("weight", "bias")}
    for number in range(config.layers):
        old, new = f"{prefix}encoder.layers.{number}.", f"transformer.resblocks.{number}."
        for kind in ("weight", "bias"):
            rows = [clip[f"{old}self_attn.{one}_proj.{kind}"].unflatten(0, (heads, width // heads))
                    for one in "qkv"]
            found[f"{new}attn.in_proj.{kind}"] = torch.cat(rows, 1).flatten(0, 1)
            for ours, theirs in _NAMES.items():
                found[f"{new}{ours}.{kind}"] = clip[f"{old}{theirs}.{kind}"]
    missing, unknown = tower.load_state_dict(found, strict=False)
    assert not unknown and all(name.startswith(("attn_pool.", "ln_post.", "proj")) for name in missing)
    return tower


def tower_config(space: XWorkspace) -> QwenVitConfig:
    """Sizes of the tower, as far as nano's own decides."""
    from transformers import CLIPVisionConfig

    clip, sizes = CLIPVisionConfig.from_pretrained(space.start / "image_encoder"), space.config.tower
    return QwenVitConfig(
        image_size=space.config.image_size, patch_size=clip.patch_size, width=clip.hidden_size,
        layers=min(sizes.layers, clip.num_hidden_layers), heads=clip.num_attention_heads,
        mlp_ratio=clip.intermediate_size / clip.hidden_size, output_dim=sizes.features, n_queries=sizes.grid**2,
        position_grid=space.config.image_size // clip.patch_size, pool_heads=sizes.pool_heads)


class TowerTask(NanoTask):
    """Stage `tower`: goes to `out/vision`, the heads to `work`."""

    sections = (*NanoTask.sections, "tower", "start")

    def __init__(self, space: XWorkspace) -> None:
        torch.manual_seed(space.config.seed + 1)
        self.teacher: Any = load_clip_vision(space.start / "image_encoder", device=space.device, log=None).float()
        vision = tower_from_nano(space.start / "image_encoder", tower_config(space))
        self.tower = Tower(vision, int(self.teacher.config.projection_dim)).to(space.device)
        super().__init__(space, "tower", self.tower)
        stream = WideStream(space.config.image_size, space.config.seed)
        self.scenes = scene_batches(stream, self.settings.batch_size, space.config.workers)

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        batch, device, tower = self.scenes.at(micro_step), self.space.device, self.tower
        labels = batch["labels"].to(device)
        pixels = to_clip(batch["image"], device)
        features = tower.vision(pixels).flatten(1)
        usual = labels[:, 0] != IGNORED
        with torch.no_grad():
            wanted = self.teacher(pixel_values=pixels[usual]).image_embeds.float()
        unlike = F.mse_loss(tower.imitate(features[usual]).float(), wanted)
        naming = tower.heads.loss(features, labels[:, :5]) + 0.5 * tower.quarters.loss(features, labels[:, 5:])
        pool = batch["image"].shape[-1] // REDUCED
        target = F.avg_pool2d(to_signed(batch["image"], device), pool)
        weight = 1.0 + THINGS_WEIGHT * F.avg_pool2d(batch["mask"].to(device), pool)
        error = (tower.readout(features).float().view_as(target) - target).square()
        known = (labels[:, :5] != IGNORED).float().sum(0).clamp_min(1)
        right = tower.heads.right(features.detach(), labels[:, :5]).float().sum(0) / known
        numbers = {"naming": naming.detach(), "mse": error.detach().mean(), "first": right[0], "second": right[1],
                   "style": right[2], "unlike": unlike.detach()}
        return naming + 2.0 * (error * weight).mean() + IMITATION * unlike, numbers

    def made(self) -> Sequence[Path]:
        return self.space.out / "vision" / "model.safetensors", self.space.work / HEADS_FILE

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        self.scenes.close()
        space, tower = self.space, self.tower.cpu().eval()
        unit_scale(tower, scene_pixels(space.pool[:1024], SIZE))
        tower.vision.save_pretrained(space.out / "vision")
        save_state_dict(tower.heads.state_dict(), space.work / HEADS_FILE)
        found = gated(space, tower.heads, lambda scenes: see(tower.vision, scene_pixels(scenes, SIZE)).flatten(1),
                      space.config.gate_named)  # type: ignore[attr-defined]
        return {**super().finish(group), **found, "parameters": sum(p.numel() for p in tower.vision.parameters())}


@torch.no_grad()
def unit_scale(tower: Tower, images: Tensor) -> None:
    """Scale the last matrix so that features have unit mean variance; what is read from them does not change."""
    spread = see(tower.vision, images).std(0).square().mean().sqrt().item()
    tower.vision.proj /= spread
    for layer in (*tower.heads.layers.values(), *tower.quarters.layers.values(), tower.readout, tower.imitate):
        layer.weight *= spread  # type: ignore[union-attr,operator]


@torch.no_grad()
def see(vision: QwenVit, images: Tensor, batch: int = 256) -> Tensor:
    """Features float32 `[N, Q, D]` of uint8 `images [N, 3, S, S]`."""
    vision.eval()
    device = next(vision.parameters()).device
    return torch.cat([vision(to_clip(chunk, device)).float().cpu() for chunk in images.split(batch)])


def features(space: XWorkspace) -> Tensor:
    """Features of the pool, float16 `[N, Q, D]`; made once by the tower."""
    def make() -> Tensor:
        space.need("tower", space.out / "vision" / "config.json")
        vision = QwenVit.from_pretrained(space.out / "vision", device=space.device)
        return torch.cat([see(vision, scene_pixels(space.pool[at:at + 1024], space.config.image_size)).half()
                          for at in range(0, len(space.pool), 1024)])

    return space.cached("features", "tower", make)
