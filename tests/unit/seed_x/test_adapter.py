"""SDXLAdapter: layouts of checkpoints (outputs and gradients: golden kind `seedx_sdxl_adapter`;
condition channels: `unit/training/seed_x/test_detokenizer.py`).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import write_json
from tiny.diffusion import FEATURES, RESAMPLER, random_adapter, write_sdxl
from torch import Tensor

from seed_multimodal.diffusion.training import size_ids
from seed_multimodal.models.seed_x.adapter import SDXLAdapter
from seed_multimodal.state_dicts import save_state_dict


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_sdxl(tmp_path_factory.mktemp("sdxl") / "sdxl", complete=False)


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(0)
    return {
        "noisy_latents": torch.randn(2, 4, 8, 8, generator=make),
        "timesteps": torch.tensor([7, 900]),
        "image_embeds": torch.randn(2, 9, FEATURES, generator=make),
        "time_ids": size_ids((16, 16), count=2),
    }


@torch.no_grad()
@pytest.mark.parametrize("name", ["a.bin", "a.safetensors", "original folder", "saved folder"])
def test_from_pretrained_layouts(name, folder, tmp_path, inputs):
    # Each layout of the original and ours draws the same.
    adapter = random_adapter(2)
    state = adapter.state_dict()
    path = tmp_path if "folder" in name else tmp_path / name
    write_json(tmp_path / "resampler.json", vars(RESAMPLER))
    if name == "saved folder":
        adapter.save_pretrained(tmp_path)
    elif name == "a.safetensors":
        save_state_dict(state, path)
    elif name == "a.bin":
        torch.save(state, path)
    else:
        torch.save({"module": state}, tmp_path / "pytorch_model.bin")
    loaded = SDXLAdapter.from_pretrained(path, folder)
    assert loaded.reads_condition
    assert not loaded.training
    torch.testing.assert_close(loaded(**inputs), adapter(**inputs))
