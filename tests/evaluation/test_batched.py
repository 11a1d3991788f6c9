"""The batched system gives what the system gives one at a time, and the whole command runs on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seed_multimodal.errors import GenerationError
from seed_multimodal.evaluation import report
from seed_multimodal.evaluation.batched import BatchedSystem
from seed_multimodal.evaluation.tasks import World


@pytest.fixture(scope="module")
def batched(tiny_folder: Path) -> BatchedSystem:
    return BatchedSystem.from_pretrained(tiny_folder, device="cpu", batch=3, log=None)


def test_codes_and_pictures_are_those_of_the_system(toy, batched: BatchedSystem) -> None:
    pictures = toy.images()[:5]
    codes = batched.codes(pictures)
    assert codes.shape == (5, 32) and codes.dtype == np.int64
    assert codes.tolist() == batched.inner.tokenize([Image.fromarray(p) for p in pictures]).tolist()
    made = batched.pictures(codes.tolist())
    alone = [batched.inner.reconstruct([row], seed=0)[0] for row in codes.tolist()]
    for one, other in zip(made, alone, strict=True):
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 1
    assert batched.pictures([]) == []


def test_answers_are_those_of_the_system(toy, batched: BatchedSystem) -> None:
    codes = batched.codes(toy.images()[:4]).tolist()
    questions = ["What is it?", "What is the colour of this thing here?", "Is it?", "What is it?"]
    assert batched.describe(codes) == [batched.inner.describe(row) for row in codes]
    assert batched.ask(codes, questions) == [batched.inner.ask(row, q) for row, q in zip(codes, questions, strict=True)]


def test_drawings_are_those_of_the_system(toy, batched: BatchedSystem) -> None:
    texts = ["a red disc", "a green and quite long bar", "a fish", "blue."]
    codes = batched.draw(texts)
    assert all(row is not None and len(row) == 32 for row in codes)
    for text, picture in zip(texts, batched.pictures([row for row in codes if row]), strict=True):
        assert np.abs(np.asarray(picture, int) - np.asarray(batched.inner.draw(text, seed=0), int)).max() <= 1
    given = batched.codes(toy.images()[:2]).tolist()
    edited = batched.edit(given, ["Make it green.", "Turn it into a fish."])
    alone = batched.inner.edit(given[1], "Turn it into a fish.", seed=0)
    assert edited[1] is not None
    assert np.abs(np.asarray(batched.pictures([edited[1]])[0], int) - np.asarray(alone, int)).max() <= 1


def test_an_unconstrained_system_may_fail_to_draw(batched: BatchedSystem, monkeypatch) -> None:
    monkeypatch.setitem(batched.inner.spec.generation, "constrain", False)
    codes = batched.draw(["a red disc"])
    assert codes == [None]
    with pytest.raises(GenerationError):
        batched.inner.draw("a red disc")


def test_vae_round_trip_has_the_pictures_sizes(toy, batched: BatchedSystem) -> None:
    made = batched.round_trip(toy.images()[:4])
    assert [picture.size for picture in made] == [(64, 64)] * 4


@pytest.mark.slow
def test_report_over_a_real_system(toy, trained, batched: BatchedSystem) -> None:
    splits, shown, answers = report.evaluate(batched, World(toy, trained), report.ReportSettings(limit=2, questions=2),
                                             log=lambda line: None)
    assert splits["val"]["drawing"]["n"] == 2 and splits["val"]["codes"]["sequences"] == 4
    assert splits["val"]["ceilings"]["vae"]["n"] == 2
    assert splits["test_combo"]["qa"]["n"] == len(answers["test_combo"]["questions"]) == 2
    assert len(shown[0].edited) == 2


@pytest.mark.process
@pytest.mark.slow
def test_the_command(tiny_folder: Path, trained, tmp_path: Path, capsys) -> None:
    trained.save_pretrained(tmp_path / "judge")
    arguments = ["--model", str(tiny_folder), "--judge", str(tmp_path / "judge"), "--out", str(tmp_path / "report"),
                 "--splits", "val", "--limit", "2", "--questions", "2", "--device", "cpu"]
    assert report.main(arguments) == 0
    assert " left, " in capsys.readouterr().out
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    assert data["settings"]["limit"] == 2 and data["seconds"] > 0 and data["versions"]["torch"]
    assert data["splits"]["val"]["pictures"] == data["splits"]["val"]["reconstruction"]["gallery_pictures"] > 100
    assert (tmp_path / "report" / "report.md").read_text().startswith("# Report card of ")


def test_a_missing_judge_is_one_sentence(tiny_folder: Path, tmp_path: Path, capsys) -> None:
    assert report.main(["--model", str(tiny_folder), "--judge", str(tmp_path / "none"), "--out", str(tmp_path),
                        "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "no judge in this folder" in error and "Traceback" not in error
