"""The judge: a small ResNet classifier of a scene's labels, independent of the systems.

    python -m seed_nano.report.judge --out pretrained/nano/judge        # trains it

    judge = Judge.from_pretrained("pretrained/nano/judge")
    labels, vectors = judge.read(images)

It is trained on scenes of all splits, with another seed and architecture than a system's vision
encoder. Each layout has learned weights of the feature map's cells for the first and the second
thing; both share one classifier.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock
from torchvision.transforms import v2

from seed_multimodal.device import choose_device
from seed_multimodal.disk import JsonObject
from seed_multimodal.entry import DONE, run_program
from seed_multimodal.nn.pretrained import PretrainedNetwork
from seed_multimodal.training.config import StageSettings
from seed_multimodal.training.meters import Metrics
from seed_multimodal.training.task import ONE_PROCESS, RunView, StageTask
from seed_multimodal.training.trainer import train_stage
from seed_multimodal.weights.find import locate, locate_system
from seed_nano.world.scene import Scene, scene_image
from seed_nano.world.splits import HELD_OUT_SPLITS, draw_scene
from seed_nano.world.splits import scenes as listed
from seed_nano.world.targets import JUDGE_CLASSES, NOTHING, label_tensor
from seed_nano.world.things import HELD_OUT, NAMES

SHIPPED = "pretrained/nano/judge"
SHARPNESS = 10.0  # scale of the cell weights, so that they train as fast as the rest
TWO_KINDS = ("left of", "above", "two kinds")


@dataclass
class JudgeConfig:
    """Sizes of a judge; `labels`: label -> its classes; `training`: training settings and
    accuracy."""

    labels: dict[str, list[str]] = field(
        default_factory=lambda: {name: list(row) for name, row in JUDGE_CLASSES.items()}
    )
    image_size: int = 64
    widths: tuple[int, ...] = (48, 64, 128)
    blocks: tuple[int, ...] = (0, 2, 3)
    layout_width: int = 16
    training: JsonObject = field(default_factory=dict)


def residual_block(inputs: int, outputs: int, stride: int = 1) -> BasicBlock:
    """Two 3x3 convolutions with batch norm, and a shortcut without."""
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
    return BasicBlock(inputs, outputs, stride, shortcut)


class Judge(PretrainedNetwork[JudgeConfig]):
    """ResNet, layout head, cell weights for each layout, one classifier of things; see the module's
    docstring."""

    config_class = JudgeConfig

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        stem, *widths = config.widths
        layers: list[nn.Module] = [
            nn.Conv2d(3, stem, 5, 2, 2, bias=False),
            nn.BatchNorm2d(stem),
            nn.ReLU(),
        ]
        for width, blocks in zip(widths, config.blocks[1:], strict=True):
            layers.append(residual_block(stem, width, 2))
            layers += [residual_block(width, width) for _ in range(blocks - 1)]
            stem = width
        self.body = nn.Sequential(*layers)
        classes = {name: len(row) for name, row in config.labels.items()}
        # The stem and each stage halve the image.
        cells = (config.image_size // 2 ** len(config.widths)) ** 2
        self.narrow = nn.Conv2d(stem, config.layout_width, 1)
        self.layout = nn.Linear(config.layout_width * cells + stem, classes["layout"])
        self.where = nn.Parameter(torch.zeros(classes["layout"], 2, cells))
        self.thing = nn.Linear(stem, classes["second"])
        self.style = nn.Linear(2 * stem, classes["style"])
        self.background = nn.Linear(stem, classes["background"])
        alone = [not name.startswith(TWO_KINDS) for name in config.labels["layout"]]
        self.register_buffer("alone", torch.tensor(alone), persistent=False)

    def forward(
        self, pixels: Tensor, layout: Tensor | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """[B, 3, S, S] in -1..1 → logits `[B, classes]` by label, and features [B, D].

        `layout` [B]: true classes in training, which select the cell weights.
        """
        grid = self.body(pixels)
        narrow = F.relu(self.narrow(grid)).flatten(1)
        # Halves of the image separate three of one kind from one and two.
        top, bottom = (half.amax((2, 3)) for half in grid.chunk(2, 2))
        layouts = self.layout(torch.cat([narrow, (top - bottom).abs()], 1))
        look = layouts.argmax(1) if layout is None else layout
        weights = (SHARPNESS * self.where[look]).softmax(2).to(grid.dtype)
        # Features of the first and the second thing, [B, 2, D].
        attended = torch.einsum("bkp,bcp->bkc", weights, grid.flatten(2))
        things = self.thing(attended).float()
        mean = grid.mean((2, 3))
        nothing = torch.zeros_like(things[:, 1])
        nothing[:, self.config.labels["second"].index(NOTHING)] = 1e3
        logits = {
            "first": things[:, 0, : len(self.config.labels["first"])],
            "second": torch.where(self.alone[look][:, None], nothing, things[:, 1]),
            "style": self.style(torch.cat([attended[:, 0], mean], 1)),
            "background": self.background(mean),
            "layout": layouts,
        }
        parts = (attended[:, 0], attended[:, 1], mean, narrow)
        return (
            {name: logits[name].float() for name in self.config.labels},
            torch.cat([F.normalize(part.float(), dim=1) for part in parts], 1),
        )

    @classmethod
    def from_state_dict(
        cls, config: JudgeConfig, state: Mapping[str, Tensor], source: str | Path, **options: Any
    ) -> Self:
        # The shipped weights have other names than torchvision's blocks, and no counts of batches.
        weights = {}
        for name, value in state.items():
            weights[name.replace("norm", "bn").replace("shortcut", "downsample")] = value
        options["allow_missing"] = ["*num_batches_tracked"]
        judge = super().from_state_dict(config, weights, source, **options)
        return judge.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def read(self, images: Sequence[Image.Image], batch: int = 256) -> tuple[Tensor, Tensor]:
        """Images of any size → class indices int64 [N, 5], in the order of `config.labels`, and
        unit vectors for retrieval float32 [N, D]."""
        labels = [torch.zeros(0, len(self.config.labels), dtype=torch.long)]
        vectors: list[Tensor] = []
        # Empty first rows keep the result's shape without images.
        for start in range(0, len(images), batch):
            rows = images[start : start + batch]
            pixels = torch.cat([pixels_of(image, self.config.image_size) for image in rows])
            logits, features = self(pixels.to(self.device, memory_format=torch.channels_last))
            labels.append(torch.stack([scores.argmax(1) for scores in logits.values()], 1).cpu())
            vectors.append(F.normalize(features, dim=1).cpu())
        return torch.cat(labels), torch.cat(vectors or labels)

    def labels(self, images: Sequence[Image.Image]) -> Tensor:
        """Class numbers of `read`."""
        return self.read(images)[0]


def pixels_of(image: Image.Image, size: int) -> Tensor:
    """An image as float32 [1, 3, size, size] in -1..1, reduced by area averaging."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
    mode = "area" if min(image.size) >= size else "bilinear"
    return F.interpolate(pixels.float() / 127.5 - 1, size=(size, size), mode=mode)


