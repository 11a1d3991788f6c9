"""The command on a tiny system of each kind; scores by hand; samples."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from seed_multimodal.weights import save_state_dict
from seed_nano.report.__main__ import main
from seed_nano.report.judge import Judge
from seed_nano.report.samples import Sizes, make_samples
from seed_nano.report.scoring import (
    UNREAD,
    all_words,
    box_rates,
    caption_words,
    likeness,
    matched,
    picture_words,
    ratio,
    right_labels,
    same_answer,
    score,
    unchanged_psnr,
)
from seed_nano.report.sections import sections_of
from seed_nano.report.systems import load_system
from seed_nano.report.write import aims, write_card
from seed_nano.world.scene import Scene, render
from seed_nano.world.splits import held_out

JUDGE = Path(__file__).resolve().parents[4] / "pretrained" / "nano" / "judge"
PAIR = Scene("noto", "blue", "left of", ("tiger", "penguin"))


@pytest.mark.process  # the report names the commit
@pytest.mark.parametrize(("fixture", "kind", "sheets"), [
    ("tiny_folder", "seed_llama", ()), ("tiny_lavit_folder", "lavit", ("kept", "wide_drawings")),
    ("tiny_x_folder", "seed_x", ("detections",))])
def test_command_of_each_kind(fixture: str, kind: str, sheets: tuple[str, ...], request: pytest.FixtureRequest,
                              tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = request.getfixturevalue(fixture)
    assert main(["--model", str(folder), "--judge", str(JUDGE), "--out", str(tmp_path), "--splits", "val,things",
                 "--limit", "2", "--device", "cpu"]) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "report.json").read_text())
    assert {split: set(found) for split, found in report["splits"].items()} == {
        split: {one.__name__ for one in sections_of(kind, split)} for split in ("val", "things")}
    assert report["settings"]["scenes"] == 2 and report["versions"]["torch"] and report["aims"]
    assert report["splits"]["val"]["caption"]["n"] == 2 and report["splits"]["val"]["reconstruction"]["gallery"] == 4
    answers = json.loads(gzip.decompress((tmp_path / "answers.json.gz").read_bytes()))
    assert len(answers["val"]["captions"]) == 2 and len(answers["things"]["rebuilt"]) == 4
    text = (tmp_path / "report.md").read_text()
    assert "## Reconstruction\n\nImages drawn from" in text and not re.search(r"\| \*?\*?nan\b", text)
    for name in (*sheets, "reconstructions", "drawings", "edits"):
        assert (tmp_path / f"{name}.webp").is_file() and f"({name}.webp)" in text, name


def test_command_names_wrong_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "nano", "--out", str(tmp_path), "--splits", "vol"]) == 2
    assert "'vol' (did you mean 'val'?)" in capsys.readouterr().err
    assert main(["--model", "nano", "--out", str(tmp_path), "--judge", str(tmp_path / "none")]) == 2
    assert "no judge in this folder" in capsys.readouterr().err


def test_lavit_batches_equal_single_requests(tiny_lavit_folder: Path) -> None:
    system = load_system(tiny_lavit_folder, batch=2, seed=10, device="cpu", log=None)
    images = [Image.fromarray(render(scene)) for scene in make_samples("val", Sizes.limited(2)).scenes[:3]]
    encoded, inner, questions = system.encode(images), system.inner, ["What is it?", "Where?", "Is it a dog?"]
    assert [one.codes for one in encoded] == [
        inner.pictures.tokenize(image, seed=10 + row)[0].tolist() for row, image in enumerate(images)]
    assert [int(one.patches.sum()) for one in encoded] == [len(one.codes) for one in encoded]
    assert system.ask(encoded, questions) == [
        inner.ask(image, text, seed=10 + row) for row, (image, text) in enumerate(zip(images, questions, strict=True))]
    assert [one.codes for one in system.draw(questions)] == [
        inner.write([[text]], "draw", seed=10 + row)[0].codes.tolist() for row, text in enumerate(questions)]
    near, blind = system.losses(encoded)
    assert near.shape == blind.shape == (3,) and near.min() > 0 and system.losses(encoded[:1])[1] < 1e-5


def test_caption_words_by_label() -> None:
    labels = ("first", "second", "style", "background", "layout")
    for text, wrong in {"a noto tiger left of a penguin on a blue background": set(),
                        "a noto penguin left of a tiger on a blue background": {"first", "second"},
                        "a tiger left of a penguin on a blue background": {"style"},
                        "a noto tiger left of a penguin": {"background"}, "it is a tiger": set(labels)}.items():
        right = right_labels([caption_words(text)], all_words([PAIR]))[0]
        assert {name for name, ok in zip(labels, right, strict=True) if not ok} == wrong, text


def test_score_counts_missing_images_as_wrong() -> None:
    found = picture_words(Judge.from_pretrained(JUDGE), [None, Image.fromarray(render(PAIR))])
    assert found == [UNREAD, *all_words([PAIR])] and score(found, all_words([PAIR] * 2))["all"].value == 0.5


def test_likeness_by_hand() -> None:
    real = render(PAIR)
    lighter = np.clip(real.astype(int) + 10, 0, 255).astype(np.uint8)
    found = likeness([Image.fromarray(lighter)], [PAIR])
    error = np.square(lighter.astype(float) - real).mean()
    assert found["psnr"].value == pytest.approx(10 * np.log10(255**2 / error)) and found["ssim"].value > 0.95
    corner = real.copy()
    corner[:6, :6] = 0  # background: the pixels of things stay
    other = likeness([Image.fromarray(corner)], [PAIR])
    assert other["psnr_things"].value > 50 > other["psnr"].value
    before, target = Image.fromarray(real), Image.fromarray(corner)
    assert unchanged_psnr([target], [before], [target]).value > 50 > unchanged_psnr([None], [before], [target]).value


def test_ratios_by_hand() -> None:
    found = ratio([1, 3], [4, 4])
    assert (found.value, found.low, found.high, found.n) == (0.5, 0.25, 0.75, 2)
    rates = box_rates([1, 1], [2, 1], [1, 3])
    assert [rates[name].value for name in ("precision", "recall", "f1")] == pytest.approx([2 / 3, 1 / 2, 4 / 7])


@pytest.mark.parametrize(("answer", "truth", "same"), [
    ("A cat.", "cat", True), ("Two", "2", True), ("cats", "cat", False), ("", "cat", False)])
def test_same_answer(answer: str, truth: str, same: bool) -> None:
    assert same_answer(answer, truth) is same


def test_matched_boxes_are_used_once() -> None:
    left, right = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
    assert [matched(*both) for both in (([left], [left, left]), ([right, left], [left, right]), ([], [left]),
                                        ([left], []), ([(0, 0, 0.5, 0.4)], [left]))] == [1, 2, 0, 0, 0]


def test_aims_at_most() -> None:
    sections = {"val": {"tokens": {"cosine": 0.25, "empty_share": 0.4}, "caption": {"all": 0.9}}}
    assert [aim["met"] for aim in aims("lavit", sections)] == [False, True, True]


@pytest.mark.slow
def test_samples_are_fixed_and_of_their_split() -> None:
    for split in ("pairs", "styles"):
        made = make_samples(split, Sizes.limited(9))
        assert made == make_samples(split, Sizes.limited(9)) and len(made.scenes) == 18 and len(made.edits) == 9
        assert all(held_out(scene) == {split} for scene in made.scenes)
        assert all(held_out(scene) | held_out(edit.target) == {split} for scene, edit in made.edits)
    assert make_samples("things", Sizes.limited(9)).questions == []


@pytest.mark.process  # the card names the commit
def test_card_of_records_and_report(tmp_path: Path) -> None:
    work, model = tmp_path / "work", tmp_path / "model"
    save_state_dict({"weight": torch.zeros(3, 4)}, model / "part" / "model.safetensors")
    (work / "stage2").mkdir(parents=True)
    (work / "vae.done.json").write_text(json.dumps({"steps": 4, "psnr": 20.5}))
    (work / "stage2" / "summary.json").write_text(json.dumps({"steps": 10}))
    (model / "report").mkdir()
    (model / "report" / "report.md").write_text("# Report of toy\n\n## Aims\n\n![drawings.webp](drawings.webp)\n")
    write_card(model, work, model / "report")
    card = ModelCard.load(model / "README.md")
    assert card.data.license == "apache-2.0" and card.text.strip().startswith("# model")
    for line in ("| vae.done.json | steps 4, psnr 20.5 |", "| stage2/summary.json | steps 10 |", "| `part` | 12 | ",
                 "### Aims", "(report/drawings.webp)"):
        assert line in card.text, line
