"""Stage 1 of LaVIT on synthetic features.

An image has one background in its 16 patches and objects in 0 to 8 of them, so images need
different numbers of tokens.
"""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from tensors import normal
from tiny import lavit
from torch import Tensor

from seed_multimodal.models.lavit.decoder import CodeDecoder
from seed_multimodal.models.lavit.modeling import DynamicTokenizer
from seed_multimodal.recipes.lavit.losses import LavitStage1
from seed_multimodal.recipes.lavit.train_tokenizer import LavitTokenizerTask
from seed_multimodal.training.codebook import CodebookHealth
from seed_multimodal.training.config import StageSettings
from seed_multimodal.training.trainer import train_stage

PATCHES = 16
WIDTH = 32
CODES = 32
CODE = 16
SIZES = replace(lavit.TOKENIZER, vit_head=0, merger_depth=1, codebook_size=CODES, codebook_dim=CODE)
DECODER = replace(
    lavit.DECODER, head="lowres", code_dim=CODE, width=WIDTH, mlp_width=64, prompt_dim=8
)


def stage1(**options) -> LavitStage1:
    """A model, the same at every call."""
    torch.manual_seed(0)
    model = LavitStage1(DynamicTokenizer(SIZES), CodeDecoder(DECODER), **options)
    # So that outputs depend on codes from the start.
    for layer in model.decoder.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    model.init_keep_share()
    return model


def images(count=256, seed=1) -> tuple[Tensor, Tensor]:
    """Features `[count, 16, 32]` and the number of objects in each image (0, 2, 4, 6 or 8)."""
    generator = torch.Generator().manual_seed(seed)
    kinds = normal(7, 24, WIDTH)
    objects = 2 * torch.randint(5, (count,), generator=generator)
    grounds = kinds[torch.randint(4, (count,), generator=generator)]
    features = grounds[:, None].repeat(1, PATCHES, 1)
    # Objects replace the background in random patches.
    for index in range(count):
        patches = torch.randperm(PATCHES, generator=generator)[: objects[index]]
        features[index, patches] = kinds[
            4 + torch.randint(20, (len(patches),), generator=generator)
        ]
    patches_ND = normal(8, PATCHES, WIDTH)  # as position embeddings
    return features + patches_ND + 0.05 * torch.randn(features.shape, generator=generator), objects


def train(
    folder,
    *,
    health: dict | None = None,
    rank=0,
    world=1,
    **settings,
) -> tuple[LavitStage1, dict]:
    """One run; returns the model and its record."""
    data, _ = images()
    model = stage1()
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

    # The images in turn, each process its own.
    def batch(micro_step) -> Tensor:
        size = choices["batch_size"]
        first = (micro_step * world + rank) * size
        return data[(first + torch.arange(size)) % len(data)]

    task = LavitTokenizerTask(
        "tokenizer", model, StageSettings(**choices), batch, CodebookHealth(**(health or {}))
    )
    return model, train_stage(task, folder)


def train_in_two(rank, folder: str):
    """One of two processes that train together; saves its weights as `RANK.pt`."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model, _ = train(Path(folder) / "run", max_steps=4, rank=rank, world=2)
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
