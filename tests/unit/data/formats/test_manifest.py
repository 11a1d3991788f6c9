"""The manifest of a folder with many files: few calls, and every change is noticed."""

import builtins
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data_files import fields_of, lines
from fsspec.implementations.memory import MemoryFileSystem
from warm_processes import PYTHON

from seed_multimodal.cli.main import main
from seed_multimodal.data.formats import index, manifest
from seed_multimodal.data.formats.index import INDEX_FOLDER
from seed_multimodal.data.formats.records import open_records
from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.errors import ReadError
from seed_multimodal.training.agreement import _file_sizes

COUNT = 300
STORED = f"{INDEX_FOLDER}/.manifest.npz"


def write_tar(path, n_records: int, text: str = "a"):
    write_shard(
        path, [(f"k{n}", {"json": json.dumps({"text": text}).encode()}) for n in range(n_records)]
    )


@pytest.fixture
def shards(tmp_path) -> Path:
    """A folder of `COUNT` shards of two records each, and its manifest."""
    folder = tmp_path / "shards"
    write_tar(folder / "000.tar", 2)
    for n in range(1, COUNT):
        os.link(folder / "000.tar", folder / f"{n:03d}.tar")
    assert len(open_records(folder)) == 2 * COUNT
    assert (folder / STORED).exists()
    return folder


def replace(folder: Path, name: str, n_records: int):
    write_tar(folder.parent / "new.tar", n_records)
    os.replace(folder.parent / "new.tar", folder / name)


@pytest.fixture
def calls(monkeypatch) -> Counter[str]:
    """Paths that the file system is asked for, and how often."""
    counter: Counter[str] = Counter()

    def count(module, name):
        original = getattr(module, name)

        def counted(path, *arguments, **options):
            counter[str(path)] += 1
            return original(path, *arguments, **options)

        monkeypatch.setattr(module, name, counted)

    for name in ("stat", "lstat", "open", "scandir", "listdir"):
        count(os, name)
    count(builtins, "open")
    return counter


WAYS: dict[str, Callable[[Path], object]] = {
    "folder": lambda folder: folder,
    "wildcard": lambda folder: folder / "*.tar",
    "braces": lambda folder: f"{folder}/{{000..{COUNT - 1}}}.tar",
    "list": lambda folder: [f"{folder}/{n:03d}.tar" for n in range(COUNT)],
}


@pytest.mark.parametrize("way", WAYS)
def test_start_asks_for_no_shard(shards, calls, way):
    # Else 1,000 processes with 100,000 shards ask a file system 500 million times.
    files = WAYS[way](shards)
    assert len(open_records(files)) == 2 * COUNT
    if way != "list":  # of patterns, which configurations have
        assert len(dict(_file_sizes({"files": str(files)}, shards.parent / "out"))) == COUNT
    assert sum(count for path, count in calls.items() if path.startswith(str(shards))) <= 30
    assert calls[str(shards / "007.tar")] == 0


