"""The vision encoders of nano (stage `clip`) and nano-x (stage `vision`).

A contrastive loss on captions would lose the identity of things, so linear heads on the embedding
classify things, style, background and layout, and a linear read-out predicts the image at 16×16
pixels. nano-x's encoder starts from the first layers of nano's, is distilled from nano's embedding
by a linear map, and also trains on quarters and wide scenes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.images.transforms import normalise
from seed_multimodal.nn.vision.clip import load_clip_vision
from seed_multimodal.nn.vision.qwen import QwenVit, QwenVitConfig
from seed_multimodal.state_dicts import save_state_dict
from seed_nano.labels import LabelHeads, load_label_heads
from seed_nano.train.task import Loss, NanoTask, SceneStream, map_scenes, to_signed
from seed_nano.train.vae import THINGS_WEIGHT
from seed_nano.train.workspace import SuccessorWorkspace, Workspace
from seed_nano.world.scene import QUARTERS, WideScene, render
from seed_nano.world.targets import CLASSES, IGNORED
from seed_nano.world.things import NAMES
from seed_nano.world.wide import wide_at

HEADS_FILE = "heads.safetensors"
READOUT_FILE = "readout.safetensors"
REDUCED = 16  # side of the image that is read out of an embedding
WIDE_SHARE = 6  # every sixth image is a quarter of a wide scene, every sixth a whole one
IMITATION = 3.0  # weight of the distance from nano's embedding, whose numbers have unit variance
NOTHING = len(NAMES)
LABELS = {name: len(outputs) for name, outputs in CLASSES.items()}
# Names of nano-x's encoder and of CLIP's: outside of the blocks, and in each.
OUTER_NAMES = {
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
}
BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


class VisionTask(NanoTask):
    """Base of both stages: `vision`, and linear `readers` of its features `[B, E]`, among them
    `heads` and `readout`."""

    vision: Any
    readers: nn.ModuleDict

    def read(
        self, features: Tensor, batch: Mapping[str, Tensor], naming: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Classification plus read-out loss, and numbers to log."""
        labels = batch["labels"][:, : len(LABELS)]
        pool = batch["image"].shape[-1] // REDUCED
        # 1. Read-out loss: the image at 16×16 pixels, things weighted more.
        target = F.avg_pool2d(to_signed(batch["image"]), pool)
        weight = 1.0 + THINGS_WEIGHT * F.avg_pool2d(batch["mask"], pool)
        error = (self.readers["readout"](features).float().view_as(target) - target).square()
        # 2. Accuracy of the heads on the labels that an image has.
        n_labelled = (labels != IGNORED).float().sum(0).clamp_min(1)
        heads = self.readers["heads"](features.detach())
        right = labels_right(heads, labels).float().sum(0) / n_labelled
        metrics = {"naming": naming.detach(), "mse": error.detach().mean()}
        metrics |= zip(("first", "second", "style"), right, strict=False)
        return naming + 2.0 * (error * weight).mean(), metrics

    @torch.no_grad()
    def save_scaled(self, projection: Tensor, folder: Path) -> None:
        """Scale the projection so that features have unit mean variance (their readers the other
        way), and save."""
        space = self.space
        self.module.eval()
        # The spread of the features is measured on the first scenes of the pool.
        features = map_scenes(partial(embed, self.vision), space.pool[:1024], space, batch=256)
        spread = features.flatten(1).std(0).square().mean().sqrt().item()
        self.module.cpu()
        projection /= spread
        for layer in self.readers.modules():
            if isinstance(layer, nn.Linear):
                layer.weight *= spread
        self.vision.save_pretrained(folder)
        save_state_dict(self.readers["heads"].state_dict(), space.work / HEADS_FILE)
        readout = {"readout": self.readers["readout"].weight}
        save_state_dict(readout, space.work / READOUT_FILE)


def label_loss(logits: Mapping[str, Tensor], labels_BL: Tensor) -> Tensor:
    """Mean cross entropy of all labels; -100 is ignored."""
    columns = zip(logits.values(), labels_BL.unbind(1), strict=True)
    return torch.stack([F.cross_entropy(scores, labels) for scores, labels in columns]).mean()


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


def pool_features(space: Workspace) -> Tensor:
    """Image embeddings of nano's pool, float16 `[N, E]`, or features of nano-x's, `[N, Q, D]`;
    cached."""
    of_nano = space.system == "nano"

    def make() -> Tensor:
        vision: Any
        if of_nano:
            vision = clip_encoder(space, space.decoder_folder)
        else:
            vision = QwenVit.from_pretrained(space.out / "vision", device=space.device)
        return map_scenes(partial(embed, vision.eval()), space.pool, space, batch=256).half()

    if of_nano:
        return space.cached("embeddings", "clip", make)
    return space.cached("features", "vision", make)


def clip_encoder(space: Workspace, decoder: Path) -> Any:
    """nano's trained vision encoder, next to its decoder, on the device."""
    return load_clip_vision(decoder / "image_encoder", device=space.device, log=None)


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
        # The fused bf16 kernel's backward is slow on CPUs.
        self.vision.set_attn_implementation("eager")
        self.readers = nn.ModuleDict(
            {
                "heads": LabelHeads(sizes.embedding, LABELS),
                "readout": nn.Linear(sizes.embedding, 3 * REDUCED**2),
            }
        )
        module = nn.ModuleDict({"vision": self.vision, **self.readers})
        super().__init__(space, "clip", module, SceneStream(space))

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        embedding = self.vision(pixel_values=normalise(batch["image"])).image_embeds
        naming = label_loss(self.readers["heads"](embedding), batch["labels"])
        return self.read(embedding, batch, naming)

    def save_result(self) -> None:
        folder = self.space.decoder_folder / "image_encoder"
        self.save_scaled(self.vision.visual_projection.weight, folder)


