"""Users' files as they really are: each is read, or refused with what to do."""

import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from data_files import jpeg, write, write_any
from tiny import write_json
from yaml_tables import read_tables

from seed_multimodal.data.formats.pairs import Pairs, open_pairs
from seed_multimodal.data.formats.records import open_records
from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.errors import ConfigError, DataError

JPEG = jpeg(0, 16, 16)
PAIRS = [("k0", {"jpg": JPEG, "txt": b"a 0"}), ("k1", {"jpg": JPEG, "txt": b"a 1"})]
TABLES = read_tables(__file__)


def write_table(path):
    """Two pairs as rows of a parquet or arrow file."""
    rows = [{"image": {"bytes": JPEG, "path": None}, "text": f"a {n}"} for n in range(2)]
    columns = pyarrow.Table.from_pylist(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(columns, path)
        return
    with pyarrow.ipc.new_stream(str(path), columns.schema) as stream:
        stream.write_table(columns)


def content_of(text: str) -> bytes:
    return JPEG if text == "JPEG" else text.encode()


def create(folder, files: dict[str, Any]):
    """Files by their contents of the table."""
    for name, content in files.items():
        path = folder / name
        if content == "PAIRS":
            write_shard(path, PAIRS)
        elif content == "TABLE":
            write_table(path)
        elif isinstance(content, str):
            write(path, content_of(content))
        elif isinstance(content, bytes):
            write(path, content)
        elif "encoding" in content:
            write(path, content["text"].encode(content["encoding"]))
        elif "tar" in content:
            samples = []
            for key, texts in content["tar"].items():
                samples.append((key, {kind: content_of(text) for kind, text in texts.items()}))
            write_shard(path, samples)
        else:
            write_any(path, content)


def join_tars(folder):
    write_shard(folder / "a", PAIRS[:1])
    write_shard(folder / "b", PAIRS[1:])
    write(folder / "c.tar", (folder / "a").read_bytes() + (folder / "b").read_bytes())


def link_folders(folder):
    create(folder / "elsewhere", TABLES["captioned"])
    (folder / "set").mkdir()
    (folder / "set/link").symlink_to(folder / "elsewhere")
    (folder / "set/loop").symlink_to(folder / "set")


def fill_a_cell(folder):
    rows = f"file_name,text,x\n0.jpg,a 0\n1.jpg,a 1,{'x' * 200_000}\n"
    create(folder, {"0.jpg": "JPEG", "1.jpg": "JPEG", "a.csv": rows})


# What is not only files with contents.
MADE = {"joined tars": join_tars, "links to folders": link_folders, "large cell": fill_a_cell}


@pytest.mark.parametrize("name", TABLES["files"])
def test_users_files_are_read_or_refused_with_the_cure(tmp_path, monkeypatch, name):
    case = TABLES["files"][name]
    if name in MADE:
        MADE[name](tmp_path)
    create(tmp_path, case.get("files", {}))
    monkeypatch.setenv("HOME", str(tmp_path))
    path = case.get("path", "")
    source = path if path == "~" else tmp_path / path
    if "named" in case:
        with pytest.raises(DataError, match=case["named"]):
            len(Pairs(source))
        return
    pairs = Pairs(source)
    read = [pairs.read(index) for index in range(len(pairs))]
    assert [pair.captions for pair in read] == [["a 0"], ["a 1"]]
    for pair in read:
        content = (
            pair.image if isinstance(pair.image, bytes) else Path(str(pair.image)).read_bytes()
        )
        assert content == JPEG


@pytest.mark.parametrize("case", TABLES["left_out"].values(), ids=TABLES["left_out"])
def test_what_a_folder_leaves_out_is_named(tmp_path, capsys, case):
    # One file of settings must not hide a folder of images.
    create(tmp_path, case["files"])
    pairs = Pairs(tmp_path)
    captions = [pairs.read(index).captions for index in range(len(pairs))]
    assert captions == [[caption] for caption in case["captions"]]
    assert case["named"] in capsys.readouterr().err


def test_a_folder_of_images_where_shards_are_expected(tmp_path, capsys):
    for split in ("train", "test"):
        create(tmp_path / split, {"0.jpg": "JPEG", "1.jpg": "JPEG"})
    with pytest.raises(DataError, match=r"4 images: set format: folder"):
        open_records(tmp_path, format="tar")
    # Held-out images are not trained on without a word.
    assert len(open_records(tmp_path)) == 4
    assert "test and train" in capsys.readouterr().err
    # With several formats one is chosen.
    row = {"image": "0.jpg", "caption": "a 0"}
    create(tmp_path, {"00000.tar": "PAIRS", "a.jsonl": [row]})
    assert open_records(tmp_path, format="jsonl").read(0).fields == row


def test_vqa_of_two_official_files(tmp_path):
    # Questions and their commonest answers, for training of visual question answering.
    create(tmp_path, TABLES["vqa"])
    names = sorted(os.listdir(tmp_path))
    for files in (tmp_path, [tmp_path / name for name in names]):
        records = open_records(files)
        first = records.read(0).fields
        assert len(records) == 2
        assert (first["question"], first["answer"]) == ("q 1?", "red")
        assert first["image"] == "COCO_train2014_000000000001.jpg"
    with pytest.raises(DataError, match="annotations"):
        len(open_records(tmp_path / names[0]))


def test_open_pairs_of_lists(tmp_path):
    # Of other names, with images below `image_root`; texts that are cut in an emoji are used.
    image = write(tmp_path / "images/0.jpg", JPEG)
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, path in zip(files, ("0.jpg", str(image)), strict=True):
        write_json(file, [{"photo": path, "title": [file.name, "cut \ud83d"]}])
    keys = {"image_key": "photo", "caption_key": "title", "image_root": str(image.parent)}
    pairs = open_pairs({"files": list(map(str, files)), "format": "json", **keys})
    for index, file in enumerate(files):
        pair = pairs.read(index)
        assert (pair.image, pair.captions) == (image, [file.name, "cut ?"])
        assert pair.location == f"{file}: item 0"
    for wrong, named in (({"format": "tarr", "files": "x"}, "tarr"), ({"file": "x"}, "'files'")):
        with pytest.raises(ConfigError, match=named):
            open_pairs(wrong)
