"""The report command on a tiny system of each kind; scores, samples, model cards."""

from __future__ import annotations

import gzip
import json
import re

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from repository import ROOT

from seed_multimodal.weights import save_state_dict
from seed_nano.report import scoring
from seed_nano.report.__main__ import main
from seed_nano.report.judge import Judge
from seed_nano.report.samples import Sizes, make_samples
from seed_nano.report.sections import sections_of
from seed_nano.report.write import aims, write_card
from seed_nano.world.scene import Scene, render
from seed_nano.world.splits import held_out

JUDGE = ROOT / "pretrained" / "nano" / "judge"
PAIR = Scene("noto", "blue", "left of", ("tiger", "penguin"))


@pytest.mark.process  # the report names the commit
@pytest.mark.parametrize(
    ("fixture", "kind", "sheets"),
    [
        ("tiny_folder", "seed_llama", ()),
        ("tiny_lavit_folder", "lavit", ("kept", "wide_drawings")),
        ("tiny_x_folder", "seed_x", ("detections",)),
    ],
)
def test_report_of_each_kind(
    fixture,
    kind,
    sheets,
    request,
    tmp_path,
    capsys,
):
    folder = request.getfixturevalue(fixture)
    assert (
        main(
            (
                f"--model {folder} --judge {JUDGE} --out {tmp_path} --splits val,things "
                "--limit 2 --device cpu"
            ).split()
        )
        == 0
    ), capsys.readouterr().err
    report = json.loads((tmp_path / "report.json").read_text())
    assert {split: set(sections) for split, sections in report["splits"].items()} == {
        split: {section.__name__ for section in sections_of(kind, split)}
        for split in ("val", "things")
    }
    assert report["settings"]["scenes"] == 2 and report["versions"]["torch"] and report["aims"]
    assert (
        report["splits"]["val"]["caption"]["n"] == 2
        and report["splits"]["val"]["reconstruction"]["gallery"] == 4
    )
    answers = json.loads(gzip.decompress((tmp_path / "answers.json.gz").read_bytes()))
    assert len(answers["val"]["captions"]) == 2 and len(answers["things"]["rebuilt"]) == 4
    text = (tmp_path / "report.md").read_text()
    assert "## Reconstruction\n\nImages drawn from" in text and "| 64 pixels: questions |" in text
    assert not re.search(r"\| \*?\*?nan\b", text)
    for name in (*sheets, "reconstructions", "drawings", "edits"):
        assert (tmp_path / f"{name}.webp").is_file() and f"({name}.webp)" in text, name


def test_report_with_wrong_values(tmp_path, capsys):
    assert main(f"--model nano --out {tmp_path} --splits vol".split()) == 2
    assert "'vol' (did you mean 'val'?)" in capsys.readouterr().err
    assert main(f"--model nano --out {tmp_path} --judge {tmp_path / 'none'}".split()) == 2
    assert "no judge in this folder" in capsys.readouterr().err


def test_caption_words_by_label():
    labels = ("first", "second", "style", "background", "layout")
    for text, wrong in {
        "a noto tiger left of a penguin on a blue background": set(),
        "a noto penguin left of a tiger on a blue background": {"first", "second"},
        "a tiger left of a penguin on a blue background": {"style"},
        "a noto tiger left of a penguin": {"background"},
        "it is a tiger": set(labels),
    }.items():
        right = scoring.label_matches([scoring.caption_labels(text)], scoring.true_labels([PAIR]))[
            0
        ]
        assert {name for name, ok in zip(labels, right, strict=True) if not ok} == wrong, text


def test_score_counts_missing_images_as_wrong():
    labels = scoring.image_labels(
        Judge.from_pretrained(JUDGE), [None, Image.fromarray(render(PAIR))]
    )
    assert labels == [scoring.NO_LABELS, *scoring.true_labels([PAIR])]
    assert scoring.score(labels, scoring.true_labels([PAIR] * 2))["all"].value == 0.5


def test_likeness_by_hand():
    real = render(PAIR)
    corner = real.copy()
    corner[:6, :6] = 0  # background only
    scores = scoring.similarity([Image.fromarray(corner)], [PAIR])
    error = np.square(corner.astype(float) - real).mean()
    assert (
        scores["psnr"].value == pytest.approx(10 * np.log10(255**2 / error))
        and 0.9 < scores["ssim"].value < 1
    )
    assert scores["psnr_things"].value > 50 > scores["psnr"].value
    before = Image.fromarray(real)
    target = Image.fromarray(corner)
    values = [
        scoring.unchanged_psnr([edited], [before], [target]).value for edited in (target, None)
    ]
    assert values[0] > 50 and values[1] == 0


def test_ratios_by_hand():
    share = scoring.ratio([1, 3], [4, 4])
    assert (share.value, share.low, share.high, share.n) == (0.5, 0.25, 0.75, 2)
    rates = scoring.box_rates([1, 1], [2, 1], [1, 3])
    assert [rates[name].value for name in ("precision", "recall", "f1")] == pytest.approx(
        [2 / 3, 1 / 2, 4 / 7]
    )


def test_matched_boxes_are_used_once():
    left = (0, 0, 0.5, 1)
    right = (0.5, 0, 1, 1)
    assert [
        scoring.count_matches(*both)
        for both in (
            ([left], [left, left]),
            ([right, left], [left, right]),
            ([], [left]),
            ([left], []),
            ([(0, 0, 0.5, 0.4)], [left]),
        )
    ] == [1, 2, 0, 0, 0]


def test_aims_at_most():
    sections = {"val": {"tokens": {"cosine": 0.25, "empty_share": 0.4}, "caption": {"all": 0.9}}}
    assert [aim["met"] for aim in aims("lavit", sections)] == [False, True, True]
    edits = {"val": {"edit": {"all": 0.8, "unchanged_psnr": 26.0, "ceiling": 0.9}}}
    assert [(aim["what"], aim["ceiling"]) for aim in aims("seed_x", edits)] == [
        ("edits, all", 0.9),
        ("edits, PSNR of what is unchanged, dB", None),
    ]


@pytest.mark.slow
def test_make_samples_is_deterministic_and_of_one_split():
    for split in ("pairs", "styles"):
        samples = make_samples(split, Sizes.limited(9))
        assert samples == make_samples(split, Sizes.limited(9))
        assert len(samples.scenes) == 18 and len(samples.edits) == 9
        assert all(held_out(scene) == {split} for scene in samples.scenes)
        assert all(
            held_out(scene) | held_out(edit.target) == {split} for scene, edit in samples.edits
        )
    assert make_samples("things", Sizes.limited(9)).questions == []


@pytest.mark.process  # the card names the commit
def test_write_card_of_records_and_report(tmp_path):
    work = tmp_path / "work"
    model = tmp_path / "model"
    save_state_dict({"weight": torch.zeros(3, 4)}, model / "part" / "model.safetensors")
    work.mkdir()
    (work / "vae.done.json").write_text(json.dumps({"steps": 4, "psnr": 20.5}))
    (model / "report").mkdir()
    (model / "report" / "report.md").write_text(
        "# Report of toy\n\n## Aims\n\n![drawings.webp](drawings.webp)\n"
    )
    write_card(model, work, model / "report")
    card = ModelCard.load(model / "README.md")
    assert card.data.license == "apache-2.0"
    for line in (
        "| vae.done.json | steps 4, psnr 20.5 |",
        "| `part` | 12 | ",
        "### Aims",
        "(report/drawings.webp)",
    ):
        assert line in card.text, line
