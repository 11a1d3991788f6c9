"""Files behind URLs, on a real S3 server on loopback and in fsspec's memory; the cached index."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data_files import jpeg
from torch.utils.data import DataLoader
from warm_python import PYTHON

from seed_multimodal.data.formats import index, open_files
from seed_multimodal.data.formats.index import INDEX_FOLDER
from seed_multimodal.data.formats.pairs import open_pairs
from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.data.formats.sources import open_records, write_indexes
from seed_multimodal.data.formats.tar import TarFile
from seed_multimodal.data.stream.pairs_dataset import PairDataset
from seed_multimodal.errors import DataError
from seed_multimodal.images.transforms import seed_image_processor

COUNT = 60


def text_of(index: int) -> dict[str, object]:
    return {"text": f"number {index}"}


def write_texts(path: Path, rows: Iterable[int] = range(COUNT)) -> None:
    """A tar of texts."""
    write_shard(path, [(f"k{n}", {"json": json.dumps(text_of(n)).encode()}) for n in rows])


def write_kinds(folder: Path) -> None:
    """The same texts in two tars, jsonl, json and parquet; tars with images; a list of images."""
    for part in range(2):
        rows = range(part * COUNT // 2, (part + 1) * COUNT // 2)
        write_texts(folder / f"tars/{part}.tar", rows)
        write_shard(
            folder / f"pairs/{part}.tar",
            [(f"k{n}", {"jpg": jpeg(n), "txt": f"number {n}".encode()}) for n in rows],
        )
    (folder / "a.jsonl").write_text("".join(json.dumps(text_of(n)) + "\n\n" for n in range(COUNT)))
    (folder / "a.json").write_text(json.dumps([text_of(n) for n in range(COUNT)], indent=1))
    (folder / "images.json").write_text(
        json.dumps([{"image": f"images/{n}.jpg", "caption": "a"} for n in range(2)])
    )
    (folder / "images").mkdir()
    (folder / "images/0.jpg").write_bytes(jpeg(0))
    table = pyarrow.table({"text": [f"number {n}" for n in range(COUNT)]})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=COUNT // 4)


class S3:
    """moto's S3 server in a second process, with one bucket."""

    url = "s3://data"

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-p", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + 60
        while time.monotonic() < end and self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError("moto's server did not start")

    def stop(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def s3(tmp_path, monkeypatch) -> Iterator[S3]:
    server = S3()
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "a"),
        ("AWS_SECRET_ACCESS_KEY", "b"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}"),
        ("AWS_MAX_ATTEMPTS", "1"),
        ("SEED_INDEX_DIR", str(tmp_path / "index")),
        ("SEED_CACHE_DIR", str(tmp_path / "copies")),
    ):
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    files = fsspec.filesystem("s3")
    files.retries = 1
    files.mkdir("data")
    (tmp_path / "here").mkdir()
    write_kinds(tmp_path / "here")
    files.put(str(tmp_path / "here") + "/", "data", recursive=True)
    yield server
    server.stop()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.process
def test_open_records_and_pairs_of_s3(s3: S3, tmp_path):
    expected = [text_of(index) for index in range(COUNT)]
    for name in ("tars", "tars/{0..1}.tar", "tars/*.tar", "a.jsonl", "a.json", "a.parquet"):
        for cache in (False, None):
            source = open_records(f"{s3.url}/{name}", cache=cache)
            assert [source.read(index).fields for index in range(COUNT)] == expected, name
        assert source.read(3).location.startswith("s3://data/")
    assert len(list((tmp_path / "index").iterdir())) == 3  # two tars and the jsonl
    copies = [
        file for file in (tmp_path / "copies").iterdir() if not file.name.startswith(".")
    ]  # without locks
    assert len(copies) == 4  # … and the table
    pairs = open_pairs({"files": f"{s3.url}/pairs/{{0..1}}.tar"})
    pairs.read(0)  # workers must not use the connection of this process
    captions = list(DataLoader(Captions(pairs), batch_size=None, num_workers=2))  # forked
    assert captions == [[f"number {index}"] for index in range(COUNT)]
    listed = open_pairs({"format": "json", "files": f"{s3.url}/images.json"})
    assert isinstance(listed.read(0).image, bytes)
    with pytest.raises(DataError, match=r"s3://data/images/1\.jpg: no such file"):
        listed.read(1)


class Captions:
    """Captions by index, for a DataLoader."""

    def __init__(self, pairs: object):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> list[str]:
        return self.pairs.read(index).captions  # type: ignore[attr-defined]


