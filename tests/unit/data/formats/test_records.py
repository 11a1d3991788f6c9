"""Records from tars, jsonl, json lists, parquet and folders: by number, and every broken one named."""

from __future__ import annotations

import gc
import gzip
import json
import os
import pickle
import tarfile
import weakref
from pathlib import Path

import numpy as np
import pytest

from seed_multimodal.data.formats import json_lines, json_lists
from seed_multimodal.data.formats import parquet as parquet_rows
from seed_multimodal.data.formats.conversations import with_messages
from seed_multimodal.data.formats.files import expand_pattern
from seed_multimodal.data.formats.parquet import RowGroups
from seed_multimodal.data.formats.record import BadRecord, find_image
from seed_multimodal.data.formats.records import FileRecords, open_records
from seed_multimodal.data.formats.writer import write_shard
from seed_multimodal.errors import ConfigError, DataError


def tar(path: Path, items: dict[str, object]) -> Path:
    write_shard(path, [(key, {"json": value if isinstance(value, bytes) else json.dumps(value).encode()})
                       for key, value in items.items()])
    return path


def caption(number: int) -> dict:
    return {"image_ids": [number, number + 1], "text": f"Größe {number}"}


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def fields(source: FileRecords) -> list[dict]:
    return [source.read(index).fields for index in range(len(source))]


def test_tars_are_read_by_number(tmp_path):
    for part in range(3):
        tar(tmp_path / f"part-{part:04d}" / "0000000.tar",
            {f"{part}x{n}": caption(10 * part + n) for n in range(part + 1)})
    source = open_records(str(tmp_path / "part-{0000..0002}" / "*.tar"), name="captions")
    assert (source.name, len(source), list(source.shard_sizes)) == ("captions", 6, [1, 2, 3])
    record = source.read(4)
    assert record.fields == caption(21)
    assert record.where == f"{tmp_path}/part-0002/0000000.tar: sample 2x1"
    assert record.key == "2x1"
    assert len({source.read(n).key for n in range(6)}) == 6
    assert fields(open_records(tmp_path)) == fields(source)  # a folder is searched at any depth
    with pytest.raises(IndexError):
        source.read(6)


def test_a_broken_member_is_named_and_the_others_are_read(tmp_path):
    path = tar(tmp_path / "a.tar", {"good": caption(1), "torn": b'{"text": "a', "list": [1],
                                    "half": b'{"t": "\\ud83d"}', "deep": b'{"a":' * 100_000,
                                    "pair": b'{"t": "\\ud83d\\ude00"}'})
    source = open_records(path)
    for row, (key, words) in enumerate([("torn", "is not json"), ("list", "holds a list"), ("half", "surrogate"),
                                        ("deep", "is not json")], 1):
        with pytest.raises(BadRecord, match=f"a.tar: sample {key}: .*{words}") as caught:
            source.read(row)
        assert caught.value.kind == "malformed json"
    assert source.read(0).fields == caption(1) and source.read(5).fields == {"t": "😀"}


def test_pickled_torn_and_compressed_tars_are_told_in_a_sentence(tmp_path):
    write_shard(tmp_path / "old.tar", [("k1", {"json": b"{}"}), ("k2", {"pkl": b"\x80\x04}."})])
    with pytest.raises(DataError, match=r"old\.tar: sample k2 is a pickle.*seed data convert .*old\.tar --out"):
        len(open_records(tmp_path / "old.tar"))
    write_shard(tmp_path / "x.tar.gz", [("k", {"json": b"{}"})])
    with pytest.raises(DataError, match=r"x\.tar\.gz: compressed shards cannot be read at random"):
        len(open_records(tmp_path / "x.tar.gz"))
    os.rename(tmp_path / "x.tar.gz", tmp_path / "x.tar")  # the content decides, not the name
    with pytest.raises(DataError, match=r"x\.tar: compressed"):
        len(open_records(tmp_path / "x.tar"))
    whole = tar(tmp_path / "w.tar", {f"s{n}": caption(n) for n in range(9)}).read_bytes()
    torn = written(tmp_path / "torn.tar", whole[:5000])
    source = open_records(torn)
    assert len(source) == 5 and source.read(3).fields == caption(3)
    with pytest.raises(BadRecord, match=r"torn\.tar: torn or damaged after sample s3"):
        source.read(4)
    written(tmp_path / "nothing.tar", b"")
    with pytest.raises(DataError, match=r"nothing\.tar: torn or damaged in its first sample"):
        len(open_records(tmp_path / "nothing.tar"))
    write_shard(tmp_path / "pictures.tar", [("k", {"jpg": b"x"})])
    with pytest.raises(DataError, match=r"pictures\.tar: none of its 1 samples has a \.json member"):
        len(open_records(tmp_path / "pictures.tar"))
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(DataError, match=r"empty\.tar: holds no record"):
        len(open_records(tmp_path / "empty.tar"))