CHANGES: dict[str, tuple[Callable[[Path], object], int]] = {
    "added": (lambda folder: write_tar(folder / "x.tar", 5), 5),
    "removed": (lambda folder: (folder / "007.tar").unlink(), -2),
    "replaced": (lambda folder: replace(folder, "007.tar", 6), 4),
    "renamed": (lambda folder: (folder / "007.tar").rename(folder / "x.tar"), 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_folder_is_counted_again(shards, change):
    alter, difference = CHANGES[change]
    alter(shards)
    for _ in range(2):  # also by the new manifest
        records = open_records(shards)
        assert len(fields_of(records)) == len(records) == 2 * COUNT + difference


def test_parquet_files_are_counted_once(tmp_path, calls):
    table = pyarrow.Table.from_pylist([{"text": "a"}] * 3)
    pyarrow.parquet.write_table(table, tmp_path / "000.parquet")
    for n in range(1, COUNT):
        os.link(tmp_path / "000.parquet", tmp_path / f"{n:03d}.parquet")
    assert len(open_records(tmp_path)) == 3 * COUNT
    records = open_records(tmp_path)
    assert len(records) == 3 * COUNT
    assert not any("_ends" in vars(file) for file in records.record_files)
    assert records.read(4).fields == {"text": "a"}
    pyarrow.parquet.write_table(table.slice(1), tmp_path / "000.parquet")
    with pytest.raises(ReadError, match=r"002\.parquet: changed"):
        records.read(7)


def test_shard_removed_in_use_ends_the_run(shards, monkeypatch):
    # As a shard that was indexed: it is no bad record, which would be skipped.
    monkeypatch.setenv("SEED_READ_PAUSES", "")
    records = open_records(shards)
    assert len(records) == 2 * COUNT
    (shards / "007.tar").unlink()
    with pytest.raises(ReadError, match="was there before"):
        records.read(14)


@pytest.mark.parametrize("n_records", [2, 6])
def test_shard_rewritten_in_place_stops_the_run_that_reads_it(shards, n_records):
    # The folder's time is as before: nothing else may read parts of other records.
    replace(shards, "007.tar", 2)
    assert len(open_records(shards)) == 2 * COUNT
    write_tar(shards.parent / "new.tar", n_records, "another text")
    (shards / "007.tar").write_bytes((shards.parent / "new.tar").read_bytes())
    records = open_records(shards)
    with pytest.raises(ReadError, match=r"007\.tar: changed .* start again"):
        records.read(14)
    assert len(fields_of(open_records(shards))) == 2 * COUNT - 2 + n_records


def test_folder_with_another_new_file_is_compared_once(shards, calls):
    # Else a log in the folder makes all later starts slow.
    (shards / "log.txt").touch()
    for n_calls in (COUNT, 0):
        calls.clear()
        assert len(open_records(shards)) == 2 * COUNT
        assert sum(count for path, count in calls.items() if path.endswith(".tar")) == n_calls


def rows_of(*changes: tuple) -> Callable[[Path], None]:
    """Write a manifest with these rows."""

    def write(path: Path):
        with np.load(path) as stored:
            arrays = dict(stored)
        rows = [*arrays["files"].tolist()[len(changes) :], *changes]
        np.savez(path, **(arrays | {"files": np.rec.fromrecords(rows)}))

    return write


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, 500),
    "json": lambda path: path.write_text('{"files": [["000.tar", -1]]}'),
    "negative": rows_of((b"000.tar", 10, b"1", -2)),
    "outside": rows_of((b"../000.tar", 10, b"1", 7), (b"/etc/passwd", 1, b"1", 1)),
    "columns": rows_of(*[(b"000.tar", 10)] * COUNT),
    "no number": rows_of((b"000.tar", 10, b"1", b"2")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_manifest_is_replaced(shards, damage):
    DAMAGES[damage](shards / STORED)
    assert len(fields_of(open_records(shards))) == 2 * COUNT
    assert len(manifest.read(shards.glob("*.tar"))) == COUNT


def test_manifest_that_cannot_be_stored(shards, capsys, monkeypatch, tmp_path):
    # Root may write anywhere, but not below a file.
    (shards / STORED).unlink()
    (shards / INDEX_FOLDER).rmdir()
    (shards / INDEX_FOLDER).write_text("a file at the folder's path")
    assert len(open_records(shards)) == 2 * COUNT
    assert "set SEED_INDEX_DIR" in capsys.readouterr().err
    monkeypatch.setenv("SEED_INDEX_DIR", str(tmp_path / "index"))
    assert len(open_records(shards)) == 2 * COUNT
    assert len(manifest.read(shards.glob("*.tar"))) == COUNT


@pytest.mark.process
def test_two_processes_write_the_manifest(shards):
    (shards / STORED).unlink()
    code = (
        "import sys; from seed_multimodal.data.formats.records import open_records; "
        "assert len(open_records(sys.argv[1])) == int(sys.argv[2])"
    )
    command = [PYTHON, "-c", code, str(shards), str(2 * COUNT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert len(manifest.read(shards.glob("*.tar"))) == COUNT
    assert [path.name for path in (shards / INDEX_FOLDER).iterdir()] == [".manifest.npz"]


def test_data_index_writes_the_manifest(shards, calls):
    (shards / STORED).unlink()
    assert main(["data", "index", str(shards), "--procs", "1"]) == 0
    assert len(manifest.read(shards.glob("*.tar"))) == COUNT


def test_indexes_read_last_are_kept(tmp_path, monkeypatch):
    # Else each process keeps the offsets of a billion records.
    monkeypatch.setenv("SEED_INDEX_DIR", str(tmp_path / "index"))
    monkeypatch.setattr(index, "CACHED_BYTES", 5_000)
    for n in range(20):
        lines(tmp_path / f"{n:02d}.jsonl", [{"text": f"{n} {row}"} for row in range(50)])
    records = open_records(tmp_path / "*.jsonl")
    expected = [{"text": f"{n} {row}"} for n in range(20) for row in range(50)]
    assert fields_of(records) == expected
    assert [records.read(i).fields for i in range(999, 0, -37)] == expected[:0:-37]
    n_kept = sum(file._arrays is not None for file in records.record_files)
    assert 1 <= n_kept <= 4


def test_remote_folder_is_one_listing(tmp_path, monkeypatch):
    # Else each process asks an object store once for each shard.
    monkeypatch.setenv("SEED_INDEX_DIR", str(tmp_path / "index"))
    files = fsspec.filesystem("memory")
    for n in range(COUNT):
        files.pipe(f"/many/{n:03d}.jsonl", b'{"a": 1}\n' * 2)
    name = f"memory://many/{{000..{COUNT - 1}}}.jsonl"
    assert len(open_records(name, cache=False)) == 2 * COUNT
    asked: list[str] = []
    info = MemoryFileSystem.info
    monkeypatch.setattr(
        MemoryFileSystem, "info", lambda self, path: asked.append(path) or info(self, path)
    )
    assert len(open_records(name, cache=False)) == 2 * COUNT
    assert not asked
    files.pipe("/many/007.jsonl", b'{"a": 1}\n' * 5)
    assert len(open_records(name, cache=False)) == 2 * COUNT + 3
