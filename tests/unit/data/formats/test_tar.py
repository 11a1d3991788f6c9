"""Shards: the index of their members, damaged files, and the writer."""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import webdataset

from seed_multimodal.data.formats import index
from seed_multimodal.data.formats.open_files import OpenFiles
from seed_multimodal.data.formats.record import BadRecord, ByteRange
from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.data.formats.sources import open_records
from seed_multimodal.data.formats.tar import TarFile
from seed_multimodal.errors import DataError


def tar_of(
    path: Path, members: Iterable[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT
) -> Path:
    with tarfile.open(path, "w", format=kind) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mode = 0o644
            archive.addfile(info, io.BytesIO(data))
    return path


def samples_of(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    """The samples of a tar, read by its index."""
    tar = TarFile(path)
    files = OpenFiles()
    records = [tar.locate(row) for row in range(tar.sizes[0])]
    return [
        (record.key, {name: record.member(name, files=files) or b"" for name in record.members})
        for record in records
    ]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_scan_tar_of_every_format(tmp_path, kind):
    """Long names, links, empty members and non-ASCII names."""
    deep = "folder-of-some-length/" * (6 if kind == tarfile.USTAR_FORMAT else 20)
    path = tar_of(
        tmp_path / "x.tar",
        [
            ("plain.jpg", b"z" * 500),
            ("é.x.jpg", b"z"),
            ("empty.json", b""),
            (f"{deep}deep.jpg", b"zz"),
        ],
        kind,
    )
    with tarfile.open(path, "a", format=kind) as archive:
        link = tarfile.TarInfo(f"{deep}link.jpg")
        link.type = tarfile.SYMTYPE
        link.linkname = "else"
        archive.addfile(link)
    with tarfile.open(path) as archive:
        expected = [(m.offset_data, m.size) for m in archive if m.isreg()]
    members = TarFile(path).scan()
    assert list(zip(members["offset"], members["size"], strict=True)) == expected and not str(
        members["damage"]
    )
    assert [key.decode() for key in members["keys"]] == ["plain", "é", "empty", f"{deep}deep"]


def test_locate_groups_as_webdataset(tmp_path):
    names = [
        "a/one.JPG",
        "a/one.json",
        "b/one.seg.png",
        "b/one.png",
        "b/one.json",
        ".hidden",
        "readme",
        "two.x.y",
    ]
    path = tar_of(tmp_path / "x.tar", [(name, name.encode()) for name in names])
    assert samples_of(path) == [
        ("a/one", {"jpg": b"a/one.JPG", "json": b"a/one.json"}),
        ("b/one", {"seg.png": b"b/one.seg.png", "png": b"b/one.png", "json": b"b/one.json"}),
        ("two", {"x.y": b"two.x.y"}),
    ]


@pytest.mark.parametrize(
    "cut", ["in an image", "in a header", "between samples", "no end mark", "zeroed header"]
)
def test_locate_in_a_torn_shard(tmp_path, shards: Path, cut, monkeypatch):
    monkeypatch.setattr(index, "MIN_STORED_BYTES", 1)
    path = Path(shutil.copy(shards / "s-000.tar", tmp_path / "torn.tar"))
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        seventh = next(m for m in members if m.name == "00006.jpg")
        end = archive.offset
    data = bytearray(path.read_bytes())
    if cut == "zeroed header":
        data[seventh.offset_data - 512 : seventh.offset_data - 400] = b"\xff" * 112
    else:
        del data[
            {
                "in an image": seventh.offset_data + 100,
                "in a header": seventh.offset + 100,
                "between samples": seventh.offset,
                "no end mark": end,
            }[cut] :
        ]
    path.write_bytes(data)
    # Without the start of the seventh sample the sixth may lack members, so it is dropped as well.
    samples = {"in an image": 6, "no end mark": 12}.get(cut, 5)
    for _ in range(2):  # the second time by its cached index
        tar = TarFile(path)
        assert tar.sizes == [samples + 1] and tar.locate(4).key == "00004"
        torn = tar.locate(samples)
        assert torn.problem is not None and torn.problem[0] == "damaged file"
        assert torn.problem[1].startswith(
            f"{path}: torn or damaged after sample {samples - 1:05d} ("
        )


def test_read_of_other_files(tmp_path, shards: Path):
    packed = gzip.compress((shards / "s-001.tar").read_bytes())
    for name, content in (("text.tar", b"not a tar " * 200), ("empty.tar", b""), ("x.tar", packed)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: torn or damaged in its first sample"):
            open_records(tmp_path / name).read(0)
    with pytest.raises(DataError, match=r"none\.tar: contains no record"):
        len(open_records(tar_of(tmp_path / "none.tar", [])))
    write_shard(tmp_path / "old.tar", [("k1", {"json": b"{}"}), ("k2", {"pkl": b"\x80\x04}."})])
    with pytest.raises(
        DataError, match=r"old\.tar: sample k2 is a pickle.*seed data convert .*old\.tar --out"
    ):
        open_records(tmp_path / "old.tar").read(1)
    write_shard(tmp_path / "mixed.tar", [("k1", {"json": b"{}"}), ("k2", {"jpg": b"x"})])
    with pytest.raises(BadRecord, match=r"mixed\.tar: sample k2: has no \.json member"):
        open_records(tmp_path / "mixed.tar").read(1)


RECORDS = [
    ("a", {"webp": b"1", "json": b"{}"}),
    ("folder/b", {"txt": "größe".encode()}),
    ("é" * 20, {"json": b"[]"}),
    (f"{'d' * 90}/{'k' * 60}", {"json": b"{}" * 3000, "jpg": b"\0" * 700}),
    ("empty", {"txt": b"", "_odd.x": b"x"}),
]


def test_write_shard_is_read_back(tmp_path):
    reference = tar_of(
        tmp_path / "reference.tar",
        [
            (f"{key}.{extension}", data)
            for key, members in RECORDS
            for extension, data in members.items()
        ],
    )
    assert write_shard(tmp_path / "x.tar", RECORDS) == len(RECORDS)
    assert samples_of(tmp_path / "x.tar") == RECORDS
    assert (tmp_path / "x.tar").read_bytes() == reference.read_bytes(), "without times and owners"
    record = TarFile(tmp_path / "x.tar").locate(1)
    assert record.location == f"{tmp_path}/x.tar: sample folder/b" and isinstance(
        record.members["txt"], ByteRange
    )
    samples = list(webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [key for key, _ in RECORDS] and samples[0][
        "webp"
    ] == b"1"
