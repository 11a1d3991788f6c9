"""SDXLAdapter: condition channels, checkpoints (outputs and gradients: golden kind
`seedx_sdxl_adapter`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny.diffusion import FEATURES, RESAMPLER, random_adapter, write_sdxl
from torch import Tensor

from seed_multimodal.diffusion.training import size_ids
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.models.seed_x.adapter import SDXLAdapter


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
def test_add_condition_channels_keeps_the_output(inputs: dict[str, Tensor]):
    adapter = random_adapter()
    condition = torch.randn(2, 4, 8, 8)
    before = adapter(**inputs)
    bias = adapter.unet.conv_in.bias
    for _ in range(2):  # a second call changes nothing
        adapter.add_condition_channels()
        assert adapter.reads_condition and adapter.unet.config.in_channels == 8
        assert adapter.unet.conv_in.weight.shape == (8, 8, 3, 3) and torch.equal(
            adapter.unet.conv_in.bias, bias
        )
    torch.testing.assert_close(adapter(**inputs), before)
    torch.testing.assert_close(adapter(**inputs, condition_latents=condition), before)
    trained = random_adapter(stage=2)
    assert not torch.allclose(trained(**inputs), trained(**inputs, condition_latents=condition))


@pytest.mark.parametrize("name", ["a.bin", "a.safetensors", "original folder", "saved folder"])
def test_from_pretrained_layouts(name, folder: Path, tmp_path, inputs: dict[str, Tensor]):
    adapter = random_adapter(2)
    state = random_adapter(2).state_dict()
    path = tmp_path if "folder" in name else tmp_path / name
    if name == "saved folder":
        adapter.save_pretrained(tmp_path)
    else:
        (tmp_path / "resampler.json").write_text(json.dumps(vars(RESAMPLER)))
        if name == "a.safetensors":
            save_file(state, path)
        elif name == "a.bin":
            torch.save(state, path)
        else:
            torch.save({"module": state}, tmp_path / "pytorch_model.bin")
    loaded = SDXLAdapter.from_pretrained(path, folder)
    report = loaded.load_report
    assert report is not None and (len(report.loaded), report.missing, report.ignored) == (
        len(state),
        [],
        [],
    )
    assert loaded.reads_condition and not loaded.training
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs), adapter(**inputs))
    half = SDXLAdapter.from_pretrained(path, folder, dtype=torch.bfloat16)
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}


def test_from_pretrained_of_wrong_files(folder: Path, tmp_path):
    def assert_error(message: str, error: Any = CheckpointError) -> None:
        with pytest.raises(error, match=message):
            SDXLAdapter.from_pretrained(tmp_path / "saved", folder)

    assert_error(r"no such folder; seed fetch seed-x downloads AILab-CVC")
    random_adapter().save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    sizes = tmp_path / "saved" / "resampler.json"
    state = load_file(file)
    save_file({name: value for name, value in state.items() if name != "unet.conv_out.bias"}, file)
    assert_error("1 tensors are missing from the file: 'unet.conv_out.bias'")
    save_file(state, file)
    sizes.write_text(json.dumps({**vars(RESAMPLER), "num_queries": 5}))
    assert_error(r"resampler.latents': the file has \(1, 4, 16\), the model needs \(1, 5, 16\)")
    sizes.write_text('{"dims": 3}')
    assert_error(r"resampler.json: unknown key 'dims' \(did you mean 'dim'\?\)", ConfigError)
