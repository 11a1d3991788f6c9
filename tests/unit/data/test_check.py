"""`seed data check`: the sources of a run, and files with a decoder."""

import json

from data_files import lines
from repository import NANO
from tiny import write_json

from seed_multimodal.cli.main import main

WORDS = NANO / "seed_tokenizer"


def test_check_of_a_run(mixed, tmp_path, capsys):
    # Counts and lengths of every source, compared with the row length of the run.
    run = tmp_path / "run.yaml"
    config = {"tokenizer": {"pretrained_model_name_or_path": str(WORDS)}, "data": mixed(length=60)}
    write_json(run, config)
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


def test_check_of_files_with_bad_records(codes, tmp_path, capsys):
    # Exit code 1, each broken line named; control words in texts would end a text.
    good = {"image_ids": codes(1), "question": "What?", "answer": "a cat"}
    file = lines(
        tmp_path / "a.jsonl",
        [
            good,
            {**good, "answer": "see </s> and <img_00001>"},
            {"image_ids": codes(2), "answer": None},
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
    assert f"{file}: line 3: 'answer' is empty" in out
    assert f"{file}: line 5" in out
