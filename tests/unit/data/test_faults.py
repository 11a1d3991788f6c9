"""Every reader with every fault: unusable samples are named, skipped and counted.

Many in a row end the run.
"""

from __future__ import annotations

import base64
import json
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from data_files import jpeg
from pyarrow import parquet

from seed_multimodal.data.formats.pairs import open_pairs
from seed_multimodal.data.formats.shards import ShardWriter
from seed_multimodal.data.pretokenize.dataset import TaskDataset, decode_shards
from seed_multimodal.data.pretokenize.inputs import InputSettings, list_shards
from seed_multimodal.data.pretokenize.record_types import RECORD_TYPES
from seed_multimodal.data.stream.config import read_data_settings
from seed_multimodal.data.stream.llm_batches import LlmBatches
from seed_multimodal.data.stream.loader import StepBatches
from seed_multimodal.data.stream.pairs_dataset import PairDataset
from seed_multimodal.errors import DataError
from seed_multimodal.evaluation.tokenizer import Pass, read_images
from seed_multimodal.images.transforms import seed_image_processor
from seed_multimodal.models.seed.captions import BlipCaption

# fault -> words of its error message. The faults of captions, then of records, then of images.
CAPTIONS = {
    "no caption": "has no",
    "null": "null|has no",
    "empty": "is empty",
    "blank": "is empty",
    "list with null": "not a text|no text",
    "list with blank": "is empty",
    "no list": "has no caption",
    "object": "not a text|no text|must be",
}
RECORDS = {
    "not json": "is not JSON",
    "not UTF-8": "UTF-8|utf-8",
    "a list": "is a JSON list",
    "twice": "has two",
    "torn": "torn or damaged",
}
IMAGES = {
    "no image": "image",
    "null image": "image",
    "missing image": "not found",
    "not an image": "not an image",
    "cut off": "truncated or damaged",
    "0 bytes": "0 bytes",
}
# format -> the faults that it can have; a torn tar ends with that sample
PAIR_FORMATS = {
    "tar of json": [
        *CAPTIONS,
        "not json",
        "not UTF-8",
        "a list",
        "twice",
        "no image",
        "not an image",
        "cut off",
        "0 bytes",
        "torn",
    ],
    "tar of txt": [
        "no caption",
        "empty",
        "blank",
        "not UTF-8",
        "twice",
        "no image",
        "cut off",
        "torn",
    ],
    "jsonl": [*CAPTIONS, "not json", "not UTF-8", "a list", *IMAGES],
    "jsonl with base64": [*CAPTIONS, "not json", "null image", "not an image", "cut off"],
    "json": [*CAPTIONS, "a list", *IMAGES],
    "parquet of bytes": [
        "null",
        "empty",
        "blank",
        "not UTF-8",
        "null image",
        "not an image",
        "cut off",
        "0 bytes",
    ],
    "parquet of structs": ["null", "null image", "not an image"],
    "folder": ["no caption", "empty", "blank", "not UTF-8", "not an image", "cut off", "0 bytes"],
    "folder with metadata.jsonl": [*CAPTIONS, "not json", "null image", "missing image", "cut off"],
}


def caption_of(index: int, fault: str) -> Any:
    """The caption of a sample with this fault; `...`: no caption."""
    return {
        "no caption": ...,
        "null": None,
        "empty": "",
        "blank": " \n",
        "list with null": ["a", None],
        "list with blank": ["a", " "],
        "no list": [],
        "object": {"a": 1},
    }.get(fault, f"number {index}")


def image_of(jpeg: Callable, index: int, fault: str) -> Any:
    """The bytes of a sample's image; `...`: no image, None: null, "": a missing file."""
    content = jpeg(index)
    return {
        "no image": ...,
        "null image": None,
        "missing image": "",
        "not an image": b"<html>404</html>" * 9,
        "cut off": content[:-400],
        "0 bytes": b"",
    }.get(fault, content)


