"""Every reader with every fault: a sample that cannot be used is named, skipped and counted, and ends the run after
many in a row."""

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
from pyarrow import parquet

from seed_multimodal.data.formats.pairs import open_pairs
from seed_multimodal.data.formats.shards import ShardWriter
from seed_multimodal.data.pretokenize.dataset import TaskDataset, decode_shards
from seed_multimodal.data.pretokenize.inputs import InputSettings, list_shards
from seed_multimodal.data.pretokenize.kinds import KINDS
from seed_multimodal.data.stream.config import read_data_settings
from seed_multimodal.data.stream.llm_batches import LlmBatches
from seed_multimodal.data.stream.loader import StepBatches
from seed_multimodal.data.stream.pairs_dataset import PairDataset
from seed_multimodal.errors import DataError
from seed_multimodal.evaluation.tokenizer import Pass, read_images
from seed_multimodal.images.transforms import seed_image_processor
from seed_multimodal.seed.captions import BlipCaption

WORDS = Path(__file__).resolve().parents[3] / "pretrained" / "nano" / "seed_tokenizer"
COUNT = 8  # samples of a set, of which number 3 is broken
BAD = 3
# fault -> what the sentence says of it. The faults of captions, then of records, then of images.
CAPTIONS = {"no caption": "has no", "null": "null|has no", "empty": "is empty", "blank": "is empty",
            "list with null": "not a text|no text", "list with blank": "is empty", "no list": "has no caption",
            "object": "not a text|no text|must be"}
RECORDS = {"not json": "is not JSON", "not UTF-8": "UTF-8|utf-8", "a list": "is a JSON list", "twice": "has two",
           "torn": "torn or damaged"}
PICTURES = {"no picture": "image", "null picture": "image", "picture gone": "not found", "no picture in it":
            "not an image", "cut off": "truncated or damaged", "0 bytes": "0 bytes"}
# format -> the faults that it can have
PAIR_FORMATS = {
    "tar of json": [*CAPTIONS, "not json", "not UTF-8", "a list", "twice", "torn", "no picture", "no picture in it",
                    "cut off", "0 bytes"],
    "tar of txt": ["no caption", "empty", "blank", "not UTF-8", "twice", "torn", "no picture", "cut off"],
    "jsonl": [*CAPTIONS, "not json", "not UTF-8", "a list", *PICTURES],
    "jsonl with base64": [*CAPTIONS, "not json", "null picture", "no picture in it", "cut off"],
    "json": [*CAPTIONS, "a list", *PICTURES],
    "parquet of bytes": ["null", "empty", "blank", "not UTF-8", "null picture", "no picture in it", "cut off",
                         "0 bytes"],
    "parquet of structs": ["null", "null picture", "no picture in it"],
    "folder": ["no caption", "empty", "blank", "not UTF-8", "no picture in it", "cut off", "0 bytes"],
    "folder with metadata.jsonl": [*CAPTIONS, "not json", "null picture", "picture gone", "cut off"],
}


def caption_of(number: int, fault: str) -> Any:
    """The caption of a sample with this fault; `...` where it has none."""
    return {"no caption": ..., "null": None, "empty": "", "blank": " \n", "list with null": ["a", None],
            "list with blank": ["a", " "], "no list": [], "object": {"a": 1}}.get(fault, f"number {number}")


def picture_of(jpeg: Callable, number: int, fault: str) -> Any:
    """The bytes of a sample's image; `...` where it has none, None where it is null, "" where the file is gone."""
    whole = jpeg(number)
    return {"no picture": ..., "null picture": None, "picture gone": "", "no picture in it": b"<html>404</html>" * 9,
            "cut off": whole[:-400], "0 bytes": b""}.get(fault, whole)


