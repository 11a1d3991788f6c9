"""The vision encoders of nano (stage `clip`) and nano-x (stage `vision`).

A contrastive loss on captions would lose the identity of things, so linear heads on the embedding
classify things, style, background and layout, and a linear read-out predicts the image at 16×16
pixels. nano-x's encoder starts from the first layers of nano's, is distilled from nano's embedding
by a linear map, and also trains on quarters and wide scenes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.images.transforms import normalise
from seed_multimodal.nn.vision.clip import load_clip_vision
from seed_multimodal.nn.vision.qwen import QwenVit, QwenVitConfig
from seed_multimodal.state_dicts import save_state_dict
from seed_multimodal.training.distributed import ProcessGroup
from seed_nano.labels import LabelHeads, load_label_heads
from seed_nano.train.task import NanoTask, SceneStream, map_scenes, to_signed
from seed_nano.train.vae import THINGS_WEIGHT
from seed_nano.train.workspace import Workspace, XWorkspace
from seed_nano.world.scene import QUARTERS, WideScene
from seed_nano.world.targets import CLASSES, IGNORED
from seed_nano.world.things import NAMES
from seed_nano.world.wide import render_wide, wide_at

HEADS_FILE = "heads.safetensors"
READOUT_FILE = "readout.safetensors"
REDUCED = 16  # side of the image that is read out of an embedding
WIDE_SHARE = 6  # every sixth image is a quarter of a wide scene, every sixth a whole one
IMITATION = 3.0  # weight of the distance from nano's embedding, whose numbers have unit variance
NOTHING = len(NAMES)
LABELS = {name: len(outputs) for name, outputs in CLASSES.items()}
_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}  # of a block: nano-x's → CLIP's


class VisionTask(NanoTask):
    """Base of both stages: `vision`, and heads and read-out of its features `[B, E]`."""

    vision: Any
    heads: LabelHeads
    readout: nn.Linear

    def read(
        self, features: Tensor, batch: Mapping[str, Tensor], naming: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        """Classification plus read-out loss, and numbers to log."""
        device = self.space.device
        labels = batch["labels"][:, : len(LABELS)].to(device)
        pool = batch["image"].shape[-1] // REDUCED
        # 1. Read-out loss: the image at 16×16 pixels, things weighted more.
        target = F.avg_pool2d(to_signed(batch["image"].to(device)), pool)
        weight = 1.0 + THINGS_WEIGHT * F.avg_pool2d(batch["mask"].to(device), pool)
        error = (self.readout(features).float().view_as(target) - target).square()
        # 2. Accuracy of the heads on the labels that an image has.
        n_labelled = (labels != IGNORED).float().sum(0).clamp_min(1)
        right = labels_right(self.heads(features.detach()), labels).float().sum(0) / n_labelled
        metrics = {
            "naming": naming.detach(),
            "mse": error.detach().mean(),
            "first": right[0],
            "second": right[1],
            "style": right[2],
        }
        return naming + 2.0 * (error * weight).mean(), metrics

    @torch.no_grad()
    def save(self, projection: Tensor, readers: Sequence[Any], folder: Path) -> None:
        """Scale the projection so that features have unit mean variance (`readers` of them the
        other way), and save."""
        space = self.space
        self.module.eval()
        # The spread of the features is measured on the first scenes of the pool.
        features = map_scenes(
            partial(embed, self.vision), space.pool[:1024], space, batch=256
        ).flatten(1)
        spread = features.std(0).square().mean().sqrt().item()
        self.module.cpu()
        projection /= spread
        for layer in readers:
            layer.weight *= spread
        self.vision.save_pretrained(folder)
        save_state_dict(self.heads.state_dict(), space.work / HEADS_FILE)
        save_state_dict({"readout": self.readout.weight}, space.work / READOUT_FILE)


def label_loss(logits: Mapping[str, Tensor], labels_BL: Tensor) -> Tensor:
    """Mean cross entropy of all labels; -100 is ignored."""
    losses = [
        F.cross_entropy(scores, labels_BL[:, column])
        for column, scores in enumerate(logits.values())
    ]
    return torch.stack(losses).mean()


def labels_right(logits: Mapping[str, Tensor], labels_BL: Tensor) -> Tensor:
    """Which labels are predicted correctly, bool `[B, L]`."""
    return torch.stack([scores.argmax(1) for scores in logits.values()], 1) == labels_BL


def trained_label_heads(space: Workspace) -> LabelHeads:
    """The heads that a stage has written, in the order of `CLASSES`."""
    return load_label_heads(space.work / HEADS_FILE, list(CLASSES))


def embed(vision: Any, images: Tensor) -> Tensor:
    """Embeddings float32 `[N, E]` (of a Qwen-style encoder features `[N, Q, D]`) of uint8 `[N, 3,
    S, S]`."""
    outputs = vision(normalise(images))
    return getattr(outputs, "image_embeds", outputs).float()


def pool_features(space: Any) -> Tensor:
    """Image embeddings of nano's pool, float16 `[N, E]`, or features of nano-x's, `[N, Q, D]`;
    cached."""
    of_nano = space.system == "nano"

    def make() -> Tensor:
        vision = (
            load_clip_vision(space.decoder_folder / "image_encoder", device=space.device, log=None)
            if of_nano
            else QwenVit.from_pretrained(space.out / "vision", device=space.device)
        )
        return map_scenes(partial(embed, vision.eval()), space.pool, space, batch=256).half()

    return space.cached(*(("embeddings", "clip") if of_nano else ("features", "vision")), make)


class ClipTask(VisionTask):
    """nano's, with CLIP's architecture; goes to `{decoder}/image_encoder`, heads and read-out to
    `{work}`."""

    def __init__(self, space: Workspace) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        torch.manual_seed(space.config.seed + 1)
        sizes = space.config.clip
        self.vision = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=sizes.width,
                intermediate_size=4 * sizes.width,
                num_hidden_layers=sizes.layers,
                num_attention_heads=sizes.heads,
                image_size=space.config.image_size,
                patch_size=sizes.patch,
                projection_dim=sizes.embedding,
                hidden_act="gelu",
            )
        )
        self.vision.set_attn_implementation(
            "eager"
        )  # the fused bf16 kernel's backward is slow on CPUs
        self.heads = LabelHeads(sizes.embedding, LABELS)
        self.readout = nn.Linear(sizes.embedding, 3 * REDUCED**2)
        module = nn.ModuleDict(
            {"vision": self.vision, "heads": self.heads, "readout": self.readout}
        )
        super().__init__(
            space,
            "clip",
            module.to(space.device),
            SceneStream(space.config.image_size, space.config.seed),
        )

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        batch = self.scenes.at(micro_step)
        embedding = self.vision(
            pixel_values=normalise(batch["image"].to(self.space.device))
        ).image_embeds
        return self.read(
            embedding,
            batch,
            label_loss(self.heads(embedding), batch["labels"].to(self.space.device)),
        )

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        self.save(
            self.vision.visual_projection.weight,
            [*self.heads.layers.values(), self.readout],
            self.space.decoder_folder / "image_encoder",
        )
        return super().finish(group)


class WideStream(SceneStream):
    """`SceneStream` with wide scenes among its own: their quarters, which hold one thing or none,
    and wholes. `labels` int64 `[B, 5 + 4]`: the thing in each quarter comes last; what cannot be
    said is `IGNORED`."""

    def get_batch(self, indices: Sequence[int]) -> dict[str, Any]:
        batch = super().get_batch(indices)
        batch["labels"] = F.pad(batch["labels"], (0, len(QUARTERS)), value=IGNORED)
        for row, index in enumerate(indices):
            if index % WIDE_SHARE < 2:
                scene = wide_at(self.seed, index)
                size = self.size
                # Every sixth image is a quarter of a wide scene, every sixth a whole one.
                quarter = index // WIDE_SHARE % len(QUARTERS) if index % WIDE_SHARE else None
                if quarter is None:
                    pixels = render_wide(scene, size)
                else:
                    top = size * (quarter // 2)
                    left = size * (quarter % 2)
                    pixels = render_wide(scene, 2 * size)[top : top + size, left : left + size]
                batch["image"][row] = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
                batch["mask"][row] = 0.25
                batch["labels"][row] = _wide_labels(scene, quarter)
        return batch


def _wide_labels(scene: WideScene, quarter: int | None) -> Tensor:
    things = [NAMES.index(name) if name else NOTHING for name in scene.things]
    labels = dict.fromkeys(CLASSES, IGNORED)
    labels["background"] = CLASSES["background"].index(scene.background)
    if quarter is None or scene.things[quarter]:
        labels["style"] = CLASSES["style"].index(scene.style)
    if quarter is not None and scene.things[quarter]:
        labels |= {
            "first": things[quarter],
            "second": CLASSES["second"].index("nothing"),
            "layout": CLASSES["layout"].index("middle"),
        }
    return torch.tensor(
        [*labels.values(), *(things if quarter is None else [IGNORED] * len(things))]
    )


def encoder_from_nano(folder: Path, space: XWorkspace) -> QwenVit:
    """An encoder with the first layers of nano's CLIP encoder and a new attention pool."""
    clip: Any = load_clip_vision(folder, log=None).float()
    config = clip.config
    sizes = space.config.vision
    size = space.config.image_size
    layers = min(sizes.layers, config.num_hidden_layers)
    width = config.hidden_size
    heads = config.num_attention_heads
    encoder = QwenVit(
        QwenVitConfig(
            image_size=size,
            patch_size=config.patch_size,
            width=width,
            layers=layers,
            heads=heads,
            mlp_ratio=config.intermediate_size / width,
            output_dim=sizes.features,
            n_queries=sizes.grid**2,
            position_grid=size // config.patch_size,
            pool_heads=sizes.pool_heads,
        )
    )
    state = {name.removeprefix("vision_model."): value for name, value in clip.state_dict().items()}
    weights = {
        "conv1.weight": state["embeddings.patch_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"][1:],
    }  # without class token
    for kind in ("weight", "bias"):
        weights[f"ln_pre.{kind}"] = state[f"pre_layrnorm.{kind}"]
        for layer in range(layers):
            old = f"encoder.layers.{layer}."
            new = f"transformer.resblocks.{layer}."
            rows = [
                state[f"{old}self_attn.{part}_proj.{kind}"].unflatten(0, (heads, width // heads))
                for part in "qkv"
            ]
            weights[f"{new}attn.in_proj.{kind}"] = torch.cat(rows, 1).flatten(0, 1)
            weights |= {
                f"{new}{ours}.{kind}": state[f"{old}{theirs}.{kind}"]
                for ours, theirs in _NAMES.items()
            }
    missing, unknown = encoder.load_state_dict(weights, strict=False)
    assert not unknown and all(
        name.startswith(("attn_pool.", "ln_post.", "proj")) for name in missing
    )
    return encoder


class XVisionTask(VisionTask):
    """nano-x's, a Qwen-style encoder; goes to `{out}/vision`, heads and read-out to `{work}`."""

    def __init__(self, space: XWorkspace) -> None:
        torch.manual_seed(space.config.seed + 1)
        folder = space.autoencoder.parent / "image_encoder"
        self.teacher: Any = load_clip_vision(folder, device=space.device, log=None).float()
        self.vision = encoder_from_nano(folder, space)
        width = space.config.vision.grid**2 * space.config.vision.features
        # Heads of a scene's labels, of the quarters of a wide scene, and the imitation of nano.
        self.heads = LabelHeads(width, LABELS)
        self.quarters = LabelHeads(width, dict.fromkeys(QUARTERS, NOTHING + 1))
        self.readout = nn.Linear(width, 3 * REDUCED**2)
        self.imitate = nn.Linear(width, int(self.teacher.config.projection_dim))
        module = nn.ModuleDict(
            {
                "vision": self.vision,
                "heads": self.heads,
                "quarters": self.quarters,
                "readout": self.readout,
                "imitate": self.imitate,
            }
        )
        super().__init__(
            space,
            "vision",
            module.to(space.device),
            WideStream(space.config.image_size, space.config.seed),
        )

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        batch = self.scenes.at(micro_step)
        device = self.space.device
        labels = batch["labels"].to(device)
        pixels = normalise(batch["image"].to(device))
        features = self.vision(pixels).flatten(1)
        labelled = labels[:, 0] != IGNORED
        with torch.no_grad():
            wanted = self.teacher(pixel_values=pixels[labelled]).image_embeds.float()
        # Imitate nano's embedding of ordinary scenes; it never saw wide ones.
        unlike = F.mse_loss(self.imitate(features[labelled]).float(), wanted)
        # Label loss of scenes and, at half weight, of the quarters of wide scenes.
        naming = label_loss(self.heads(features), labels[:, : len(LABELS)])
        naming = naming + 0.5 * label_loss(self.quarters(features), labels[:, len(LABELS) :])
        loss, metrics = self.read(features, batch, naming)
        return loss + IMITATION * unlike, {**metrics, "unlike": unlike.detach()}

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        readers = [
            *self.heads.layers.values(),
            *self.quarters.layers.values(),
            self.readout,
            self.imitate,
        ]
        self.save(self.vision.proj, readers, self.space.out / "vision")
        return super().finish(group)