@pytest.mark.process
def test_get_after_s3_has_stopped(s3: S3, tmp_path, monkeypatch):
    """Without a connection samples are bad, and the local cache is still read."""
    from seed_multimodal.data.formats import storage

    monkeypatch.setattr(storage, "BLOCK_BYTES", 4096)
    reasons: list[str] = []
    pairs = open_pairs({"files": f"{s3.url}/pairs", "cache": False})
    data = PairDataset(
        pairs, seed_image_processor(16), None, log=reasons.append, max_bad_in_a_row=2
    )
    assert data.get(0)["caption"] == "number 0"
    cached = [
        open_records(f"{s3.url}/{name}", cache=str(tmp_path / "cache"))
        for name in ("tars", "a.parquet")
    ]
    assert [source.read(5).fields for source in cached] == [text_of(5)] * 2
    s3.stop()
    assert [source.read(6).fields for source in cached] == [text_of(6)] * 2
    with pytest.raises(DataError, match="2 consecutive samples") as error:
        data.get(COUNT - 3)
    assert len(reasons) == 2 and all(
        "s3://data/pairs/1.tar: cannot be read (" in text for text in reasons
    ), reasons
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"s3://data/tars: cannot be read"):
        len(open_records(f"{s3.url}/tars"))


@pytest.fixture
def memory(tmp_path, monkeypatch) -> Iterator[fsspec.AbstractFileSystem]:
    monkeypatch.setenv("SEED_INDEX_DIR", str(tmp_path / "index"))
    monkeypatch.setenv("SEED_CACHE_DIR", str(tmp_path / "copies"))
    files = fsspec.filesystem("memory")
    write_texts(tmp_path / "a.tar")
    files.put(str(tmp_path / "a.tar"), "/d/a.tar")
    yield files
    files.rm("/d", recursive=True)


def test_write_index_next_to_a_remote_shard(
    memory: fsspec.AbstractFileSystem, tmp_path, monkeypatch
):
    TarFile("memory://d/a.tar").write_index()
    assert memory.exists(f"/d/{INDEX_FOLDER}/a.tar.npz")
    monkeypatch.setattr(TarFile, "scan", lambda self: pytest.fail("the shard is read again"))
    source = open_records("memory://d/a.tar")
    assert (
        len(source) == COUNT
        and source.read(7).fields == text_of(7)
        and not (tmp_path / "index").exists()
    )


def test_read_of_remote_files_from_copies(
    memory: fsspec.AbstractFileSystem,
    tmp_path,
    monkeypatch,
    capsys,
):
    monkeypatch.setattr(open_files, "RESERVED_SHARE", 1.0)
    full = open_records("memory://d/a.tar")
    assert full.read(7).fields == text_of(7) and not list((tmp_path / "copies").glob("*.tar"))
    assert (
        capsys.readouterr().err.count(
            "is read by range requests, not copied (it would leave less than 100%"
        )
        == 1
    )
    monkeypatch.undo()
    monkeypatch.setenv("SEED_CACHE_DIR", str(tmp_path / "copies"))
    ranges = open_records("memory://d/a.tar", cache=False)
    copied = open_records("memory://d/a.tar")
    assert ranges.read(7).fields == copied.read(7).fields == text_of(7)
    assert len(list((tmp_path / "copies").glob("*.tar"))) == 1
    memory.pipe_file("/d/a.tar", b"")
    assert copied.read(8).fields == text_of(8)
    monkeypatch.setenv("SEED_CACHE_DIR", str(tmp_path / "a.tar"))  # a file
    memory.put(str(tmp_path / "a.tar"), "/d/a.tar")
    assert open_records("memory://d/a.tar").read(9).fields == text_of(9)
    assert "is read by range requests, not copied (" in capsys.readouterr().err


COPYING = """
import sys
from fsspec.implementations.local import LocalFileSystem
from seed_multimodal.data.formats.sources import open_records

get = LocalFileSystem.get_file
LocalFileSystem.get_file = lambda *given, **more: (print("copied", flush=True), get(*given, **more))
print(len({open_records(sys.argv[1]).read(number).key for number in range(60)}))
"""


@pytest.mark.process
def test_a_file_is_copied_once(tmp_path):
    write_texts(tmp_path / "a.tar")
    environment = {
        **os.environ,
        "SEED_CACHE_DIR": str(tmp_path / "copies"),
        "SEED_INDEX_DIR": str(tmp_path / "index"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    processes = [
        subprocess.Popen(
            [PYTHON, "-c", COPYING, f"file://{tmp_path}/a.tar"],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
        )
        for _ in range(3)
    ]
    lines = [process.communicate(timeout=100)[0].split() for process in processes]
    assert (
        sorted(line[-1] for line in lines) == ["60"] * 3
        and sum("copied" in line for line in lines) == 1
    )


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://d/none.tar", "no such file"),
        ("nosuch://d/a.tar", "nosuch"),
        ("memory://d/*.npy", "no file"),
    ],
)
def test_open_records_of_a_wrong_url(memory: fsspec.AbstractFileSystem, url, message):
    with pytest.raises(DataError, match=f"{url.replace('*', '.*')}: .*{message}"):
        len(open_records(url))


