"""Names of outputs, outcomes of batches, and how programs end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from seed_multimodal.cli.common import Outcomes, Outputs, slug
from seed_multimodal.entry import REFUSED, guarded
from seed_multimodal.errors import ConfigError, RequestError


@pytest.mark.parametrize("name", ["trial.run", "drawn.v2", "new.png/"])
def test_outputs_folder_names_may_have_dots(tmp_path, name):
    outputs = Outputs(f"{tmp_path}/{name}", 2)
    assert outputs.next(slug("a cat")) == tmp_path / name / "a_cat.png"
    assert outputs.next(slug("a cat")).name == "a_cat_2.png"


def test_outputs_never_name_a_source(tmp_path):
    (tmp_path / "cat.png").touch()
    assert Outputs(str(tmp_path), 1, [tmp_path / "cat.png"]).next("cat").name == "cat_2.png"
    assert len(Outputs(str(tmp_path)).next("\U0001f600" * 300).name.encode()) < 255


def test_outputs_one_file(tmp_path):
    assert Outputs(str(tmp_path / "a.jpg")).next("cat") == tmp_path / "a.jpg"
    with pytest.raises(ConfigError, match="one file for 2 images"):
        Outputs(str(tmp_path / "a.jpg"), 2)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        Outputs(str(tmp_path / "file" / "x"))


def test_results_of_a_failing_batch_come_one_by_one(capsys):
    seen = []

    def work(values: list[int]) -> list[int]:
        seen.append(values)
        if 3 in values:
            raise RequestError("three")
        return [10 * value for value in values]

    outcomes = Outcomes(5)
    named = [(str(number), number) for number in range(1, 6)]
    assert list(outcomes.results(named, work, 2)) == [("1", 10), ("2", 20), ("4", 40), ("5", 50)]
    assert seen == [[1, 2], [3, 4], [3], [4], [5]]
    assert outcomes.finish() == 1 and "seed: 4 of 5 done, 1 failed: 3." in capsys.readouterr().err


def test_guarded_memory_and_packages(capsys):
    def missing() -> int:
        raise ModuleNotFoundError("No module named 'flask'", name="flask")

    for work, words in ((lambda: torch.empty(2**58), "memory does not suffice ("),
                        (lambda: bytearray(2**62), "memory does not suffice ("), (missing, "flask is not installed")):
        assert guarded("seed", False, work) == REFUSED  # type: ignore[arg-type]
        printed = capsys.readouterr().err
        assert printed.startswith("seed: ") and words in printed and printed.count("\n") == 1
    with pytest.raises(FileNotFoundError):
        guarded("seed", False, lambda: len(Path("/nowhere/at all").read_text()))