def write_pairs(folder: Path, format: str, faults: Sequence[str], jpeg: Callable):
    """A folder of `len(faults)` samples of a format, each with its fault ("": none)."""
    (folder / "images").mkdir(parents=True)
    rows = []
    samples = []
    for index, fault in enumerate(faults):
        caption = caption_of(index, fault)
        data = image_of(jpeg, index, fault)
        name = f"{index:03d}"
        row: dict[str, Any] = {"caption": caption}
        if "tar" not in format:
            value = (
                data
                if "bytes" in format or data in (..., None)
                else {"bytes": data, "path": None}
                if "structs" in format
                else base64.b64encode(data).decode()
                if "base64" in format
                else f"images/{name}.jpg"
            )
            row |= {"file_name" if "metadata" in format else "image": value}
            if isinstance(value, str) and "base64" not in format and data != "":
                (folder / value).write_bytes(data)
        rows.append({key: value for key, value in row.items() if value is not ...})
        text = caption.encode() if isinstance(caption, str) else caption
        samples.append(
            (
                name,
                {
                    "jpg": data,
                    **(
                        {"json": json.dumps(rows[-1]).encode()}
                        if format == "tar of json"
                        else {"txt": text}
                    ),
                },
            )
        )
    if "tar" in format:
        write_tar_of(folder / "a.tar", samples, faults)
    elif "parquet" in format:
        write_table(folder / "a.parquet", rows, faults)
    elif format == "json":
        (folder / "captions.json").write_text(
            json.dumps(
                [[1] if fault == "a list" else row for row, fault in zip(rows, faults, strict=True)]
            )
        )
    elif "jsonl" in format:
        name = "metadata.jsonl" if "metadata" in format else "captions.jsonl"
        (folder / name).write_bytes(
            b"".join(
                spoiled(json.dumps(row).encode(), fault) + b"\n"
                for row, fault in zip(rows, faults, strict=True)
            )
        )
    else:
        for (name, members), fault in zip(samples, faults, strict=True):
            (folder / "images" / f"{name}.jpg").write_bytes(members["jpg"])
            if members["txt"] is not ...:
                text = b"\xff\xfe" if fault == "not UTF-8" else members["txt"]
                (folder / "images" / f"{name}.txt").write_bytes(text)


def spoiled(data: bytes, fault: str) -> bytes:
    """A json object with this fault."""
    return {
        "not json": data[:-2],
        "not UTF-8": data[:2] + b"\xff" + data[2:],
        "a list": b"[1]",
    }.get(fault, data)


