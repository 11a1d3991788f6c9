"""Failing batches, and the errors of programs."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from seed_multimodal.cli.common import run_batches
from seed_multimodal.entry import COMMAND_FAILED, run_guarded
from seed_multimodal.errors import RequestError


def test_run_batches_repeats_a_failing_batch_one_by_one(capsys):
    # Only the item at fault is lost, and the summary counts it.
    batches = []
    results = []

    def work(names: list[str]) -> list[str]:
        batches.append("".join(names))
        if "c" in names:
            raise RequestError("three")
        return [name.upper() for name in names]

    def save(name: str, result: str) -> None:
        results.append(name + result)

    assert run_batches(Namespace(debug=False), list("abcde"), save, work, 2) == 1
    assert results == ["aA", "bB", "dD", "eE"] and batches == ["ab", "cd", "c", "d", "e"]
    error, summary = capsys.readouterr().err.splitlines()
    assert "c: three" in error and "4 of 5" in summary


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
