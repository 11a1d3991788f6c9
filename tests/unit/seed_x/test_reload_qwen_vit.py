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
def test_reload_of_shards_in_both_formats(torch_files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "pretrained" / "Qwen-VL-Chat"
    encoder = write_qwen_vl(source, torch_files=torch_files)
    language, vision, *_ = sorted(source.glob("*-of-*"))
    language.unlink()  # is not needed
    assert reload_script([]) == 0
    file = tmp_path / "pretrained" / "QwenViT" / "qwen_vit_G.pt"
    state = load_state_dict(file)
    assert state.keys() == encoder.state_dict().keys()
    assert equal(encoder.state_dict(), state)
    pixels = torch.randn(1, 3, VIEW, VIEW)
    loaded = QwenVit.from_pretrained(file, config=TOWER)
    assert torch.equal(loaded(pixels), encoder.float().eval()(pixels))

    # It replaces nothing unasked, and names what is missing.
    assert reload_script([]) == 2
    vision.unlink()
    assert reload_script(["--force"]) == 2
    assert vision.name in capsys.readouterr().err
    assert reload_script(["--source", str(tmp_path / "nowhere"), "--force"]) == 2
    assert "Qwen/Qwen-VL-Chat" in capsys.readouterr().err
