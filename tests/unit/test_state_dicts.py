"""Loading and saving weights: wrapped states, shared tensors, full disks. Damaged files:
`test_torch_files.py` and `nightly/test_fuzz.py`."""

import pytest
import torch
from full_disk import file_size_limit
from tensors import equal
from torch.utils._python_dispatch import TorchDispatchMode

from seed_multimodal.errors import CheckpointError
from seed_multimodal.state_dicts import load_state_dict, save_state_dict


@pytest.mark.parametrize("wrappers", [("model",), ("module", "model"), ("module", "state_dict")])
def test_load_state_dict_unwraps_states(wrappers, tmp_path):
    # As trainers wrap them; names that are no texts are of optimizers.
    wrapped = {"a": torch.ones(2), 0: torch.ones(2)}
    for wrapper in wrappers:
        wrapped = {wrapper: wrapped, "epoch": 3}
    torch.save(wrapped, tmp_path / "a.pt")
    assert list(load_state_dict(tmp_path / "a.pt")) == ["a"]


class Clones(TorchDispatchMode):
    """Counts the tensors that are cloned."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten.clone.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
def test_load_state_dict_names_what_is_no_weights(name, tmp_path):
    # A clone without Git LFS, or a download that was an error page.
    for content, named in ((b"version https://git-lfs.", "git lfs pull"), (b"<html>", "HTML")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=named):
            load_state_dict(tmp_path / name)


def test_save_state_dict_copies_only_shared_tensors(tmp_path):
    # A copy of all weights would need twice the memory.
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
    assert loaded.keys() == state.keys()
    assert equal(state, loaded)


def test_save_state_dict_on_a_full_disk(tmp_path):
    # The earlier file stays, and nothing beside it.
    file = tmp_path / "a.safetensors"
    save_state_dict({"a": torch.ones(2)}, file)
    with file_size_limit(2000), pytest.raises(OSError):
        save_state_dict({"a": torch.zeros(10_000)}, file)
    assert torch.equal(load_state_dict(file)["a"], torch.ones(2))
    assert [*tmp_path.iterdir()] == [file]