class WideStream(SceneStream):
    """`SceneStream` with wide scenes among its own: their quarters, which hold one thing or none,
    and wholes. `labels` int64 `[B, 5 + 4]`: the thing in each quarter comes last; what cannot be
    said is `IGNORED`."""

    def get(self, index: int, epoch: int = 0) -> dict[str, Tensor]:
        sample = super().get(index, epoch)
        if index % WIDE_SHARE >= 2:
            labels = F.pad(sample["labels"], (0, len(QUARTERS)), value=IGNORED)
            return {**sample, "labels": labels}

        # Every sixth image is a quarter of a wide scene, every sixth a whole one.
        size = self.size
        scene = wide_at(self.seed, index)
        quarter = index // WIDE_SHARE % len(QUARTERS) if index % WIDE_SHARE else None
        pixels = torch.tensor(render(scene, size if quarter is None else 2 * size))
        if quarter is not None:
            top = size * (quarter // 2)
            left = size * (quarter % 2)
            pixels = pixels[top : top + size, left : left + size]
        return {
            "image": pixels.permute(2, 0, 1),
            "mask": torch.full_like(sample["mask"], 0.25),
            "labels": _wide_labels(scene, quarter),
        }


def _wide_labels(scene: WideScene, quarter: int | None) -> Tensor:
    things = [NAMES.index(name) if name else NOTHING for name in scene.things]
    # Only the background is known of every view.
    labels = dict.fromkeys(CLASSES, IGNORED)
    labels["background"] = CLASSES["background"].index(scene.background)
    if quarter is None or scene.things[quarter]:
        labels["style"] = CLASSES["style"].index(scene.style)
    if quarter is None:
        return torch.tensor([*labels.values(), *things])
    if scene.things[quarter]:
        labels["first"] = things[quarter]
        labels["second"] = NOTHING
        labels["layout"] = CLASSES["layout"].index("middle")
    return torch.tensor([*labels.values(), *[IGNORED] * len(things)])


def encoder_from_nano(clip: Any, space: Workspace) -> QwenVit:
    """An encoder with the first layers of nano's CLIP encoder and a new attention pool."""
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
    weights = {name: state[theirs] for name, theirs in OUTER_NAMES.items()}
    weights["positional_embedding"] = weights["positional_embedding"][1:]  # no class token
    for layer in range(layers):
        old = f"encoder.layers.{layer}."
        new = f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            for name, theirs in BLOCK_NAMES.items():
                weights[f"{new}{name}.{kind}"] = state[f"{old}{theirs}.{kind}"]
            # Queries, keys and values, joined head by head.
            parts = [state[f"{old}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            joined = torch.stack([part.unflatten(0, (heads, -1)) for part in parts], 1)
            weights[f"{new}attn.in_proj.{kind}"] = joined.flatten(0, 2)
    missing, unknown = encoder.load_state_dict(weights, strict=False)
    assert not unknown
    assert all(name.startswith(("attn_pool.", "ln_post.", "proj")) for name in missing)
    return encoder


class XVisionTask(VisionTask):
    """nano-x's, a Qwen-style encoder; goes to `{out}/vision`, heads and read-out to `{work}`."""

    def __init__(self, space: SuccessorWorkspace) -> None:
        torch.manual_seed(space.config.seed + 1)
        self.teacher = clip_encoder(space, space.autoencoder.parent).float()
        self.vision = encoder_from_nano(self.teacher, space).to(space.device)
        width = space.config.vision.grid**2 * space.config.vision.features
        self.readers = nn.ModuleDict(
            {
                "heads": LabelHeads(width, LABELS),
                "quarters": LabelHeads(width, dict.fromkeys(QUARTERS, NOTHING + 1)),
                "readout": nn.Linear(width, 3 * REDUCED**2),
                "imitate": nn.Linear(width, int(self.teacher.config.projection_dim)),
            }
        )
        module = nn.ModuleDict({"vision": self.vision, **self.readers})
        super().__init__(space, "vision", module, WideStream(space))

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        labels = batch["labels"]
        pixels = normalise(batch["image"])
        features = self.vision(pixels).flatten(1)
        # Imitate nano's embedding of ordinary scenes; it never saw wide ones.
        labelled = labels[:, 0] != IGNORED
        with torch.no_grad():
            wanted = self.teacher(pixel_values=pixels[labelled]).image_embeds.float()
        unlike = F.mse_loss(self.readers["imitate"](features[labelled]).float(), wanted)
        # Label loss of scenes and, at half weight, of the quarters of wide scenes.
        naming = label_loss(self.readers["heads"](features), labels[:, : len(LABELS)])
        quarters = label_loss(self.readers["quarters"](features), labels[:, len(LABELS) :])
        loss, metrics = self.read(features, batch, naming + 0.5 * quarters)
        return loss + IMITATION * unlike, {**metrics, "unlike": unlike.detach()}

    def save_result(self) -> None:
        self.save_scaled(self.vision.proj, self.space.out / "vision")
