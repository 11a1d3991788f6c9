"""Torch files: the same tensors as by torch, and what a file can do to the process reading it."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from seed_multimodal import torch_files, torch_index
from seed_multimodal.errors import CheckpointError
from seed_multimodal.torch_files import read_torch_file


def content() -> dict[str, object]:
    """A checkpoint with views, shared and odd tensors, and values that are no tensors."""
    weight = torch.arange(12.0).view(3, 4)
    state = {
        "weight": weight,
        "tied": weight,
        "row": weight[1],
        "transposed": weight.t(),
        "expanded": torch.ones(1).expand(5),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "half": torch.randn(5).half(),
        "bfloat16": torch.randn(5).bfloat16(),
        "bool": torch.tensor([True, False, True]),
        "complex": torch.randn(2, dtype=torch.complex64),
        "modules": 7,
    }
    settings = {"lr": 1e-3, "dtype": torch.float16, "device": torch.device("cpu"), 0: {1, 2}}
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"params": [0]}]}
    return {"model": state, "args": settings, "optimizer": optimizer, "size": torch.Size([2])}


def assert_same(read: dict[str, Tensor], expected: dict[str, object]) -> None:
    tensors = {name: value for name, value in expected.items() if isinstance(value, Tensor)}
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype and read[name].stride() == value.stride()
        assert torch.equal(read[name], value), name


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_read_torch_file_as_torch_does(zipped, tmp_path):
    file = tmp_path / "a.pth"
    torch.save(content(), file, _use_new_zipfile_serialization=zipped)
    tmp_path.chmod(0o500)  # nothing is written next to the file
    for mapped in (True, False):
        tensors = read_torch_file(file, mapped)
        assert_same(tensors, torch.load(file, weights_only=True)["model"])
        assert tensors["weight"].data_ptr() == tensors["tied"].data_ptr()
        # Writing changes this process's memory only.
        tensors["weight"].fill_(-1)
        assert tensors["row"].tolist() == [-1] * 4
    # Tensors that are not mapped outlive the file.
    file.write_bytes(b"")
    assert tensors["half"].isfinite().all()


def test_read_torch_file_of_new_dtypes_and_modules(tmp_path):
    # Storages without a class of their own, and a state dict with its metadata.
    module = torch.nn.Linear(3, 2)
    torch.save(module.state_dict(), tmp_path / "module.pt")
    assert_same(read_torch_file(tmp_path / "module.pt"), module.state_dict())
    torch.save(torch.ones(3).to(torch.float8_e4m3fn), tmp_path / "float8.pt")
    tensor = read_torch_file(tmp_path / "float8.pt")[""]
    assert tensor.dtype == torch.float8_e4m3fn and tensor.float().tolist() == [1, 1, 1]


class Touch:
    """An object whose pickle calls a function with arguments."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_read_torch_file_with_code(zipped, tmp_path):
    trace = tmp_path / "trace"
    for function, arguments, name in (
        (os.system, (f"touch {trace}",), "posix.system"),
        (exec, (f"open({str(trace)!r}, 'w')",), "__builtin__.exec"),
        (torch.hub.load, ("folder", "model"), "torch.hub.load"),
    ):
        evil = {"model": {"a": torch.ones(2), "b": Touch(function, *arguments)}}
        file = tmp_path / "evil.bin"
        torch.save(evil, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=rf"unsafe pickle content \({name}\)"):
            read_torch_file(file)
        assert read_torch_file(file, placeholders=True)["a"].tolist() == [1, 1]
    assert not trace.exists()


def zip_file(file: Path, pickled: bytes, storage: bytes = b"") -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", pickled, zipfile.ZIP_DEFLATED)
        archive.writestr("a/data/0", storage)
    return file


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no limit of a process's memory")
def test_read_torch_file_that_allocates_without_end(tmp_path):
    # 40 kB on the disk: a list of 40 million dictionaries of 64 bytes.
    bomb = zip_file(tmp_path / "bomb.pt", b"\x80\x02(" + b"}" * 40_000_000)
    assert bomb.stat().st_size < 50_000
    with pytest.raises(CheckpointError, match=r"bomb\.pt: not a complete .*MemoryError"):
        read_torch_file(bomb)


