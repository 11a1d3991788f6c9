"""Replacing folders, output folders, full disks."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from full_disk import file_size_limit
from safetensors import SafetensorError

from seed_multimodal.disk import (
    atomic_folder,
    folder_lock,
    output_folder,
    replace_folder,
    writable_folder,
)
from seed_multimodal.entry import COMMAND_FAILED, run_guarded
from seed_multimodal.errors import CheckpointError, ConfigError, DataError

HOLDER = """
import errno, fcntl, pathlib, socket, sys
from seed_multimodal.disk import folder_lock

def flock(*arguments):
    raise OSError(errno.ENOSYS, "Function not implemented")

socket.gethostname = lambda: sys.argv[3]
if sys.argv[2] == "without flock":
    fcntl.flock = flock
with folder_lock(pathlib.Path(sys.argv[1]), ValueError, "busy"):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.mark.process
@pytest.mark.parametrize("disk", ["with flock", "without flock"])
def test_folder_lock_after_a_kill_on_another_machine(tmp_path, disk):
    """The process id in a file would mean nothing there.

    A disk without flock (Lustre, FUSE) has no locks.
    """
    for machine in ("one", "two"):
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path), disk, machine],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        output = holder.stdout.readline()
        holder.kill()
        assert output == "locked\n", holder.communicate()


def test_folder_lock_in_this_process(tmp_path):
    with folder_lock(tmp_path, ConfigError):
        with (
            pytest.raises(DataError, match="another run is busy"),
            folder_lock(tmp_path, DataError, "busy", 0.1),
        ):
            pass
    with folder_lock(tmp_path, ConfigError):
        pass


def test_replace_folder(tmp_path):
    new = tmp_path / "new"
    target = tmp_path / "target"
    for text in ("first", "second"):
        new.mkdir()
        (new / "a.txt").write_text(text)
        replace_folder(new, target)
        assert (target / "a.txt").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_making_folder_renames_the_finished_folder(tmp_path):
    out = tmp_path / "out"
    target = output_folder(out, force=False, label="the result")
    with pytest.raises(DataError, match="broken"), atomic_folder(target, out) as folder:
        (folder / "half").write_text("half")
        raise DataError("broken")
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(target, out) as folder, atomic_folder(target.with_name("out"), out) as other:
        assert folder != other  # process ids can be equal in two containers
        (folder / "whole").write_text("whole")
        (other / "whole").write_text("other")
    assert (out / "whole").read_text() == "whole"
    assert [path.name for path in out.iterdir()] == ["whole"]
    with pytest.raises(ConfigError, match="not empty"):
        output_folder(out, force=False, label="the result")
    with pytest.raises(ConfigError, match="holds .*whole, which is used here and would be gone"):
        output_folder(out, force=True, label="the result", inputs=[None, out / "whole"])
    with (
        pytest.raises(CheckpointError, match="cannot be written"),
        atomic_folder(out / "whole" / "x", "x"),
    ):
        pass


def test_writable_folder_on_a_full_disk(tmp_path):
    assert writable_folder(tmp_path / "a" / "b", ConfigError).is_dir()
    with (
        file_size_limit(0),
        pytest.raises(ConfigError, match=r"a/b: cannot be written \(the disk or quota is full"),
    ):
        writable_folder(tmp_path / "a" / "b", ConfigError)
    assert not any((tmp_path / "a" / "b").iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
)
def test_guarded_on_a_full_disk(error, capsys):
    def work() -> int:
        raise error

    assert run_guarded("program", False, work) == COMMAND_FAILED
    assert (
        capsys.readouterr().err == "program: a file cannot be written: the disk or quota is full.\n"
    )
    with pytest.raises(type(error), match="No space left"):
        run_guarded("program", True, work)
    with pytest.raises(FileNotFoundError):
        run_guarded("program", False, lambda: len(Path("/nowhere/at all").read_text()))