def test_headers_that_lie_about_sizes_are_damage_not_an_endless_walk(tmp_path):
    whole = tar(tmp_path / "w.tar", {"s": caption(1)}).read_bytes()

    def header(kind: bytes, size: bytes) -> bytes:
        block = bytearray(whole[:512])
        block[124:136], block[156:157], block[148:156] = size.ljust(12, b"\0"), kind, b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        return bytes(block)

    def pax(body: bytes) -> bytes:
        return header(b"x", b"%o" % len(body)) + body.ljust(512, b"\0")

    for start, words in ((header(b"L", b"77777777777"), "its end"), (header(b"x", b"77777777777"), "its end"),
                         (header(b"0", b"-0000002000"), "no header"), (header(b"5", b"-0000002000"), "no header"),
                         (pax(b"0 path=x\n"), "a pax header"), (pax(b"12 size=abc\n"), "a pax header"),
                         (pax(b"14 size=-1024\n"), "a pax header")):
        with pytest.raises(DataError, match=f"torn or damaged in its first sample .*{words}"):
            len(open_records(written(tmp_path / "odd.tar", start + whole)))


def test_a_sample_without_json_among_others_is_that_samples_fault(tmp_path):
    write_shard(tmp_path / "a.tar", [("k1", {"json": b"{}"}), ("k2", {"jpg": b"x"})])
    source = open_records(tmp_path / "a.tar")
    with pytest.raises(BadRecord, match=r"a\.tar: sample k2: has no \.json member"):
        source.read(1)
    assert len(source) == 2


@pytest.mark.parametrize("block", [7, 64, 1 << 24])
def test_jsonl_lines_have_their_numbers_whatever_the_block(tmp_path, monkeypatch, block):
    monkeypatch.setattr(json_lines, "BLOCK", block)
    lines = ["", '{"text": "ä"}', "   \t ", '{"text": "b"}\r', '{"text": ', "", '{"text": "c"}']
    for end in ("", "\n", "\n \n"):
        source = open_records(written(tmp_path / "t.jsonl", "\n".join(lines) + end))
        assert len(source) == 4
        assert [source.read(n).fields["text"] for n in (0, 1, 3)] == ["ä", "b", "c"]
        assert [source.read(n).where for n in (0, 1, 3)] == [f"{tmp_path}/t.jsonl: line {n}" for n in (2, 4, 7)]
        with pytest.raises(BadRecord, match=r"t\.jsonl: line 5: is not json"):
            source.read(2)
    bom = open_records(written(tmp_path / "bom.jsonl", b"\xef\xbb\xbf" + b'{"text": "a"}\n{"text": "b"}'))
    assert fields(bom) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("seed", range(4))
