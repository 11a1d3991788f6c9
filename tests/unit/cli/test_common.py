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


def test_outputs_in_a_folder(tmp_path):
    outputs = Outputs(f"{tmp_path}/drawn.v2", 2)
    image = Image.new("RGB", (4, 4))
    assert [outputs.save(image, slug("a cat")) for _ in range(2)] == [
        f"{tmp_path}/drawn.v2/a_cat.png",
        f"{tmp_path}/drawn.v2/a_cat_2.png",
    ]


def test_outputs_in_one_file(tmp_path):
    assert Outputs(str(tmp_path / "a.jpg")).save(Image.new("RGB", (4, 4)), "cat") == str(
        tmp_path / "a.jpg"
    )
    with pytest.raises(ConfigError, match="one file for 2 images"):
        Outputs(str(tmp_path / "a.jpg"), 2)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        Outputs(str(tmp_path / "file" / "x"))


def test_next_number_is_free(tmp_path):
    (tmp_path / "0000.png").touch()
    assert next_free_path(tmp_path, "{:04d}.png") == tmp_path / "0001.png"
    assert next_free_path(tmp_path, "grid-{:03d}.png") == tmp_path / "grid-000.png"


def test_run_batches_repeats_a_failing_batch_one_by_one(capsys):
    batches = []
    results = []

    def work(names: list[str]) -> list[str]:
        batches.append(names)
        if "c" in names:
            raise RequestError("three")
        return [name.upper() for name in names]

    assert (
        run_batches(
            Namespace(debug=False),
            list("abcde"),
            lambda name, result: results.append(name + result),
            work,
            2,
        )
        == 1
    )
    assert results == ["aA", "bB", "dD", "eE"] and batches == [
        ["a", "b"],
        ["c", "d"],
        ["c"],
        ["d"],
        ["e"],
    ]
    assert capsys.readouterr().err == "seed: c: three\nseed: 4 of 5 done, 1 failed: c.\n"


def test_guarded_memory_and_packages(capsys):
    def missing() -> int:
        raise ModuleNotFoundError("No module named 'flask'", name="flask")

    for work, sentence in (
        (lambda: torch.empty(2**58), "memory does not suffice ("),
        (lambda: bytearray(2**62), "memory does not suffice ("),
        (missing, "flask is not installed"),
    ):
        assert run_guarded("seed", False, work) == COMMAND_FAILED  # type: ignore[arg-type]
        printed = capsys.readouterr().err
        assert printed.startswith("seed: ") and sentence in printed and printed.count("\n") == 1
    with pytest.raises(FileNotFoundError):
        run_guarded("seed", False, lambda: len(Path("/nowhere/at all").read_text()))
