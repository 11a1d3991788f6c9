"""Stage `known`: the network that tells images unlike the training's from known ones, see
`seed_nano.known_images`.

It learns from images of programs (`seed_nano.known`), the known ones among them also as the system
itself draws them, as the finished system's codes or features lead to expect them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.disk import read_json_object, replace_json
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_multimodal.pipelines.config import SYSTEM, SystemConfig
from seed_nano.known import BATCH, OTHERS, Maker, known, measure
from seed_nano.known_images import Comparison, ComparisonConfig, ImageFamiliarity
from seed_nano.train.task import Loss, NanoTask
from seed_nano.train.workspace import Workspace

KNOWN = "known_images"
DRAWN_EVERY = 8  # of the batches of known images one is drawn by the system
HARD = ("turned", "hybrid", "shapes")  # kinds of which three times as many are learned
FALSE_NOTES = 0.0125  # share of known images that are noted


class KnownTask(NanoTask):
    """Goes to `{out}/known_images`, and into `system.json`."""

    def __init__(self, space: Workspace) -> None:
        torch.manual_seed(space.config.seed)
        self.comparison = Comparison(ComparisonConfig())
        self.folder = space.out / KNOWN
        if not self.folder.is_dir():
            self.comparison.save_pretrained(self.folder)
        count = space.config.known // 2
        make_known = partial(self.pictures, [known], count, seed=0)
        makers = [*OTHERS.values(), *2 * [OTHERS[kind] for kind in HARD]]
        make_others = partial(self.pictures, makers, count, seed=0)
        self.known = space.cached("known", "assemble", make_known, known=count)
        self.others = space.cached("others", "assemble", make_others, known=count)
        super().__init__(space, "known", self.comparison)

    def pictures(self, makers: Sequence[Maker], count: int, seed: int) -> Tensor:
        """Pixels and expected pictures of images, by each program in turn; float16 `[N, 6, S,
        S]`."""
        # 1. A system that collects both, instead of comparing them.
        config = SystemConfig.find(self.folder.parent, known_images=self.folder)
        codec = MultimodalSystem.from_pretrained(config, log=None).images
        codec.familiarity = recorder = _Recorder(codec.familiarity)

        # 2. The images; some known ones as the system draws them.
        for start in range(0, count, BATCH):
            numbers = range(start, start + BATCH)
            images = [
                makers[index % len(makers)](random.Random(f"{seed} {index}")) for index in numbers
            ]
            if makers[0] is known and start // BATCH % DRAWN_EVERY == 0:
                before = len(recorder.pairs)
                images = codec.reconstruct(images, seeds=numbers)
                del recorder.pairs[before:]
            measure(codec, images)
        return torch.cat(recorder.pairs)

    def batch(self, micro_step: int) -> tuple[Tensor, Tensor]:
        """Pictures `[B, 6, S, S]`, half of them known, and whether they are unlike."""
        half = self.settings.batch_size // 2
        rows = [
            side[self.indices(micro_step, len(side), half)] for side in (self.known, self.others)
        ]
        unlike = torch.arange(2).repeat_interleave(half).float()
        return torch.cat(rows).float().to(self.space.device), unlike.to(self.space.device)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Loss:
        pictures, unlike = batch
        if torch.rand(()) < 0.5:
            pictures = pictures.flip(3)
        distances = model(*pictures.split(3, 1)).float()
        right = ((distances > 0) == (unlike > 0)).float().mean()
        return F.binary_cross_entropy_with_logits(distances, unlike), {"right": right}

    @torch.no_grad()
    def save_result(self) -> None:
        """The threshold becomes zero."""
        pictures = self.pictures([known], len(self.known) // 4, seed=1).float()
        network = self.comparison.cpu().eval()
        distances = [network(*batch.split(3, 1)) for batch in pictures.split(256)]
        network.head.bias -= torch.cat(distances).quantile(1 - FALSE_NOTES)
        network.half().save_pretrained(self.folder)
        file = self.folder.parent / SYSTEM
        replace_json(file, {KNOWN: KNOWN, **read_json_object(file)})


class _Recorder(ImageFamiliarity):
    """Collects pictures."""

    def __init__(self, familiarity: Any) -> None:
        super().__init__(familiarity.comparison, familiarity.conditioner, familiarity.vae)
        self.pairs: list[Tensor] = []

    def distances(self, embed: Callable[[], Tensor], pixels: Tensor) -> list[float]:
        self.pairs.append(torch.cat(self.pictures(embed(), pixels), 1).half())
        return [0.0] * len(pixels)
