"""`seed data check`: the sources of a run, and files with a decoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from data_files import jpeg, lines
from omegaconf import OmegaConf
from repository import ROOT

from seed_multimodal.cli.main import main
from seed_multimodal.data.check import check_sources
from seed_multimodal.data.stream.config import read_data_settings

WORDS = ROOT / "pretrained" / "nano" / "seed_tokenizer"


def test_check_of_a_run(mixed: Callable[..., dict[str, Any]], tmp_path, capsys):
    """Counts and lengths of every source, compared with the row length of the run."""
    run = tmp_path / "run.yaml"
    OmegaConf.save(
        OmegaConf.create(
            {"tokenizer": {"pretrained_model_name_or_path": str(WORDS)}, "data": mixed(length=60)}
        ),
        run,
    )
    assert main(f"data check {run} --records 1000000 --json".split()) == 0
    report = json.loads(capsys.readouterr().out)
    sources = {source["name"]: source for source in report["sources"]}
    assert {name: source["records"] for name, source in sources.items()} == {
        "captions": 66,
        "documents": 30,
        "texts": 35,
    } and report["broken"] == 0
    assert sources["documents"]["too_long"] == 30 and sources["captions"]["too_long"] == 0
    assert 34 < sources["captions"]["tokens"]["p50"] < sources["documents"]["tokens"]["p5"]
    assert main(["data", "check", str(run), "--records", "4"]) == 0
    out = capsys.readouterr().out
    assert "captions: 4 of 66 records, 4 sequences" in out and "nothing broken" in out


def test_check_of_files_with_bad_records(codes, tmp_path, capsys):
    good = {"image_ids": codes(1), "question": "What?", "answer": "a cat"}
    file = lines(
        tmp_path / "a.jsonl",
        [
            good,
            {**good, "answer": "see </s> and <img_00001>"},
            {"image_ids": codes(2)},
            {**good, "image_ids": codes(1)[1:]},
            "{",
        ],
    )
    call = f"data check {file} --decoder sft.qa --tokenizer {WORDS}".split()
    assert main(call) == 1
    out = capsys.readouterr().out
    assert (
        "5 of 5 records, 2 sequences" in out
        and "3 broken records" in out
        and "</s> 1, <img_…> 1" in out
    )
    assert f"missing key: {file}: line 3: answer: missing; decoder sft.qa needs it." in out
    assert f"malformed json: {file}: line 5" in out
    assert main([*call[:3], "--tokenizer", str(WORDS)]) == 2
    assert "need --decoder NAME and --tokenizer DIR" in capsys.readouterr().err


def test_check_sources_with_images(tmp_path):
    """Decoders of images open them as in training; a record with a missing image is broken."""
    from seed_multimodal.models.lavit.processing import LavitTokenizer
    from seed_nano.train.words import train_text_tokenizer

    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    (tmp_path / "a.jsonl").write_text(
        "".join(
            json.dumps({"image": f"{index}.jpg", "text": "a red cat"}) + "\n" for index in range(2)
        )
    )
    train_text_tokenizer(
        LavitTokenizer,
        ["a red cat"] * 30,
        tmp_path / "words",
        vocab_size=270,
        n_codes=8,
        tokens_per_image=16,
    )
    settings = read_data_settings(
        {"sources": [{"files": str(tmp_path / "a.jsonl"), "decoder": "lavit.caption"}]}
    )
    (report,) = check_sources(settings, str(tmp_path / "words"))
    assert report.records == 2 and len(report.lengths) == 1 and report.broken == 1
    assert "1.jpg" in report.first[0]
