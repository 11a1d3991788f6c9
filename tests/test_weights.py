"""Torch files with wrong bytes end in a sentence, whatever torch's reader makes of them."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
import torch

from seed_multimodal.errors import CheckpointError
from seed_multimodal.weights import load_state_dict


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


def test_mapped_tensors_are_the_same(tmp_path: Path) -> None:
    state = {"a": torch.randn(4, 4)}
    for zipped in (True, False):
        torch.save({"state_dict": state}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        assert torch.equal(load_state_dict(tmp_path / "a.pt", mapped=True)["a"], state["a"])
