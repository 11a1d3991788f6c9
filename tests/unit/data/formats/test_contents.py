"""Users' files as they really are: each is read, or refused with what to do."""

import gzip
import json
import os
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from data_files import jpeg, lines, write
from tiny import write_json

from seed_multimodal.data.formats.pairs import Pairs, open_pairs
from seed_multimodal.data.formats.records import open_records
from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.errors import ConfigError, DataError

JPEG = jpeg(0, 16, 16)
PAIRS = [("k0", {"jpg": JPEG, "txt": b"a 0"}), ("k1", {"jpg": JPEG, "txt": b"a 1"})]
ROWS = [{"image": f"{n}.jpg", "caption": f"a {n}"} for n in range(2)]


def images(folder, *names: str):
    for name in names or ("0.jpg", "1.jpg"):
        write(folder / name, JPEG)


def captioned(folder):
    """Two images with captions beside them, and other files."""
    images(folder)
    for name in (".hidden.jpg", "notes.md"):
        write(folder / name, "x")
    for index in range(2):
        write(folder / f"{index}.txt", f"a {index}")


def listed(folder, name, content):
    """Two images and a list of them."""
    images(folder)
    write(folder / name, content if isinstance(content, bytes | str) else json.dumps(content))


def tars(folder, *others: str):
    write_shard(folder / "00000.tar", PAIRS)
    for name in others:
        write(folder / name, "{}")


def joined(folder):
    write_shard(folder / "a", PAIRS[:1])
    write_shard(folder / "b", PAIRS[1:])
    write(folder / "c.tar", (folder / "a").read_bytes() + (folder / "b").read_bytes())


def table(folder, name="data/train.parquet"):
    rows = [{"image": {"bytes": JPEG, "path": None}, "text": f"a {n}"} for n in range(2)]
    columns = pyarrow.Table.from_pylist(rows)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(columns, folder / name)
        return
    with pyarrow.ipc.new_stream(str(folder / name), columns.schema) as stream:
        stream.write_table(columns)


def saved_to_disk(folder):
    table(folder, "data-00000-of-00001.arrow")
    for name in ("state.json", "dataset_info.json"):
        write(folder / name, "{}")


def hub_clone(folder):
    table(folder)
    write(folder / "dataset_infos.json", "{}")
    write(folder / ".git/config.json", "{}")


def linked(folder):
    captioned(folder / "elsewhere")
    (folder / "set").mkdir()
    (folder / "set/link").symlink_to(folder / "elsewhere")
    (folder / "set/loop").symlink_to(folder / "set")


def coco(folder):
    entries = [{"id": 7 + n, "file_name": f"{n}.jpg", "license": 1} for n in range(2)]
    annotations = [{"image_id": 7 + n, "id": n, "caption": f"a {n}"} for n in range(2)]
    listed(folder, "captions.json", {"images": entries, "annotations": annotations})


def dotted(folder):
    names = [f"Figure 1.{n} fox" for n in range(2)]
    records = [(name, {"jpg": JPEG, "txt": f"a {n}".encode()}) for n, name in enumerate(names)]
    hidden = ("._Figure 1", {"jpg": b"x", "txt": b"x"})  # of macOS
    write_shard(folder / "a.tar", [hidden, *records])


UTF_16 = "\n".join(map(json.dumps, ROWS)).encode("utf-16")
METADATA = "file_name,text\n0.jpg,a 0\n1.jpg,a 1\n"
ACCENTED = [{"image": "é.jpg", "caption": f"a {n}"} for n in range(2)]
CC3M = "a 0\thttp://x/0.jpg\n"
# What a user gives → who writes it, the path in the folder, and None (two pairs) or what is said.
FILES = {
    "capital suffixes": (
        lambda f: [write(f / f"{n}.JPG", JPEG) and write(f / f"{n}.TXT", f"a {n}") for n in (0, 1)],
        "",
        None,
    ),
    "ImageFolder's metadata.csv": (lambda f: listed(f, "metadata.csv", METADATA), "", None),
    "save_to_disk": (saved_to_disk, "", None),
    "clone of the hub": (hub_clone, "", None),
    "COCO's captions": (coco, "captions.json", None),
    "img2dataset's shards": (lambda f: tars(f, "00000.parquet", "00000_stats.json"), "", None),
    "img2dataset's files": (
        lambda f: (
            captioned(f / "00000"),
            write(f / "00000.parquet", ""),
            write(f / "0_stats.json", ""),
        ),
        "",
        None,
    ),
    "dots in keys": (dotted, "a.tar", None),
    "joined tars": (joined, "c.tar", None),
    "links to folders": (linked, "set", None),
    "home": (captioned, "~", None),
    "tar without suffix": (lambda f: write_shard(f / "shard", PAIRS), "shard", None),
    "lines in a .json with BOM": (
        lambda f: listed(f, "a.json", b"\xef\xbb\xbf" + UTF_16.decode("utf-16").encode()),
        "a.json",
        None,
    ),
    "list of Windows": (
        lambda f: (
            images(f / "Img", "0.JPG", "1.jpg"),
            write(
                f / "a.json", json.dumps([{**row, "image": f"img\\{row['image']}"} for row in ROWS])
            ),
        ),
        "a.json",
        None,
    ),
    "captions in UTF-16": (
        lambda f: (images(f), [write(f / f"{n}.txt", f"a {n}".encode("utf-16")) for n in (0, 1)]),
        "",
        None,
    ),
    "image": (images, "0.jpg", "is an image; give the folder"),
    "UTF-16": (lambda f: write(f / "a.jsonl", UTF_16), "a.jsonl", "iconv -f UTF-16"),
    "gzipped tar in a .tar": (
        lambda f: write(f / "a.tar", gzip.compress(b"x")),
        "a.tar",
        "gzip -d",
    ),
    "zstd": (lambda f: write(f / "a", b"\x28\xb5\x2f\xfd" * 9), "a", "zstd -d"),
    "zip": (lambda f: zipfile.ZipFile(f / "a.zip", "w").close(), "a.zip", "unzip"),
    "folder of gzipped tars": (lambda f: write(f / "a.tar.gz", b"x"), "", "1 .gz file, .* gzip -d"),
    "folder of CC3M": (lambda f: write(f / "Train.tsv", CC3M), "", "img2dataset"),
    "two formats": (
        lambda f: (tars(f), lines(f / "a.jsonl", ROWS)),
        "",
        "jsonl and tar|tar and jsonl",
    ),
    "accents of macOS": (
        lambda f: (images(f, "e\u0301.jpg"), lines(f / "a.jsonl", ACCENTED)),
        "a.jsonl",
        None,
    ),
    "braces in names": (lambda f: captioned(f / "{a,b}"), "{a,b}", None),
    "large cell": (
        lambda f: listed(
            f, "a.csv", METADATA.replace("a 1", f"a 1,{'x' * 200_000}").replace("text", "text,x")
        ),
        "a.csv",
        None,
    ),
    "comma without quotes": (
        lambda f: listed(f, "a.csv", f"{METADATA}2.jpg,a, 2"),
        "a.csv",
        "line 4 .* quotes",
    ),
    "members by type": (
        lambda f: write_shard(f / "a.tar", [("k0", {"jpg": JPEG}), ("k1", {"jpg": JPEG})]),
        "a.tar",
        "tar --sort=name",
    ),
    "other keys": (
        lambda f: listed(f, "a.json", [{"caption": "a", "img": "0.jpg"}]),
        "a.json",
        "item 0: .*'img'",
    ),
    "list in a .jsonl": (lambda f: listed(f, "a.jsonl", ROWS), "a.jsonl", "rename it to .json"),
    **{
        f"pointer of Git LFS in a {name}": (
            lambda f, name=name: write(
                f / f"a.{name}", "version https://git-lfs.github.com/spec/v1"
            ),
            "",
            "git lfs pull",
        )
        for name in ("parquet", "tar", "jsonl", "csv")
    },
}


