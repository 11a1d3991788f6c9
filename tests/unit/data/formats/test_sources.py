"""Records of tars, jsonl, json lists, parquet and folders: read by index, broken files named."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from data_files import fields_of, lines, write
from installed_package import install
from pyarrow import parquet
from real_processes import run_process
from repository import ROOT
from warm_processes import PYTHON
from yaml_tables import read_tables

from seed_multimodal.data.formats.contents import expand_pattern
from seed_multimodal.data.formats.images import find_image
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.data.formats.records import open_records
from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.errors import ConfigError, DataError

TABLES = read_tables(__file__)
ITEMS = [
    {"text": 'ä\n"]},{[', "n": -12.5e3},
    {"nested": [[1, 2], {"a": None}]},
    {},
    {"text": "𝄞" * 50, "b": True},
]
BOM = b"\xef\xbb\xbf"


def text_lines(end: str = "\n") -> bytes:
    """The items, a line each, after blank ones."""
    first, *others = map(json.dumps, ITEMS)
    return end.join(["", first, " \t ", *others, ""]).encode()


# name -> its content, and the key of its last record
CONTENTS = {
    "a.jsonl": (text_lines(), "line 6"),
    "windows.jsonl": (text_lines("\r\n"), "line 6"),
    "bom.jsonl": (BOM + text_lines().strip(), "line 5"),
    "a.json": (json.dumps(ITEMS, indent=2).encode(), "item 3"),
    "coco.json": (json.dumps({"info": {"a": [1]}, "annotations": ITEMS}).encode(), "item 3"),
    "lines.json": (text_lines(), "item 3"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_open_records_of_lines_and_lists(tmp_path, name):
    content, last = CONTENTS[name]
    path = write(tmp_path / name, content)
    source = open_records(path)
    assert fields_of(source) == ITEMS
    record = source.read(3)
    assert (record.key, record.location) == (last, f"{path}: {last}")


def test_open_records_of_parquet(tmp_path):
    turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    rows = [
        {"image_ids": [n, n + 1], "text": None if n == 3 else f"t{n}", "conversations": turns}
        for n in range(7)
    ]
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    source = open_records([path, path])
    assert len(source) == 7  # a file that is named twice is read once
    record = source.read(4)
    assert (record.key, record.location) == ("row 4", f"{path}: row 4")
    assert record.fields["messages"][0]["content"] == [{"codes": [4, 5]}, "q"]
    assert "text" not in source.read(3).fields

    # In any order, also if a row group does not fit into the cache.
    for in_order in (False, True):
        shuffled = open_records(path, in_order=in_order)
        for index in np.random.default_rng(0).permutation(7).tolist():
            fields = shuffled.read(index).fields
            assert fields["image_ids"] == rows[index]["image_ids"]

    # Conversations as JSON texts.
    texts = [{"image": "x", "conversations": json.dumps(turns)}] * 2
    parquet.write_table(pa.Table.from_pylist(texts), path)
    content = open_records(path).read(1).fields["messages"][0]["content"]
    assert content == [{"image": "x"}, "q"]
    # The table that was opened first became shorter.
    with pytest.raises(DataError, match=r"a\.parquet"):
        source.read(6)


def empty_table() -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), sink)
    return sink.getvalue().to_pybytes()


# Files without a usable record.
FAULTS = {
    "text.tar": b"not a tar " * 200,
    "empty.tar": b"",
    "empty.jsonl": b"",
    "value.json": b'[{"a": 1},\n {"a": }]',
    "object.json": b'{"a": [1]\n}',
    "deep.json": b"[" * 100_000,
    "cut.parquet": empty_table()[:-9],
}


@pytest.mark.parametrize("name", FAULTS)
def test_open_records_of_a_broken_file(tmp_path, name):
    # One line that begins with the file.
    path = write(tmp_path / name, FAULTS[name])
    with pytest.raises(DataError) as error:
        fields_of(open_records(path))
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_open_records_of_a_pickled_sample(tmp_path):
    # The original's shards may run code; they are not read.
    samples = [("k1", {"json": b"{}"}), ("k2", {"pkl": b"\x80\x04}."})]
    write_shard(tmp_path / "a.tar", samples)
    source = open_records(tmp_path / "a.tar")
    assert source.read(0).fields == {}
    with pytest.raises(BadRecord, match=r"a\.tar: sample k2") as error:
        source.read(1)
    assert error.value.kind == "pickled"


# ---- which files are read


@pytest.mark.parametrize("case", TABLES["options"], ids=str)
def test_open_records_with_a_wrong_option(tmp_path, case):
    path = lines(tmp_path / "a.jsonl", [{}])
    with pytest.raises(ConfigError, match=case["named"]):
        open_records(path, **case["options"])


@pytest.mark.parametrize("case", TABLES["patterns"], ids=str)
def test_expand_pattern(tmp_path, case):
    for name in ("a-008.tar", "a-009.tar", "a-010.tar", "b.tar", "odd[1].tar"):
        (tmp_path / name).touch()
    patterns = [tmp_path / pattern for pattern in case["patterns"]]
    if "error" in case:
        with pytest.raises(DataError, match=case["error"]):
            expand_pattern(patterns)
        return
    assert list(expand_pattern(patterns)) == [f"{tmp_path}/{name}" for name in case["names"]]


def test_find_image(tmp_path, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    image = write(folder / "a.jpg", "x")
    # As in SEED-X's lists, a leading slash may mean the folder of images.
    assert find_image("a.jpg", folder) == find_image("/a.jpg", folder) == image
    assert find_image("b.jpg", folder) is None
    assert find_image("A" * 5000) is None  # such as an image stored as base64
    monkeypatch.chdir(tmp_path)
    assert find_image("images/a.jpg") == Path("images/a.jpg")


# ---- formats of other packages

MODULE = """
import numpy as np
from seed_multimodal.data.formats.record import Record

