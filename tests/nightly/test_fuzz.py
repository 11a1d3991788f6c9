"""Damaged files: no reader crashes, hangs or raises an error of another kind than SeedError."""

import json
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from repository import NANO, ROOT
from yaml_tables import read_tables

from seed_multimodal.data.formats.records import open_records
from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.errors import SeedError
from seed_multimodal.images.io import open_image
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.state_dicts import load_state_dict, save_state_dict

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),
]
CASES = 400
SAMPLES = 4 * read_tables(__file__)


def write_json(file):
    lines = "".join(json.dumps(record) + "\n" for record in SAMPLES)
    file.write_text(lines if file.suffix == ".jsonl" else json.dumps(SAMPLES))


def write_parquet(file):
    table = pyarrow.Table.from_pylist([{"text": "a fox", "image": b"abc", "ids": [1, 2]}] * 20)
    pyarrow.parquet.write_table(table, file, row_group_size=7)


def write_tar(file):
    rows = [{"json": json.dumps(record).encode(), "png": b"abc"} for record in SAMPLES]
    write_shard(file, [(f"{index:05d}", row) for index, row in enumerate(rows)])


def write_weights(file):
    tensors = {"a.weight": torch.randn(3, 4), "b": torch.arange(5), "c": torch.zeros(0)}
    if file.suffix == ".safetensors":
        save_state_dict(tensors, file)
    else:  # .pth: as torch wrote before 1.6
        zipped = file.suffix == ".bin"
        torch.save({"model": tensors}, file, _use_new_zipfile_serialization=zipped)


def write_image(file):
    Image.open(ROOT / "images/cat.jpg").resize((90, 60)).save(file)


def read_records(file):
    records = open_records(file, cache=False)
    for index in range(min(len(records), 50)):
        records.read(index)


READERS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    "a.tar": (write_tar, read_records),
    "a.jsonl": (write_json, read_records),
    "a.json": (write_json, read_records),
    "a.parquet": (write_parquet, read_records),
    "a.safetensors": (write_weights, load_state_dict),
    "a.bin": (write_weights, load_state_dict),
    "a.pth": (write_weights, load_state_dict),
    "system.json": (
        lambda file: shutil.copy(NANO / "system.json", file),
        lambda file: SystemConfig.find(file.parent),
    ),
}
for kind in ("png", "jpg", "gif", "webp", "tif"):
    READERS[f"a.{kind}"] = (write_image, open_image)


def damaged(content: bytes, rng) -> bytes:
    """A copy with a few changes: flipped bits, pieces that are removed, repeated or replaced."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        # Headers are at the beginning, or the end.
        distance = min(int(rng.expovariate(1 / 100)), len(data) - 1) if data else 0
        position = rng.choice((distance, len(data) - 1 - distance, rng.randrange(len(data) or 1)))
        length = rng.choice((1, 4, 16, 500))
        kind = rng.randrange(5)
        if kind == 0 and data:
            data[position] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[position : position + length]
        elif kind == 2:
            data[position:position] = data[position : position + length]
        elif kind == 3:
            data[position : position + length] = rng.randbytes(length)
        elif rng.random() < 0.3:
            del data[position:]
    return bytes(data)


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_raise_sentences(name, tmp_path):
    write, read = READERS[name]
    file = tmp_path / name
    write(file)
    read(file)
    content = file.read_bytes()
    refused = 0
    for case in range(CASES):
        rng = random.Random(zlib.crc32(f"{name} {case}".encode()))
        file.write_bytes(damaged(content, rng))
        try:
            read(file)
        except SeedError as error:
            assert str(error).strip()
            refused += 1
    assert refused > CASES // 20
