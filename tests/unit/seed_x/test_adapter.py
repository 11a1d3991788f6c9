"""SDXLAdapter: layouts of checkpoints (outputs and gradients: golden kind `seedx_sdxl_adapter`;
condition channels: `unit/training/seed_x/test_detokenizer.py`).
"""

import pytest
import torch
from tensors import equal
from tiny import write_json
from tiny.diffusion import RESAMPLER, random_adapter, write_sdxl

from seed_multimodal.diffusion.training import reads_images
from seed_multimodal.models.seed_x.adapter import SDXLAdapter


@pytest.mark.parametrize("name", ["a.bin", "original folder", "saved folder"])
def test_from_pretrained_layouts(name, tmp_path):
    # Each layout of the original and ours has the same weights.
    adapter = random_adapter(2)
    state = adapter.state_dict()
    path = tmp_path if "folder" in name else tmp_path / name
    write_json(tmp_path / "resampler.json", vars(RESAMPLER))
    if name == "saved folder":
        adapter.save_pretrained(tmp_path)
    else:
        file = tmp_path / "pytorch_model.bin" if path == tmp_path else path
        torch.save({"module": state}, file)
    loaded = SDXLAdapter.from_pretrained(path, write_sdxl(tmp_path / "sdxl", complete=False))
    assert reads_images(loaded.unet)
    assert not loaded.training
    assert equal(loaded.state_dict(), state)
