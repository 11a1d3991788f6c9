"""Locks of folders, replacing files and folders, output folders, full disks."""

import subprocess
import sys
from pathlib import Path

import pytest
from full_disk import file_size_limit

from seed_multimodal.disk import (
    atomic_folder,
    atomic_open,
    folder_lock,
    output_folder,
    replace_folder,
    writable_folder,
    writing,
)
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
def test_folder_lock_of_killed_processes_on_other_machines(tmp_path, disk):
    # Process ids in a file would mean nothing there. Lustre and FUSE may have no locks at all.
    for machine in ("one", "two"):
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path), disk, machine],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        output = holder.stdout.readline()
        try:
            assert output == "locked\n"
            if disk == "with flock":
                with (
                    pytest.raises(ConfigError, match=str(tmp_path)),
                    folder_lock(tmp_path, ConfigError, timeout=0.1),
                ):
                    pass
        finally:
            holder.kill()
            holder.communicate()


def test_folder_lock_in_this_process(tmp_path):
    # Two threads of one server must not write into one folder either.
    with (
        folder_lock(tmp_path, ConfigError),
        pytest.raises(DataError, match=str(tmp_path)),
        folder_lock(tmp_path, DataError, timeout=0.1),
    ):
        pass
    with folder_lock(tmp_path, ConfigError):
        pass


def test_atomic_open_writes_the_whole_file_or_nothing(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("before")
    with pytest.raises(RuntimeError), atomic_open(file) as handle:
        handle.write(b"half")
        raise RuntimeError
    assert file.read_text() == "before" and [*tmp_path.iterdir()] == [file]
    with atomic_open(file) as handle:
        handle.write(b"after")
    assert file.read_text() == "after"


def test_atomic_open_of_a_symbolic_link_writes_its_target(tmp_path):
    # As a shell's `>` does: a link that is replaced leaves the old picture behind it.
    file = tmp_path / "below" / "a.txt"
    file.parent.mkdir()
    link = tmp_path / "link.txt"
    link.symlink_to("below/a.txt")
    for content in (b"of a dangling link", b"again"):
        with atomic_open(link) as handle:
            handle.write(content)
        assert link.is_symlink() and file.read_bytes() == content
    assert [*file.parent.iterdir()] == [file]
    link.unlink()
    link.symlink_to("below")
    with pytest.raises(DataError, match="link.txt"), writing(link, DataError), atomic_open(link):
        pass


def test_writing_names_the_file(tmp_path):
    with pytest.raises(DataError, match="none/a:"), writing(tmp_path, DataError):
        (tmp_path / "none" / "a").write_text("x")


def test_replace_folder(tmp_path):
    new = tmp_path / "new"
    target = tmp_path / "target"
    for text in ("first", "second"):
        new.mkdir()
        (new / "a.txt").write_text(text)
        replace_folder(new, target)
        assert (target / "a.txt").read_text() == text
    assert [*tmp_path.iterdir()] == [target]


def test_atomic_folder_renames_the_finished_folder(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="broken"), atomic_folder(out, out) as folder:
        (folder / "half").write_text("half")
        raise DataError("broken")
    assert not any(tmp_path.iterdir())
    # Two at once, whose process ids can be equal in two containers: the last one stays.
    with atomic_folder(out, out) as folder, atomic_folder(out, out) as other:
        (folder / "whole").write_text("whole")
        (other / "other").write_text("other")
    assert [path.name for path in out.iterdir()] == ["whole"]
    with pytest.raises(CheckpointError, match="x"), atomic_folder(out / "whole" / "x", "x"):
        pass


def test_output_folder_keeps_files(tmp_path):
    assert output_folder(tmp_path / "new", force=False, label="it") == tmp_path / "new"
    file = tmp_path / "out" / "whole"
    file.parent.mkdir()
    file.touch()
    assert output_folder(file.parent, force=True, label="it") == file.parent
    for options in ({"force": False}, {"force": True, "inputs": [None, file]}):
        with pytest.raises(ConfigError, match=str(file.parent)):
            output_folder(file.parent, label="it", **options)
    with pytest.raises(ConfigError, match=str(file)):
        output_folder(file, force=True, label="it")


def test_writable_folder_on_a_full_disk(tmp_path):
    folder = tmp_path / "a" / "b"
    assert writable_folder(folder, ConfigError) == folder
    with file_size_limit(0), pytest.raises(ConfigError, match="a/b: "):
        writable_folder(folder, ConfigError)
    assert not any(Path(folder).iterdir())
