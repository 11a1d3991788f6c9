"""The report of a LaVIT: the batched system gives what the system gives one at a time, tokens are counted by what there
is to see, drawings are judged in both ratios; and the whole command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from known_world import KnowingJudge, Oracle
from PIL import Image

from seed_multimodal.errors import CheckpointError
from seed_multimodal.evaluation.batched_lavit import WIDE, BatchedLavit
from seed_nano.report import report, report_text
from seed_nano.report.judge import Judge, find_judge
from seed_nano.report.lavit_run import LavitRun, amount, code_use, dimmed, ratio
from seed_nano.report.samples import Samples, Sizes, make_samples
from seed_nano.world.evaluation import scenes
from seed_nano.world.scene import render

PICTURES = np.stack([render(scene) for scene in scenes("val")[:3]])
SHOWN = [Image.fromarray(picture) for picture in PICTURES]


@pytest.fixture(scope="module")
def batched(tiny_lavit_folder: Path) -> BatchedLavit:
    return BatchedLavit.from_pretrained(tiny_lavit_folder, device="cpu", batch=2, seed=10, log=None)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.from_pretrained(find_judge("nano"))


def test_batches_give_what_the_system_gives_one_at_a_time(batched: BatchedLavit) -> None:
    given = batched.codes(PICTURES).tolist()
    system, seeds = batched.inner, (10, 11, 12)
    alone = [system.pictures.tokenize(one, seed=seed)[0].tolist() for one, seed in zip(SHOWN, seeds, strict=True)]
    assert batched.tokens(given) == alone and len(set(map(len, alone))) > 1
    assert [int(mask.sum()) for mask in batched.patches(given)] == list(map(len, alone))
    assert batched.describe(given) == [system.describe(one, seed=seed) for one, seed in zip(SHOWN, seeds, strict=True)]
    questions = ["What is it?", "Which background is there?", "Is it a dog?"]
    assert batched.ask(given, questions) == [system.ask(one, question, seed=seed) for one, question, seed in
                                             zip(SHOWN, questions, seeds, strict=True)]

    def written(prompts: list, task: str) -> list[list[int]]:
        return [system.write([prompt], task, seed=seed)[0].codes.tolist()
                for prompt, seed in zip(prompts, seeds, strict=True)]

    texts = ["a noto dog", "three fluent cars on blue", "a large noto owl at night"]
    drawn = batched.draw(texts)
    assert batched.tokens(drawn) == written([[text] for text in texts], "draw")
    edited = batched.tokens(batched.edit(given, texts))
    assert edited == written([[codes, text] for codes, text in zip(alone, texts, strict=True)], "compose")
    joined = batched.tokens(batched.join(given, given[::-1]))
    assert joined == written([[one, other] for one, other in zip(alone, alone[::-1], strict=True)], "compose") != edited

    made = batched.pictures(drawn)
    assert np.abs(np.asarray(made[2], int) - np.asarray(
        system.pictures.draw([batched.tokens(drawn)[2]], seed=10)[0], int)).max() <= 1
    assert [picture.size for picture in batched.pictures(drawn[:1], ratio=WIDE)] == [(80, 48)]
    assert batched.pictures([]) == []


@torch.inference_mode()
def test_the_loss_is_that_of_the_features(batched: BatchedLavit) -> None:
    given = batched.codes(PICTURES).tolist()
    near, blind = batched.losses(given)
    model, decoder = batched.inner.pictures.writer, batched.inner.pictures.decoder.decoder
    true = model.patch_features(model.pixels(SHOWN))
    for row, codes in enumerate(batched.tokens(given)):
        made = decoder.features([model.embed_codes(torch.tensor(codes))])[0]
        by_hand = 1 - torch.nn.functional.cosine_similarity(true[row], made, dim=-1).mean()
        assert near[row] == pytest.approx(float(by_hand), abs=1e-5) and 0 < near[row] < 2
    assert batched.losses(given[:1])[1] == pytest.approx([0], abs=1e-5) and blind.min() > 0


def test_tokens_are_counted_by_the_number_of_things(batched: BatchedLavit, judge: Judge) -> None:
    run = LavitRun(batched, judge, make_samples("things", Sizes.limited(8)))
    run.real = run._render(run.samples.scenes)
    run.codes = batched.codes(run.real)
    found = run._tokens()
    counts = np.array(list(map(len, batched.tokens(run.codes.tolist()))))
    things = np.array([sum(scene.counts) for scene in run.samples.scenes])
    assert set(found["things"]) == {"0", *map(str, things)} and found["fullest"] == things.max() > 1
    assert found["things"]["1"]["mean"].value == pytest.approx(counts[things == 1].mean())
    assert found["things"]["1"]["spread"] == pytest.approx(counts[things == 1].std(), abs=1e-3)
    assert found["things"]["0"]["mean"].n == 80  # eight selections of ten backgrounds
    assert found["empty_share"].value == pytest.approx(
        found["things"]["0"]["mean"].value / counts[things == things.max()].mean())
    assert len(run.pictures["kept"]) == 10 and run.answers["kept"] == counts[:10].tolist()


def test_small_parts_by_hand() -> None:
    assert ratio(np.array([1, 3]), np.array([4, 4])).value == 0.5
    assert (low := ratio(np.array([1, 3]), np.array([4, 4]))).low == 0.25 and low.high == 0.75 and low.n == 2
    assert amount(np.array([2, 4]))["mean"].value == 3 and amount(np.array([2, 4]))["spread"] == 1
    assert code_use([[0, 1], [0, 1], [1, 1, 0, 0]], 4) == {
        "sequences": 3, "distinct": 2, "codebook": 4, "used": 2, "usage": 0.5, "perplexity": 2.0}
    picture = np.full((4, 4, 3), 228, np.uint8)
    shown = np.asarray(dimmed(picture, np.array([[True, False], [False, False]])))
    assert (shown[:2, :2] == 228).all() and (shown[:2, 2:] == 153).all() and (shown[2:] == 153).all()


@pytest.mark.parametrize("stretched", [True, False])
def test_wide_drawings_are_judged_as_stretched_scenes(knowing: KnowingJudge, val: Samples, judge: Judge,
                                                      stretched: bool) -> None:
    class Drawing(Oracle):
        def pictures(self, codes, first=None, ratio="1:1"):
            made = super().pictures(codes, first)
            return made if ratio == "1:1" else [
                picture.resize((80, 48), Image.Resampling.BICUBIC) if stretched else picture.crop((-8, 8, 72, 56))
                for picture in made]

    run = LavitRun(Drawing(knowing, val), judge, val)
    run.real = run._render(val.scenes)
    run._drawing()
    section = run._wide_drawing()
    assert section["size"] == (80, 48) and section["without_picture"] == 0 and section["ceiling"].value > 0.7
    assert (section["all"].value == section["ceiling"].value) is stretched
    run.drawn[0] = None
    assert run._wide_drawing()["without_picture"] == 1


def test_what_should_be_small_is_aimed_at_from_above() -> None:
    sections = {"val": {"tokens": {"cosine": 0.25, "empty_share": 0.4}, "caption": {"all": 0.9}}}
    found = {aim["what"]: aim for aim in report_text.aims(sections, report_text.LAVIT_AIMS)}
    assert [aim["met"] for aim in found.values()] == [False, True, True]
    table = report_text._aims_table(list(found.values()))
    assert "**0.250** / ≤ 0.20" in table and "| 0.400 / ≤ 0.50" in table and "| 0.900 / 0.85" in table


def test_the_command_writes_the_report(tiny_lavit_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                       ) -> None:
    assert report.main(["--model", str(tiny_lavit_folder), "--out", str(tmp_path), "--limit", "2", "--splits",
                        "val,things", "--device", "cpu"]) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "report.json").read_text())
    val = found["splits"]["val"]
    assert set(val) == {"codes", "tokens", "reconstruction", "drawing", "wide_drawing", "caption", "qa", "edit",
                        "composed", "sizes"}
    assert set(found["splits"]["things"]) == {"codes", "tokens", "reconstruction"}
    assert len(found["aims"]) == 5 and found["system"]["selection"] == "draw"
    text = (tmp_path / "report.md").read_text()
    for name in ("tokens.png", "kept.webp", "wide_drawings.webp", "composed.webp", "edits.webp"):
        assert (tmp_path / name).is_file() and f"({name})" in text
    assert "## Tokens of a picture" in text and "## Ladder" not in text
    cells = [cell.strip(" *") for line in text.splitlines() if line.startswith("|") for cell in line.split("|")]
    assert not [cell for cell in cells if re.match(r"nan\b", cell)], text


def test_a_system_that_cannot_draw_has_no_report(tiny_lavit_folder: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(tiny_lavit_folder, tmp_path / "copy")
    shutil.rmtree(folder / "decoder")
    with pytest.raises(CheckpointError, match="decoder of codes is not there, so it cannot draw"):
        BatchedLavit.from_pretrained(folder, device="cpu", log=None)
