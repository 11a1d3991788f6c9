"""Torch files with wrong bytes end in a sentence, whatever torch's reader makes of them."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seed_multimodal.errors import CheckpointError
from seed_multimodal.weights import load_state_dict, save_state_dict


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [True, False])
def test_wrong_bytes_are_refused_or_read_but_never_break(zipped: bool, tmp_path: Path) -> None:
    whole, file, draw = io.BytesIO(), tmp_path / "a.pt", random.Random(0)
    torch.save({"a": torch.randn(4, 4), "b": torch.ones(3)}, whole, _use_new_zipfile_serialization=zipped)
    refused = 0
    for number in range(1500):
        content = bytearray(whole.getvalue())
        for _ in range(draw.randint(1, 3)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        file.write_bytes(content)
        try:
            load_state_dict(file, mapped=number % 2 == 0)
        except CheckpointError as error:
            assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
            refused += 1
    assert refused > 300


@pytest.mark.parametrize("wrappers", [("model",), ("module", "model"), ("module", "state_dict")])
def test_wrapped_states_are_unwrapped(wrappers: tuple[str, ...], tmp_path: Path) -> None:
    wrapped: dict[str, object] = {"a": torch.ones(2)}
    for wrapper in wrappers:
        wrapped = {wrapper: wrapped, "epoch": 3}
    torch.save(wrapped, tmp_path / "a.pt")
    for mapped in (True, False):
        assert list(load_state_dict(tmp_path / "a.pt", mapped=mapped)) == ["a"]


def test_mapped_tensors_are_the_same(tmp_path: Path) -> None:
    state = {"a": torch.randn(4, 4)}
    for zipped in (True, False):
        torch.save({"state_dict": state}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        assert torch.equal(load_state_dict(tmp_path / "a.pt", mapped=True)["a"], state["a"])


def test_load_state_dict_keeps_names_that_are_texts(tmp_path: Path) -> None:
    torch.save({0: torch.ones(2), "a": torch.ones(2)}, tmp_path / "a.pt")
    assert list(load_state_dict(tmp_path / "a.pt")) == ["a"]


FULL_DISK = """
import resource, signal, sys, torch
from seed_multimodal.weights import save_state_dict
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    save_state_dict({"a": torch.zeros(10_000)}, sys.argv[1])
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as POSIX does")
def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_state_dict({"a": torch.ones(2)}, file)
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(file)], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")})
    assert "File too large" in done.stdout, done.stderr
    assert torch.equal(load_state_dict(file)["a"], torch.ones(2)) and list(tmp_path.iterdir()) == [file]
