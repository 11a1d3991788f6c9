"""Sources of picture-caption pairs: what they read, and the sentences for what they cannot."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import resource
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from omegaconf import OmegaConf

from seed_multimodal.data.formats import tar_headers
from seed_multimodal.data.formats.files import expand_pattern, nearest_path
from seed_multimodal.data.formats.packed import PackedStrings
from seed_multimodal.data.formats.pairs import Pairs, open_pairs
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.data.formats.tar import OpenFiles, scan_tar, tar_records
from seed_multimodal.data.formats.tar_headers import tar_members
from seed_multimodal.errors import ConfigError, DataError


def sentence(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# ---- patterns


def test_patterns(tmp_path: Path) -> None:
    for name in ("a-008.tar", "a-009.tar", "a-010.tar", "b.tar", "odd[1].tar"):
        (tmp_path / name).touch()
    names = [p.name for p in expand_pattern(f"{tmp_path}/a-{{008..010}}.tar")]
    assert names == ["a-008.tar", "a-009.tar", "a-010.tar"]
    assert [p.name for p in expand_pattern(f"{tmp_path}/{{b,a-0?9}}.tar")] == ["b.tar", "a-009.tar"]
    assert [p.name for p in expand_pattern([f"{tmp_path}/b.tar", tmp_path / "*.tar"])] == [
        "b.tar", "a-008.tar", "a-009.tar", "a-010.tar", "odd[1].tar"]
    assert [p.name for p in expand_pattern(tmp_path / "odd[1].tar")] == ["odd[1].tar"]
    assert [p.name for p in expand_pattern(f"{tmp_path}/a-{{8..10}}.tar".replace("a-", "a-0*"))] == [
        "a-008.tar", "a-009.tar", "a-010.tar"]


@pytest.mark.parametrize(("pattern", "words"), [
    ("{0}/none-*.tar", ["none-*.tar", "matches"]),
    ("{0}/n-{{00..02}}.tar", ["n-{00..02}.tar", "matches"]),
    ("{0}/a-{{0..3}}.tar", ["a-{0..3}.tar", "3 of its 4", "a-1.tar"]),
    ("pipe:aws s3 cp x -", ["pipe:", "on disk"]),
    ("https://host/a-0.tar", ["https://", "on disk"]),
])
def test_patterns_that_match_nothing(tmp_path: Path, pattern: str, words: list[str]) -> None:
    (tmp_path / "a-0.tar").touch()
    with pytest.raises(DataError) as error:
        Pairs(pattern.format(tmp_path))
    assert all(word in sentence(error) for word in words)
    with pytest.raises(DataError, match="empty"):
        expand_pattern([])
    with pytest.raises(DataError, match=r"it is a folder; try .*/\*"):
        expand_pattern(tmp_path)


def test_a_plain_path_with_a_typo_is_told_as_one(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "train-000.tar").touch()
    for typed, told in (("shards/train-0000.tar", f" (did you mean {tmp_path}/shards/train-000.tar?)"),
                        ("shard/train-000.tar", f" (did you mean {tmp_path}/shards?)"), ("zzz/q", "")):
        with pytest.raises(DataError) as error:
            expand_pattern(tmp_path / typed)
        assert str(error.value) == f"{tmp_path}/{typed}: there is no such file or folder{told}."
    for number in range(2000):  # of a million pictures, comparing all names would take minutes
        (tmp_path / "shards" / f"{number}.tar").touch()
    assert nearest_path(tmp_path / "shards" / "train-0000.tar") == ""


def test_packed_strings() -> None:
    strings = ["", "a", "zwölf – 十二", "odd\udcff", ""]
    packed = PackedStrings.of(strings)
    assert [packed[i] for i in range(len(packed))] == strings
    assert len(PackedStrings.of([])) == 0
    assert PackedStrings.of(["half\ud83d"])[0] == "half?"


# ---- shards


@pytest.mark.parametrize("caption_file", ["json", "txt"])
def test_shards_read_as_webdataset_reads_them(shards: Path, caption_file: str) -> None:
    pairs = Pairs(f"{shards}/s-{{000..003}}.tar", caption_file=caption_file)
    files = [str(p) for p in sorted(shards.glob("*.tar"))]
    theirs = list(webdataset.WebDataset(files, shardshuffle=False).decode())
    assert len(pairs) == len(theirs) == 40 and pairs.shard_sizes.tolist() == [13, 7, 1, 19]
    for index in np.random.default_rng(0).permutation(40).tolist():
        pair = pairs.read(index)
        assert pair.key == pairs.key(index) == theirs[index]["__key__"]
        assert pair.captions == [theirs[index]["json"]["caption"]]
        raw = tarfile.open(pair.name.rpartition(": ")[0]).extractfile(f"{pair.key}.jpg")
        assert raw is not None and pair.image == raw.read()


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_are_read_as_tarfile_reads_them(tmp_path: Path, kind: int) -> None:
    """Long names, folders, links, empty members and names that are not ASCII, in each format of tar."""
    path = tmp_path / "x.tar"
    deep = "folder-of-some-length/" * (6 if kind == tarfile.USTAR_FORMAT else 20)
    with tarfile.open(path, "w", format=kind) as archive:
        for number, name in enumerate(["plain.jpg", "é.x.jpg", "empty.json", f"{deep}deep.jpg", "./dot.json"]):
            info = tarfile.TarInfo(name)
            info.size = 0 if "empty" in name else 500 + number
            info.mtime = 1234.5 if kind == tarfile.PAX_FORMAT else 7  # a fraction needs a pax header
            archive.addfile(info, io.BytesIO(b"z" * info.size))
            link = tarfile.TarInfo(f"{deep}link-{number}")
            link.type, link.linkname = tarfile.SYMTYPE, deep[:80 if kind == tarfile.USTAR_FORMAT else None] + "else"
            archive.addfile(link)
            folder = tarfile.TarInfo(f"{deep}sub-{number}")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
    with tarfile.open(path) as archive:
        theirs = [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]
    assert list(tar_members(path)) == theirs and len(theirs) == 5


def test_keys_are_grouped_as_webdataset_groups_them(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    names = ["a/one.JPG", "a/one.json", "b/one.seg.png", "b/one.png", "b/one.json", ".hidden", "readme", "two.x.y"]
    with tarfile.open(path, "w") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"data"))
    spans, keys, damage = scan_tar(path, {"image": ("jpg", "png"), "text": ("json",)})
    assert damage == "" and [keys[i] for i in range(3)] == ["a/one", "b/one", "two"]
    with tarfile.open(path) as archive:
        where = {m.name: m.offset_data for m in archive}
    assert spans["offset"].tolist() == [[where["a/one.JPG"], where["a/one.json"]],
                                        [where["b/one.png"], where["b/one.json"]], [-1, -1]]


def test_preferred_picture_and_other_caption_keys(tmp_path: Path, jpeg: Callable, write_tar: Callable) -> None:
    path = write_tar(tmp_path / "x.tar", [{"__key__": "0", "png": b"P", "jpg": jpeg(0),
                                           "json": {"top_caption": ["a", "b"]}}])
    assert Pairs(path, image_keys=("jpg", "png"), caption_key="top_caption").read(0).image == jpeg(0)
    assert Pairs(path, image_keys=["png", "jpg"], caption_key="top_caption").read(0).image == b"P"
    assert Pairs(path, image_keys="png", caption_key="top_caption").read(0).captions == ["a", "b"]


@pytest.mark.parametrize("cut", ["in a picture", "in a header", "between samples", "to nothing", "zeroed header"])
def test_a_torn_shard_is_named(tmp_path: Path, shards: Path, cut: str) -> None:
    path = tmp_path / "torn.tar"
    shutil.copy(shards / "s-000.tar", path)
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        seventh = next(m for m in members if m.name == "00006.jpg")
    data = bytearray(path.read_bytes())
    if cut == "zeroed header":
        data[seventh.offset_data - 512:seventh.offset_data - 400] = b"\xff" * 112
    else:
        keep = {"in a picture": seventh.offset_data + 100, "in a header": seventh.offset + 100,
                "between samples": seventh.offset, "to nothing": 0}[cut]
        del data[keep:]
    path.write_bytes(data)
    if cut == "to nothing":
        with pytest.raises(DataError, match=r"torn\.tar: torn or damaged in its first sample"):
            Pairs(path)
        shutil.copy(shards / "s-001.tar", tmp_path / "whole.tar")
        assert len(Pairs(f"{tmp_path}/*.tar")) == 1 + 7  # beside others it is one bad sample
        return
    for _ in range(2):  # the second time by its kept index
        kept = Pairs(path, index_folder=tmp_path / "index")
        # Unless the seventh has begun, nothing tells that the sixth has all its members, so it is left out as well.
        whole = 6 if cut == "in a picture" else 5
        assert len(kept) == whole + 1 and kept.read(4).captions == ["Picture 4."] and kept.key(whole) == "torn"
        with pytest.raises(BadRecord) as error:
            kept.read(whole)
        assert sentence(error).startswith(f"{path}: torn or damaged after sample 0000{whole - 1} (")
        assert error.value.kind == "damaged file"


def test_what_is_no_plain_tar(tmp_path: Path, shards: Path) -> None:
    import gzip

    packed = tmp_path / "x.tar.gz"
    packed.write_bytes(gzip.compress((shards / "s-001.tar").read_bytes()))
    disguised = shutil.copy(packed, tmp_path / "x.tar")
    for path in (packed, disguised):
        with pytest.raises(DataError, match="compressed") as error:
            Pairs(path)
        assert str(path) in sentence(error) and "gunzip" in str(error.value)
    (tmp_path / "text.tar").write_text("not a tar " * 200)
    with pytest.raises(DataError, match=r"text\.tar: torn or damaged in its first sample"):
        Pairs(tmp_path / "text.tar")
    with tarfile.open(tmp_path / "none.tar", "w"):
        pass
    with pytest.raises(DataError, match=r"none\.tar: holds no record"):
        Pairs(tmp_path / "none.tar")


def test_missing_captions_and_pictures(tmp_path: Path, jpeg: Callable, write_tar: Callable) -> None:
    good = {"jpg": jpeg(1), "json": {"caption": "fine"}}
    path = write_tar(tmp_path / "x.tar", [
        {"__key__": "good", **good},
        {"__key__": "renamed", "jpg": jpeg(2), "json": {"captions": "x"}},
        {"__key__": "no-json", "jpg": jpeg(3)},
        {"__key__": "torn-json", "jpg": jpeg(3), "json": b'{"caption": '},
        {"__key__": "null", "jpg": jpeg(3), "json": {"caption": None}},
        {"__key__": "no-texts", "jpg": jpeg(3), "json": {"caption": []}},
        {"__key__": "a-list", "jpg": jpeg(3), "json": b"[1]"},
        {"__key__": "blind", "json": {"caption": "no picture"}},
    ])
    pairs = Pairs(path)
    assert pairs.read(0).captions == ["fine"]
    for index in range(1, 7):
        with pytest.raises(DataError) as error:
            pairs.read(index)
        assert f"{path}: sample {pairs.key(index)}: " in sentence(error)
    with pytest.raises(DataError, match=r"no caption key 'caption' \(did you mean 'captions'\?\)"):
        pairs.read(1)
    with pytest.raises(BadRecord, match=r"x\.tar: sample blind: has no picture"):
        pairs.read(7)
    with pytest.raises(DataError, match=r"x\.tar: .* extension webp"):
        Pairs(path, image_keys=("webp",))
    with pytest.raises(DataError, match=r"x\.tar: .* extension txt"):
        Pairs(path, caption_file="txt")
    with pytest.raises(ConfigError, match="caption_file"):
        Pairs(path, caption_file="yaml")


@pytest.mark.parametrize("seed", range(12))
def test_headers_read_by_the_window_are_those_read_one_by_one(tmp_path: Path, seed: int,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Small and large members, long names, folders and links between them, torn and damaged in places."""
    draw, path = np.random.default_rng(seed), tmp_path / "x.tar"
    monkeypatch.setattr(tar_headers, "_FIRST", int(draw.choice([512, 1024, 4096, 1 << 16])))
    monkeypatch.setattr(tar_headers, "WINDOW", int(draw.choice([1024, 5120, 1 << 20])))
    monkeypatch.setattr(tar_headers, "SMALL", int(draw.choice([600, 2000, 1 << 13])))
    with tarfile.open(path, "w", format=int(draw.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT]))) as archive:
        for number in range(60):
            info = tarfile.TarInfo(("long-folder/" * 11 if draw.random() < 0.02 else "") + f"é{number:04d}.json")
            info.size = int(draw.choice([0, 1, 511, 512, 513, 3000, 20_000], p=[.1, .1, .1, .2, .3, .15, .05]))
            if draw.random() < 0.02:
                info.type, info.size = tarfile.DIRTYPE, 0
            archive.addfile(info, io.BytesIO(draw.bytes(info.size)))
    whole = path.read_bytes()
    for damage in ("none", "torn", "zeros", "flipped"):
        content = bytearray(whole)
        place = int(draw.integers(len(content) // 3, len(content)))
        if damage == "torn":
            del content[place:]
        elif damage == "zeros":
            content[place:] = bytes(len(content) - place)
        elif damage == "flipped":
            for spot in draw.integers(0, len(content), 40).tolist():
                content[spot] ^= int(draw.integers(1, 256))
        path.write_bytes(content)
        assert _walked(path) == _walked(bytes(content)), damage
    monkeypatch.undo()
    path.write_bytes(whole)
    assert _walked(path) == _walked(whole) and len(_walked(whole)[0]) > 50


def _walked(tar: Path | bytes) -> tuple[list[tuple[str, int, int]], str]:
    found = []
    try:
        for member in tar_members(tar):
            found.append(member)
    except tar_headers.Damaged as error:
        return found, str(error)
    return found, ""


def test_a_member_that_is_there_twice(tmp_path: Path, jpeg: Callable) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in (("a.jpg", b"1"), ("a.png", b"2"), ("a.png", b"3"), ("a.txt", b"t"), ("b.jpg", jpeg(1)),
                           ("b.txt", b"good")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    for _ in range(2):  # the second time by its kept index
        pairs = Pairs(tmp_path / "x.tar", index_folder=tmp_path / "index")
        assert pairs.read(1).captions == ["good"]
        with pytest.raises(BadRecord, match=r"x\.tar: sample a has two \.png members") as error:
            pairs.read(0)
        assert error.value.kind == "duplicate id"


def test_a_member_of_more_than_4_gib_is_one_bad_sample(tmp_path: Path, jpeg: Callable) -> None:
    with open(tmp_path / "x.tar", "wb") as file:
        for name, size, data in (("a.jpg", 5 << 30, b""), ("a.txt", 1, b"t"), ("b.jpg", len(jpeg(1)), jpeg(1)),
                                 ("b.txt", 4, b"good")):
            member = tarfile.TarInfo(name)
            member.size = size
            file.write(member.tobuf(tarfile.GNU_FORMAT) + data)
            file.seek(-(-size // 512) * 512 - len(data), os.SEEK_CUR)
        file.write(bytes(1024))
    pairs = Pairs(tmp_path / "x.tar")
    assert len(pairs) == 2 and pairs.read(1).captions == ["good"]
    with pytest.raises(BadRecord, match=r"sample a: its \.jpg has more than 4 GiB"):
        pairs.read(0)
    assert [record.problem for record in tar_records(tmp_path / "x.tar")] == [
        ("damaged file", f"{tmp_path}/x.tar: sample a: its .jpg has more than 4 GiB."), None]


def test_the_index_is_kept_and_follows_the_shard(tmp_path: Path, shards: Path, jpeg: Callable,
                                                 write_tar: Callable) -> None:
    path, folder = Path(shutil.copy(shards / "s-001.tar", tmp_path / "x.tar")), tmp_path / "index"
    first = Pairs(path, index_folder=folder)
    (kept,) = folder.iterdir()
    stamp = kept.stat().st_mtime_ns
    again = Pairs(path, index_folder=folder)
    assert kept.stat().st_mtime_ns == stamp and again.read(3) == first.read(3)
    kept.write_bytes(kept.read_bytes()[:50])  # torn: the shard itself is read
    assert Pairs(path, index_folder=folder).read(6) == first.read(6)
    write_tar(path, [{"__key__": "new", "jpg": jpeg(9), "json": {"caption": "new"}}])
    renewed = Pairs(path, index_folder=folder)
    assert len(renewed) == 1 and renewed.read(0).key == "new" and len(list(folder.iterdir())) == 1
    with pytest.raises(DataError, match="cannot be written"):
        Pairs(path, index_folder=path)
    # a full disk (RLIMIT_FSIZE) leaves nothing half written
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(DataError, match=r"cannot be written there \(.*File too large"):
            Pairs(path, index_folder=tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "full").iterdir())


def test_a_shard_cut_after_indexing(tmp_path: Path, shards: Path) -> None:
    path = Path(shutil.copy(shards / "s-001.tar", tmp_path / "x.tar"))
    pairs = Pairs(path)
    os.truncate(path, 2000)
    with pytest.raises(DataError, match=r"x\.tar: it is shorter than when it was indexed"):
        pairs.read(5)


def _descriptors(pairs: Pairs) -> tuple[str, list[int]]:
    return pairs.read(15).key, list(pairs._records.open_files._open.values())


@pytest.mark.process
def test_files_are_opened_per_process(shards: Path) -> None:
    pairs = Pairs(f"{shards}/*.tar")
    pairs.read(0)
    assert len(pairs._records.open_files._open) == 1
    with multiprocessing.get_context("fork").Pool(1) as pool:
        key, opened = pool.apply(_descriptors, (pairs,))  # sent pickled
    assert key == "00015" and len(opened) == 1
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # a real fork, as data workers are: the child must have closed what it inherited
        inherited = list(pairs._records.open_files._open.values())
        pairs.read(15)
        try:
            same = os.path.samestat(os.fstat(inherited[0]), os.stat(shards / "s-000.tar"))
        except OSError:  # closed, and its number not taken again
            same = False
        os.write(writer, bytes([len(pairs._records.open_files._open), same]))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 2) == bytes([1, 0])
    os.close(reader)
    os.close(writer)
    assert pairs.read(1).key == "00001"


def test_few_files_stay_open(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(5)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 10)
    files = OpenFiles(limit=2)
    for _ in range(2):
        assert [files.read(path, 3, 2) for path in paths] == [bytes([n, n]) for n in range(5)]
        assert len(files._open) == 2
    files.close()
    with pytest.raises(DataError, match="gone"):
        files.read(tmp_path / "gone", 0, 1)


# ---- json


def test_json(tmp_path: Path, jpeg: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("0.jpg", "sub/1.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(jpeg(0))
    (tmp_path / "a.json").write_text(json.dumps([{"image": "0.jpg", "caption": "one – eins"},
                                                 {"image": "sub/1.jpg", "caption": ["two", "deux"], "id": 3}]))
    (tmp_path / "b.json").write_text(json.dumps([{"image": f"{tmp_path}/2.jpg", "caption": "three"}]))
    pairs = Pairs([tmp_path / "a.json", tmp_path / "b.json"], image_root=tmp_path)
    assert len(pairs) == 3
    assert [pairs.read(i).captions for i in range(3)] == [["one – eins"], ["two", "deux"], ["three"]]
    assert [pairs.read(i).image for i in range(3)] == [tmp_path / name for name in ("0.jpg", "sub/1.jpg", "2.jpg")]
    assert pairs.read(1).name == f"{tmp_path}/a.json: item 1" and pairs.read(2).name == f"{tmp_path}/b.json: item 0"
    assert Pairs(tmp_path / "a.json").read(0).image == tmp_path / "0.jpg"  # beside the list
    monkeypatch.chdir(tmp_path / "sub")
    (tmp_path / "sub" / "c.json").write_text('[{"image": "../2.jpg", "caption": "four"}]')
    (tmp_path / "d.json").write_text('[{"image": "1.jpg", "caption": "five"}]')
    assert Pairs("c.json").read(0).image == Path("../2.jpg")
    assert Pairs(tmp_path / "d.json").read(0).image == Path("1.jpg")  # from the current folder, as the released code


def test_captions_cut_inside_an_emoji(tmp_path: Path) -> None:
    """Half a surrogate pair, which json can spell and no tokenizer takes."""
    (tmp_path / "a.json").write_text('[{"image": "0\\ud83d.jpg", "caption": ["cat \\ud83d", "\\ud83d\\ude00"]}]')
    (tmp_path / "0?.jpg").touch()
    pair = Pairs(tmp_path / "a.json").read(0)
    assert pair.captions == ["cat ?", "\U0001f600"] and pair.image == tmp_path / "0?.jpg"


@pytest.mark.parametrize(("content", "words"), [
    ([{"image": "0.jpg", "title": "x"}, {"image": "1.jpg", "title": "y"}], ["item 0", "'caption'", "has image, title"]),
    ([{"img": "0.jpg", "caption": "x"}], ["item 0", "has no picture", "'image'", "did you mean 'img'?"]),
    ([{"image": None, "caption": "x"}], ["has no picture: nothing under key 'image' (it is 'None')."]),
    ([{"image": 5, "caption": "x"}], ["item 0", "a picture is 5, not a path"]),
    ([{"image": "0.jpg", "caption": ["x", " "]}], ["item 0", "its 'caption' is empty"]),
    ([{"image": "0.jpg", "caption": None}], ["item 0", "has no caption, its 'caption' is null"]),
    ([{"image": "0.jpg", "caption": 5}], ["item 0", "'caption'", "5"]),
    (["0.jpg"], ["item 0", "a str"]),
    ([], ["holds no record"]),
    ({"images": []}, ["line 1", "has no caption key"]),
])
def test_json_that_does_not_fit(tmp_path: Path, content: object, words: list[str]) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError) as error:
        Pairs(path)
    assert sentence(error).startswith(str(path)) and all(word in str(error.value) for word in words)


def test_json_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[{"image": ')
    with pytest.raises(DataError, match=r"x\.json: line 1, item 0: is not a json list"):
        Pairs(tmp_path / "x.json")
    with pytest.raises(DataError, match=r"y\.json: there is no such file or folder \(did you mean .*x\.json\?\)"):
        Pairs(tmp_path / "y.json")


def test_open_pairs(tmp_path: Path, shards: Path) -> None:
    pairs = open_pairs({"format": "webdataset", "pattern": f"{shards}/*.tar", "caption_file": "txt"})
    assert isinstance(pairs, Pairs) and pairs.read(0).captions == ["Picture 0."]
    spec = OmegaConf.create({"format": "webdataset", "pattern": [f"{shards}/s-001.tar"], "image_keys": ["jpg"]})
    assert len(open_pairs(spec)) == 7
    (tmp_path / "a.json").write_text('[{"picture": "a", "caption": "b"}]')
    spec = {"format": "json", "files": str(tmp_path / "a.json"), "image_key": "picture", "image_root": None}
    assert isinstance(open_pairs(spec), Pairs)
    for spec, words in (({"format": "tar"}, "must be auto, json, jsonl, parquet, folder, webdataset, nano"),
                        ({}, "not None"),
                        ({"format": "json", "file": "x"}, r"unknown key 'file' \(did you mean 'files'"),
                        ({"format": "webdataset"}, "pattern is not given")):
        with pytest.raises(ConfigError, match=words):
            open_pairs(spec)
