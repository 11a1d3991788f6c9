"""The report card on systems whose scores are known: one that is always right, one that is a scene behind, others that
are wrong in one way."""

from __future__ import annotations

import errno
import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from known_world import KnowingJudge, Oracle
from PIL import Image

from seed_multimodal.errors import ConfigError
from seed_multimodal.evaluation.metrics import Estimate
from seed_nano.report import report, report_text
from seed_nano.report.longer_run import _as_told
from seed_nano.report.samples import Samples, Sizes, make_samples
from seed_nano.report.split_run import SplitRun
from seed_nano.report.tasks import (
    UNREAD,
    caption_words,
    likeness,
    picture_words,
    right_labels,
    scene_words,
    score,
    ssim,
)
from seed_nano.world.phrases import BACKGROUND_PHRASES
from seed_nano.world.scene import Scene, render
from seed_nano.world.splits import held_out
from seed_nano.world.words import describe

PAIR = Scene("noto", "blue", "left of", ("tiger", "penguin"))
HEADLINES = (("reconstruction", "all"), ("reconstruction", "r1"), ("ladder", "vae", "all"), ("prefix", "32", "all"),
             ("drawing", "all"), ("caption", "all"), ("caption", "exact"), ("qa", "all"), ("edit", "all"),
             ("edit", "stayed"), ("conversation", "turns"), ("conversation", "own"), ("examples", "all"),
             ("story", "frames"), ("story", "sentences"))


class Behind(Oracle):
    """Answers each request with what the one before it asked for; says nothing in conversations."""

    def pictures(self, codes, first=None):
        made = super().pictures(codes, first)
        return made[-1:] + made[:-1]

    def describe(self, codes):
        said = super().describe(codes)
        return said[-1:] + said[:-1]

    def ask(self, codes, questions):
        return ["a violin"] * len(questions)

    def answer(self, dialogues, most):
        return [[] for _ in dialogues]


class Swapping(Oracle):
    """Draws two things the other way round, leaves the style out of captions, leaves pictures as they were, draws no
    second picture at all."""

    def draw(self, texts):
        codes = super().draw(texts)
        return [codes[0], None, *codes[2:]]

    def pictures(self, codes, first=None):
        return [Image.fromarray(render(scene.but(things=scene.things[::-1], counts=scene.counts[::-1])))
                for scene in map(self._read, codes)]

    def describe(self, codes):
        return [describe(scene).replace(f"{scene.style} ", "") for scene in map(self._read, codes)]

    def edit(self, codes, instructions):
        return [list(row) for row in codes]


def test_an_oracle_scores_one(oracle: Oracle, knowing: KnowingJudge, val: Samples) -> None:
    run = SplitRun(oracle, knowing, val)
    seen: list[str] = []
    sections = run.measure(seen.append)
    assert seen == list(run.parts()) and sections["codes"]["sequences"] == len(val.scenes) == 24
    for path in HEADLINES:
        estimate = report_text.value_at(sections, path)
        assert isinstance(estimate, Estimate) and estimate.n > 0, path
        assert estimate.value == 1.0, path
        assert (report_text.value_at(sections, (path[0], "ceiling")) or estimate).value == 1.0, path
    assert sections["prefix"]["4"]["all"].value < 1  # the oracle's pictures of 4 codes are dark
    assert sections["drawing"]["without_picture"] == 0 and not sections["drawing"]["confused"]
    assert sections["reconstruction"]["psnr"].value == sections["reconstruction"]["psnr_things"].value > 50
    assert sections["reconstruction"]["ssim"].value == pytest.approx(1)
    assert sections["qa"]["blind"].value < 0.9 and set(sections["qa"]["kinds"]) == {
        "what", "count", "style", "background", "yesno", "where"}


def test_a_system_a_scene_behind_scores_nothing(knowing: KnowingJudge, val: Samples) -> None:
    sections = SplitRun(Behind(knowing, val), knowing, val).measure()
    for path in HEADLINES:
        if path not in (("ladder", "vae", "all"), ("edit", "stayed")):
            assert report_text.value_at(sections, path).value <= 0.1, path
    assert sections["examples"]["without_picture"] == len(val.examples)
    assert sections["reconstruction"]["psnr"].value < 25 and sections["reconstruction"]["confused"]


def test_what_is_wrong_in_one_way_is_wrong(knowing: KnowingJudge, val: Samples) -> None:
    system = Swapping(knowing, val)
    two = [scene for scene in val.scenes if len(scene.things) == 2]
    knowing.learn([scene.but(things=scene.things[::-1], counts=scene.counts[::-1])
                   for scene in (*val.scenes, *(edit.target for _, edit in val.edits), *(s for s, _ in val.edits))])
    sections = SplitRun(system, knowing, val).measure()
    alone = sum(len(scene.things) == 1 for scene in val.scenes) / len(val.scenes)
    assert 0 < alone < 1 and two
    assert sections["reconstruction"]["all"].value == sections["reconstruction"]["first"].value == pytest.approx(alone)
    assert sections["reconstruction"]["style"].value == 1
    assert sections["caption"]["all"].value == sections["caption"]["style"].value == 0
    assert sections["caption"]["first"].value == sections["caption"]["background"].value == 1
    assert sections["drawing"]["without_picture"] == 1 and sections["drawing"]["style"].value == pytest.approx(11 / 12)
    assert sections["edit"]["all"].value <= 0.3 and sections["edit"]["unchanged"].value > 0


