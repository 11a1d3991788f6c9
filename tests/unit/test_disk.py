"""Files that last, folders replaced whole."""

from __future__ import annotations

import errno
import resource
import signal
from pathlib import Path

import pytest
from safetensors import SafetensorError

from seed_multimodal.disk import making_folder, output_folder, replace_folder, writable_folder
from seed_multimodal.entry import REFUSED, guarded
from seed_multimodal.errors import CheckpointError, ConfigError, DataError


def test_a_folder_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    new, target = tmp_path / "new", tmp_path / "target"
    for text in ("first", "second"):
        new.mkdir()
        (new / "a.txt").write_text(text)
        replace_folder(new, target)
        assert (target / "a.txt").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_result_takes_its_folder_only_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    target = output_folder(out, force=False, what="the result")
    with pytest.raises(DataError, match="broken"), making_folder(target, out) as folder:
        (folder / "half").write_text("half")
        raise DataError("broken")
    assert list(tmp_path.iterdir()) == []
    with making_folder(target, out) as folder, making_folder(target.with_name("out"), out) as other:
        assert folder != other  # two processes may have one number, on two machines or in two containers
        (folder / "whole").write_text("whole")
        (other / "whole").write_text("other")
    assert (out / "whole").read_text() == "whole"
    assert [path.name for path in out.iterdir()] == ["whole"]
    with pytest.raises(ConfigError, match="not empty"):
        output_folder(out, force=False, what="the result")
    with pytest.raises(ConfigError, match="holds .*whole, which is used here and would be gone"):
        output_folder(out, force=True, what="the result", read=[None, out / "whole"])
    with pytest.raises(ConfigError, match="is a file; the result needs a folder"):
        output_folder(out / "whole", force=True, what="the result")
    with pytest.raises(CheckpointError, match="cannot be written"), making_folder(out / "whole" / "x", "x"):
        pass


def test_a_folder_on_a_full_disk_is_refused_before_long_work(tmp_path: Path) -> None:
    assert writable_folder(tmp_path / "a" / "b", ConfigError).is_dir()
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        with pytest.raises(ConfigError, match=r"a/b: cannot be written \(the disk or quota is full"):
            writable_folder(tmp_path / "a" / "b", ConfigError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert not any((tmp_path / "a" / "b").iterdir())


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")])  # its own words
def test_a_full_disk_ends_a_program_with_one_sentence(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        raise error

    assert guarded("program", False, work) == REFUSED
    assert capsys.readouterr().err == "program: a file cannot be written: the disk or quota is full.\n"
    with pytest.raises(type(error), match="No space left"):
        guarded("program", True, work)
    with pytest.raises(FileNotFoundError):
        guarded("program", False, lambda: len(Path("/nowhere/at all").read_text()))
