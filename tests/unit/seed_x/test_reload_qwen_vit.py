"""`src/tools/reload_qwen_vit.py`: the vision encoder out of Qwen-VL-Chat's shards of both formats."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import tiny_seed_x
import torch
import warm_python

from seed_multimodal.cli import reload_qwen_vit
from seed_multimodal.seed_x.vision import QwenVit
from seed_multimodal.weights import load_state_dict

PROGRAM = Path(__file__).resolve().parents[3] / "src" / "tools" / "reload_qwen_vit.py"


@pytest.mark.process
def test_program_without_flags(tmp_path: Path) -> None:
    encoder = tiny_seed_x.write_qwen_vl(tmp_path / "pretrained" / "Qwen-VL-Chat")
    run = subprocess.run([warm_python.PYTHON, str(PROGRAM)], cwd=tmp_path, text=True, capture_output=True, timeout=170)
    assert run.returncode == 0, run.stderr
    file = tmp_path / "pretrained" / "QwenViT" / "qwen_vit_G.pt"
    state = load_state_dict(file)
    assert state.keys() == encoder.state_dict().keys() and f"{len(state)} tensors" in run.stderr
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
    pixels = torch.randn(1, 3, tiny_seed_x.SIZE, tiny_seed_x.SIZE)
    again = QwenVit.from_pretrained(file, config=tiny_seed_x.TOWER)
    assert torch.equal(again(pixels), encoder.float().eval()(pixels))


@pytest.mark.parametrize("torch_files", [True, False])
def test_reload_both_formats_without_the_language_models_shard(
    torch_files: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder, out = tiny_seed_x.write_qwen_vl(tmp_path / "qwen", torch_files=torch_files), tmp_path / "q.pt"
    shards = sorted((tmp_path / "qwen").glob("*-of-*"))
    shards[0].unlink()
    flags = ["--source", str(tmp_path / "qwen"), "--out", str(out), "--dtype", "fp32"]
    assert reload_qwen_vit.main(flags) == 0
    state = load_state_dict(out)
    assert all(torch.equal(value.float(), state[name]) for name, value in encoder.state_dict().items())
    assert reload_qwen_vit.main(flags) == 2 and "exists already" in capsys.readouterr().err
    shards[1].unlink()
    assert reload_qwen_vit.main([*flags, "--force"]) == 2
    assert f"{shards[1]}: there is no such weights file" in capsys.readouterr().err
    flags[1] = str(tmp_path / "nowhere")
    assert reload_qwen_vit.main([*flags, "--force"]) == 2
    assert "download Qwen/Qwen-VL-Chat" in capsys.readouterr().err