def test_read_torch_file_that_claims_more_than_it_holds(tmp_path):
    def pickled(n_stored: int, offset: int, size: tuple[int, ...]) -> bytes:
        """One tensor of a storage of `n_stored` floats, in protocol 2 by hand."""
        storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu"
        numbers = [b"J" + struct.pack("<i", number) for number in (n_stored, offset, *size)]
        shape = b"(" + b"".join(numbers[2:]) + b"t"
        stride = b"(" + b"K\x01" * len(size) + b"t"
        return (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + numbers[0] + b"tQ"
            + numbers[1] + shape + stride + b"\x89NtR."
        )  # fmt: skip

    file = zip_file(tmp_path / "a.pt", pickled(4, 1, (3,)), struct.pack("<4f", 1, 2, 3, 4))
    assert read_torch_file(file)[""].tolist() == [2, 3, 4]
    for n_stored, offset, size in ((4, 2, (3,)), (4, 0, (5,)), (4, 0, (3, 3)), (400, 0, (4,)),
                                   (4, -1, (2,)), (-4, 0, (1,)), (4, 0, (-1,))):  # fmt: skip
        zip_file(file, pickled(n_stored, offset, size), struct.pack("<4f", 1, 2, 3, 4))
        with pytest.raises(CheckpointError, match="not a complete weights file"):
            read_torch_file(file)


def test_views_checks_the_answer_of_its_child():
    memory = torch.zeros(64, dtype=torch.uint8)
    good = ["float32", 16, 16, 0, [2, 2], [2, 1]]
    assert torch_files._views(memory, {"a": good}, mapped=True)["a"].shape == (2, 2)
    for index, value in (
        (0, "load"), (0, "qint8"), (1, 56), (1, -16), (1, 1 << 70), (1, True), (1, "16"),
        (2, 1 << 70), (3, 1), (4, [2, 3]), (4, [2]), (4, "22"), (5, [-2, 1]), (5, [2, 1 << 70]),
    ):  # fmt: skip
        bad = [*good[:index], value, *good[index + 1 :]]
        with pytest.raises((ValueError, TypeError)):
            torch_files._views(memory, {"a": bad}, mapped=True)


FORBIDDEN = """
import os, socket, sys
sys.path.insert(0, sys.argv[1])
import torch_index
torch_index.confine()
results = []
for action in (
    lambda: socket.socket(),
    lambda: open(sys.argv[2]).read(),
    lambda: open(sys.argv[2], "w"),
    lambda: os.unlink(sys.argv[2]),
    lambda: os.listdir("/"),
    lambda: os.execv("/bin/true", ["true"]),
    lambda: os.fork(),
    lambda: os.kill(os.getppid(), 0),
):
    try:
        action()
        results.append("done")
    except PermissionError:
        results.append("refused")
print(*results)
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")
def test_confine_forbids_network_files_and_programs(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    folder = tmp_path / "program"
    folder.mkdir()
    shutil.copy(torch_index.__file__, folder)
    program = [sys.executable, "-I", "-c", FORBIDDEN, str(folder), str(secret)]
    result = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == ["refused"] * 8, result.stderr
    assert secret.read_text() == "secret"


def test_read_torch_file_of_other_files(tmp_path):
    file = tmp_path / "a.pt"
    torch.save({"a": torch.ones(100)}, file)
    whole = file.read_bytes()
    scripted = tmp_path / "scripted.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), scripted)
    for data in (b"", b"<html>", whole[:700], pickle.dumps([1]), scripted.read_bytes()):
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"a\.pt: not a complete weights file"):
            read_torch_file(file)