def write_pairs(folder: Path, format: str, faults: Sequence[str], jpeg: Callable):
    """A folder of `len(faults)` samples of a format, each with its fault ("": none)."""
    (folder / "pictures").mkdir(parents=True)
    rows, samples = [], []
    for number, fault in enumerate(faults):
        caption, data = caption_of(number, fault), picture_of(jpeg, number, fault)
        name = f"{number:03d}"
        row: dict[str, Any] = {"caption": caption}
        if "tar" not in format:
            held = data if "bytes" in format or data in (..., None) else \
                {"bytes": data, "path": None} if "structs" in format else \
                base64.b64encode(data).decode() if "base64" in format else f"pictures/{name}.jpg"
            row |= {"file_name" if "metadata" in format else "image": held}
            if isinstance(held, str) and "base64" not in format and data != "":
                (folder / held).write_bytes(data)
        rows.append({key: value for key, value in row.items() if value is not ...})
        text = caption.encode() if isinstance(caption, str) else caption
        samples.append((name, {"jpg": data, **({"json": json.dumps(rows[-1]).encode()} if format == "tar of json" else
                                               {"txt": text})}))
    if "tar" in format:
        write_tar_of(folder / "a.tar", samples, faults)
    elif "parquet" in format:
        write_table(folder / "a.parquet", rows, faults)
    elif format == "json":
        (folder / "captions.json").write_text(json.dumps(
            [[1] if fault == "a list" else row for row, fault in zip(rows, faults, strict=True)]))
    elif "jsonl" in format:
        name = "metadata.jsonl" if "metadata" in format else "captions.jsonl"
        (folder / name).write_bytes(b"".join(spoiled(json.dumps(row).encode(), fault) + b"\n"
                                             for row, fault in zip(rows, faults, strict=True)))
    else:
        for (name, members), fault in zip(samples, faults, strict=True):
            (folder / "pictures" / f"{name}.jpg").write_bytes(members["jpg"])
            caption = caption_of(int(name), fault)
            if caption is not ...:
                (folder / "pictures" / f"{name}.txt").write_bytes(b"\xff\xfe" if fault == "not UTF-8" else
                                                                  caption.encode())


def spoiled(data: bytes, fault: str) -> bytes:
    """A json object with this fault."""
    return {"not json": data[:-2], "not UTF-8": data[:2] + b"\xff" + data[2:], "a list": b"[1]"}.get(fault, data)


