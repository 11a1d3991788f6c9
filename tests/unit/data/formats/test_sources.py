"""Records of tars, jsonl, json lists, parquet and folders: read by index, broken ones named."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from installed_package import install
from pyarrow import parquet
from real_processes import run_process
from repository import ROOT

from seed_multimodal.data.formats.record import BadRecord, find_image
from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.data.formats.sources import FileRecords, expand_pattern, open_records
from seed_multimodal.errors import ConfigError, DataError

ITEMS = [
    {"text": 'ä\n"]},{[', "n": -12.5e3},
    {"nested": [[1, 2], {"a": None}]},
    {},
    {"text": "𝄞" * 50, "b": True},
]


def tar(path: Path, items: dict[str, object]) -> Path:
    write_shard(
        path,
        [
            (key, {"json": value if isinstance(value, bytes) else json.dumps(value).encode()})
            for key, value in items.items()
        ],
    )
    return path


def caption(code: int) -> dict:
    return {"image_ids": [code, code + 1], "text": f"Größe {code}"}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def fields(source: FileRecords) -> list[dict]:
    return [source.read(index).fields for index in range(len(source))]


def test_open_records_of_tars(tmp_path):
    for part in range(3):
        tar(
            tmp_path / f"part-{part:04d}" / "0000000.tar",
            {f"{part}x{n}": caption(10 * part + n) for n in range(part + 1)},
        )
    source = open_records(str(tmp_path / "part-{0000..0002}" / "*.tar"), name="captions")
    assert (source.name, len(source), list(source.shard_sizes)) == ("captions", 6, [1, 2, 3])
    record = source.read(4)
    assert (record.key, record.fields) == ("2x1", caption(21))
    assert record.location == f"{tmp_path}/part-0002/0000000.tar: sample 2x1"
    assert fields(open_records(tmp_path)) == fields(source)  # a folder is searched at any depth


def test_open_records_of_lines(tmp_path):
    lines = ["", '{"text": "ä"}', "   \t ", '{"text": "b"}\r', '{"text": ', "", '{"text": "c"}']
    for end in ("", "\n", "\n \n"):
        source = open_records(write(tmp_path / "t.jsonl", "\n".join(lines) + end))
        assert len(source) == 4
        assert [source.read(n).fields["text"] for n in (0, 1, 3)] == ["ä", "b", "c"]
        assert [source.read(n).location for n in (0, 1, 3)] == [
            f"{tmp_path}/t.jsonl: line {n}" for n in (2, 4, 7)
        ]
        with pytest.raises(BadRecord, match=r"t\.jsonl: line 5: is not JSON"):
            source.read(2)
    bom = open_records(
        write(tmp_path / "bom.jsonl", b"\xef\xbb\xbf" + b'{"text": "a"}\n{"text": "b"}')
    )
    assert fields(bom) == [{"text": "a"}, {"text": "b"}] and bom.read(1).key == "line 2"


def test_open_records_of_lists(tmp_path):
    path = write(tmp_path / "a.json", json.dumps(ITEMS, indent=2))
    assert fields(open_records(path)) == ITEMS
    assert (open_records(path).read(2).location, open_records(path).read(2).key) == (
        f"{path}: item 2",
        "item 2",
    )
    coco = write(
        tmp_path / "coco.json", json.dumps({"info": {"a": [1]}, "annotations": ITEMS, "x": []})
    )
    assert fields(open_records(coco)) == ITEMS
    assert (
        fields(open_records(write(tmp_path / "bom.json", b"\xef\xbb\xbf" + path.read_bytes())))
        == ITEMS
    )
    lines = open_records(write(tmp_path / "lines.json", '{"text": "a"}\n\n{"text": "b"}\n'))
    assert fields(lines) == [{"text": "a"}, {"text": "b"}] and lines.read(1).location.endswith(
        "lines.json: item 1"
    )
    assert fields(open_records(write(tmp_path / "one.json", '{"text": "a"}\n'))) == [{"text": "a"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n {"a": }]', "Expecting value: line 2"),
        ('[{"a": 1} {"a": 2}]', "',' delimiter: line 1"),
        ("[{}]\nmore", "Extra data: line 2"),
        ('{"a": [1]\n}', "must have a list"),
        ("", "Expecting value"),
        ('"text"', "must have a list"),
    ],
)
def test_open_records_of_a_broken_list(tmp_path, content, message):
    with pytest.raises(DataError, match=rf"b\.json: .*{message}"):
        len(open_records(write(tmp_path / "b.json", content)))


def test_open_records_of_parquet(tmp_path):
    rows = [
        {
            "id": str(n),
            "image_ids": [n, n + 1],
            "text": f"t{n}" if n != 3 else None,
            "conversations": [
                {"from": "human", "value": f"<image>q{n}"},
                {"from": "gpt", "value": "a"},
            ],
        }
        for n in range(7)
    ]
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    source = open_records([path, path])
    assert len(source) == 7
    record = source.read(4)
    assert (
        record.location == f"{path}: row 4"
        and record.key == "row 4"
        and record.fields["text"] == "t4"
    )
    assert "text" not in source.read(3).fields
    assert record.fields["messages"][0]["content"] == [{"codes": [4, 5]}, "q4"]
    source.open_files.tables.limit_bytes = 0  # one row group
    order = np.random.default_rng(0).permutation(7).tolist()
    assert [source.read(n).fields["id"] for n in order] == [str(n) for n in order]
    assert len(source.open_files.tables._groups) == 1
    texts = [{"image": "x", "conversations": json.dumps(row["conversations"])} for row in rows]
    parquet.write_table(pa.Table.from_pylist(texts), tmp_path / "text.parquet")
    assert open_records(tmp_path / "text.parquet").read(2).fields["messages"][0]["content"] == [
        {"image": "x"},
        "q2",
    ]
    parquet.write_table(pa.Table.from_pylist(rows[:2]), path)
    source.open_files.close()
    with pytest.raises(BadRecord, match=r"a\.parquet: cannot be read as parquet"):
        source.read(6)
    with pytest.raises(BadRecord, match=r"b\.parquet: cannot be read as parquet"):
        len(open_records(write(tmp_path / "b.parquet", path.read_bytes()[:-60])))


def test_open_records_of_an_image_folder(tmp_path):
    for name in ("b.jpg", "sub/a.PNG", ".hidden.jpg", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "x")
    write(tmp_path / "b.txt", "a caption")
    source = open_records(tmp_path, format="folder")
    assert fields(source) == [
        {"image": str((tmp_path / name).resolve())} for name in ("b.jpg", "sub/a.PNG")
    ]
    first = source.read(0)
    assert (
        first.location == str(tmp_path / "b.jpg")
        and first.member("txt", files=source.open_files) == b"a caption"
    )
    assert source.read(1).member("txt", files=source.open_files) is None
    with pytest.raises(DataError, match="no such file or folder"):
        open_records(tmp_path / "sub" / "none", format="folder")


def test_open_records_finds_files(tmp_path):
    with pytest.raises(DataError, match="contains no tar, jsonl, json, parquet files"):
        open_records(tmp_path)
    with pytest.raises(ConfigError, match="format must be auto, .*did you mean 'jsonl'"):
        open_records(tmp_path, format="jsnl")
    write(tmp_path / "a.jsonl", '{"text": "a"}')
    tar(tmp_path / "a.tar", {"k": caption(1)})
    write(tmp_path / "counts.json", "{\n}")
    with pytest.raises(
        DataError, match="contains tar and jsonl files|contains jsonl and tar files"
    ):
        open_records(tmp_path)
    assert fields(open_records(tmp_path, format="jsonl")) == [{"text": "a"}]
    assert fields(open_records(tmp_path, format="tar")) == [
        caption(1)
    ]  # counts next to shards are no data
    both = open_records([tmp_path / "a.tar", tmp_path / "a.jsonl"])
    assert [both.read(n).key for n in (0, 1)] == ["k", "line 1"]
    odd = write(tmp_path / "notes.txt", '{"text": "b"}')
    with pytest.raises(DataError, match="unknown suffix"):
        open_records(odd)
    assert fields(open_records(odd, format="jsonl")) == [{"text": "b"}]


def test_expand_pattern(tmp_path):
    for name in ("a-008.tar", "a-009.tar", "a-010.tar", "b.tar", "odd[1].tar"):
        (tmp_path / name).touch()
    for patterns, expected in (
        (["a-{008..010}.tar"], ["a-008.tar", "a-009.tar", "a-010.tar"]),
        (["{b,a-0?9}.tar"], ["b.tar", "a-009.tar"]),
        (["odd[1].tar"], ["odd[1].tar"]),
        (["b.tar", "*.tar"], ["b.tar", "a-008.tar", "a-009.tar", "a-010.tar", "odd[1].tar"]),
    ):
        assert expand_pattern([tmp_path / pattern for pattern in patterns]) == [
            f"{tmp_path}/{name}" for name in expected
        ]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("none-*.tar", "none-.*: no file matches this pattern"),
        ("a-{0..3}.tar", "a-1.tar: no such file"),
        ("a-00.tar", r"no such file or folder \(did you mean 'a-0.tar'\?\)"),
    ],
)
def test_expand_pattern_without_match(tmp_path, pattern, message):
    (tmp_path / "a-0.tar").touch()
    with pytest.raises(DataError, match=message):
        expand_pattern([tmp_path / pattern])


def test_find_image(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    image = write(tmp_path / "images" / "a.jpg", "x")
    assert (
        find_image("a.jpg", tmp_path / "images")
        == find_image("/a.jpg", tmp_path / "images")
        == image
    )
    assert (
        find_image(str(image)) == find_image("images/a.jpg", None, tmp_path / "list.json") == image
    )
    assert find_image("b.jpg", tmp_path / "images") is None
    assert find_image("A" * 5000) is None  # such as an image stored as base64
    monkeypatch.chdir(tmp_path)
    assert find_image("images/a.jpg") == Path("images/a.jpg")


@pytest.mark.parametrize("suffix", ["tar", "jsonl"])
def test_open_records_with_an_unknown_option(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "tar":
        tar(path, {"0": caption(0)})
    else:
        write(path, "{}")
    with pytest.raises(ConfigError, match=f"options of format {suffix}: unknown key 'anon'"):
        open_records(str(path), options={"anon": True})


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
"""
PROGRAM = """
from seed_multimodal.data.formats.pairs import open_pairs
from seed_multimodal.data.formats.sources import open_records
records = open_records(None, format="squares", options={"number": 3})
print(len(records), records.read(2).fields["name"])
pair = open_pairs({"format": "squares", "files": "mine"}).read(1)
print(pair.captions, pair.image().mean(), pair.location)
open_pairs({"format": "squares", "numbr": 3})
"""


@pytest.mark.process
def test_open_records_of_a_registered_format(tmp_path):
    (tmp_path / "squares.py").write_text(MODULE)
    install(tmp_path, "squares", {"seed_multimodal.formats": {"squares": "squares:open_squares"}})
    done = run_process(
        [sys.executable, "-c", PROGRAM],
        timeout=120,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{tmp_path}"},
    )
    assert done.stdout.splitlines() == ["3 square 2", "['square 1'] 1.0 mine: 1"], done.stderr
    assert "unknown key 'numbr' (did you mean 'number'?)" in done.stderr
