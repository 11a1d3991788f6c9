"""Shards are written by webdataset's writer, byte for byte as `tarfile` writes them without times and owners."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import webdataset

from seed_multimodal.data.formats.record import Place
from seed_multimodal.data.formats.tar import OpenFiles, tar_records
from seed_multimodal.data.formats.writer import open_shard, write_shard

RECORDS = [("a", {"webp": b"1", "json": b"{}"}), ("folder/b", {"txt": "größe".encode()}), ("é" * 20, {"json": b"[]"}),
           (f"{'d' * 90}/{'k' * 60}", {"json": b"{}" * 3000, "jpg": b"\0" * 700}),
           ("empty", {"txt": b"", "_odd.x": b"x"})]


def as_tarfile(path: Path, records: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """The same shard by the standard library alone."""
    with open(path, "wb") as raw:
        packed = gzip.GzipFile("", "wb", 9, raw, mtime=0) if path.suffix == ".gz" else None
        with tarfile.open(fileobj=packed or raw, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for key, members in records:
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size, info.mode = len(data), 0o644
                    archive.addfile(info, io.BytesIO(data))
        if packed is not None:
            packed.close()


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_shards_are_written_as_tarfile_writes_them(tmp_path: Path, name: str) -> None:
    as_tarfile(tmp_path / f"reference-{name}", RECORDS)
    for folder in ("one", "two"):
        assert write_shard(tmp_path / folder / name, RECORDS) == len(RECORDS)
        assert (tmp_path / folder / name).read_bytes() == (tmp_path / f"reference-{name}").read_bytes()
        assert [path.name for path in (tmp_path / folder).iterdir()] == [name]


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_what_is_written_is_read_back(tmp_path: Path, name: str) -> None:
    write_shard(tmp_path / name, RECORDS)
    found = list(tar_records(tmp_path / name, unpack=True))
    files = OpenFiles()
    assert [(r.key, {e: r.member(e, files=files) for e in r.members}) for r in found] == RECORDS
    assert found[1].where == f"{tmp_path / name}: sample folder/b" and not found[1].problem
    assert isinstance(found[0].members["webp"], bytes if name.endswith("gz") else Place)  # only plain tars wait
    theirs = list(webdataset.WebDataset(str(tmp_path / name), shardshuffle=False))
    assert [one["__key__"] for one in theirs] == [key for key, _ in RECORDS] and theirs[0]["webp"] == b"1"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_a_shard_that_fails_leaves_nothing(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"what was there")

    def broken() -> Iterator[tuple[str, dict[str, bytes]]]:
        yield RECORDS[0]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_shard(path, broken())
    with pytest.raises(ValueError, match="name is too long"):
        write_shard(path, [("k" * 300, {"json": b"{}"})])
    with pytest.raises(OSError), open_shard(path / "y.tar"):
        pass
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [(name, b"what was there")]
