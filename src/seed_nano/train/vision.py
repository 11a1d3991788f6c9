"""The vision encoders of nano (stage `clip`) and nano-x (stage `tower`), trained to name what is in a scene.

A contrast with captions leaves the identity of things out (background and layout nearly suffice to tell the images of a
batch apart). So linear heads on the embedding name the thing in each place, style, background and layout, and a linear
read-out gives the image reduced to 16×16 pixels, where pixels of things weigh four times. nano-x's starts from the
first layers of nano's, a linear map of its features imitates nano's embedding, and it also sees wide scenes: quarters
(as any resolution cuts them) and wholes, of which it names the thing in each quarter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.tokenizers.clip_weights import load_clip_vision
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.vision.label_heads import LabelHeads
from seed_multimodal.vision.qwen_vit import QwenVit, QwenVitConfig
from seed_multimodal.weights import save_state_dict
from seed_nano.train.pixels import SceneStream, scene_pixels, to_clip, to_signed
from seed_nano.train.task import NanoTask
from seed_nano.train.vae import THINGS_WEIGHT
from seed_nano.train.workspace import Workspace, XWorkspace
from seed_nano.world.scene import QUARTERS, Scene, WideScene
from seed_nano.world.targets import CLASSES, IGNORED, label_tensor
from seed_nano.world.things import NAMES
from seed_nano.world.wide import render_wide, wide_at

HEADS_FILE, READOUT_FILE = "heads.safetensors", "readout.safetensors"
REDUCED = 16  # side of the image that is read out of an embedding
WIDE_SHARE = 6  # every sixth image is a quarter of a wide scene, every sixth a whole one
IMITATION = 3.0  # weight of the distance from nano's embedding, whose numbers have unit variance
NOTHING = len(NAMES)
LABELS = {name: len(found) for name, found in CLASSES.items()}
_NAMES = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
          "mlp.c_proj": "mlp.fc2"}  # of a block: nano-x's → CLIP's


class VisionTask(NanoTask):
    """What both stages have in common: heads and read-out of features `[B, E]`, the gate."""

    heads: LabelHeads
    readout: nn.Linear

    def naming(self, features: Tensor, labels: Tensor) -> Tensor:
        """Loss of the labels `[B, L]`."""
        return self.heads.loss(features, labels[:, :len(LABELS)])

    def read(self, features: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Losses of naming and of the read-out, and numbers to log."""
        device = self.space.device
        labels = batch["labels"][:, :len(LABELS)].to(device)
        naming = self.naming(features, batch["labels"].to(device))
        pool = batch["image"].shape[-1] // REDUCED
        target = F.avg_pool2d(to_signed(batch["image"], device), pool)
        weight = 1.0 + THINGS_WEIGHT * F.avg_pool2d(batch["mask"].to(device), pool)
        error = (self.readout(features).float().view_as(target) - target).square()
        known = (labels != IGNORED).float().sum(0).clamp_min(1)
        right = self.heads.right(features.detach(), labels).float().sum(0) / known
        numbers = {"naming": naming.detach(), "mse": error.detach().mean(), "first": right[0], "second": right[1],
                   "style": right[2]}
        return naming, 2.0 * (error * weight).mean(), numbers

    @torch.no_grad()
    def save(self, vision: Any, projection: Tensor, layers: Sequence[Any], folder: Path,
             see: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Scale the projection so that features have unit mean variance (`layers`, which read them, the other way),
        save, and measure the labels named right in held-out scenes."""
        space, size = self.space, self.space.config.image_size
        spread = see(scene_pixels(space.pool[:1024], size)).std(0).square().mean().sqrt().item()
        projection /= spread
        for layer in layers:
            layer.weight *= spread
        vision.save_pretrained(folder)
        save_state_dict(self.heads.state_dict(), space.work / HEADS_FILE)
        save_state_dict({"readout": self.readout.weight}, space.work / READOUT_FILE)
        found: dict[str, Any] = {}
        for split in ("val", "pairs", "styles"):
            scenes = space.held_out(split)
            found[split] = named_right(self.heads, see(scene_pixels(scenes, size)), scenes)
        worst, gate = min(found["val"][name] for name in ("first", "second", "style")), space.config.gate_named
        if worst < gate:
            print(f"The gate was missed: {worst} of a label of val scenes named right < {gate}.", flush=True)
        return {**found, "gate": gate, "gate_passed": worst >= gate,
                "parameters": sum(p.numel() for p in vision.parameters())}


def load_label_heads(file: Path) -> LabelHeads:
    """The heads that a stage has written, in the order of `CLASSES`."""
    return LabelHeads.load(file, list(CLASSES))


def named_right(heads: LabelHeads, embeddings: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of scenes of which the heads read each label right, and `all` labels."""
    right = heads.right(embeddings, label_tensor(scenes)).float()
    found = {name: round(value, 4) for name, value in zip(heads.classes, right.mean(0).tolist(), strict=True)}
    return {**found, "all": round(right.amin(1).mean().item(), 4)}


@torch.no_grad()
def embed(vision: Any, images: Tensor, batch: int = 256) -> Tensor:
    """Embeddings float32 `[N, E]` (of a Qwen-style encoder features `[N, Q, D]`) of uint8 `[N, 3, S, S]`."""
    vision.eval()
    device = next(vision.parameters()).device
    parts = [vision(to_clip(chunk, device)) for chunk in images.split(batch)]
    return torch.cat([getattr(part, "image_embeds", part).float().cpu() for part in parts])


def pool_features(space: Any) -> Tensor:
    """Image embeddings of nano's pool, float16 `[N, E]`, or features of nano-x's, `[N, Q, D]`; computed once."""
    size = space.config.image_size

    def make() -> Tensor:
        if space.system == "nano":
            vision = load_clip_vision(space.decoder_folder / "image_encoder", device=space.device, log=None)
        else:
            vision = QwenVit.from_pretrained(space.out / "vision", device=space.device)
        return torch.cat([embed(vision, scene_pixels(space.pool[at:at + 1024], size)).half()
                          for at in range(0, len(space.pool), 1024)])

    return space.cached(*(("embeddings", "clip") if space.system == "nano" else ("features", "tower")), make)


class ClipTask(VisionTask):
    """nano's, with CLIP's architecture; goes to `{decoder}/image_encoder`, heads and read-out to `{work}`."""

    def __init__(self, space: Workspace) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        torch.manual_seed(space.config.seed + 1)
        sizes = space.config.clip
        self.vision = CLIPVisionModelWithProjection(CLIPVisionConfig(
            hidden_size=sizes.width, intermediate_size=4 * sizes.width, num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads, image_size=space.config.image_size, patch_size=sizes.patch,
            projection_dim=sizes.embedding, hidden_act="gelu"))
        self.vision.set_attn_implementation("eager")  # the fused bf16 kernel's backward is slow on CPUs
        self.heads = LabelHeads(sizes.embedding, LABELS)
        self.readout = nn.Linear(sizes.embedding, 3 * REDUCED**2)
        module = nn.ModuleDict({"vision": self.vision, "heads": self.heads, "readout": self.readout})
        super().__init__(space, "clip", module.to(space.device),
                         SceneStream(space.config.image_size, space.config.seed))

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        batch = self.scenes.at(micro_step)
        embedding = self.vision(pixel_values=to_clip(batch["image"], self.space.device)).image_embeds
        naming, reading, numbers = self.read(embedding, batch)
        return naming + reading, numbers

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        self.module.cpu().eval()
        found = self.save(self.vision, self.vision.visual_projection.weight,
                          [*self.heads.layers.values(), self.readout], self.space.decoder_folder / "image_encoder",
                          lambda images: embed(self.vision, images))
        return {**super().finish(group), **found}


class WideStream(SceneStream):
    """`SceneStream` with wide scenes among its own: their quarters, which hold one thing or none, and wholes. `labels`
    int64 `[B, 5 + 4]`: the thing in each quarter comes last; what cannot be said is `IGNORED`."""

    def get_batch(self, indices: np.ndarray, epoch: int = 0) -> dict[str, Any]:
        """As `SceneStream`."""
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

    clip, sizes = CLIPVisionConfig.from_pretrained(space.autoencoder.parent / "image_encoder"), space.config.tower
    return QwenVitConfig(
        image_size=space.config.image_size, patch_size=clip.patch_size, width=clip.hidden_size,
        layers=min(sizes.layers, clip.num_hidden_layers), heads=clip.num_attention_heads,
        mlp_ratio=clip.intermediate_size / clip.hidden_size, output_dim=sizes.features, n_queries=sizes.grid**2,
        position_grid=space.config.image_size // clip.patch_size, pool_heads=sizes.pool_heads)


class TowerTask(VisionTask):
    """nano-x's, a Qwen-style encoder; goes to `{out}/vision`, heads and read-out to `{work}`."""

    def __init__(self, space: XWorkspace) -> None:
        torch.manual_seed(space.config.seed + 1)
        teacher = space.autoencoder.parent / "image_encoder"
        self.teacher: Any = load_clip_vision(teacher, device=space.device, log=None).float()
        self.vision = tower_from_nano(teacher, tower_config(space))
        width = self.vision.config.n_queries * self.vision.config.output_dim
        self.heads = LabelHeads(width, LABELS)
        self.quarters = LabelHeads(width, dict.fromkeys(QUARTERS, NOTHING + 1))
        self.readout = nn.Linear(width, 3 * REDUCED**2)
        self.imitate = nn.Linear(width, int(self.teacher.config.projection_dim))
        module = nn.ModuleDict({"vision": self.vision, "heads": self.heads, "quarters": self.quarters,
                                "readout": self.readout, "imitate": self.imitate})
        super().__init__(space, "tower", module.to(space.device),
                         WideStream(space.config.image_size, space.config.seed))

    def naming(self, features: Tensor, labels: Tensor) -> Tensor:
        """Of a scene and of the quarters of a wide one."""
        return super().naming(features, labels) + 0.5 * self.quarters.loss(features, labels[:, len(LABELS):])

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        batch, device = self.scenes.at(micro_step), self.space.device
        labels, pixels = batch["labels"].to(device), to_clip(batch["image"], device)
        features = self.vision(pixels).flatten(1)
        usual = labels[:, 0] != IGNORED
        with torch.no_grad():
            wanted = self.teacher(pixel_values=pixels[usual]).image_embeds.float()
        unlike = F.mse_loss(self.imitate(features[usual]).float(), wanted)
        naming, reading, numbers = self.read(features, batch)
        return naming + reading + IMITATION * unlike, {**numbers, "unlike": unlike.detach()}

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        self.module.cpu().eval()
        readers = [*self.heads.layers.values(), *self.quarters.layers.values(), self.readout, self.imitate]
        found = self.save(self.vision, self.vision.proj, readers, self.space.out / "vision",
                          lambda images: embed(self.vision, images).flatten(1))
        return {**super().finish(group), **found}
