"""`check_records` of data whose pictures training opens: it passes exactly the records that training uses."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from seed_multimodal.data.check.report import CheckSettings
from seed_multimodal.data.check.run import check_records
from seed_multimodal.data.stream.data_settings import read_data_settings
from seed_multimodal.data.stream.llm_batches import LlmBatches
from seed_multimodal.errors import DataError
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.lavit.processing import LavitTokenizer

TEXTS = ["a red picture a green picture What is red? plain words of no picture make it blue"] * 30
LENGTH = 200
TALK = [{"role": "user", "content": [{"image": "a.jpg"}, "Make it red."]},
        {"role": "assistant", "content": [{"image": "a.jpg"}]}]
# decoder -> a good record, and changes that break it
CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "lavit.caption": ({"image": "a.jpg", "text": "a red picture"}, [
        {"text": None, "caption": "a red picture"}, {"text": " "}, {"image": "gone.jpg"}, {"image": "broken.jpg"},
        {"text": "red " * 300}]),
    "lavit.question": ({"image": "a.jpg", "question": "What is red?", "answer": "a picture"}, [{"answer": None}]),
    "lavit.compose": ({"source_image": "a.jpg", "target_image": "a.jpg", "instruction": "make it blue"},
                      [{"target_image": "gone.jpg"}, {"instruction": "<image> blue"}]),
    "seed_x.conversation": ({"image": "a.jpg", "data": ["What?", "A red picture"]},
                            [{"data": ["What?"]}, {"image": "gone.jpg"}]),
    "seed_x.caption": ({"image": "a.jpg", "text": "a red picture"}, [{"text": None, "caption": "a"}, {"image": None}]),
    "seed_x.edit": ({"source_image": "a.jpg", "target_image": "a.jpg", "instruction": "make it blue"},
                    [{"source_image": None}]),
    "seed_x.chat": ({"messages": TALK}, [{"messages": TALK[:1]}]),
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of LaVIT's and SEED-X's words."""
    home = tmp_path_factory.mktemp("words")
    LavitTokenizer.train(TEXTS, home / "lavit", vocab_size=290, n_codes=8, tokens_per_image=16)
    MultimodalTokenizer.train(TEXTS, home / "seed_x", vocab_size=290, n_codes=16, tokens_per_image=4, n_locations=4)
    return {name: home / name for name in ("lavit", "seed_x")}


def refusal(files: Path, tokenizer: Path, decoder: str, options: dict[str, Any]) -> str:
    """Why training cannot use a file of one record; "" if it can."""
    words = (LavitTokenizer if decoder.startswith("lavit") else MultimodalTokenizer).from_pretrained(tokenizer)
    settings = read_data_settings({"sources": [{"name": "s", "files": str(files), "decoder": decoder,
                                                "options": options}], "length": LENGTH})
    try:
        LlmBatches(settings, words).at(0)
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("decoder", "change"), [
    (decoder, change) for decoder, (_, changes) in CASES.items() for change in [{}, *changes]])
def test_check_records_passes_what_training_uses(tmp_path: Path, jpeg: Callable, tokenizers: dict[str, Path],
                                                 decoder: str, change: dict[str, Any]) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    (tmp_path / "broken.jpg").write_bytes(jpeg(1)[:200])
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({key: value for key, value in {**CASES[decoder][0], **change}.items()
                                if value is not None}) + "\n")
    tokenizer, options = tokenizers[decoder.split(".")[0]], {"base_resolution": 16}
    report = check_records(CheckSettings([file], decoder=decoder, tokenizer=tokenizer, options=options, length=LENGTH),
                           progress=False)
    refused = refusal(file, tokenizer, decoder, options)
    assert bool(report.wrong) == bool(refused) == bool(change), (report.findings, refused)
    assert report.kinds == {decoder: 1}
    if not change:
        assert report.images == report.opened >= 1 and report.lengths.total() == 1
    elif " tokens" not in refused:
        assert report.findings[0].sentence.split(" (--images")[0] in refused


def test_check_records_reads_pictures_and_texts_of_tars(tmp_path: Path, jpeg: Callable, tokenizers: dict[str, Path]
                                                        ) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("0.jpg", jpeg(1)), ("0.txt", b"a red picture"), ("1.jpg", jpeg(2))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    report = check_records(CheckSettings([tmp_path / "a.tar"], decoder="lavit.caption", tokenizer=tokenizers["lavit"]),
                           progress=False)
    assert report.records == 2 and report.errors == {"missing key": 1}
    assert "sample 1: text: is missing" in report.findings[0].sentence


def test_check_names_the_decoder_for_an_unknown_stage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from seed_multimodal.cli.main import main

    assert main(["data", "check", str(tmp_path), "--stage", "lavit"]) == 2
    assert "LaVIT's and SEED-X's training --decoder (" in capsys.readouterr().err


def test_check_records_takes_pictures_without_captions_and_edits(tmp_path: Path, jpeg: Callable) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(1))
    edits = tmp_path / "edits.jsonl"
    edits.write_text("".join(json.dumps({"target_image": "a.jpg", "source_image": name}) + "\n"
                             for name in ("b.jpg", "gone.jpg")))
    report = check_records(CheckSettings([tmp_path], "folder", stage="pictures"), progress=False)
    assert (report.wrong, report.opened) == (0, 2)
    keys = {"image": "target_image", "condition": "source_image"}
    report = check_records(CheckSettings([edits], stage="pictures", fields=keys), progress=False)
    assert report.errors == {"missing picture": 1} and "gone.jpg is not there" in report.findings[0].sentence
