"""`src/tools/reload_qwen_vit.py`: the vision encoder from Qwen-VL-Chat's shards."""

import pytest
from tensors import equal
from tiny.seed_x import TOWER, write_qwen_vl

from seed_multimodal.compat.weight_programs import reload_script
from seed_multimodal.nn.vision.qwen import QwenVit


@pytest.mark.parametrize("torch_files", [True, False])
def test_reload_of_shards_in_both_formats(torch_files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "pretrained" / "Qwen-VL-Chat"
    encoder = write_qwen_vl(source, torch_files=torch_files)
    language, vision, *_ = sorted(source.glob("*-of-*"))
    language.unlink()  # is not needed
    assert reload_script([]) == 0
    file = tmp_path / "pretrained" / "QwenViT" / "qwen_vit_G.pt"
    loaded = QwenVit.from_pretrained(file, config=TOWER)
    assert equal(encoder.float().state_dict(), loaded.state_dict())

    # It replaces nothing unasked, and names what is missing.
    assert reload_script([]) == 2
    vision.unlink()
    assert reload_script(["--force"]) == 2
    assert vision.name in capsys.readouterr().err