@pytest.mark.parametrize("name", FILES)
def test_users_files_are_read_or_refused_with_the_cure(tmp_path, monkeypatch, name):
    make, path, problem = FILES[name]
    make(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    source = path if path == "~" else tmp_path / path
    if problem is not None:
        with pytest.raises(DataError, match=problem):
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


def with_json(folder):
    """Images with their captions as JSON, one of which misses its image."""
    images(folder)
    for index in (0, 1, 3):
        write(
            folder / f"{index}.json", json.dumps({"image": f"{index}.jpg", "caption": f"a {index}"})
        )


def beside_notes(folder):
    captioned(folder)
    write(folder / "config.json", '{"image_size": 8}')
    write(folder / "sub/notes.jsonl", '{"note": "1.png is blurred"}')


@pytest.mark.parametrize(
    "make, captions, named",
    [
        (with_json, ["a 0", "a 1"], "leaves out 3.json: "),
        (beside_notes, ["a 0", "a 1"], "leaves out config.json, sub/notes.jsonl: "),
        # A list wins if it names images, in this folder or elsewhere.
        (lambda f: (beside_notes(f), lines(f / "a.jsonl", ROWS[1:])), ["a 1"], "sub/notes.jsonl"),
        (
            lambda f: (
                captioned(f),
                write_json(f / "a.json", [{"image": "notes.md", "text": "b"}]),
            ),
            ["b"],
            "",
        ),
        (lambda f: (captioned(f), tars(f)), ["a 0", "a 1"], "tar files are read; of its 2 images"),
    ],
)
def test_what_a_folder_leaves_out_is_named(tmp_path, capsys, make, captions, named):
    # One file of settings must not hide a folder of images.
    make(tmp_path)
    pairs = Pairs(tmp_path)
    assert [pairs.read(index).captions for index in range(len(pairs))] == [[c] for c in captions]
    assert named in capsys.readouterr().err


def test_a_folder_of_images_where_shards_are_expected(tmp_path, capsys):
    for split in ("train", "test"):
        images(tmp_path / split)
    with pytest.raises(DataError, match=r"4 images: set format: folder"):
        open_records(tmp_path, format="tar")
    # Held-out images are not trained on without a word.
    assert len(open_records(tmp_path)) == 4
    assert "test and train" in capsys.readouterr().err
    # With several formats one is chosen.
    tars(tmp_path)
    lines(tmp_path / "a.jsonl", ROWS)
    assert open_records(tmp_path, format="jsonl").read(0).fields == ROWS[0]


def test_vqa_of_two_official_files(tmp_path):
    # Questions and their commonest answers, for training of visual question answering.
    questions = [{"question_id": 10 + n, "image_id": n, "question": f"q {n}?"} for n in range(2)]
    answers = [{"answer": "red"}, {"answer": "blue"}, {"answer": "red"}]
    annotations = [{"question_id": 11 - n, "image_id": 1 - n, "answers": answers} for n in range(2)]
    subset = {"data_subtype": "train2014"}
    for name, content in (
        ("v2_mscoco_train2014_annotations.json", {"annotations": annotations, **subset}),
        ("v2_OpenEnded_mscoco_train2014_questions.json", {"questions": questions, **subset}),
    ):
        write(tmp_path / name, json.dumps(content))
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
