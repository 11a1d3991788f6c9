"""Every reader with every fault: unusable samples are named, skipped and counted.

Many in a row end the run.
"""

import base64
import json
import os
import re
import tarfile
from collections.abc import Sequence

import pyarrow as pa
import pytest
from data_files import jpeg
from pyarrow import parquet
from yaml_tables import read_tables

from seed_multimodal.data.formats.pairs import open_pairs
from seed_multimodal.data.formats.shards import ShardWriter
from seed_multimodal.data.stream.config import read_data_settings
from seed_multimodal.data.stream.llm_batches import LlmBatches
from seed_multimodal.data.stream.pairs_dataset import PairDataset
from seed_multimodal.data.stream.step_batches import StepBatches
from seed_multimodal.errors import DataError
from seed_multimodal.evaluation.tokenizer import Pass, read_images
from seed_multimodal.images.transforms import seed_image_processor
from seed_multimodal.pretokenize.dataset import TaskDecoder, decode_shards
from seed_multimodal.pretokenize.inputs import InputSettings, list_shards
from seed_multimodal.pretokenize.record_types import RECORD_TYPES

TABLES = read_tables(__file__)
# ...: nothing.
CAPTIONS = {**TABLES["captions"], "no caption": ...}
PATHS = TABLES["paths"]
IMAGES = {
    "no image": ...,
    "null image": None,
    "not an image": b"<html>404</html>" * 9,
    "cut off": jpeg(0)[:-400],
    "0 bytes": b"",
}
JSON = {
    "not json": lambda data: data[:-2],
    "not UTF-8": lambda data: data[:2] + b"\xff" + data[2:],
    "a list": lambda data: b"[1]",
}


def faults_of(format: str) -> list[str]:
    """A good sample ("") before each fault."""
    groups = TABLES["formats"][format]
    faults = [name for group in groups for name in ([group] if isinstance(group, str) else group)]
    return ["", *(name for fault in faults for name in ("", fault))]


def location(format: str, index, fault: str) -> str:
    """What names a sample in a message; a torn shard is named by the sample before the damage."""
    if "tar" in format:
        return f"sample {index - (fault == 'torn'):03d}"
    if "jsonl" in format:
        return f"line {index + 1}"
    if format == "folder":
        return f"images/{index:03d}"
    return f"{'item' if format == 'json' else 'row'} {index}"


def written_caption(index, fault: str):
    return CAPTIONS.get(fault, f"number {index}")


def write_pairs(folder, format: str, faults: Sequence[str]):
    """A folder of a sample for each fault ("": none)."""
    (folder / "images").mkdir(parents=True)
    samples = []
    rows = []
    for index, fault in enumerate(faults):
        caption = written_caption(index, fault)
        image = IMAGES.get(fault, jpeg(index))
        name = f"{index:03d}"
        # 1. A sample of a tar or a folder.
        text = b"\xff\xfe" if fault == "not UTF-8" else caption
        members = {"jpg": image, "txt": text.encode() if isinstance(text, str) else text}
        if format == "tar of json":
            fields = {} if caption is ... else {"caption": caption}
            data = json.dumps(fields).encode()
            members = {"jpg": image, "json": JSON.get(fault, bytes)(data)}
        samples.append((name, {key: data for key, data in members.items() if data is not ...}))

        # 2. A row of a list or a table.
        value = image
        if fault in PATHS:
            value = PATHS[fault]
        elif image not in (..., None):
            if format == "parquet of structs":
                value = {"bytes": image, "path": None}
            elif "base64" in format:
                value = base64.b64encode(image).decode()
            elif format.startswith(("json", "folder with")):
                value = f"images/{name}.jpg"
                (folder / value).write_bytes(image)
        row = {"caption": caption, "file_name" if "metadata" in format else "image": value}
        rows.append({key: value for key, value in row.items() if value is not ...})

    if "tar" in format:
        write_tar(folder / "a.tar", samples, faults)
    elif "parquet" in format:
        write_table(folder / "a.parquet", rows, faults)
    elif format == "folder":
        for name, members in samples:
            for extension, data in members.items():
                (folder / "images" / f"{name}.{extension}").write_bytes(data)
    else:
        encoded = [
            JSON.get(fault, bytes)(json.dumps(row).encode())
            for row, fault in zip(rows, faults, strict=True)
        ]
        name = "metadata.jsonl" if "metadata" in format else f"a.{format.split()[0]}"
        joined = b"\n".join(encoded)
        (folder / name).write_bytes(b"[%s]" % b",".join(encoded) if format == "json" else joined)