def find_judge(model: str | Path, folder: str | Path | None = None) -> Path:
    """Folder of the judge: `given`, else the system's, else the shipped one."""
    if folder is not None:
        return Path(folder)
    default = (locate_system(model) or Path(model)) / "judge"
    return default if (default / "config.json").is_file() else locate(SHIPPED) or default


# ---- training


def judge_scene(seed: int, index: int) -> Scene:
    """Scene `index` of the endless training stream: any composition of any things."""
    return draw_scene(random.Random(f"judge {seed} {index}"), NAMES + HELD_OUT)


def augmentations(size: int) -> v2.Transform:
    """Augmentations that imitate reconstructions: shift, tint, blur, coarsening, banding, noise; no
    flips, since labels include left and right."""
    moved = [
        v2.Pad(8, padding_mode="edge"),
        v2.RandomAffine(3, (0.02, 0.02), (0.94, 1.06)),
        v2.CenterCrop(size),
    ]
    return v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomApply(moved, 0.3),
            v2.RandomApply([v2.ColorJitter(brightness=0.08, contrast=0.1)], 0.4),
            v2.RandomApply([v2.GaussianBlur(3, (0.1, 1.0))], 0.3),
            v2.RandomApply([v2.Resize(size // 2), v2.Resize(size)], 0.2),
            v2.RandomApply([v2.RandomPosterize(4, 1.0)], 0.2),
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomApply([v2.GaussianNoise(sigma=0.05)], 0.2),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )


class JudgeTask(StageTask):
    """Resumable training of the judge; the record has its accuracy on real images of every
    split."""

    def __init__(
        self,
        settings: StageSettings,
        out: Path,
        device: torch.device,
        config: JudgeConfig | None = None,
        scenes: Callable[[int, int], Scene] = judge_scene,
        probes: int = 1000,
    ) -> None:
        torch.manual_seed(settings.seed)
        self.judge = Judge(config or JudgeConfig()).to(device, memory_format=torch.channels_last)
        self.out = out
        self.scenes = scenes
        self.probes = probes
        self.size = self.judge.config.image_size
        self.augment = augmentations(self.size)
        super().__init__("judge", self.judge, settings)
        self.ddp_options = ONE_PROCESS

    def images(self, scenes: Sequence[Scene]) -> list[Image.Image]:
        """Images of scenes in the judge's size."""
        return [scene_image(scene, self.size) for scene in scenes]

    def batch(self, micro_step: int) -> list[Scene]:
        size = self.settings.batch_size
        first = micro_step * size
        return [self.scenes(self.settings.seed, first + row) for row in range(size)]

    def loss(self, model: nn.Module, scenes: list[Scene]) -> tuple[Tensor, Metrics]:
        device = self.judge.device
        # 1. Augment the scenes' images.
        pixels = torch.stack([self.augment(image) for image in self.images(scenes)])
        pixels = pixels.to(device, memory_format=torch.channels_last)
        columns = label_tensor(scenes, JUDGE_CLASSES).to(device).unbind(1)
        labels = dict(zip(JUDGE_CLASSES, columns, strict=True))
        # 2. The true layout selects the cell weights, so that things are learned from the start.
        logits = self.judge(pixels, labels["layout"])[0]
        losses = [F.cross_entropy(scores, labels[name]) for name, scores in logits.items()]
        right = logits["first"].argmax(1) == labels["first"]
        return torch.stack(losses).sum(), {"first_right": right.float().mean()}

    def finish(self, run: RunView) -> Mapping[str, object]:
        judge = self.judge.eval()
        accuracy: dict[str, float] = {}
        # Accuracy over all labels of each split's real images.
        for split in HELD_OUT_SPLITS:
            scenes = listed(split)[: self.probes]
            right = judge.labels(self.images(scenes)) == label_tensor(scenes, JUDGE_CLASSES)
            accuracy[split] = float(right.all(1).float().mean())
        judge.config.training = {
            "steps": self.settings.max_steps,
            "batch": self.settings.batch_size,
            "seed": self.settings.seed,
            "real_pictures": accuracy,
        }
        judge.half().save_pretrained(self.out)
        return {**super().finish(run), **accuracy}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m seed_nano.report.judge", description="Train the judge."
    )
    parser.add_argument("--out", type=Path, default=Path(SHIPPED), help="output folder")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/judge"), help="folder of checkpoint, log and record"
    )
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=77, help="of weights and scenes (77)")
    parser.add_argument("--widths", type=int, nargs=3, help="of the stages (48 64 128)")

    def work(options: argparse.Namespace) -> int:
        settings = StageSettings(
            max_steps=options.steps,
            batch_size=96,
            learning_rate=3e-3,
            warmup_steps=200,
            weight_decay=0.05,
            seed=options.seed,
        )
        config = JudgeConfig()
        if options.widths:
            config.widths = tuple(options.widths)
        device = choose_device("auto", "float32").device
        train_stage(JudgeTask(settings, options.out, device, config), options.work)
        print(f"Saved {options.out}.")
        return DONE

    return run_program(parser, work, arguments, "train judge")


if __name__ == "__main__":
    raise SystemExit(main())
