"""The batched system gives what the system gives one at a time, and the whole command runs on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seed_multimodal.errors import GenerationError
from seed_multimodal.evaluation.batched import BatchedSystem
from seed_nano.report import report
from seed_nano.world.evaluation import scenes
from seed_nano.world.scene import render

PICTURES = np.stack([render(scene) for scene in scenes("val")[:5]])


@pytest.fixture(scope="module")
def batched(tiny_folder: Path) -> BatchedSystem:
    return BatchedSystem.from_pretrained(tiny_folder, device="cpu", batch=3, log=None)


def test_codes_and_pictures_are_those_of_the_system(batched: BatchedSystem) -> None:
    pictures = PICTURES[:5]
    codes = batched.codes(pictures)
    assert codes.shape == (5, 32) and codes.dtype == np.int64
    assert codes.tolist() == batched.inner.tokenize([Image.fromarray(p) for p in pictures]).tolist()
    made = batched.pictures(codes.tolist())
    alone = [batched.inner.reconstruct([row], seed=0)[0] for row in codes.tolist()]
    for one, other in zip(made, alone, strict=True):
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 1
    assert batched.pictures([]) == []


def test_answers_are_those_of_the_system(batched: BatchedSystem) -> None:
    codes = batched.codes(PICTURES[:4]).tolist()
    questions = ["What is it?", "What is the colour of this thing here?", "Is it?", "What is it?"]
    assert batched.describe(codes) == [batched.inner.describe(row) for row in codes]
    assert batched.ask(codes, questions) == [batched.inner.ask(row, q) for row, q in zip(codes, questions, strict=True)]


def test_drawings_are_those_of_the_system(batched: BatchedSystem) -> None:
    texts = ["a red disc", "a green and quite long bar", "a fish", "blue."]
    codes = batched.draw(texts)
    assert all(row is not None and len(row) == 32 for row in codes)
    for text, picture in zip(texts, batched.pictures([row for row in codes if row]), strict=True):
        assert np.abs(np.asarray(picture, int) - np.asarray(batched.inner.draw(text, seed=0), int)).max() <= 1
    given = batched.codes(PICTURES[:2]).tolist()
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


def test_rungs_of_the_ladder_have_the_pictures_sizes(batched: BatchedSystem) -> None:
    assert [picture.size for picture in batched.through_vae(PICTURES[:4])] == [(64, 64)] * 4
    assert batched.through_embedding(PICTURES) is None  # it has no tower that gives the embedding
    codes = batched.codes(PICTURES[:2]).tolist()
    some, whole = batched.pictures(codes, first=4), batched.pictures(codes)
    assert np.asarray(some[0]).tolist() != np.asarray(whole[0]).tolist()
    same = batched.inner.reconstruct([codes[1]], seed=0, codes=4)[0]
    assert np.abs(np.asarray(some[1], int) - np.asarray(same, int)).max() <= 1


@pytest.mark.slow
def test_pictures_from_their_true_embeddings() -> None:
    system = BatchedSystem.from_pretrained("pretrained/nano", device="cpu", batch=2, log=None)
    three, first = system.through_embedding(PICTURES[:3]), system.through_embedding(PICTURES[:1])
    assert len(three) == 3 and three[0].size == (64, 64)
    assert np.abs(np.asarray(three[0], int) - np.asarray(first[0], int)).max() <= 1


def test_free_answers_are_those_of_a_chat(batched: BatchedSystem) -> None:
    codes = batched.codes(PICTURES[:2]).tolist()
    dialogues = [[("user", [codes[0], "What do you see?"])],
                 [("user", ["Draw a dog."]), ("assistant", ["Here.", codes[1]]), ("user", ["Make it noto."])]]
    found = batched.answer(dialogues, 20)
    for turns, parts in zip(dialogues, found, strict=True):
        alone = batched.inner.chat([{"role": role, "content": list(content)} for role, content in turns],
                                   max_new_tokens=20)
        assert [part for part in parts if isinstance(part, str)] == [
            part.text.strip() for part in alone.parts if hasattr(part, "text")]
    long = [[("user", ["word " * 600])], dialogues[0]]
    assert batched.answer(long, 20) == [[], found[0]]


@pytest.mark.process
@pytest.mark.slow
def test_the_command(tiny_folder: Path, trained, tmp_path: Path, capsys) -> None:
    trained.save_pretrained(tmp_path / "judge")
    arguments = ["--model", str(tiny_folder), "--judge", str(tmp_path / "judge"), "--out", str(tmp_path / "report"),
                 "--splits", "val,things", "--limit", "3", "--device", "cpu"]
    assert report.main(arguments) == 0
    assert " left, " in capsys.readouterr().out
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    assert data["settings"]["scenes"] == 3 and data["seconds"] > 0 and data["versions"]["torch"]
    val = data["splits"]["val"]
    assert val["drawing"]["n"] == val["edit"]["n"] == 3 and val["codes"]["sequences"] == val["reconstruction"]["n"] == 6
    assert val["qa"]["n"] == 6 and set(data["splits"]["things"]) == {"codes", "reconstruction", "ladder", "prefix"}
    assert (tmp_path / "report" / "report.md").read_text().startswith("# Report card of ")


def test_a_missing_judge_is_one_sentence(tiny_folder: Path, tmp_path: Path, capsys) -> None:
    assert report.main(["--model", str(tiny_folder), "--judge", str(tmp_path / "none"), "--out", str(tmp_path),
                        "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "no judge in this folder" in error and "Traceback" not in error
