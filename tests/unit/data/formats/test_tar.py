"""Shards: their members by index, damaged files, and the writer."""

import io
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import webdataset

from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.data.formats.storage import DataFile
from seed_multimodal.data.formats.tar import TarFile


def tar_of(path, members: Iterable[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mode = 0o644
            archive.addfile(info, io.BytesIO(data))
    return path


def samples_of(path) -> list[tuple[str, dict[str, bytes]]]:
    """The samples of a tar, read by its index."""
    tar = TarFile(DataFile(path))
    records = [tar.locate(row) for row in range(tar.sizes[0])]
    return [
        (record.key, {name: record.member(name) or b"" for name in record.members})
        for record in records
    ]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_locate_in_a_tar_of_every_kind(tmp_path, kind):
    # Long names, links, empty members and non-ASCII names.
    deep = "folder-of-some-length/" * (6 if kind == tarfile.USTAR_FORMAT else 20)
    members = [
        ("plain.jpg", b"z" * 500),
        ("é.x.jpg", b"y"),
        ("empty.json", b""),
        (f"{deep}deep.jpg", b"zz"),
    ]
    path = tar_of(tmp_path / "x.tar", members, kind)
    with tarfile.open(path, "a", format=kind) as archive:
        link = tarfile.TarInfo(f"{deep}link.jpg")
        link.type = tarfile.SYMTYPE
        link.linkname = "else"
        archive.addfile(link)
    assert samples_of(path) == [
        ("plain", {"jpg": b"z" * 500}),
        ("é", {"x.jpg": b"y"}),
        ("empty", {"json": b""}),
        (f"{deep}deep", {"jpg": b"zz"}),
    ]


def test_locate_groups_as_webdataset(tmp_path):
    # Other groups would give images the captions of their neighbours.
    names = ["a/one.JPG", "a/one.json", "b/one.seg.png", "b/one.png", "b/one.json"]
    names += [".hidden", "readme", "two.x.y"]
    path = tar_of(tmp_path / "x.tar", [(name, name.encode()) for name in names])
    assert samples_of(path) == [
        ("a/one", {"jpg": b"a/one.JPG", "json": b"a/one.json"}),
        ("b/one", {"seg.png": b"b/one.seg.png", "png": b"b/one.png", "json": b"b/one.json"}),
        ("two", {"x.y": b"two.x.y"}),
    ]


# Where a shard of 13 samples is damaged -> samples before it. Without the start of the seventh
# sample the sixth may lack members, so it is dropped as well.
DAMAGES = {
    "in an image": 6,
    "no end mark": 12,
    "zeroed header": 5,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_locate_in_a_torn_shard(tmp_path, shards, damage, monkeypatch):
    monkeypatch.setenv("SEED_INDEX_DIR", str(tmp_path / "index"))
    path = Path(shutil.copy(shards / "s-000.tar", tmp_path / "torn.tar"))
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        seventh = next(member for member in members if member.name == "00006.jpg")
        end = archive.offset
    data = bytearray(path.read_bytes())
    if damage == "zeroed header":
        data[seventh.offset_data - 512 : seventh.offset_data - 400] = b"\xff" * 112
    else:
        ends = {
            "in an image": seventh.offset_data + 100,
            "no end mark": end,
        }
        del data[ends[damage] :]
    path.write_bytes(data)

    n_samples = DAMAGES[damage]
    for _ in range(2):  # the second time by its stored index
        tar = TarFile(DataFile(path))
        assert tar.sizes == [n_samples + 1]
        assert tar.locate(4).key == "00004"
        kind, message = tar.locate(n_samples).problem or ("", "")
        assert kind == "damaged file"
        assert message.startswith(f"{path}: ")
        assert f"sample {n_samples - 1:05d}" in message


RECORDS = [
    ("a", {"webp": b"1", "json": b"{}"}),
    ("folder/b", {"txt": "größe".encode()}),
    ("é" * 20, {"json": b"[]"}),
    (f"{'d' * 90}/{'k' * 60}", {"json": b"{}" * 3000, "jpg": b"\0" * 700}),
    ("empty", {"txt": b"", "_odd.x": b"x"}),
]


def test_write_shard_is_read_back(tmp_path):
    # Also by webdataset, which other projects read with.
    path = tmp_path / "x.tar"
    assert write_shard(path, RECORDS) == len(RECORDS)
    assert samples_of(path) == RECORDS
    assert TarFile(DataFile(path)).locate(1).location == f"{path}: sample folder/b"
    # Without times and owners: equal records are equal files.
    names = [(f"{key}.{name}", data) for key, members in RECORDS for name, data in members.items()]
    assert path.read_bytes() == tar_of(tmp_path / "reference.tar", names).read_bytes()
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [key for key, _ in RECORDS]
    assert samples[0]["webp"] == b"1"
