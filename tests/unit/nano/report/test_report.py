"""The report command on a tiny system of each kind; scores, samples, model cards; figures of
the shipped reports."""

import gzip
import json
import re

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from repository import NANO, ROOT
from tiny import read_json, write_json
from yaml_tables import read_tables

from seed_multimodal.evaluation.metrics import plain
from seed_multimodal.state_dicts import save_state_dict
from seed_nano.report import scoring
from seed_nano.report.__main__ import main
from seed_nano.report.judge import Judge
from seed_nano.report.samples import Sizes, make_samples
from seed_nano.report.sections import Run, caption, qa, sections_of
from seed_nano.report.systems import System
from seed_nano.report.write import aims, write_card
from seed_nano.world.scene import Scene, render
from seed_nano.world.splits import held_out

JUDGE = NANO / "judge"
PAIR = Scene("noto", "blue", "left of", ("tiger", "penguin"))


@pytest.mark.process  # the report names the commit
@pytest.mark.slow
@pytest.mark.parametrize(
    "fixture, kind, sheets",
    [
        ("tiny_folder", "seed_llama", ()),
        ("tiny_lavit_folder", "lavit", ("kept", "wide_drawings")),
        ("tiny_x_folder", "seed_x", ("detections",)),
    ],
)
def test_report_of_each_kind(fixture, kind, sheets, request, tmp_path):
    # Every section, file and sheet that the published reports have.
    folder = request.getfixturevalue(fixture)
    flags = f"--model {folder} --judge {JUDGE} --out {tmp_path} --splits val,things --limit 2"
    assert main([*flags.split(), "--device", "cpu"]) == 0
    report = read_json(tmp_path / "report.json")
    for split in ("val", "things"):
        expected = {section.__name__ for section in sections_of(kind, split)}
        assert set(report["splits"][split]) == expected
    assert report["settings"]["scenes"] == report["splits"]["val"]["caption"]["n"] == 2
    assert report["versions"]["torch"]
    assert report["aims"]
    answers = json.loads(gzip.decompress((tmp_path / "answers.json.gz").read_bytes()))
    assert len(answers["val"]["captions"]) == 2
    assert len(answers["things"]["rebuilt"]) == 4
    text = (tmp_path / "report.md").read_text()
    assert not re.search(r"\| \*?\*?nan\b", text)
    for name in (*sheets, "reconstructions", "drawings", "edits"):
        assert (tmp_path / f"{name}.webp").is_file()
        assert f"({name}.webp)" in text


def test_caption_words_by_label():
    # A caption is right label by label, in any words.
    labels = ("first", "second", "style", "background", "layout")
    for text, wrong in {
        "a noto tiger left of a penguin on a blue background": set(),
        "a noto penguin left of a tiger on a blue background": {"first", "second"},
        "a tiger left of a penguin on a blue background": {"style"},
        "a noto tiger left of a penguin": {"background"},
        "it is a tiger": set(labels),
    }.items():
        read = [scoring.caption_labels(text)]
        [right] = scoring.label_matches(read, scoring.true_labels([PAIR]))
        assert {name for name, ok in zip(labels, right, strict=True) if not ok} == wrong, text


def test_score_counts_missing_images_as_wrong():
    # A system that draws nothing would score best.
    images = [None, Image.fromarray(render(PAIR))]
    labels = scoring.image_labels(Judge.from_pretrained(JUDGE), images)
    assert labels == [scoring.NO_LABELS, *scoring.true_labels([PAIR])]
    assert scoring.score(labels, scoring.true_labels([PAIR] * 2))["all"].value == 0.5


def test_likeness_by_hand():
    real = render(PAIR)
    corner = real.copy()
    corner[:6, :6] = 0  # background only
    scores = scoring.similarity([Image.fromarray(corner)], [PAIR])
    error = np.square(corner.astype(float) - real).mean()
    assert scores["psnr"].value == pytest.approx(10 * np.log10(255**2 / error))
    assert 0.9 < scores["ssim"].value < 1
    assert scores["psnr_things"].value > 50 > scores["psnr"].value
    # An edit that does nothing wrong outside of what changes; and a missing one.
    before, target = [Image.fromarray(real)], [Image.fromarray(corner)]
    assert scoring.unchanged_psnr(target, before, target).value > 50
    assert scoring.unchanged_psnr([None], before, target).value == 0


