"""`src/tools/reload_qwen_vit.py`: the vision encoder from Qwen-VL-Chat's shards."""

from __future__ import annotations

import pytest
import torch
from tensors import equal
from tiny.seed_x import TOWER, VIEW, write_qwen_vl

from seed_multimodal.compat.weight_programs import reload_script
from seed_multimodal.nn.vision.qwen import QwenVit
from seed_multimodal.weights import load_state_dict


@pytest.mark.parametrize("torch_files", [True, False])
def test_reload_of_shards_in_both_formats(
    torch_files,
    tmp_path,
    monkeypatch,
    capsys,
):
    monkeypatch.chdir(tmp_path)
    encoder = write_qwen_vl(tmp_path / "pretrained" / "Qwen-VL-Chat", torch_files=torch_files)
    shards = sorted((tmp_path / "pretrained" / "Qwen-VL-Chat").glob("*-of-*"))
    shards[0].unlink()  # holds the language model only
    assert reload_script([]) == 0
    file = tmp_path / "pretrained" / "QwenViT" / "qwen_vit_G.pt"
    state = load_state_dict(file)
    assert state.keys() == encoder.state_dict().keys()
    assert equal(encoder.state_dict(), state)
    pixels = torch.randn(1, 3, VIEW, VIEW)
    again = QwenVit.from_pretrained(file, config=TOWER)
    assert torch.equal(again(pixels), encoder.float().eval()(pixels))
    assert reload_script([]) == 2 and "exists already" in capsys.readouterr().err
    shards[1].unlink()
    assert reload_script(["--force"]) == 2
    assert f"{shards[1].name}: no such weights file" in capsys.readouterr().err
    assert reload_script(["--source", str(tmp_path / "nowhere"), "--force"]) == 2
    assert "download Qwen/Qwen-VL-Chat" in capsys.readouterr().err