# ---- the index of local files


@pytest.fixture
def shard(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(index, "MIN_STORED_BYTES", 1)
    write_texts(tmp_path / "data/a.tar")
    (tmp_path / "data/b.jsonl").write_text(
        "".join(json.dumps(text_of(n)) + "\n" for n in range(COUNT))
    )
    return tmp_path / "data/a.tar"


def texts(path: Path) -> list[object]:
    source = open_records(path)
    return [source.read(index).fields["text"] for index in range(len(source))]


@pytest.mark.process
def test_write_indexes_of_a_folder(shard: Path, monkeypatch):
    monkeypatch.undo()  # small files, too
    assert write_indexes([shard, shard.with_name("b.jsonl")], processes=2) == 2
    monkeypatch.setattr(TarFile, "scan", lambda self: pytest.fail("scanned again"))
    assert len(texts(shard)) == COUNT


@pytest.mark.parametrize("index_dir", [False, True])
def test_index_is_written_once(shard: Path, index_dir, monkeypatch):
    folder = shard.parent / INDEX_FOLDER
    if index_dir:
        folder = shard.parent.parent / "index"
        monkeypatch.setenv("SEED_INDEX_DIR", str(folder))
    expected = [f"number {index}" for index in range(COUNT)]
    for file in (shard, shard.with_name("b.jsonl")):
        assert texts(file) == expected
        monkeypatch.setattr(
            type(open_records(file).record_files[0]),
            "scan",
            lambda self: pytest.fail("scanned again"),
        )
        assert texts(file) == expected
    assert len(list(folder.iterdir())) == 2 and (shard.parent / INDEX_FOLDER).exists() != index_dir


@pytest.mark.parametrize("change", ["shard", "torn", "name", "other"])
def test_index_of_another_file_is_replaced(shard: Path, change):
    assert len(texts(shard)) == COUNT
    stored = shard.parent / INDEX_FOLDER / "a.tar.npz"
    content = stored.read_bytes()
    if change == "shard":
        before = shard.stat()
        shard.write_bytes(shard.read_bytes().replace(b"number 7", b"number 8"))
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    else:
        damaged = {
            "torn": content[:-70],
            "name": content.replace(b"damage", b"dxmage"),  # zip has no checksum of names
            "other": b"not an index",
        }
        stored.write_bytes(damaged[change])
    assert texts(shard)[7] == ("number 8" if change == "shard" else "number 7")
    assert len(np.load(stored)["keys"]) == COUNT


def test_index_that_cannot_be_stored(shard: Path, capsys):
    (shard.parent / INDEX_FOLDER).write_text(
        "a file at the folder's path"
    )  # root may write anywhere else
    assert len(texts(shard)) == COUNT and "its index cannot be stored" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"a\.tar\.npz: cannot be written"):
        TarFile(shard).write_index()


INDEXING = """
import os, sys, time
from pathlib import Path
from seed_multimodal.data.formats.sources import open_records
from seed_multimodal.data.formats.tar import TarFile

scan = TarFile.scan
folder = Path(sys.argv[1])


def slow_scan(self):
    time.sleep(0.1)
    print("scanned", Path(self.path).name, flush=True)
    return scan(self)


TarFile.scan = slow_scan
records = open_records(folder)
(folder / f".{os.environ['RANK']}").touch()
while len(list(folder.glob(".[01]"))) < 2:
    time.sleep(0.01)
print(len(records), records.read(25).key)
"""


@pytest.mark.process
def test_ranks_share_the_indexing(tmp_path):
    """Two ranks start at the same time on 12 shards: each is scanned about once."""
    folder = tmp_path / "shards"
    for part in range(12):
        write_shard(
            folder / f"{part:02d}.tar",
            [(f"k{part}-{n}", {"json": json.dumps(text_of(n)).encode()}) for n in range(3)],
        )
    environment = {
        **os.environ,
        "SEED_INDEX_DIR": str(tmp_path / "index"),
        "WORLD_SIZE": "2",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    ranks = [
        subprocess.Popen(
            [PYTHON, "-c", INDEXING, str(folder)],
            env={**environment, "RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    lines = [rank.communicate(timeout=100)[0].splitlines() for rank in ranks]
    assert [line.pop() for line in lines] == ["36 k8-1"] * 2
    assert lines[0][0] == "scanned 00.tar" and lines[1][0] == "scanned 06.tar"
    assert len({*lines[0], *lines[1]}) == 12 and len(lines[0] + lines[1]) <= 15
