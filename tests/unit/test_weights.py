"""Loading and saving weights: damaged files, wrapped states, mapped tensors, full disks."""

from __future__ import annotations

import io
import random

import pytest
import torch
from full_disk import file_size_limit
from torch.utils._python_dispatch import TorchDispatchMode

from seed_multimodal.errors import CheckpointError
from seed_multimodal.weights import load_state_dict, save_state_dict


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [True, False])
def test_load_state_dict_of_files_with_wrong_bytes(zipped, tmp_path):
    buffer = io.BytesIO()
    file = tmp_path / "a.pt"
    rng = random.Random(0)
    torch.save(
        {"a": torch.randn(4, 4), "b": torch.ones(3)}, buffer, _use_new_zipfile_serialization=zipped
    )
    errors = 0
    for _ in range(60):
        content = bytearray(buffer.getvalue())
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        file.write_bytes(content)
        try:
            load_state_dict(file)
        except CheckpointError as error:
            assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
            errors += 1
    assert errors > 20


@pytest.mark.parametrize("wrappers", [("model",), ("module", "model"), ("module", "state_dict")])
def test_load_state_dict_unwraps_states(wrappers, tmp_path):
    wrapped: dict[str, object] = {"a": torch.ones(2)}
    for wrapper in wrappers:
        wrapped = {wrapper: wrapped, "epoch": 3}
    torch.save(wrapped, tmp_path / "a.pt")
    assert list(load_state_dict(tmp_path / "a.pt")) == ["a"]


def test_load_state_dict_skips_names_that_are_not_text(tmp_path):
    torch.save({0: torch.ones(2), "a": torch.ones(2)}, tmp_path / "a.pt")
    assert list(load_state_dict(tmp_path / "a.pt")) == ["a"]


class Clones(TorchDispatchMode):
    """Counts the tensors that are cloned."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten.clone.default
        return func(*args, **(kwargs or {}))


def test_save_state_dict_copies_only_shared_tensors(tmp_path):
    weight = torch.arange(12.0).view(3, 4)
    state = {
        "a": weight,
        "tied": weight,
        "row": weight[1],
        "own": torch.ones(3),
        "empty": torch.zeros(0),
    }
    with Clones() as clones:
        file = save_state_dict(state, tmp_path / "a.safetensors")
    assert clones.count == 2
    loaded = load_state_dict(file)
    assert loaded.keys() == state.keys() and all(
        torch.equal(loaded[name], value) for name, value in state.items()
    )


def test_save_state_dict_on_a_full_disk(tmp_path):
    file = tmp_path / "a.safetensors"
    save_state_dict({"a": torch.ones(2)}, file)
    with file_size_limit(2000), pytest.raises(OSError, match="File too large"):
        save_state_dict({"a": torch.zeros(10_000)}, file)
    assert torch.equal(load_state_dict(file)["a"], torch.ones(2)) and list(tmp_path.iterdir()) == [
        file
    ]
