"""Names of outputs, failing batches, and the errors of programs."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image

from seed_multimodal.cli.common import Outputs, next_free_path, run_batches, slug
from seed_multimodal.entry import COMMAND_FAILED, run_guarded
from seed_multimodal.errors import ConfigError, RequestError

IMAGE = Image.new("RGB", (4, 4))


def test_outputs_in_a_folder_or_one_file(tmp_path):
    outputs = Outputs(f"{tmp_path}/drawn.v2", 2)
    names = [outputs.save(IMAGE, slug("a cat")) for _ in range(2)]
    assert names == [f"{tmp_path}/drawn.v2/a_cat.png", f"{tmp_path}/drawn.v2/a_cat_2.png"]
    file = str(tmp_path / "a.jpg")
    assert Outputs(file).save(IMAGE, "cat") == file
    with pytest.raises(ConfigError, match=r"a\.jpg"):
        Outputs(file, 2)
    with pytest.raises(ConfigError, match=r"a\.jpg/x"):
        Outputs(f"{file}/x")


def test_next_number_is_free(tmp_path):
    # A second run does not overwrite the first one's images.
    (tmp_path / "0000.png").touch()
    assert next_free_path(tmp_path, "{:04d}.png") == tmp_path / "0001.png"
    assert next_free_path(tmp_path, "grid-{:03d}.png") == tmp_path / "grid-000.png"


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
