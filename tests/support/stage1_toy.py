"""Stage 1 of LaVIT on synthetic features; also a program: `python stage1_toy.py FOLDER
'{"max_steps": 40}'`.

An image has one background in its 16 patches and objects in 0 to 8 of them, so images need
different numbers of tokens. Under torchrun it trains with DistributedDataParallel over gloo.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seed_multimodal.errors import SeedError
from seed_multimodal.models.lavit.decoder import CodeDecoder, LavitDecoderConfig
from seed_multimodal.models.lavit.losses import LavitStage1, LavitStage1Output
from seed_multimodal.models.lavit.modeling import DynamicTokenizer, LavitTokenizerConfig
from seed_multimodal.models.lavit.train_tokenizer import LavitTokenizerTask
from seed_multimodal.nn.vision.eva import EvaConfig
from seed_multimodal.training.codebook import CodebookHealth
from seed_multimodal.training.config import StageSettings
from seed_multimodal.training.trainer import train_stage

PATCHES = 16
WIDTH = 32
CODES = 32
CODE = 16
SIZES = LavitTokenizerConfig(
    vit=EvaConfig(image_size=32, patch_size=8, width=WIDTH, depth=1, heads=2, mlp_width=32),
    vit_head=0,
    merger_depth=1,
    merger_heads=2,
    merger_mlp_width=64,
    codebook_size=CODES,
    codebook_dim=CODE,
    llm_width=8,
)
DECODER = LavitDecoderConfig(
    head="lowres",
    tokens=PATCHES,
    code_dim=CODE,
    width=WIDTH,
    depth=1,
    heads=2,
    mlp_width=64,
    feature_dim=WIDTH,
    prompt_dim=8,
)


class Repeatable(LavitStage1):
    """Seeds the rng of each image by the image, so that results do not depend on the process that
    has it."""

    def forward(self, batch: Tensor, **more: Any) -> LavitStage1Output:
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds(batch).tolist()]
        return super().forward(batch, generator=generators, **more)

    def flipped_patches(self, features_BND: Tensor) -> Tensor:
        return self.seeds(features_BND) % PATCHES

    def seeds(self, batch: Tensor) -> Tensor:
        return (batch.flatten(1)[:, 0] * 1e6).round().long().abs()


def stage1(kind: type[LavitStage1] = LavitStage1, seed: int = 0, **options: Any) -> LavitStage1:
    """A model, the same at every call."""
    torch.manual_seed(seed)
    model = kind(DynamicTokenizer(SIZES), CodeDecoder(DECODER), **options)
    for layer in model.decoder.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    model.init_keep_share()
    return model


def images(count: int = 256, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Features `[count, 16, 32]` and the number of objects in each image (0, 2, 4, 6 or 8)."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(7))
    objects = 2 * torch.randint(5, (count,), generator=generator)
    grounds = kinds[torch.randint(4, (count,), generator=generator)]
    features = grounds[:, None].repeat(1, PATCHES, 1)
    for index in range(count):
        patches = torch.randperm(PATCHES, generator=generator)[: objects[index]]
        features[index, patches] = kinds[
            4 + torch.randint(20, (len(patches),), generator=generator)
        ]
    patches_ND = torch.randn(
        PATCHES, WIDTH, generator=torch.Generator().manual_seed(8)
    )  # as position embeddings
    return features + patches_ND + 0.05 * torch.randn(features.shape, generator=generator), objects


def train(
    folder: Path,
    *,
    name: str = "tokenizer",
    health: dict[str, Any] | None = None,
    repeatable: bool = False,
    freeze_selector: bool = False,
    selector_lr_scale: float = 1.0,
    **settings: Any,
) -> tuple[LavitStage1, dict[str, Any]]:
    """One run; returns the model and its record."""
    data, _ = images()
    model = stage1(Repeatable if repeatable else LavitStage1, freeze_selector=freeze_selector)
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    choices = {
        "max_steps": 12,
        "batch_size": 16,
        "learning_rate": 3e-3,
        "warmup_steps": 5,
        "seed": 3,
        "precision": "fp32",
        "logging_steps": 1,
        "save_seconds": 1e9,
        "curves": False,
        **settings,
    }

    def batch(micro_step: int) -> Tensor:
        size = choices["batch_size"]
        first = (micro_step * world + rank) * size
        return data[(first + torch.arange(size)) % len(data)]

    task = LavitTokenizerTask(
        name,
        model,
        StageSettings(**choices),
        batch,
        CodebookHealth(**(health or {})),
        selector_lr_scale=selector_lr_scale,
    )
    return model, train_stage(task, folder)


def main(folder: Path, *runs: str) -> int:
    """Train; each process saves its weights."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    try:
        for run in map(json.loads, runs):
            model, _ = train(folder, **run)
            torch.save(
                model.state_dict(),
                folder / f"{run.get('name', 'tokenizer')}.{os.environ.get('RANK', 0)}.pt",
            )
    except SeedError as error:
        print(f"refused: {error}", flush=True)
        return 2
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
