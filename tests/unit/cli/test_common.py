"""The errors of programs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from seed_multimodal.entry import COMMAND_FAILED, run_guarded


def missing_package() -> int:
    raise ModuleNotFoundError("No module named 'flask'", name="flask")


@pytest.mark.parametrize(
    "work, named",
    [
        (lambda: torch.empty(2**58), "memory"),
        (lambda: bytearray(2**62), "memory"),
        (missing_package, "flask"),
    ],
)
def test_errors_of_the_machine_are_one_line(work, named, capsys):
    assert run_guarded("seed", False, work) == COMMAND_FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("seed: ") and named in line


def test_defects_have_a_traceback():
    # An error that is none of the user's is not hidden.
    with pytest.raises(FileNotFoundError):
        run_guarded("seed", False, lambda: len(Path("/nowhere/at all").read_text()))