def write_tar_of(path: Path, samples: Sequence[tuple[str, dict[str, Any]]], faults: Sequence[str]):
    """A tar of samples; a torn one must be the last."""
    with open(path, "wb") as file:
        writer = ShardWriter(file)
        for (key, members), fault in zip(samples, faults, strict=True):
            content = {
                name: spoiled(data, fault)
                if name == "json"
                else b"\xff\xfe"
                if name == "txt" and fault == "not UTF-8"
                else data
                for name, data in members.items()
                if data is not ...
            }
            if fault == "no json":
                content = {"txt": b"x"}
            writer.add(key, content)
            if fault == "twice":
                writer.add(key, dict(list(content.items())[-1:]))
        writer.close()
    if faults[-1] == "torn":
        with tarfile.open(path) as archive:
            last = archive.getmembers()[-1]
        os.truncate(path, last.offset_data + last.size // 2)


def write_table(path: Path, rows: Sequence[dict[str, Any]], faults: Sequence[str]):
    """A parquet file of three rows a group."""
    table = pa.Table.from_pylist(list(rows))
    if "not UTF-8" in faults:
        texts = [
            b"\xff\xfe" if fault == "not UTF-8" else row["caption"] and row["caption"].encode()
            for row, fault in zip(rows, faults, strict=True)
        ]
        index = table.schema.get_field_index("caption")
        table = table.set_column(index, "caption", pa.array(texts, pa.binary()).view(pa.string()))
    parquet.write_table(table, path, row_group_size=3)


# ---- the tools: (captions of the samples they use, messages about those they skip)

Used = tuple[list[str], list[str]]


def trained(folder: Path) -> Used:
    """The tokenizer's training: one epoch of batches."""
    data = PairDataset(
        open_pairs({"format": "auto", "files": str(folder)}),
        seed_image_processor(16),
        BlipCaption(),
        log=None,
        max_bad_in_a_row=20,
    )
    with StepBatches(data, len(data), seed=0, shuffle=False) as batches:
        batch = batches.at(0)
        used = dict(
            zip(batch["key"], batch["caption"], strict=True)
        )  # good samples replace broken ones
        return list(used.values()), [reason for _, reason in batches.bad_samples()]


def evaluated(folder: Path) -> Used:
    """The tokenizer's evaluation, up to its images."""
    source = open_pairs({"format": "auto", "files": str(folder)})
    evaluated_pass = Pass()
    for _ in read_images(source, range(len(source)), 4, evaluated_pass, lambda line: None):
        pass
    return [texts[0] for texts in evaluated_pass.captions], evaluated_pass.bad


def extracted(folder: Path) -> Used:
    """An extraction, up to its images."""
    settings = InputSettings(files=str(folder))
    dataset = TaskDataset(RECORD_TYPES["caption"], settings, seed_image_processor(16))
    used = []
    bad = []
    for result in decode_shards(list_shards(settings, 5), dataset, 5, 0):
        used += [sample.fields.get("text") for sample in result.samples if sample.fields]
        bad += [reason for sample in result.samples for reason in sample.lost_images]
        bad += [
            sample.error or f"dropped: {sample.drop_reason}"
            for sample in result.samples
            if not sample.fields
        ]
    return used, bad


TOOLS = {"training": trained, "evaluation": evaluated, "extraction": extracted}


@pytest.mark.parametrize("format", PAIR_FORMATS)
def test_faulty_pairs_are_skipped(tmp_path, format):
    faults = ["", *(name for fault in PAIR_FORMATS[format] for name in ("", fault))]
    write_pairs(tmp_path, format, faults, jpeg)
    for tool, run in TOOLS.items():
        used, bad = run(tmp_path)
        assert set(used) == {
            f"number {index}" for index, fault in enumerate(faults) if not fault
        }, (tool, bad)
        for fault, reason in zip(PAIR_FORMATS[format], bad, strict=True):
            phrases = {**CAPTIONS, **RECORDS, **IMAGES}[fault].split("|")
            assert any(word in reason for word in phrases), (tool, fault, reason)
            assert str(tmp_path) in reason and "\n" not in reason


@pytest.mark.parametrize("fault", ["no caption", "cut off"])
def test_many_faulty_pairs_in_a_row_end_the_run(tmp_path, fault):
    write_pairs(tmp_path, "jsonl", ["", *[fault] * 21, *[""] * 3], jpeg)
    with pytest.raises(
        DataError, match=r"20 consecutive samples from index 1 on .*; the last is .*line 21"
    ):
        trained(tmp_path)
    with pytest.raises(DataError, match=r"20 samples in a row cannot be used, the last: .*line 21"):
        evaluated(tmp_path)


# ---- the language model's data


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
def test_faulty_records_of_a_stream_are_skipped(tmp_path, codes, tokenizer):
    faults = [
        "",
        "no caption",
        "null",
        "",
        "blank",
        "object",
        "not json",
        "not UTF-8",
        "",
        "a list",
        "twice",
        "no json",
        "",
        "torn",
    ]
    rows = [
        {
            key: value
            for key, value in (("image_ids", codes(index)), ("text", caption_of(index, fault)))
            if value is not ...
        }
        for index, fault in enumerate(faults)
    ]
    write_tar_of(
        tmp_path / "a.tar",
        [(f"{index:03d}", {"json": json.dumps(row).encode()}) for index, row in enumerate(rows)],
        faults,
    )
    source = {"name": "all", "files": str(tmp_path), "decoder": "pretrain.caption", "cycles": 1}
    settings = read_data_settings({"sources": [source], "length": 512})
    with LlmBatches(settings, tokenizer, workers=2) as batches:
        (row,) = next(batches).input_ids.tolist()
        skipped = batches.report()["sources"]["all"]["skipped"]
    good = [index for index, fault in enumerate(faults) if not fault]
    assert (
        sorted(int(index) for index in re.findall(r"number (\d+)", tokenizer.decode(row))) == good
    )
    assert sum(entry["count"] for entry in skipped.values()) == len(faults) - len(good)
    reasons = " ".join(
        [*skipped, *(reason for entry in skipped.values() for reason in entry["first"])]
    )
    for message in (
        "missing",
        "is blank",
        "must be a str",
        "is not JSON",
        "UTF-8",
        "is a JSON list",
        "has two .json",
        "has no .json",
        "torn or damaged",
    ):
        assert message in reasons, message


def test_odd_values_of_a_stream_are_skipped(tmp_path, codes, tokenizer):
    rows = [{"image_ids": codes(index), "text": f"number {index}"} for index in range(200)]
    rows[77]["text"], rows[78]["views"], rows[79]["text"] = [], float("nan"), 1.5
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    source = {
        "name": "all",
        "files": str(tmp_path),
        "decoder": "pretrain.caption",
        "cycles": 1,
        "options": {"reverse_ratio": 1.0},
    }
    batches = LlmBatches(read_data_settings({"sources": [source], "length": 512}), tokenizer)
    assert sum(batch.sequences for batch in batches) == 197
    skipped = batches.report()["sources"]["all"]["skipped"]
    assert sum(entry["count"] for entry in skipped.values()) == 3
    for line in (78, 79, 80):
        assert any(
            f"line {line}:" in first for entry in skipped.values() for first in entry["first"]
        )
    mostly_bad = [rows[77 if index % 30 else 0] for index in range(150)]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in mostly_bad))
    with pytest.raises(
        DataError, match="20 consecutive records of source all are broken, the last: .*text: is an"
    ):
        list(LlmBatches(read_data_settings({"sources": [source], "length": 512}), tokenizer))