def test_jsonl_index_equals_a_plain_reading(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(json_lines, "BLOCK", 97)
    rng = np.random.default_rng(seed)
    lines = [b" " * int(rng.integers(0, 150)) if rng.random() < 0.3 else b'{"a":%d}' % n + b" " * int(rng.integers(200))
             for n in range(200)]
    path = written(tmp_path / "r.jsonl", b"\n".join(lines))
    expected = [(n + 1, line) for n, line in enumerate(path.read_bytes().split(b"\n")) if line.strip()]
    starts, ends, numbers = json_lines.index_lines(path)
    raw = path.read_bytes()
    assert [(int(n), raw[a:b]) for n, a, b in zip(numbers, starts, ends, strict=True)] == expected


ITEMS = [{"text": "ä\n\"]},{[", "n": -12.5e3}, {"nested": [[1, 2], {"a": None}]}, {}, {"text": "𝄞" * 50, "b": True}]


@pytest.mark.parametrize("window", [4, 40, 1 << 22])
@pytest.mark.parametrize("style", [{}, {"indent": 2}, {"ensure_ascii": False}, {"separators": (",", ":")}])
def test_json_lists_are_indexed_by_windows(tmp_path, monkeypatch, window, style):
    monkeypatch.setattr(json_lists, "BLOCK", 4 * window)
    path = written(tmp_path / "a.json", json.dumps(ITEMS, **style))
    assert fields(open_records(path)) == ITEMS
    assert open_records(path).read(2).where == f"{path}: item 2"
    assert open_records(path).read(2).key == "item2"
    coco = written(tmp_path / "coco.json", json.dumps({"info": {"a": [1]}, "annotations": ITEMS, "x": []}, **style))
    assert fields(open_records(coco)) == ITEMS
    assert fields(open_records(written(tmp_path / "bom.json", b"\xef\xbb\xbf" + path.read_bytes()))) == ITEMS


@pytest.mark.parametrize(("content", "words"), [
    ('[{"a": 1},\n {"a": }]', "line 2, item 1: .*Expecting value"), ('[{"a": 1} {"a": 2}]', "item 0: .*',' or ']'"),
    ('[{"a": 1},', "item 1"), ('[{"a": "x', "item 0: .*Unterminated"), ('[{}]\nmore', "line 2.*after the list's end"),
    ('{"a": [1]\n}', "must hold a list"), ("", "must hold a list"), ('"text"', "must hold a list"),
    ('[{"a": tru', "item 0"), ('[{"id": ' + "9" * 5000 + "}]", "item 0: .*4300 digits"),
    ("[" * 200_000, "nested too deeply")])
@pytest.mark.parametrize("window", [8, 1 << 22])
def test_broken_json_lists_name_line_and_item(tmp_path, monkeypatch, content, words, window):
    monkeypatch.setattr(json_lists, "BLOCK", 4 * window)
    path = written(tmp_path / "b.json", content)
    with pytest.raises(DataError, match=rf"b\.json: {words if words.startswith('line') else '.*' + words}"):
        len(open_records(path))


def test_json_that_is_lines_in_truth(tmp_path):
    path = written(tmp_path / "qa.json", '{"question": "a"}\n\n{"question": "b"}\n')
    assert fields(open_records(path)) == [{"question": "a"}, {"question": "b"}]
    assert open_records(path).read(1).where.endswith("qa.json: line 3")
    latin = open_records(written(tmp_path / "latin.json", b'[{"a": "\xc3\xa4"},\n {"a": "\xe4"}, {"a": "\xc3\xa4"}]'))
    assert len(latin) == 3 and latin.read(0).fields == latin.read(2).fields == {"a": "\xe4"}
    with pytest.raises(BadRecord, match=r"latin\.json: item 1: is not UTF-8"):
        latin.read(1)
    with pytest.raises(BadRecord, match=r"utf16\.json: line 1: .*not UTF-8"):
        len(open_records(written(tmp_path / "utf16.json", '[{"a": 1}]'.encode("utf-16"))))
    numbers = open_records(written(tmp_path / "n.json", "[1, 23]"))
    with pytest.raises(BadRecord, match="item 1: holds a int, not an object"):
        numbers.read(1)


def test_parquet_rows_by_number_and_row_group(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"id": str(n), "image_ids": [n, n + 1], "text": f"t{n}" if n != 3 else None, "conversations": [
        {"from": "human", "value": f"<image>q{n}"}, {"from": "gpt", "value": "a"}]} for n in range(7)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    source = open_records([path, path])
    assert len(source) == 7 and list(source.shard_sizes) == [3, 3, 1]
    record = source.read(4)
    assert record.where == f"{path}: row 4" and record.key == "row4" and record.fields["text"] == "t4"
    assert "text" not in source.read(3).fields
    for order in ((6, 0, 3), (5, 2, 6)):  # more row groups than are kept
        assert [source.read(n).fields["id"] for n in order] == [str(n) for n in order]
    assert record.fields["messages"][0]["content"] == [{"codes": [4, 5]}, "q4"]
    texts = [{"image": "x", "conversations": json.dumps(row["conversations"])} for row in rows]
    parquet.write_table(pa.Table.from_pylist(texts), tmp_path / "text.parquet")
    assert open_records(tmp_path / "text.parquet").read(2).fields["messages"][0] ["content"] == [{"image": "x"}, "q2"]
    with pytest.raises(BadRecord, match=r"b\.parquet: cannot be read as parquet"):
        len(open_records(written(tmp_path / "b.parquet", path.read_bytes()[:-60])))


def test_files_are_found_or_it_is_said_why_not(tmp_path):
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"gone\.jsonl: is a link to .*nowhere\.jsonl, which is not there"):
        open_records(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match="no file matches"):
        open_records(str(tmp_path / "*.jsonl"))
    with pytest.raises(DataError, match="holds no tar, jsonl, json, parquet files"):
        open_records(tmp_path)
    with pytest.raises(ConfigError, match="format must be auto, .*did you mean 'jsonl'"):
        open_records(tmp_path, format="jsnl")
    written(tmp_path / "a.jsonl", '{"text": "a"}')
    tar(tmp_path / "a.tar", {"k": caption(1)})
    written(tmp_path / "manifest.json", "{}")
    with pytest.raises(DataError, match="holds tar and jsonl files|holds jsonl and tar files"):
        open_records(tmp_path)
    assert fields(open_records(tmp_path, format="jsonl")) == [{"text": "a"}]
    assert fields(open_records(tmp_path, format="tar")) == [caption(1)]  # a manifest beside shards is no data
    both = open_records([tmp_path / "a.tar", tmp_path / "a.jsonl"])
    assert [both.read(n).key for n in (0, 1)] == ["k", "line1"]
    odd = written(tmp_path / "notes.txt", '{"text": "b"}')
    with pytest.raises(DataError, match="its suffix tells no format"):
        open_records(odd)
    assert fields(open_records(odd, format="jsonl")) == [{"text": "b"}]
    with pytest.raises(DataError, match="compressed files"):
        len(open_records(written(tmp_path / "z.jsonl", b"\x1f\x8b123"), format="jsonl"))


