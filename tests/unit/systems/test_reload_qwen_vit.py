"""`src/tools/reload_qwen_vit.py`: the tower out of Qwen-VL-Chat's shards of both formats, at once or after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_seed_x
import torch
import warm_python

from seed_multimodal.commands import reload_qwen_vit
from seed_multimodal.vision.qwen_vit import QwenVit
from seed_multimodal.weights import load_state_dict, save_state_dict

ROOT = Path(__file__).resolve().parents[3]


def reload(*words: str) -> int:
    return reload_qwen_vit.main(list(words))


@pytest.mark.process
def test_the_command_without_flags(tmp_path: Path) -> None:
    """Where the originals' folders are, in another process."""
    tower = tiny_seed_x.write_qwen_vl(tmp_path / "pretrained" / "Qwen-VL-Chat")
    done = subprocess.run([warm_python.PYTHON, str(ROOT / "src/tools/reload_qwen_vit.py")], cwd=tmp_path, text=True,
                          capture_output=True, timeout=170)
    assert done.returncode == 0, done.stderr
    made = tmp_path / "pretrained" / "QwenViT" / "qwen_vit_G.pt"
    state = load_state_dict(made)
    assert state.keys() == tower.state_dict().keys() and f"{len(state)} tensors" in done.stderr
    assert all(torch.equal(value, state[name]) for name, value in tower.state_dict().items())
    assert not list(made.parent.glob(".*"))
    pixels = torch.randn(1, 3, tiny_seed_x.SIZE, tiny_seed_x.SIZE)
    assert torch.equal(QwenVit.from_pretrained(made)(pixels), tower.float().eval()(pixels))


@pytest.mark.parametrize("torch_files", [True, False])
def test_both_formats_and_other_precision(torch_files: bool, tmp_path: Path) -> None:
    tower = tiny_seed_x.write_qwen_vl(tmp_path / "qwen", torch_files=torch_files)
    out = str(tmp_path / "q.pt")
    assert reload("--source", str(tmp_path / "qwen"), "--out", out, "--dtype", "fp32") == 0
    state = load_state_dict(out)
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert all(torch.equal(value.float(), state[name]) for name, value in tower.state_dict().items())


def test_shards_of_the_language_model_need_not_be_there(tmp_path: Path) -> None:
    tiny_seed_x.write_qwen_vl(tmp_path / "qwen")
    (tmp_path / "qwen" / "pytorch_model-00001-of-00003.bin").unlink()
    assert reload("--source", str(tmp_path / "qwen"), "--out", str(tmp_path / "q.pt")) == 0


