"""A tiny SEED-2 configuration and a tiny SEED-1 folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_seed1
import torch
from PIL import Image

from seed_multimodal.nn.eva import EvaConfig
from seed_multimodal.seed.configuration import QFormerConfig, Seed2Config


@pytest.fixture(autouse=True)
def _seeded(tmp_path, monkeypatch) -> None:
    """Equal random numbers, no downloads, and no vision encoder in a cache."""
    torch.manual_seed(0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch_hub"))


@pytest.fixture
def tiny() -> Seed2Config:
    return Seed2Config(
        vit=EvaConfig(image_size=16, patch_size=8, width=16, depth=2, heads=2, mlp_width=24),
        qformer=QFormerConfig(
            width=24, depth=3, heads=2, mlp_width=32, max_positions=40, dropout=0.1
        ),
        codebook_size=50,
        codebook_dim=6,
        decode_depth=1,
        decode_heads=12,
        image_features_dim=10,
        reverse_depth=2,
    )


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """SEED-1 as in `pretrained/`, with its Stable Diffusion and three images."""
    folder = tmp_path_factory.mktemp("pretrained")
    tiny_seed1.tokenizer().save_pretrained(folder)
    tiny_seed1.diffusion_folder(folder / "stable-diffusion-v1-4")
    for index in range(3):
        image = np.random.default_rng(index).integers(0, 256, (20, 30 + index, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{index}.png")
    return folder