def test_two_hundred_thousand_lines_cost_little_memory(tmp_path):
    path = tmp_path / "many.jsonl"
    with open(path, "w") as file:
        for number in range(200_000):
            file.write(f'{{"text": "number {number}"}}\n')
    source = open_records(path)
    assert source.read(199_999).fields == {"text": "number 199999"}
    assert sum(part.nbytes for part in source.parts[0].arrays.values()) <= 12 * 200_000


# ---- spellings of conversations


def messages(item: dict) -> list:
    return [(turn["role"], turn["content"]) for turn in with_messages(item, "f: line 1")["messages"]]


def test_llava_and_its_pictures():
    item = {"id": "1", "image": "coco/1.jpg", "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]}
    assert messages(item) == [("user", [{"image": "coco/1.jpg"}, "\nWhat?"]), ("assistant", ["A cat."]),
                              ("user", ["Sure?"]), ("assistant", ["Yes."])]
    both = item | {"image": ["a.jpg", "b.jpg"]}
    with pytest.raises(BadRecord, match="f: line 1: 1 <image> placeholder for 2 pictures") as caught:
        messages(both)
    assert caught.value.kind == "images and placeholders"
    both["conversations"][2]["value"] = "And <image>?"
    assert messages(both)[2] == ("user", ["And ", {"image": "b.jpg"}, "?"])
    with pytest.raises(BadRecord, match="2 <image> placeholders for 0 pictures"):
        messages(item | {"image": None})
    assert messages(item | {"image_ids": [1, 2, 3, 4]})[0][1][0] == {"codes": [1, 2]}  # two, one after the other
    assert messages(item | {"image_ids": [[1, 2, 3], [4, 5, 6]]})[2][1][1] == {"codes": [4, 5, 6]}


def test_other_spellings():
    seed_x = {"image": "/a.jpg", "data": ["q", "a", "q2", "a2"]}
    assert messages(seed_x)[0] == ("user", [{"image": "/a.jpg"}, "q"]) and len(messages(seed_x)) == 4
    assert messages(seed_x | {"image": "null"})[0] == ("user", ["q"])
    assert messages(seed_x | {"image": "nullable/x.jpg"})[0][1][0] == {"image": "nullable/x.jpg"}
    chat = {"messages": [{"role": "system", "content": "Be kind."},
                         {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]},
                         {"role": "assistant", "content": "a"}], "images": ["x.png"]}
    assert messages(chat) == [("user", [{"image": "x.png"}, "q"]), ("assistant", ["a"])]
    assert with_messages(chat, "w")["system"] == "Be kind."
    ours = {"messages": [{"role": "user", "content": [{"codes": [[1, 2], [3, 4]]}, "q"]},
                         {"role": "assistant", "content": ["a", {"codes": [5, 6]}]}], "image": "where it came from.jpg"}
    assert with_messages(ours, "w")["messages"] == ours["messages"]
    edit = {"source_image": "s.jpg", "target_image": "t.jpg", "instruction": "Red."}
    assert messages(edit) == [("user", [{"image": "s.jpg"}, "Red."]), ("assistant", [{"image": "t.jpg"}])]
    polite = edit | {"instruction_new": "Please, red.", "response": "Here."}
    assert messages(polite)[1] == ("assistant", ["Here.", {"image": "t.jpg"}])
    codes = edit | {"source_image": None, "source_image_ids": [1]}
    for untouched in (caption(1), codes, {"image_ids": [[1]], "data": ["q", "a"]}, {"data": ["only one"]},
                      {"text": "a"}):
        assert with_messages(untouched, "w") == untouched


