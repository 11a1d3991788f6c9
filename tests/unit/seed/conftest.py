"""A tiny SEED-2 configuration and a tiny SEED-1 folder."""

from pathlib import Path

import pytest
import torch
from random_images import noise
from tensors import normal
from tiny.diffusion import write_sd1
from tiny.seed import SIZES, seed1_tokenizer

from seed_multimodal.models.seed.configuration import Seed2Config


@pytest.fixture(autouse=True)
def _seeded(tmp_path, monkeypatch):
    """Equal random numbers, no downloads, and no vision encoder in a cache."""
    torch.manual_seed(0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch_hub"))


@pytest.fixture
def tiny() -> Seed2Config:
    return Seed2Config(**SIZES, decode_heads=12, image_features_dim=10, reverse_depth=2)


@pytest.fixture
def images() -> torch.Tensor:
    return normal(1, 5, 3, 16, 16)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """SEED-1 as in `pretrained/`, with its Stable Diffusion and three images."""
    folder = tmp_path_factory.mktemp("pretrained")
    seed1_tokenizer().save_pretrained(folder)
    write_sd1(folder / "stable-diffusion-v1-4")
    for index in range(3):
        noise(index, (30 + index, 20)).save(folder / f"{index}.png")
    return folder