def test_words_of_scenes_and_captions() -> None:
    assert scene_words(PAIR) == ("tiger", "penguin", "noto", "blue", "left of") == caption_words(describe(PAIR))
    wrong = {"a noto penguin left of a tiger on blue": {"first", "second"},
             "a noto tiger on blue": {"second", "layout"},
             "a tiger left of a penguin on a blue background": {"style"},
             "a noto tiger left of a penguin": {"background"},
             "a noto penguin to the right of a tiger on blue": set(),
             "it is a tiger": {"first", "second", "style", "background", "layout"}}
    for text, labels in wrong.items():
        right = right_labels([caption_words(text)], [scene_words(PAIR)])[0]
        assert {name for name, ok in zip(("first", "second", "style", "background", "layout"), right, strict=True)
                if not ok} == labels, text
    three = Scene("noto", "sea", "many", ("crab",), (3,))
    assert scene_words(three)[4] == "many 3" != caption_words("four noto crabs on the sea")[4]
    assert score([UNREAD, scene_words(PAIR)], [scene_words(PAIR)] * 2)["all"].value == 0.5
    assert picture_words(KnowingJudge(), [None, Image.fromarray(render(PAIR))])[0] == UNREAD


def test_likeness_by_hand() -> None:
    real = render(PAIR)
    lighter = np.clip(real.astype(int) + 10, 0, 255).astype(np.uint8)
    found = likeness([Image.fromarray(lighter)], [PAIR])
    error = np.square(lighter.astype(float) - real).mean()
    assert found["psnr"].value == pytest.approx(10 * np.log10(255**2 / error), abs=1e-3)
    assert found["ssim"].value > 0.95 > ssim(real, np.asarray(Image.fromarray(real).resize((8, 8)).resize((64, 64))))
    # An error on the background alone leaves the pixels of things as they are.
    corner = real.copy()
    corner[:6, :6] = 0
    other = likeness([Image.fromarray(corner)], [PAIR])
    assert other["psnr_things"].value > 50 > other["psnr"].value


def test_stories_are_right_by_their_own_backgrounds(val: Samples) -> None:
    pages = val.stories[0]
    told = _as_told(pages, [text for text, _ in pages])
    assert told == [scene for _, scene in pages]
    elsewhere = pages[0][1].but(background="room" if pages[0][1].background != "room" else "sea")
    moved = pages[0][0].replace(BACKGROUND_PHRASES[pages[0][1].background][0],
                                BACKGROUND_PHRASES[elsewhere.background][0])
    again = _as_told(pages, [moved, *(text for text, _ in pages[1:])])
    assert again[0] == elsewhere and again[1] == pages[1][1].but(background=elsewhere.background)
    assert again[2] == pages[2][1]
    assert _as_told(pages, ["a dog", pages[1][0]])[:3] == [None, None, None]


@pytest.mark.slow
def test_samples_are_fixed_and_of_their_split() -> None:
    for split in ("pairs", "styles", "counts"):
        made = make_samples(split, Sizes.limited(9))
        assert made == make_samples(split, Sizes.limited(9)) and len(made.scenes) == 18 and len(made.edits) == 9
        assert all(held_out(scene) == {split} for scene in made.scenes)
        for scene, edit in made.edits:
            assert held_out(scene) <= {split} and held_out(edit.target) <= {split}
            assert {split} in (held_out(scene), held_out(edit.target))
        assert bool(made.stories) == bool(made.conversations) == (split == "pairs")
    assert make_samples("things", Sizes.limited(9)).questions == []
    assert Sizes.limited(500) == Sizes() == Sizes.limited(900) and Sizes.limited(1).stories == 1