def test_a_command_that_failed_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second shard is torn: the first one's part stays, and is taken when the shard is whole again."""
    tower = tiny_seed_x.write_qwen_vl(tmp_path / "qwen")
    last = tmp_path / "qwen" / "pytorch_model-00003-of-00003.bin"
    whole = last.read_bytes()
    last.write_bytes(whole[:len(whole) // 2])
    out = tmp_path / "q.pt"
    words = ("--source", str(tmp_path / "qwen"), "--out", str(out))
    assert reload(*words) == 2
    assert "pytorch_model-00003-of-00003.bin: not a complete torch checkpoint" in capsys.readouterr().err
    assert not out.exists()
    last.write_bytes(whole)
    first = tmp_path / "qwen" / "pytorch_model-00002-of-00003.bin"
    assert reload(*words) == 0
    assert f"{first.name}: taken from an earlier run" in capsys.readouterr().err
    assert all(torch.equal(value, load_state_dict(out)[name]) for name, value in tower.state_dict().items())
    assert reload(*words) == 2 and "exists already" in capsys.readouterr().err
    assert reload(*words, "--force") == 0


KILLED = """
import os, sys
import seed_multimodal.weights as weights
calls, real = [], weights.save_torch
def save(*given):
    calls.append(given)
    if len(calls) == 2:
        os.kill(os.getpid(), 9)
    real(*given)
weights.save_torch = save
from seed_multimodal.commands.reload_qwen_vit import main
main(sys.argv[1:])
"""


@pytest.mark.process
def test_sigkill_between_two_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tower = tiny_seed_x.write_qwen_vl(tmp_path / "qwen")
    out = tmp_path / "q.pt"
    words = ["--source", str(tmp_path / "qwen"), "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], timeout=170,
                          env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    assert done.returncode == -9 and not out.exists() and len(list((tmp_path / ".q.pt.parts").glob("*.pt"))) == 1
    assert reload(*words) == 0
    assert capsys.readouterr().err.count("taken from an earlier run") == 1
    assert all(torch.equal(value, load_state_dict(out)[name]) for name, value in tower.state_dict().items())
    assert not (tmp_path / ".q.pt.parts").exists()


def test_another_shard_of_that_name_is_read_again(tmp_path: Path) -> None:
    tiny_seed_x.write_qwen_vl(tmp_path / "qwen")
    last = tmp_path / "qwen" / "pytorch_model-00003-of-00003.bin"
    whole = torch.load(last, weights_only=True)
    name = next(iter(whole))
    torch.save({key: value for key, value in whole.items() if key != name}, last)
    words = ("--source", str(tmp_path / "qwen"), "--out", str(tmp_path / "q.pt"))
    assert reload(*words) == 2
    torch.save({**whole, name: torch.full_like(whole[name], 3.0)}, last)
    assert reload(*words) == 0
    made = load_state_dict(tmp_path / "q.pt")[name.removeprefix("transformer.visual.")]
    assert made.unique().tolist() == [3.0]


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        assert reload(*words) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    out = ("--out", str(tmp_path / "q.pt"))
    assert "there is no such folder; download Qwen/Qwen-VL-Chat" in refused("--source", str(tmp_path / "no"), *out)
    tiny_seed_x.write_qwen_vl(tmp_path / "qwen")
    source = ("--source", str(tmp_path / "qwen"))
    assert "Unknown dtype 'int3'" in refused(*source, *out, "--dtype", "int3")
    assert "must end in .pt" in refused(*source, "--out", str(tmp_path / "q.txt"))
    index = tmp_path / "qwen" / "pytorch_model.bin.index.json"
    places = json.loads(index.read_text())
    for file in ("pytorch_model-00002-of-00003.bin", "pytorch_model-00003-of-00003.bin"):
        (tmp_path / "qwen" / file).rename(tmp_path / file)
    assert "2 of the 2 shards that hold the vision tower are not there: pytorch_model-00002-of-00003.bin, " in refused(
        *source, *out)
    index.write_text(json.dumps({"weight_map": {"transformer.h.0.weight": "a.bin"}}))
    assert "names no tensors of a vision tower" in refused(*source, *out)
    index.write_text("{}")
    assert "not an index of shards" in refused(*source, *out)
    index.unlink()
    assert "holds no tensors of a vision tower" in refused(*source, *out)
    part = torch.load(tmp_path / "pytorch_model-00002-of-00003.bin", weights_only=True)
    save_state_dict({**part, "transformer.visual.proj": torch.zeros(2, 2)}, tmp_path / "other" / "model.safetensors")
    assert "tensors are missing from the vision tower: " in refused("--source", str(tmp_path / "other"), *out)
    assert places and not (tmp_path / "q.pt").exists()


def test_a_tensor_of_another_size_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_seed_x.write_qwen_vl(tmp_path / "qwen", shards=2, torch_files=False)
    file = tmp_path / "qwen" / "model-00002-of-00002.safetensors"
    save_state_dict({**load_state_dict(file), "transformer.visual.proj": torch.zeros(2, 2)}, file)
    assert reload("--source", str(tmp_path / "qwen"), "--out", str(tmp_path / "q.pt")) == 2
    assert "'proj (file (2, 2), model (24, 24))'" in capsys.readouterr().err


def test_the_released_tower_has_594_tensors() -> None:
    from seed_multimodal.vision.qwen_vit import QwenVitConfig

    wanted = reload_qwen_vit._wanted(QwenVitConfig())
    assert len(wanted) == 594 and wanted["attn_pool.kv_proj.weight"] == (4096, 1664)