def test_ratios_by_hand():
    # Counts are added before they are divided.
    share = scoring.ratio([1, 3], [4, 4])
    assert (share.value, share.low, share.high, share.n) == (0.5, 0.25, 0.75, 2)
    rates = scoring.box_rates([1, 1], [2, 1], [1, 3])
    assert [rates[name].value for name in ("precision", "recall", "f1")] == pytest.approx(
        [2 / 3, 1 / 2, 4 / 7]
    )


@pytest.mark.parametrize("boxes, expected, n_matches", read_tables(__file__))
def test_matched_boxes_are_used_once(boxes, expected, n_matches):
    # Boxes at one place would find several things.
    assert scoring.count_matches(boxes, expected) == n_matches


def test_aims_at_most():
    # Some figures are better if lower.
    sections = {"val": {"tokens": {"cosine": 0.25, "empty_share": 0.4}, "caption": {"all": 0.9}}}
    assert [aim["met"] for aim in aims("lavit", sections)] == [False, True, True]


@pytest.mark.slow
def test_make_samples_is_deterministic_and_of_one_split():
    # Reports of two systems are about the same samples.
    samples = make_samples("styles", Sizes.limited(9))
    assert samples == make_samples("styles", Sizes.limited(9))
    assert (len(samples.scenes), len(samples.edits)) == (18, 9)
    assert all(held_out(scene) == {"styles"} for scene in samples.scenes)


@pytest.mark.process  # the card names the commit
def test_write_card_of_records_and_report(tmp_path):
    # The README of a published model.
    work = tmp_path / "work"
    model = tmp_path / "model"
    save_state_dict({"weight": torch.zeros(3, 4)}, model / "part" / "model.safetensors")
    work.mkdir()
    write_json(work / "vae.done.json", {"steps": 4, "psnr": 20.5})
    (model / "report").mkdir()
    (model / "report" / "report.md").write_text(
        "# Report of toy\n\n## Aims\n\n![drawings.webp](drawings.webp)\n"
    )
    write_card(model, work, model / "report")
    card = ModelCard.load(model / "README.md")
    assert card.data.license == "apache-2.0"
    for line in ("| vae.done.json | steps 4", "| `part` | 12 | ", "(report/drawings.webp)"):
        assert line in card.text


class Packed(System):
    """A system that returns its packed answers."""

    image_size = 64

    def __init__(self, answers: dict):
        self.answers = answers

    def encode(self, images) -> list:
        return list(images)

    def describe(self, encoded) -> list[str]:
        return [answer["text"] for answer in self.answers["captions"]]

    def ask(self, encoded, questions) -> list[str]:
        assert [answer["question"] for answer in self.answers["questions"]] == questions
        return [answer["answer"] for answer in self.answers["questions"]]


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["nano", "nano-x", "nano-lavit"])
def test_sections_of_packed_answers(name):
    from seed_nano.report.judge import Judge

    # The published figures follow from the published answers.
    folder = ROOT / "pretrained" / name / "report"
    shipped = read_json(folder / "report.json")
    answers = json.loads(gzip.decompress((folder / "answers.json.gz").read_bytes()))["val"]
    sizes = Sizes(**{key: shipped["settings"][key] for key in vars(Sizes())})
    judge = Judge.from_pretrained(NANO / "judge")
    run = Run(Packed(answers), judge, make_samples("val", sizes))
    for section in (caption, qa):
        figures = json.loads(json.dumps(plain(section(run))))
        assert figures == shipped["splits"]["val"][section.__name__]
    for packed in ("captions", "questions"):
        assert json.loads(json.dumps(run.answers[packed])) == answers[packed]