def test_written_report(oracle: Oracle, knowing: KnowingJudge, val: Samples, tmp_path: Path) -> None:
    run = SplitRun(oracle, knowing, val)
    run.measure()
    sections = {"val": run.sections}
    whole = {"model": "toy", "command": "python -m x", "date": "today", "commit": "unknown", "seconds": 1.0,
             "hardware": {"cpu": "any"}, "versions": {"torch": "2"}, "settings": vars(Sizes.limited(12)),
             "judge": {"steps": 60}, "aims": report_text.aims(sections), "splits": sections}
    (tmp_path / "wide.webp").touch()  # of a report of another kind, which was here before
    report.write_report(whole, [run], tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert {"value", "low", "high", "n"} == set(data["splits"]["val"]["drawing"]["all"])
    aims = {(a["what"], a["split"]): a for a in data["aims"]}
    assert len(aims) == 9 and aims["drawing, every label right", "val"] == {
        "what": "drawing, every label right", "split": "val", "aim": 0.9, "value": 1.0, "ceiling": 1.0, "met": True}
    text = (tmp_path / "report.md").read_text()
    assert "24 scenes rebuilt, 12 described, drawn and edited, 24 questions, 4 conversations" in text
    assert "1.000 / 0.90 (1.000)" in text and "## Edits" in text and "kind of edit" in text and "nan" not in text
    answers = json.loads(gzip.decompress((tmp_path / "answers.json.gz").read_bytes()))["val"]
    assert len(answers["captions"]) == len(answers["edits"]) == 12 and answers["conversations_own"]
    names = sorted(p.name for p in tmp_path.iterdir() if p.suffix in (".webp", ".png"))
    assert len(names) == 11 and all(f"({name})" in text for name in names)
    assert sum((tmp_path / name).stat().st_size for name in names) < 1_500_000
    full = tmp_path / "full"
    (full / "edits.webp").mkdir(parents=True)  # cannot be replaced
    with pytest.raises(ConfigError, match=r"edits\.webp: cannot be written"):
        report.write_report(whole, [run], full)
    assert json.loads((full / "report.json").read_text()) == data and (full / "answers.json.gz").is_file()
    assert not (full / "report.md").exists()


def test_command_line_refuses_in_one_sentence(tmp_path: Path, capsys) -> None:
    for flag, value in (("--limit", "0"), ("--batch", "0"), ("--seed", "-1")):
        assert report.main(["--model", str(tmp_path / "none"), flag, value]) == 2
        assert f"{flag} must be at least" in capsys.readouterr().err
    taken = tmp_path / "taken"
    taken.write_text("a file")
    assert report.main(["--model", "nano", "--out", str(taken), "--limit", "1"]) == 2
    assert f"{taken}: cannot be written" in capsys.readouterr().err
    assert taken.read_text() == "a file"
    assert report.main(["--model", str(tmp_path / "none"), "--splits", "vol"]) == 2  # before anything is loaded
    assert "no split 'vol' (did you mean 'val'?)" in capsys.readouterr().err


def test_a_smaller_report_replaces_no_larger_one_unasked(tmp_path: Path, capsys) -> None:
    """`--limit 2` alone would have replaced the shipped report."""
    shipped = report.report_folder("nano") / "report.json"
    before = shipped.read_bytes()
    scenes = json.loads(before)["settings"]["scenes"]
    for more in (["--limit", "2"], ["--splits", "val,pairs"]):
        assert report.main(["--model", "nano", *more]) == 2
        assert f"holds a report of {scenes} scenes a split, of val, pairs, places" in capsys.readouterr().err
    assert shipped.read_bytes() == before
    (tmp_path / "report.json").write_bytes(before)
    report.check_place(tmp_path, True, ["val"], 2)  # the folder was named
    report.check_place(tmp_path, False, list(json.loads(before)["splits"]), 500)
    (tmp_path / "report.json").write_text("{")
    report.check_place(tmp_path, False, ["val"], 2)


def test_what_the_end_of_a_report_needs_is_looked_for_at_its_start(tmp_path: Path, capsys, monkeypatch) -> None:
    def refused(**_):  # the tests may run as root
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    assert report.main(["--model", "nano", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path}: cannot be written (Permission denied)" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert report.main(["--model", "nano", "--out", str(tmp_path)]) == 2
    assert "needs the package matplotlib: bash install.sh --extras train" in capsys.readouterr().err


def test_a_report_goes_into_its_own_systems_folder(tmp_path: Path) -> None:
    shipped = Path(__file__).resolve().parents[3] / "pretrained"
    assert report.report_folder("nano").resolve() == shipped / "nano" / "report"
    assert report.report_folder("nano-x").resolve() == shipped / "nano-x" / "report"
    assert report.report_folder(tmp_path) == tmp_path / "report"
    assert report.report_folder("nano", tmp_path) == tmp_path
    assert report.report_folder("8b") == report.report_folder(tmp_path / "none") == Path("outputs/report")


def test_which_judge_scores(tmp_path: Path) -> None:
    shipped = Path(__file__).resolve().parents[3] / "pretrained" / "nano" / "judge"
    assert report.find_judge("nano", None).resolve() == shipped
    assert report.find_judge(tmp_path, None).resolve() == shipped  # a system of one's own has none
    assert report.find_judge(tmp_path, tmp_path / "other") == tmp_path / "other"
    (tmp_path / "judge").mkdir()
    assert report.find_judge(tmp_path, None).resolve() == shipped  # the folder holds no judge
    (tmp_path / "judge" / "config.json").write_text("{}")
    assert report.find_judge(tmp_path, None) == tmp_path / "judge"