def write_tar(path, samples: Sequence[tuple[str, dict[str, bytes]]], faults: Sequence[str]):
    """A tar of samples; a torn one must be the last."""
    with open(path, "wb") as file:
        writer = ShardWriter(file)
        for (key, members), fault in zip(samples, faults, strict=True):
            writer.add(key, members)
            if fault == "twice":
                writer.add(key, dict(list(members.items())[-1:]))
        writer.close()
    if faults[-1] == "torn":
        with tarfile.open(path) as archive:
            last = archive.getmembers()[-1]
        os.truncate(path, last.offset_data + last.size // 2)


def write_table(path, rows: list[dict], faults: Sequence[str]):
    """A parquet file of three rows a group."""
    table = pa.Table.from_pylist(rows)
    texts = [
        b"\xff\xfe" if fault == "not UTF-8" else row["caption"] and row["caption"].encode()
        for row, fault in zip(rows, faults, strict=True)
    ]
    # A cast to text would check it.
    column = pa.Array.from_buffers(pa.string(), len(texts), pa.array(texts, pa.binary()).buffers())
    index = table.column_names.index("caption")
    parquet.write_table(table.set_column(index, "caption", column), path, row_group_size=3)


# ---- the tools: captions of used samples, and messages of the others

Used = tuple[list[str], list[str]]


def train(folder) -> Used:
    """The tokenizer's training: a batch of as many samples as there are broken and good ones."""
    logged: list[str] = []
    data = PairDataset(open_pairs({"files": str(folder)}), seed_image_processor(16))
    with StepBatches([data], len(data), seed=0, shuffle=False, log=logged.append) as batches:
        captions = batches.at(0)["caption"]
        return list(dict.fromkeys(captions)), [line.split(": ", 2)[2] for line in logged]


def evaluate(folder) -> Used:
    """The tokenizer's evaluation, up to its images."""
    source = open_pairs({"files": str(folder)})
    used = Pass()
    for _ in read_images(source, range(len(source)), 4, used, lambda line: None):
        pass
    return [texts[0] for texts in used.captions], used.bad


def extract(folder) -> Used:
    """An extraction, up to its images."""
    settings = InputSettings(files=str(folder))
    decoder = TaskDecoder(RECORD_TYPES["caption"], settings, seed_image_processor(16))
    used = []
    bad = []
    for result in decode_shards(list_shards(settings, 5), decoder, 5, 0):
        used += [sample.record["text"] for sample in result.samples if sample.record]
        bad += [sample.note.location for sample in result.samples if sample.note]
    return used, bad


@pytest.mark.parametrize("format", TABLES["formats"])
@pytest.mark.parametrize("tool", [train, evaluate, extract])
def test_faulty_pairs_are_skipped(tmp_path, format, tool):
    # Any other error ends a run after days; a silent skip hides lost data.
    faults = faults_of(format)
    write_pairs(tmp_path, format, faults)
    used, bad = tool(tmp_path)
    assert used == [f"number {index}" for index, fault in enumerate(faults) if not fault]
    broken = [(index, fault) for index, fault in enumerate(faults) if fault]
    assert len(bad) == len(broken)
    for index, fault in broken:
        named = re.compile(rf"{re.escape(str(tmp_path))}.*{location(format, index, fault)}\b.*")
        assert any(map(named.fullmatch, bad)), fault


@pytest.mark.parametrize("tool", [train, evaluate])
def test_many_faulty_pairs_end_the_run(tmp_path, tool):
    # Else a wrong folder gives a result of a few images after hours.
    write_pairs(tmp_path, "jsonl", ["", *["cut off"] * 21] * 8)
    with pytest.raises(DataError, match=r"20 .*a\.jsonl: line 21"):
        tool(tmp_path)


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
def test_faulty_records_of_a_stream_are_skipped(tmp_path, codes, tokenizer):
    faults = ["no caption", "null", "blank", "object", *JSON, "twice", "no json", "torn"]
    faults = ["", *(name for fault in faults for name in ("", fault))]
    samples = []
    for index, fault in enumerate(faults):
        fields = {"image_ids": codes(index), "text": written_caption(index, fault)}
        fields = {key: value for key, value in fields.items() if value is not ...}
        data = JSON.get(fault, bytes)(json.dumps(fields).encode())
        extension = "txt" if fault == "no json" else "json"
        samples.append((f"{index:03d}", {extension: data}))
    write_tar(tmp_path / "a.tar", samples, faults)

    source = {"name": "all", "files": str(tmp_path), "decoder": "pretrain.caption", "cycles": 1}
    settings = read_data_settings({"sources": [source], "length": 512})
    with LlmBatches(settings, tokenizer, workers=2) as batches:
        (row,) = next(batches).input_ids.tolist()
        skipped = batches.report()["sources"]["all"]["skipped"].values()
    used = sorted(map(int, re.findall(r"number (\d+)", tokenizer.decode(row))))
    assert used == [index for index, fault in enumerate(faults) if not fault]
    broken = [(index, fault) for index, fault in enumerate(faults) if fault]
    assert sum(entry["count"] for entry in skipped) == len(broken)
    reasons = [reason for entry in skipped for reason in entry["first"]]
    for index, fault in broken:
        assert any(location("tar", index, fault) in reason for reason in reasons), fault