def write_tar_of(path: Path, samples: Sequence[tuple[str, dict[str, Any]]], faults: Sequence[str]):
    """A tar of samples; a torn one must be the last."""
    with open(path, "wb") as file:
        writer = ShardWriter(file)
        for (key, members), fault in zip(samples, faults, strict=True):
            kept = {name: spoiled(data, fault) if name == "json" else b"\xff\xfe" if name == "txt" and
                    fault == "not UTF-8" else data for name, data in members.items() if data is not ...}
            if fault == "no json":
                kept = {"txt": b"x"}
            writer.add(key, kept)
            if fault == "twice":
                writer.add(key, dict(list(kept.items())[-1:]))
        writer.close()
    if faults[-1] == "torn":
        with tarfile.open(path) as archive:
            last = archive.getmembers()[-1]
        os.truncate(path, last.offset_data + last.size // 2)


def write_table(path: Path, rows: Sequence[dict[str, Any]], faults: Sequence[str]):
    """A parquet file of three rows a group."""
    table = pa.Table.from_pylist(list(rows))
    if "not UTF-8" in faults:
        place = table.schema.get_field_index("caption" if "caption" in table.column_names else "text")
        texts = [b"\xff\xfe" if fault == "not UTF-8" else row[table.column_names[place]].encode()
                 for row, fault in zip(rows, faults, strict=True)]
        column = pa.array(texts, pa.binary()).view(pa.string())
        table = table.set_column(place, table.column_names[place], column)
    parquet.write_table(table, path, row_group_size=3)


def where_in(faults: list[str], fault: str) -> list[str]:
    """A set of good samples with one broken (a torn tar breaks in its last)."""
    faults[-1 if fault == "torn" else BAD] = fault
    return faults


# ---- the tools: (captions of the samples they use, sentences about those they skip)

Found = tuple[list[str], list[str]]


def trained(folder: Path, most: int = 20) -> Found:
    """The tokenizer's training: one epoch of batches."""
    data = PairDataset(open_pairs({"format": "auto", "files": str(folder)}), seed_image_processor(16), BlipCaption(),
                       log=None, max_bad_in_a_row=most)
    with StepBatches(data, len(data), seed=0, shuffle=False) as batches:
        batch = batches.at(0)
        used = dict(zip(batch["key"], batch["caption"], strict=True))  # one of them stands for the broken one, too
        return list(used.values()), [reason for _, reason in batches.bad_samples()]


def evaluated(folder: Path, most: int = 20) -> Found:
    """The tokenizer's evaluation, up to its images."""
    source, seen = open_pairs({"format": "auto", "files": str(folder)}), Pass()
    for _ in read_images(source, range(len(source)), 4, seen, lambda line: None):
        pass
    return [texts[0] for texts in seen.captions], seen.bad


def extracted(folder: Path, most: int = 20, kind: str = "caption") -> Found:
    """An extraction, up to its images."""
    settings = InputSettings(files=str(folder))
    dataset = TaskDataset(KINDS[kind], settings, seed_image_processor(16))
    used, bad = [], []
    for result in decode_shards(list_shards(settings, 5), dataset, 5, 0):
        used += [sample.fields.get("text") for sample in result.samples if sample.fields]
        bad += [reason for sample in result.samples for reason in sample.lost]
        bad += [sample.bad or f"dropped: {sample.dropped}" for sample in result.samples if not sample.fields]
    return used, bad


TOOLS = {"training": trained, "evaluation": evaluated, "extraction": extracted}
ALL = [(format, fault) for format, faults in PAIR_FORMATS.items() for fault in faults]


@pytest.mark.parametrize(("format", "fault"), ALL)
def test_a_sample_without_caption_or_image_is_skipped(tmp_path: Path, jpeg: Callable, format: str,
                                                        fault: str):
    faults = where_in([""] * COUNT, fault)
    write_pairs(tmp_path, format, faults, jpeg)
    good = [f"number {number}" for number, one in enumerate(faults) if not one]
    for name, tool in TOOLS.items():
        used, bad = tool(tmp_path)
        assert set(used) == set(good), (name, bad)
        assert len(bad) == 1 and str(tmp_path) in bad[0] and "\n" not in bad[0], (name, bad)
        words = {**CAPTIONS, **RECORDS, **PICTURES}[fault].split("|")
        assert any(word in bad[0] for word in words), (name, bad)


@pytest.mark.parametrize("format", PAIR_FORMATS)
def test_without_a_fault_every_reader_takes_all(tmp_path: Path, jpeg: Callable, format: str):
    write_pairs(tmp_path, format, [""] * COUNT, jpeg)
    for name, tool in TOOLS.items():
        assert tool(tmp_path) == ([f"number {number}" for number in range(COUNT)], []), name


@pytest.mark.parametrize("fault", ["no caption", "cut off"])
def test_many_in_a_row_end_the_run(tmp_path: Path, jpeg: Callable, fault: str):
    write_pairs(tmp_path, "jsonl", ["", *[fault] * 21, *[""] * 3], jpeg)
    with pytest.raises(DataError, match=r"20 consecutive samples from index 1 on .*; the last is .*line 21"):
        trained(tmp_path)
    with pytest.raises(DataError, match=r"20 samples in a row cannot be used, the last: .*line 21"):
        evaluated(tmp_path)


# ---- the language model's data


def test_broken_records_of_a_stream_are_skipped(tmp_path: Path, codes: Callable, words: Any):
    faults = ["", "no caption", "null", "", "blank", "object", "not json", "not UTF-8", "", "a list", "twice",
              "no json", "", "torn"]
    rows = [{key: value for key, value in (("image_ids", codes(number)), ("text", caption_of(number, fault)))
             if value is not ...} for number, fault in enumerate(faults)]
    write_tar_of(tmp_path / "a.tar", [(f"{number:03d}", {"json": json.dumps(row).encode()})
                                      for number, row in enumerate(rows)], faults)
    source = {"name": "all", "files": str(tmp_path), "decoder": "pretrain.caption", "cycles": 1}
    settings = read_data_settings({"sources": [source], "length": 512})
    told: list[str] = []
    with LlmBatches(settings, words, log=told.append) as batches:
        row, = next(batches).input_ids.tolist()
        skipped = batches.report()["sources"]["all"]["skipped"]
    good = [number for number, fault in enumerate(faults) if not fault]
    assert sorted(int(number) for number in re.findall(r"number (\d+)", words.decode(row))) == good
    assert sum(entry["count"] for entry in skipped.values()) == len(faults) - len(good)
    said = " ".join(one for entry in skipped.values() for one in entry["first"])
    for sentence in ("missing", "is blank", "must be a str", "is not JSON", "UTF-8", "is a JSON list", "has two .json",
                     "has no .json", "torn or damaged"):
        assert sentence in said + " ".join(skipped), sentence
