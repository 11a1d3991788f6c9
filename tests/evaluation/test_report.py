"""The report card on systems whose scores are known: one that is always right, one that always gives one answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seed_multimodal.errors import ConfigError
from seed_multimodal.evaluation import report, report_text
from seed_multimodal.evaluation.metrics import Estimate
from seed_multimodal.evaluation.tasks import World, picture_hits, spread


class Oracle:
    """Knows every picture by heart: the code of a picture is its number in the data set, written in base 4."""

    codebook_size = 8

    def __init__(self, toy) -> None:
        self.toy = toy
        self.known = {p.tobytes(): i for i, p in enumerate(toy.images())}
        self.by_name = {r.captions[0]: i for i, r in enumerate(toy.records)}

    def _write(self, number: int) -> list[int]:
        return [number // 4**place % 4 for place in range(4)]

    def _read(self, codes: Sequence[int]) -> int:
        return sum(c * 4**place for place, c in enumerate(codes))

    def codes(self, pictures: np.ndarray) -> np.ndarray:
        return np.array([self._write(self.known[p.tobytes()]) for p in pictures])

    def pictures(self, codes: Sequence[list[int]]) -> list[Image.Image]:
        return [Image.fromarray(self.toy.images()[self._read(c)]) for c in codes]

    def describe(self, codes: Sequence[list[int]]) -> list[str]:
        return [f"A {self.toy.records[self._read(c)].captions[0]}." for c in codes]

    def ask(self, codes: Sequence[list[int]], questions: Sequence[str]) -> list[str]:
        return [next(qa.answer for qa in self.toy.records[self._read(c)].qa if qa.question == q).upper() + "."
                for c, q in zip(codes, questions, strict=True)]

    def draw(self, texts: Sequence[str]) -> list[list[int] | None]:
        return [self._write(self.by_name[t]) for t in texts]

    def edit(self, codes: Sequence[list[int]], instructions: Sequence[str]) -> list[list[int] | None]:
        names = [self.toy.records[self._read(c)].captions[0].replace("flat", "line") for c in codes]
        return self.draw(names)


class Stuck(Oracle):
    """Says and draws one thing whatever it is asked; its second drawing is broken; edits change nothing."""

    def describe(self, codes: Sequence[list[int]]) -> list[str]:
        return ["a line drawing of orange disc"] * len(codes)

    def ask(self, codes: Sequence[list[int]], questions: Sequence[str]) -> list[str]:
        return ["orange"] * len(codes)

    def draw(self, texts: Sequence[str]) -> list[list[int] | None]:
        codes: list[list[int] | None] = [self._write(self.by_name["a line drawing of orange disc"])] * len(texts)
        return [codes[0], None, *codes[2:]]

    def edit(self, codes: Sequence[list[int]], instructions: Sequence[str]) -> list[list[int] | None]:
        return list(codes)


@pytest.fixture(scope="module")
def world(toy, trained) -> World:
    return World(toy, trained)


def measure(system, world: World, **settings):
    return report.evaluate(system, world, report.ReportSettings(**settings), log=lambda line: None)


def test_a_perfect_system_scores_one(toy, world: World) -> None:
    splits, shown, answers = measure(Oracle(toy), world)
    assert list(splits) == ["val", "test_combo", "test_concept"]
    assert [splits[s]["pictures"] for s in splits] == [4, 3, 2]
    for split, section in splits.items():
        for path in (("reconstruction", "picture_r1"), ("reconstruction", "cosine"), ("drawing", "picture_r1"),
                     ("drawing", "picture_r1_all"), ("caption", "concept"), ("caption", "style"), ("qa", "all"),
                     ("edit", "concept_and_style")):
            estimate = report_text.value_at(section, path)
            assert isinstance(estimate, Estimate), (split, path)
            assert estimate.value == pytest.approx(1.0, abs=1e-6), (split, path)
            assert estimate.n > 0
        # The same pictures go to the judge, so a perfect system reaches its ceiling exactly.
        assert section["drawing"]["text_r1"] == section["ceilings"]["real"]["text_r1"]
        assert section["drawing"]["without_picture"] == section["edit"]["without_picture"] == 0
        assert section["codes"]["distinct"] == section["pictures"]
        assert section["chance"]["picture_r1"] == pytest.approx(1 / section["pictures"], abs=1e-4)
    assert splits["test_combo"]["qa"]["kinds"].keys() == {"colour", "thing"}
    assert splits["val"]["edit"]["n"] == 2 and splits["test_combo"]["edit"]["n"] == 3
    assert len(shown) == 3 and len(answers["val"]["captions"]) == 4


def test_a_stuck_system_scores_by_hand(toy, world: World) -> None:
    section = measure(Stuck(toy), world, splits=("test_combo",))[0]["test_combo"]
    # test_combo: line drawings of orange disc, square, bar; the second drawing is missing.
    assert section["drawing"]["picture_r1"].value == pytest.approx(1 / 3)
    assert section["drawing"]["without_picture"] == 1
    assert section["caption"]["concept"].value == pytest.approx(1 / 3)
    assert section["caption"]["style"].value == 1.0
    # Two questions a picture: the colour is always orange, the shape never.
    assert section["qa"]["all"].value == 0.5
    assert section["qa"]["kinds"]["colour"]["accuracy"].value == 1.0
    assert section["qa"]["kinds"]["thing"]["accuracy"].value == 0.0
    # Edits returned the given picture: the thing is right, the style is not, and it is seen as unchanged.
    assert section["edit"]["concept"].value == 1.0
    assert section["edit"]["concept_and_style"].value == section["edit"]["style"].value == 0.0
    assert section["edit"]["left_unchanged"].value == 1.0
    assert section["edit"]["gallery_pictures"] == 6


def test_limits(toy, world: World) -> None:
    section = measure(Oracle(toy), world, splits=("val",), limit=2, questions=3)[0]["val"]
    assert section["pictures"] == section["reconstruction"]["gallery_pictures"] == 4
    assert section["reconstruction"]["n"] == section["caption"]["n"] == 2
    assert section["qa"]["n"] == 3
    with pytest.raises(ConfigError, match="no pictures in split 'nothing'"):
        measure(Oracle(toy), world, splits=("nothing",))
    assert report.sample(range(100), 10, 1) == report.sample(range(100), 10, 1) != report.sample(range(100), 10, 2)


def test_missing_pictures_are_wrong_not_left_out(toy, world: World) -> None:
    found, there = spread(world, [None, Image.fromarray(toy.images()[3])])
    assert there.tolist() == [False, True] and not found[0].any()
    assert picture_hits(world, found, [2, 3], range(24), 1, by_name=False)[1] == 1.0
    assert spread(world, [])[0].shape[0] == 0


def test_written_report(toy, world: World, tmp_path: Path) -> None:
    splits, shown, answers = measure(Stuck(toy), world)
    whole = {"model": "toy", "command": "python -m x", "date": "today", "commit": "unknown", "seconds": 1.0,
             "hardware": {"cpu": "any"}, "versions": {"torch": "2"}, "settings": {"limit": 128}, "judge": {"steps": 60},
             "aims": report_text.aims(splits), "splits": splits}
    report.write_report(whole, shown, answers, world, tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["splits"]["test_combo"]["qa"]["all"]["value"] == 0.5
    assert {"value", "low", "high", "n"} == set(data["splits"]["val"]["drawing"]["picture_r5"])
    aims = {(a["what"], a["split"]): a for a in data["aims"]}
    assert aims["caption names the thing", "test_combo"]["met"] is False
    assert aims["codebook entries used", "val"]["value"] == 0.25
    text = (tmp_path / "report.md").read_text()
    assert "0.500 (" in text and "## Edits" in text and "nan" not in text
    assert sorted(p.name for p in tmp_path.glob("*.jpg")) == sorted(data["sheets"]) and len(data["sheets"]) == 9
    assert all(p.stat().st_size < 300_000 for p in tmp_path.glob("*.jpg"))
    assert Image.open(tmp_path / "drawings_val.jpg").width > 300


def test_command_line_refuses_in_one_sentence(tmp_path: Path, capsys) -> None:
    for flag, value in (("--limit", "0"), ("--questions", "0"), ("--batch", "0"), ("--seed", "-1")):
        assert report.main(["--model", str(tmp_path / "none"), flag, value]) == 2
        assert f"{flag} must be at least" in capsys.readouterr().err
    taken = tmp_path / "taken"
    taken.write_text("a file")
    assert report.main(["--model", "nano", "--out", str(taken), "--limit", "1"]) == 2
    assert f"--out {taken}: no folder that can be written" in capsys.readouterr().err
    assert taken.read_text() == "a file"


def test_which_judge_scores(tmp_path: Path) -> None:
    shipped = Path(__file__).resolve().parents[2] / "pretrained" / "nano" / "judge"
    assert report.find_judge("nano", None).resolve() == shipped
    assert report.find_judge(tmp_path, None).resolve() == shipped  # a system of one's own has none
    assert report.find_judge(tmp_path, tmp_path / "other") == tmp_path / "other"
    (tmp_path / "judge").mkdir()
    assert report.find_judge(tmp_path, None).resolve() == shipped  # the folder holds no judge
    (tmp_path / "judge" / "config.json").write_text("{}")
    assert report.find_judge(tmp_path, None) == tmp_path / "judge"