class Squares:
    def __init__(self, path, number):
        self.path, self.sizes, self.pair_keys = path or "squares", [number], {"caption_key": "name"}
    def locate(self, row):
        image = lambda: np.full((8, 8, 3), row, np.uint8)
        fields = {"image": image, "name": f"square {row}"}
        return Record(str(row), f"{self.path}: {row}", fields, file=str(self.path))

def open_squares(path=None, number=4):
    return Squares(path, number)

def open_bare(path, **options):
    squares = Squares(path, **options)
    squares.files, squares.pair_keys = [path], {"image_key": "image", "caption_key": "none"}
    return squares
"""
PROGRAM = """
from seed_multimodal.data.formats.pairs import open_pairs
from seed_multimodal.data.formats.records import open_records
from seed_multimodal.training.pixel_decoder.config import ImageSource
records = open_records(None, format="squares", options={"number": 3})
print(len(records), records.read(2).fields["name"], records.checksum)
pair = open_pairs({"format": "squares", "files": "mine"}).read(1)
print(pair.captions, pair.image().mean(), pair.location)
# Images alone, whose files are known.
bare = {"format": "bare", "files": "squares.py", "format_options": {"number": 2}}
pairs = ImageSource("mine", **bare).open()
print(len(pairs), pairs.read(0).captions, pairs.checksum() > 0)
print(open_pairs({**bare, "captioned": False}).read(1).captions)
open_pairs({"format": "squares", "numbr": 3})
"""


@pytest.mark.slow
@pytest.mark.process
def test_open_records_of_a_registered_format(tmp_path):
    (tmp_path / "squares.py").write_text(MODULE)
    openers = {"squares": "squares:open_squares", "bare": "squares:open_bare"}
    install(tmp_path, "squares", {"seed_multimodal.formats": openers})
    done = run_process(
        [PYTHON, "-c", PROGRAM],
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{tmp_path}"},
    )
    expected = ["3 square 2 0", "['square 1'] 1.0 mine: 1", "2 [] True", "[]"]
    assert done.stdout.splitlines() == expected, done.stderr
    # Other files would be trained on in silence.
    assert "squares: has no `files`" in done.stderr
    assert "'numbr'" in done.stderr


@pytest.mark.process
def test_open_records_of_lance_as_in_the_docs(tmp_path):
    pytest.importorskip("lance", reason="needs pylance")
    page = (ROOT / "docs" / "how-to" / "prepare-data.md").read_text()
    code = re.search("```python\n(# my_package/lance_rows.py.*?)```", page, re.DOTALL)
    assert code is not None
    (tmp_path / "lance_rows.py").write_text(code[1])
    install(tmp_path, "rows", {"seed_multimodal.formats": {"lance": "lance_rows:Rows"}})
    program = """
import lance, pyarrow
from seed_multimodal.data.formats.records import open_records
table = pyarrow.table({"text": [f"row {n}" for n in range(10)]})
lance.write_dataset(table, "a.lance", max_rows_per_file=6)
records = open_records("a.lance", format="lance")
size, checksum = len(records), records.checksum
lance.write_dataset(table, "a.lance", mode="append")
rows = [records.read(row) for row in (0, 7)]
print(size, [row.fields["text"] for row in rows], rows[1].location, checksum > 0)
"""
    search = [str(ROOT / "src"), str(tmp_path), os.environ.get("PYTHONPATH", "")]
    done = run_process(
        [PYTHON, "-c", program],
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(search)},
    )
    expected = "10 ['row 0', 'row 7'] a.lance: row 7 True\n"
    assert done.stdout == expected, done.stderr