@pytest.mark.parametrize(("item", "kind", "words"), [
    ({"conversations": []}, "wrong type", "list of turns"),
    ({"conversations": ["hello"]}, "wrong type", "turn 1 of 'conversations': is 'hello', not an object"),
    ({"conversations": [{"value": "a"}]}, "missing key", "turn 1 .*no key 'from'"),
    ({"conversations": [{"from": "human"}]}, "missing key", "no key 'value'"),
    ({"conversations": [{"from": "cat", "value": "a"}]}, "wrong role", "'from' is 'cat'"),
    ({"conversations": [{"from": "gpt", "value": "a"}]}, "wrong role", "turn 1 is the assistant's"),
    ({"conversations": [{"from": "human", "value": "a"}]}, "wrong role", "ends without an answer"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " \n"}]}, "empty text", "turn 2"),
    ({"conversations": [{"from": "human", "value": 7}]}, "wrong type", "7 is no list"),
    ({"conversations": "not json"}, "malformed json", "'conversations' is a text that is not json"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "missing key", "a part holds neither"),
    ({"image": "a.jpg", "data": ["q"]}, "wrong role", "come in pairs"),
    ({"image": "a.jpg", "data": "[1]"}, "wrong type", "'data' must be a list of texts"),
    ({"source_image": "a", "target_image": "b"}, "missing key", "'instruction' must be a text"),
    ({"source_image": "", "target_image": "b", "instruction": "c"}, "missing key", "'source_image' is empty"),
])
def test_bad_conversations_say_what_and_where(item, kind, words):
    with pytest.raises(BadRecord, match="^f.jsonl: line 3: .*" + words) as caught:
        with_messages(item, "f.jsonl: line 3")
    assert caught.value.kind == kind


