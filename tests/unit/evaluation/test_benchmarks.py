"""Every benchmark through its command: recorded answers are scored as the papers' programs do.

The answers lie in OUT/samples-0.jsonl as a stopped run leaves them, so that nothing is generated;
the scores are computed by hand.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from data_files import write_any
from random_images import noise
from tiny import read_json
from yaml_tables import read_tables

from seed_multimodal.cli.main import main
from seed_multimodal.errors import DataError
from seed_multimodal.evaluation.annotations import Sample
from seed_multimodal.evaluation.benchmark import run
from seed_multimodal.evaluation.vqa import Questions
from seed_multimodal.recipes.lavit.evaluate import LavitQuestions

BENCHMARKS = read_tables(__file__)


def evaluate(case: dict, lines: list[dict], model: Path) -> int:
    """The command with these answers, in the working folder."""
    for name, content in case["files"].items():
        write_any(Path(name), content)
    out = Path("out")
    out.mkdir()
    write_any(out / "samples-0.jsonl", lines)
    # Drawings whose judgement is recorded are still there, as the two benchmarks name them.
    for index, line in enumerate(lines):
        for number in range(case.get("n_images", 0)):
            file = out / "images" / f"{index:05d}" / "samples" / f"{number:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            noise(number, (8, 8)).save(file)
            shutil.copy(file, out / "images" / f"{line['id']}.png")
    argv = ["eval", *case["command"].split(), "--out", "out", "--device", "cpu"]
    return main([*argv, "--model", str(model)])


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")  # without Java


@pytest.mark.parametrize("case", BENCHMARKS.values(), ids=BENCHMARKS)
def test_eval_scores_recorded_answers(case, tiny_folder, capsys):
    # Figures next to the papers' must be computed as theirs.
    assert evaluate(case, case["lines"], tiny_folder) == case.get("status", 0)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    summary = read_json(Path("out/summary.json"))
    assert printed == summary
    assert {name: summary[name] for name in case["summary"]} == case["summary"]
    results = read_json(Path("out/results.json"))
    expected = case.get("results", {})
    columns = {name: [result[name] for result in results] for name in expected}
    assert columns == expected


@pytest.mark.parametrize("case", BENCHMARKS.values(), ids=BENCHMARKS)
def test_eval_refuses_numbers_that_are_not_finite(case, tiny_folder, capsys):
    # NaN compares as nothing does: a diverged model would get some score, often a perfect one.
    lines = [{**line, "probabilities": [[float("nan")] * 4]} for line in case["lines"]]
    assert evaluate(case, lines, tiny_folder) == 2
    assert "not finite" in capsys.readouterr().err
    assert not Path("out/summary.json").exists()


@dataclass(kw_only=True)
class Own(Questions):
    """A benchmark of another package, whose `samples` sets what `answer` reads."""

    resolution: int

    def samples(self):
        self.text = "a fox"
        return [Sample(1, "item 1")]

    def prepare(self, samples):
        if self.resolution == 0:
            raise DataError("no judge")

    def answer(self, samples, images):
        return [{"answer": self.text}]


def test_run_keeps_a_benchmark_as_it_is(tiny_lavit):
    # LaVIT's evaluator of this kind is none of this benchmark. A folder is begun when the judge is
    # there; answers of two settings would be scored together, which is noticed before.
    def answer(resolution):
        run(Own(out=Path("out"), resolution=resolution), lambda: tiny_lavit)

    with pytest.raises(DataError, match="no judge"):
        answer(0)
    answer(8)
    for resolution in (9, 0):
        with pytest.raises(DataError, match="resolution: "):
            answer(resolution)
    assert read_json(Path("out/results.json"))[0]["answer"] == "a fox"


def test_run_reads_the_samples_of_an_evaluator(tiny_lavit, monkeypatch):
    monkeypatch.setattr(Questions, "samples", lambda self: [])
    monkeypatch.setattr(LavitQuestions, "samples", lambda self: [Sample(7, "", problem="none")])
    summary = run(Questions(out=Path("out")), lambda: tiny_lavit)
    assert summary["bad"] == 1
