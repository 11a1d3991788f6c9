"""The independent judge: a small ResNet that reads a scene's labels off a rebuilt or drawn picture.

It is trained by `seed_nano.report.train_judge` on scenes of all parts, held-out ones included, with exact
labels, another seed and another architecture than the system's own vision tower, and is never used in training.

    judge = Judge.from_pretrained("pretrained/nano/judge")
    judge.labels(pictures)            # class numbers int64 [N, 5], in the order of world.targets.JUDGED
    judge.embed_images(pictures)      # unit vectors [N, D] for retrieval

Where a thing is looked for follows from the layout: for each layout the cells of the feature map have learned weights
for the first and for the second thing, and one classifier names both, so a thing is learned once for all its places.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from seed_multimodal.disk import read_json_object, replace_text
from seed_multimodal.errors import CheckpointError, DataError
from seed_multimodal.hub import locate, locate_system
from seed_multimodal.weights import assign_strictly, load_state_dict, save_state_dict
from seed_nano.world.targets import JUDGED, NOTHING

Pictures = Sequence[Image.Image] | NDArray[np.uint8]
SHIPPED = "pretrained/nano/judge"
SHARPNESS = 10.0  # of the weights of cells, so that they are learned as fast as the rest
TWO_KINDS = ("left of", "above", "two kinds")


@dataclass
class JudgeConfig:
    """Sizes of a judge; `labels`: label -> its classes; `training`: how it was trained and how well it reads."""

    labels: dict[str, list[str]] = field(default_factory=lambda: {name: list(row) for name, row in JUDGED.items()})
    image_size: int = 64
    widths: tuple[int, ...] = (48, 64, 128)
    blocks: tuple[int, ...] = (0, 2, 3)
    layout_width: int = 16
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def cells(self) -> int:
        """Side of the feature map: the stem and every stage but the first halve the picture."""
        return self.image_size // 2 ** len(self.widths)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut; `stride` 2 halves the picture."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] → [B, outputs, H/stride, W/stride]."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(y)))


@dataclass
class Reading:
    """What a judge sees: logits `[B, classes]` by label, and the features `[B, D]` they are read from."""

    logits: dict[str, Tensor]
    features: Tensor


class Judge(nn.Module):
    """ResNet, layout head, cell weights for each layout, one classifier of things; see the module's docstring."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        stem, *widths = config.widths
        layers: list[nn.Module] = [nn.Conv2d(3, stem, 5, 2, 2, bias=False), nn.BatchNorm2d(stem), nn.ReLU()]
        layers += [ResidualBlock(stem, stem, 1) for _ in range(config.blocks[0])]
        for width, blocks in zip(widths, config.blocks[1:], strict=True):
            layers.append(ResidualBlock(stem, width, 2))
            layers += [ResidualBlock(width, width, 1) for _ in range(blocks - 1)]
            stem = width
        self.body = nn.Sequential(*layers)
        classes = {name: len(row) for name, row in config.labels.items()}
        cells = config.cells**2
        self.narrow = nn.Conv2d(stem, config.layout_width, 1)
        self.layout = nn.Linear(config.layout_width * cells + stem, classes["layout"])
        self.where = nn.Parameter(torch.zeros(classes["layout"], 2, cells))
        self.thing = nn.Linear(stem, classes["second"])
        self.style = nn.Linear(2 * stem, classes["style"])
        self.background = nn.Linear(stem, classes["background"])
        alone = [not name.startswith(TWO_KINDS) for name in config.labels["layout"]]
        self.register_buffer("alone", torch.tensor(alone), persistent=False)

    def forward(self, pixels: Tensor, layout: Tensor | None = None) -> Reading:
        """[B, 3, S, S] in -1..1; `layout` [B], the true class numbers in training, says where to look."""
        grid = self.body(pixels)
        narrow = F.relu(self.narrow(grid)).flatten(1)
        top, bottom = (half.amax((2, 3)) for half in grid.chunk(2, 2))  # tells three of one kind from one and two
        layouts = self.layout(torch.cat([narrow, (top - bottom).abs()], 1))
        look = layouts.argmax(1) if layout is None else layout
        weights = (SHARPNESS * self.where[look]).softmax(2).to(grid.dtype)
        seen = torch.einsum("bkp,bcp->bkc", weights, grid.flatten(2))
        things = self.thing(seen).float()
        mean = grid.mean((2, 3))
        nothing = F.one_hot(torch.tensor(self.config.labels["second"].index(NOTHING)), things.shape[2])
        second = torch.where(self.alone[look][:, None], 1e3 * nothing.to(things), things[:, 1])
        logits = {"first": things[:, 0, : len(self.config.labels["first"])], "second": second,
                  "style": self.style(torch.cat([seen[:, 0], mean], 1)), "background": self.background(mean),
                  "layout": layouts}
        parts = (seen[:, 0], seen[:, 1], mean, narrow)
        return Reading({name: logits[name].float() for name in self.config.labels},
                       torch.cat([F.normalize(part.float(), dim=1) for part in parts], 1))

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> Judge:
        """Load `config.json` and `model.safetensors` of `folder`, in fp32 and in evaluation mode.

        Raises:
            CheckpointError: when a file is missing, damaged or of another model.
        """
        file = Path(folder) / "config.json"
        raw = read_json_object(file, CheckpointError, "there is no judge in this folder; train one with `python -m "
                               "seed_nano.report.train_judge`")
        try:
            config = JudgeConfig(**{**raw, "widths": tuple(raw["widths"]), "blocks": tuple(raw["blocks"])})
            judge = cls(config)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{file}: not a config of a judge of scenes ({error}).") from error
        if list(config.labels.items()) != list(JudgeConfig().labels.items()):
            raise CheckpointError(f"{file}: a judge of another world: its things, styles, backgrounds or layouts are "
                                  "not those of data/nano; train one with `python -m "
                                  "seed_nano.report.train_judge`.")
        source = file.with_name("model.safetensors")
        state = load_state_dict(source)
        assign_strictly(judge, {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, source)
        return judge.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `config.json` and `model.safetensors` (fp16) into `folder`, the weights first."""
        target = Path(folder)
        state = {k: v.half() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        save_state_dict(state, target / "model.safetensors")
        replace_text(target / "config.json", json.dumps(asdict(self.config), ensure_ascii=False) + "\n")
        return target

    @torch.inference_mode()
    def read(self, pictures: Pictures, batch: int = 256) -> tuple[Tensor, Tensor]:
        """Class numbers int64 [N, 5] in the order of `config.labels`, and unit vectors [N, D], of PIL pictures of any
        sizes or uint8 [N, H, W, 3]."""
        device, labels, features = self.where.device, [], []
        for start in range(0, len(pictures), batch):
            pixels = pixels_of(pictures[start : start + batch], self.config.image_size)
            found = self(pixels.to(device, memory_format=torch.channels_last))
            labels.append(torch.stack([logits.argmax(1) for logits in found.logits.values()], 1).cpu())
            features.append(F.normalize(found.features, dim=1).cpu())
        if not labels:
            return torch.zeros(0, len(self.config.labels), dtype=torch.long), torch.zeros(0, self.features)
        return torch.cat(labels), torch.cat(features)

    @property
    def features(self) -> int:
        """Width of the vectors that `read` gives."""
        return 2 * self.thing.in_features + self.layout.in_features

    def labels(self, pictures: Pictures) -> Tensor:
        """Class numbers int64 [N, 5] of `read`."""
        return self.read(pictures)[0]

    def embed_images(self, pictures: Pictures) -> Tensor:
        """Unit vectors float32 [N, D] of `read`."""
        return self.read(pictures)[1]


def pixels_of(pictures: Pictures, size: int) -> Tensor:
    """Pictures as float32 [N, 3, size, size] in -1..1; shrinking averages areas, so no detail is aliased.

    Raises:
        DataError: when an array is not uint8 [N, H, W, 3].
    """
    if isinstance(pictures, np.ndarray):
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
            raise DataError(f"the judge needs uint8 pictures [N, H, W, 3], got {pictures.dtype} {pictures.shape}.")
        return shrink(torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1, size)
    rows = [torch.from_numpy(np.array(p.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1 for p in pictures]
    return torch.cat([shrink(row[None], size) for row in rows]) if rows else torch.zeros(0, 3, size, size)


def shrink(pixels: Tensor, size: int) -> Tensor:
    """[N, 3, H, W] → [N, 3, size, size] by area means, or bilinear where a side must grow."""
    if min(pixels.shape[-2:]) >= size:
        return F.interpolate(pixels, size=(size, size), mode="area")
    return F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)


def find_judge(model: str | Path, given: str | Path | None = None) -> Path:
    """Folder of the scorer: `given`, or the system's own if it holds one, or the shipped one (of no system)."""
    if given is not None:
        return Path(given)
    own = (locate_system(model) or Path(model)) / "judge"
    return own if (own / "config.json").is_file() else locate(SHIPPED) or own