def test_pictures_are_found(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    picture = written(tmp_path / "images" / "a.jpg", "x")
    assert find_image("a.jpg", tmp_path / "images") == picture
    assert find_image("/a.jpg", tmp_path / "images") == picture
    assert find_image(str(picture)) == picture
    assert find_image("images/a.jpg", None, tmp_path / "list.json") == picture
    assert find_image("b.jpg", tmp_path / "images") is None
    monkeypatch.chdir(tmp_path)
    assert find_image("images/a.jpg") == Path("images/a.jpg")


def test_a_name_that_is_too_long_for_a_file_is_not_there():
    assert find_image("A" * 5000) is None  # such as a picture written out as base64


def test_a_pattern_that_cannot_be_looked_up_is_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"A{200}: cannot be looked up \(File name too long\)"):
        open_records("A" * 5000)
    with pytest.raises(DataError, match="cannot be looked up"):
        expand_pattern("A" * 5000)
    os.mkfifo(tmp_path / "fifo.jsonl")
    with pytest.raises(DataError, match=r"fifo\.jsonl: is no file on disk"):
        open_records(tmp_path / "fifo.jsonl")

    def closed(path: Path, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", closed)  # who runs the tests may enter every folder
    with pytest.raises(DataError, match=r"closed/a\.tar: cannot be looked up \(Permission denied\)"):
        open_records("closed/a.tar")


def test_folders_by_braces_and_wildcards(tmp_path):
    for part in ("p1", "p2"):
        (tmp_path / part / "deep").mkdir(parents=True)
        written(tmp_path / part / "deep" / "a.jsonl", f'{{"text": "{part}"}}')
    for pattern in ("p{1..2}", "p?", "{p1,p2}/deep"):
        assert fields(open_records(str(tmp_path / pattern))) == [{"text": "p1"}, {"text": "p2"}]
    with pytest.raises(DataError, match=r"1 of its 3 folders are missing, first .*p3"):
        open_records(str(tmp_path / "p{1..3}"))


def test_compressed_lists_in_a_folder_are_not_passed_over(tmp_path):
    written(tmp_path / "a.jsonl", '{"text": "a"}')
    packed = written(tmp_path / "b.jsonl.gz", gzip.compress(b'{"text": "b"}'))
    for files in (tmp_path, packed):
        with pytest.raises(DataError, match=r"b\.jsonl\.gz: compressed files .*gunzip"):
            len(open_records(files))


def test_half_surrogate_pairs_are_refused_however_they_are_written(tmp_path):
    lines = (b'{"text": "a\xed\xa0\x80b"}', b'{"text": "a\\ud800b"}', '{"text": "\ud55c"}'.encode(),
             b'{"text": "\\ud83d\\ude00"}')
    source = open_records(written(tmp_path / "a.jsonl", b"\n".join(lines)))
    for index in (0, 1):
        with pytest.raises(BadRecord, match=f"line {index + 1}: a text holds half of a surrogate pair"):
            source.read(index)
    assert [source.read(index).fields["text"] for index in (2, 3)] == ["\ud55c", "\U0001f600"]
    inside = json.dumps([{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "b"}])
    with pytest.raises(BadRecord, match="f: row 3: a text holds half of a surrogate pair"):
        with_messages({"messages": inside}, "f: row 3")


def test_a_data_text_that_is_no_list_is_left_alone():
    record = {"image_ids": [1, 2], "text": "a", "data": "2020-01-01"}
    assert with_messages(record, "f: line 1") == record


def test_parquet_files_share_what_they_keep_in_memory(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    count, get, read = 30, RowGroups.get, {}

    def watched(self: RowGroups, path: str, *number: int) -> object:
        table = get(self, path, *number)
        read[Path(path)] = weakref.ref(table)
        return table

    # Weak references, not arrow's count of bytes: its pool gives those back when its own threads get to it.
    monkeypatch.setattr(RowGroups, "get", watched)
    for number in range(count):
        table = pa.table({"text": [f"t{number:02d}"]})
        parquet.write_table(table, tmp_path / f"{number:03d}.parquet")
    source = open_records(tmp_path)
    source.open_files.tables.kept = 24 * table.nbytes
    assert [one["text"] for one in fields(source)] == [f"t{number:02d}" for number in range(count)]
    assert source.read(0).fields["text"] == "t00"
    gc.collect()
    held = [path.name for path, table in read.items() if table() is not None]
    assert sorted(held) == ["000.parquet", *(f"{number:03d}.parquet" for number in range(7, count))]
    source.close()
    gc.collect()
    assert all(table() is None for table in read.values())
    assert source.read(count - 1).fields["text"] == f"t{count - 1}"


def test_large_row_groups_are_read_by_pieces(tmp_path, monkeypatch):
    """In order, backwards, at random and from two files by turns, with little memory."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr(parquet_rows, "PIECE", 20_000)
    monkeypatch.setattr(parquet_rows, "WHOLE", 30_000)
    rng = np.random.default_rng(0)
    wanted = {}
    for name, groups in (("a", [70, 30, 1]), ("b", [101])):
        rows = [{"number": number, "data": rng.bytes(1000 + number)} for number in range(sum(groups))]
        wanted[name] = rows
        table = pa.Table.from_pylist(rows)
        with parquet.ParquetWriter(tmp_path / f"{name}.parquet", table.schema, compression="none") as writer:
            start = 0
            for size in groups:
                writer.write_table(table.slice(start, size))
                start += size
    source = open_records([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    tables, rows = source.open_files.tables, wanted["a"] + wanted["b"]
    tables.kept = 80_000
    assert source.shard_sizes.tolist() == [70, 30, 1, 101]
    opened, read = [], parquet_rows._pieces
    monkeypatch.setattr(parquet_rows, "_pieces", lambda *a: opened.append(a[:2]) or read(*a))
    order = [*range(202), *reversed(range(202)), *rng.permutation(202).tolist()]
    for place, index in enumerate(order):
        assert source.read(index).fields == rows[index]
        assert tables.held <= 80_000 and max(table.num_rows for table in tables._pieces.values()) <= 20
        assert place != 201 or sorted(Path(path).name for path, _ in opened) == ["a.parquet"] * 2 + ["b.parquet"], \
            "each group was read in one pass"
    source.close()
    assert not tables._pieces and not tables._running


def test_parquet_texts_that_are_not_utf8_are_that_rows_fault(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    offsets, data = np.array([0, 3, 5], np.int32), b"a\xffbok"
    texts = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(data)])
    parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    source = open_records(tmp_path / "a.parquet")
    with pytest.raises(BadRecord, match=r"a\.parquet: row 0: a text is not UTF-8"):
        source.read(0)
    assert source.read(1).fields == {"text": "ok"}


def test_parquet_values_that_python_has_not_are_that_rows_fault(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    days = pa.array([1, 2**30], pa.date32())
    parquet.write_table(pa.table({"text": ["a", "b"], "day": days}), tmp_path / "a.parquet")
    source = open_records(tmp_path / "a.parquet")
    assert source.read(0).fields["text"] == "a"
    with pytest.raises(BadRecord, match=r"a\.parquet: row 1: a value cannot be read \(days=1073741824"):
        source.read(1)


@pytest.mark.parametrize("pieces", [False, True])
def test_tables_that_shrink_while_they_are_read_are_a_sentence(tmp_path, monkeypatch, pieces):
    """Not StopIteration, which a data worker's loader takes for the end of the data."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr(parquet_rows, "WHOLE", 1000 if pieces else 1 << 30)
    monkeypatch.setattr(parquet_rows, "PIECE", 1000)
    rng = np.random.default_rng(0)
    write = lambda rows: parquet.write_table(  # noqa: E731
        pa.table({"data": [rng.bytes(100) for _ in range(rows)]}), tmp_path / "a.parquet", compression="none")
    write(300)
    source = open_records([tmp_path / "a.parquet"])
    source.read(0)
    source.open_files.tables._pieces.clear()
    source.open_files.tables._running.clear()
    write(100)
    for row in (150, 299):
        with pytest.raises(BadRecord, match=r"a\.parquet: (has fewer rows than when|cannot be read as parquet)"):
            source.read(row)


def test_the_footer_of_a_table_is_read_once(tmp_path, monkeypatch):
    """Of a table of thousands of row groups it takes longer than the rows."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr(parquet_rows, "PIECES", 8)
    parquet.write_table(pa.table({"text": [f"t{number}" for number in range(100)]}), tmp_path / "a.parquet",
                        row_group_size=1)
    source = open_records(tmp_path / "a.parquet")
    assert len(source) == 100
    options = []
    opened = parquet_rows.opened
    monkeypatch.setattr(parquet_rows, "opened", lambda path, **given: options.append(given) or opened(path, **given))
    assert [source.read(row).fields["text"] for row in range(100)] == [f"t{row}" for row in range(100)]
    assert sum("metadata" not in given for given in options) == 1 and len(options) == 101
    assert len(source.open_files.tables._pieces) == 8


def test_a_folder_of_pictures_and_the_nano_set_are_records_too(tmp_path):
    for name in ("b.jpg", "sub/a.PNG", ".hidden.jpg", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        written(tmp_path / name, "x")
    written(tmp_path / "b.txt", "a caption")
    source = open_records(tmp_path, format="folder")
    assert [source.read(n).fields for n in range(len(source))] == [
        {"image": str((tmp_path / name).resolve())} for name in ("b.jpg", "sub/a.PNG")]
    first = source.read(0)
    assert first.where == str(tmp_path / "b.jpg") and first.member("txt", files=source.open_files) == b"a caption"
    assert source.read(1).member("txt", files=source.open_files) is None
    with pytest.raises(DataError, match="holds no record"):
        len(open_records(tmp_path / "sub" / "none", format="folder"))
    nano = open_records(None, format="nano")
    record = pickle.loads(pickle.dumps(nano.locate(7)))  # noqa: S301  # a worker draws it
    assert len(nano) == 100_000 and nano.files[0].name == "nano" and len(pickle.dumps(record)) < 1000
    assert record.fields["image"]().shape == (64, 64, 3) and len(record.fields["caption"]) == 4