def test_odd_values_of_an_extraction_are_skipped(
    tmp_path,
):
    rows = [
        {"image": "a.jpg", "caption": "a"},
        {"image": "a.jpg", "caption": "a", "similarity": "n/a"},
        {"image": ["a.jpg"], "caption": "a"},
        {"image": {"bytes": 7}, "caption": "a"},
        {"image": "a.jpg", "caption": {}},
        {"image": "a\0.jpg", "caption": "a"},
    ]
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    (tmp_path / "list.json").write_text(json.dumps(rows))
    settings = InputSettings(files=str(tmp_path / "list.json"), similarity_thr=0.2)
    dataset = TaskDataset(RECORD_TYPES["caption"], settings, seed_image_processor(16))
    (task,) = decode_shards(list_shards(settings, 9), dataset, 9, 0)
    assert [bool(sample.error) for sample in task.samples] == [False, False, True, True, True, True]
    assert all(f"item {sample.index}" in sample.error for sample in task.samples if sample.error)


def test_odd_values_of_pairs_are_skipped(
    tmp_path,
):
    rows: list[dict[str, Any]] = [
        {"image": "a.jpg", "caption": "a"},
        {"image": "a\0.jpg", "caption": "b"},
        {"image": {"bytes": 7}, "caption": "c"},
        {"image": "a.jpg", "caption": "d"},
    ]
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    (tmp_path / "list.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    used, bad = trained(tmp_path / "list.jsonl")
    assert (
        set(used) == {"a", "d"}
        and len(bad) == 2
        and all("list.jsonl: line" in reason for reason in bad)
    )
    used, bad = evaluated(tmp_path / "list.jsonl")
    assert used == ["a", "d"] and len(bad) == 2
    data = PairDataset(
        open_pairs({"files": str(tmp_path / "list.jsonl")}),
        seed_image_processor(16),
        lambda text: {"a": "A"}[text],
        log=None,
    )  # a text processor that knows one caption
    assert data.get(3)["caption"] == "A" and len(data.bad) == 1
