"""Files behind URLs, on a real S3 server on loopback and in fsspec's memory; the stored index."""

import errno
import functools
import http.server
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data_files import fields_of, jpeg, lines
from fsspec.implementations.local import LocalFileSystem
from real_processes import free_port, run_checked
from tiny import write_json
from waiting import wait_until

from seed_multimodal.cli.main import main
from seed_multimodal.data.formats.images import find_image
from seed_multimodal.data.formats.index import INDEX_FOLDER
from seed_multimodal.data.formats.pairs import open_pairs
from seed_multimodal.data.formats.records import open_records
from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.data.formats.storage import REMOTE_FILES, DataFile, list_files, local_copy
from seed_multimodal.data.formats.tar import TarFile
from seed_multimodal.data.stream.loader import load
from seed_multimodal.data.stream.pairs_dataset import PairDataset
from seed_multimodal.errors import DataError, ReadError
from seed_multimodal.images.transforms import seed_image_processor

COUNT = 60
TEXTS = [{"text": f"number {n}"} for n in range(COUNT)]
# Names of the same records; the tars are two files.
NAMES = ("tars", "tars/{0..1}.tar", "a.jsonl", "a.json", "a.parquet")


def write_texts(path, texts: Iterable = TEXTS) -> Path:
    """A tar of texts; its keys are k0, k1 …"""
    samples = [(f"k{n}", {"json": json.dumps(text).encode()}) for n, text in enumerate(texts)]
    write_shard(path, samples)
    return path


def write_formats(folder):
    """The texts in two tars, jsonl, json and parquet; a tar and a list of images."""
    write_texts(folder / "tars/0.tar", TEXTS[:20])
    write_texts(folder / "tars/1.tar", TEXTS[20:])
    lines(folder / "a.jsonl", TEXTS)
    (folder / "a.json").write_text(json.dumps(TEXTS, indent=1))
    table = pyarrow.Table.from_pylist(TEXTS)
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=7)
    for part in range(2):
        samples = [(f"k{n}", {"jpg": jpeg(n), "txt": b"a fox"}) for n in range(8)]
        write_shard(folder / f"pairs/{part}.tar", samples)
    images = [{"image": f"{n}.jpg", "caption": "a"} for n in range(2)]
    write_json(folder / "images.json", images)
    (folder / "0.jpg").write_bytes(jpeg(0))


def fields(name, **options) -> list:
    return fields_of(open_records(name, **options))


# ---- a real server


@pytest.fixture
def s3(tmp_path, monkeypatch) -> Iterator[subprocess.Popen]:
    """moto's S3 server in a second process, with the bucket `data` of all formats."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "a"),
        ("AWS_SECRET_ACCESS_KEY", "b"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}"),
        ("AWS_MAX_ATTEMPTS", "1"),
        ("SEED_INDEX_DIR", str(tmp_path / "index")),
        ("SEED_CACHE_DIR", str(tmp_path / "copies")),
    ):
        monkeypatch.setenv(name, value)
    wait_until(lambda: not socket.socket().connect_ex(("127.0.0.1", port)), 60)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    files = fsspec.filesystem("s3")
    files.retries = 1
    files.mkdir("data")
    write_formats(tmp_path / "local")
    files.put(f"{tmp_path}/local/", "data", recursive=True)
    yield server
    server.kill()
    server.wait()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.slow
@pytest.mark.process
def test_read_of_s3_until_the_connection_is_lost(s3, monkeypatch):
    for name in ("tars", "a.parquet"):
        assert fields(f"s3://data/{name}", cache=False) == TEXTS
    cached = open_records("s3://data/tars")
    assert cached.read(5).fields == TEXTS[5]
    assert cached.read(5).location.startswith("s3://data/tars/0.tar")

    # Forked data workers must not use the connection of this process.
    pairs = open_pairs({"files": "s3://data/pairs", "cache": False})
    assert pairs.read(0).captions == ["a fox"]
    captions = list(load(lambda index: pairs.read(index).captions, range(16), workers=2))
    assert captions == [["a fox"]] * 16

    # Images next to a list.
    listed = open_pairs({"files": "s3://data/images.json"})
    assert listed.read(0).image == jpeg(0)
    with pytest.raises(DataError, match=r"s3://data/1\.jpg"):
        listed.read(1)

    # Without a connection the run ends, and copies are still read.
    s3.kill()
    s3.wait()
    monkeypatch.setenv("SEED_READ_PAUSES", "0")
    assert cached.read(6).fields == TEXTS[6]
    data = PairDataset(pairs, seed_image_processor(16))
    with pytest.raises(ReadError, match="s3://data/pairs/1.tar"):
        data.get(10)
    with pytest.raises(ReadError, match="s3://data/tars"):
        len(open_records("s3://data/tars"))


# ---- faults of the machine


class FaultyFiles(LocalFileSystem):
    """Local files as `faulty://`; the first `n_faults` reads of all files raise `fault`."""

    protocol = "faulty"
    fault: Exception
    n_faults = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("faulty://"))

    def open(self, *arguments, **options):
        if FaultyFiles.n_faults:
            FaultyFiles.n_faults -= 1
            raise FaultyFiles.fault
        return super().open(*arguments, **options)


class Answer(Exception):
    """A client's error with an HTTP status."""

    def __init__(self, status: int):
        super().__init__(f"answer {status}")
        self.status = status


@pytest.mark.parametrize(
    "fault, is_of_machine",
    [
        *[(OSError(code, "x"), True) for code in (errno.EMFILE, errno.EIO, errno.ESTALE)],
        *[(Answer(status), True) for status in (408, 429, 503)],
        (TimeoutError(), True),
        (ConnectionResetError(), True),
        (RuntimeError("Session is closed"), True),
        (Answer(403), False),
        (FileNotFoundError(errno.ENOENT, "x"), True),  # it was there before
        (PermissionError(errno.EACCES, "x"), False),
    ],
)
def test_faults_of_the_machine_are_not_those_of_records(
    tmp_path, monkeypatch, fault, is_of_machine
):
    # Else valid records are skipped without a word, and other ones by a resumed run.
    fsspec.register_implementation("faulty", FaultyFiles, clobber=True)
    monkeypatch.setenv("SEED_READ_PAUSES", "0 0")
    monkeypatch.setenv("SEED_INDEX_DIR", str(tmp_path / "index"))
    url = f"faulty://{write_texts(tmp_path / 'a.tar')}"
    source = open_records(url, cache=False)
    len(source)
    FaultyFiles.fault = fault
    FaultyFiles.n_faults = 2
    if is_of_machine:
        assert source.read(3).fields == TEXTS[3]
        REMOTE_FILES.close_oldest(0)
        FaultyFiles.n_faults = 3
    with pytest.raises(ReadError if is_of_machine else DataError, match=url):
        source.read(4)
    FaultyFiles.n_faults = 0


class ThrottledFolder(http.server.SimpleHTTPRequestHandler):
    """Files with ranges; `status` answers 30 % of the requests, HEAD as well as GET."""

    status = 503
    rng = random.Random(0)

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file() or self.rng.random() < 0.3:
            self.send_error(self.status if path.is_file() else 404)
            return
        content = path.read_bytes()
        first, last = 0, len(content) - 1
        if "Range" in self.headers:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        else:
            self.send_response(200)
        part = content[first : last + 1]
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part)

    do_HEAD = do_GET

    def log_message(self, *arguments) -> None:
        pass


@pytest.mark.parametrize("status", [503, 429, 408])
@pytest.mark.parametrize("cache", [None, False])
def test_read_of_a_busy_http_server(tmp_path, monkeypatch, status, cache):
    # A throttled HEAD is called a missing file by fsspec: records were lost without a word.
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("SEED_READ_PAUSES", "0 " * 9)
    monkeypatch.setenv("SEED_INDEX_DIR", str(tmp_path / "index"))
    monkeypatch.setenv("SEED_CACHE_DIR", str(tmp_path / "copies"))
    monkeypatch.setattr(ThrottledFolder, "status", status)
    write_formats(tmp_path / "d")
    handler = functools.partial(ThrottledFolder, directory=str(tmp_path / "d"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for name in ("tars/0.tar", "a.jsonl", "a.parquet"):
            source = open_records(f"{url}/{name}", cache=cache)
            assert len(source) >= 20
            for index in range(20):
                REMOTE_FILES.close_oldest(0)  # as after a failed read
                assert source.read(index).fields == TEXTS[index]
        with pytest.raises(DataError, match="no such file"):
            len(open_records(f"{url}/gone.jsonl", cache=cache))
        server.shutdown()


@pytest.mark.parametrize("call", ["scandir", "stat"])
def test_faults_of_the_machine_hide_no_file(tmp_path, monkeypatch, call):
    # Else a folder or a listed image is missed without a word.
    monkeypatch.setenv("SEED_READ_PAUSES", "")
    image = tmp_path / "set/images/0.jpg"
    image.parent.mkdir(parents=True)
    image.write_bytes(jpeg(0))
    original = getattr(os, call)

    def faulty(path, *arguments, **options):
        if "images" in str(path):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, call, faulty)
    with pytest.raises(ReadError, match="Input/output error"):
        find_image("0.jpg", image.parent) if call == "stat" else list_files(tmp_path)


MANY_FILES = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[2])))
from seed_multimodal.data.formats.records import open_records
sources = [open_records(f"{sys.argv[1]}/*.{kind}") for kind in ("tar", "jsonl", "parquet")]
for index in range(len(sources[0])):
    for source in sources:
        source.read(index)
spare = [os.open(sys.argv[1], os.O_RDONLY) for _ in range(25)]
for source in sources:
    source.read(0)
"""


@pytest.mark.process
@pytest.mark.parametrize("hard", [64, 4096])
def test_reads_of_more_files_than_the_system_opens(tmp_path, hard):
    # Three sources share the limit, and give way to other files.
    for part in range(60):
        texts = TEXTS[:2]
        lines(tmp_path / f"{part}.jsonl", texts)
        write_texts(tmp_path / f"{part}.tar", texts)
        table = pyarrow.Table.from_pylist(texts)
        pyarrow.parquet.write_table(table, tmp_path / f"{part}.parquet")
    run_checked(
        [sys.executable, "-c", MANY_FILES, str(tmp_path), str(hard)],
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "SEED_READ_PAUSES": "0"},
    )


# ---- copies


@pytest.fixture
def memory(tmp_path, monkeypatch) -> Iterator[fsspec.AbstractFileSystem]:
    """fsspec's memory with the folder `d` of all formats."""
    monkeypatch.setenv("SEED_INDEX_DIR", str(tmp_path / "index"))
    monkeypatch.setenv("SEED_CACHE_DIR", str(tmp_path / "copies"))
    files = fsspec.filesystem("memory")
    write_formats(tmp_path / "local")
    files.put(f"{tmp_path}/local/", "/d", recursive=True)
    yield files
    files.rm("/d", recursive=True)


def copies(folder) -> list[Path]:
    """The copied files, without locks."""
    return [path for path in folder.glob("*") if not path.name.startswith(".")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cache", [None, False])
def test_read_of_remote_files(memory, tmp_path, name, cache):
    before = memory.find("/d")
    assert fields(f"memory://d/{name}", cache=cache) == TEXTS
    # Lists are read whole; nothing is written next to the remote files.
    n_files = 0 if cache is False or name == "a.json" else 2 if "tar" in name else 1
    assert len(copies(tmp_path / "copies")) == n_files
    assert memory.find("/d") == before


def test_read_of_a_copy_of_a_changed_file(memory):
    copied = open_records("memory://d/tars/0.tar")
    assert copied.read(7).fields == TEXTS[7]
    # This run goes on with its copy; the next one reads the new version.
    memory.pipe_file("/d/tars/0.tar", memory.cat_file("/d/tars/1.tar"))
    assert copied.read(8).fields == TEXTS[8]
    assert fields("memory://d/tars/0.tar") == TEXTS[20:]


@pytest.mark.parametrize("problem", ["no space", "no folder"])
def test_read_without_a_copy(memory, tmp_path, monkeypatch, capsys, problem):
    if problem == "no space":
        monkeypatch.setattr("seed_multimodal.data.formats.storage.RESERVED_SHARE", 1.0)
    else:
        (tmp_path / "copies").write_text("a file at the folder's path")
    assert fields("memory://d/tars/0.tar") == TEXTS[:20]
    assert copies(tmp_path / "copies") == []
    # Slower reads are named, once for each file.
    assert capsys.readouterr().err.count("memory://d/tars/0.tar") == 1


class CountedFiles(LocalFileSystem):
    """Local files as `counted://`; each download is a line of FILE.log."""

    protocol = "counted"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("counted://"))

    def get_file(self, rpath: str, lpath: str, **options):
        with open(f"{rpath}.log", "a") as log:
            log.write("copied\n")
        time.sleep(0.2)  # the other processes wait
        super().get_file(rpath, lpath, **options)


@pytest.mark.process
def test_local_copy_is_made_once(tmp_path):
    # Else all workers of a machine download each shard.
    fsspec.register_implementation("counted", CountedFiles, clobber=True)
    path = write_texts(tmp_path / "a.tar")
    arguments = [(f"counted://{path}", str(tmp_path / "copies"))] * 3
    with multiprocessing.get_context("fork").Pool(3) as pool:
        names = pool.starmap(local_copy, arguments, chunksize=1)
    assert len(set(names)) == 1
    assert Path(names[0]).read_bytes() == path.read_bytes()
    assert Path(f"{path}.log").read_text() == "copied\n"


# ---- the index


@pytest.fixture
def large(tmp_path) -> Path:
    """Folder with a.tar and b.jsonl, large enough for an index next to them."""
    texts = [text | {"padding": "x" * 20_000} for text in TEXTS]
    write_texts(tmp_path / "data/a.tar", texts)
    lines(tmp_path / "data/b.jsonl", texts)
    return tmp_path / "data"


def overwrite(path):
    """Zeros in a file of the same size and time: only its index knows its records."""
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("index_dir", [False, True])
def test_index_is_written_once(large, index_dir, monkeypatch):
    # Else each start of a run scans terabytes.
    folder = large / INDEX_FOLDER
    if index_dir:
        folder = large.parent / "index"
        monkeypatch.setenv("SEED_INDEX_DIR", str(folder))
    for name in ("a.tar", "b.jsonl"):
        assert len(open_records(large / name)) == COUNT
        overwrite(large / name)
        assert len(open_records(large / name)) == COUNT
    assert len(list(folder.iterdir())) == 2
    assert (large / INDEX_FOLDER).exists() != index_dir


@pytest.mark.process
def test_data_index_of_small_files(tmp_path):
    write_formats(tmp_path)
    paths = [tmp_path / name for name in ("tars/0.tar", "tars/1.tar", "a.jsonl")]
    assert main(["data", "index", *map(str, paths), "--procs", "2"]) == 0
    for path in paths:
        overwrite(path)
    assert len(open_records(paths)) == 2 * COUNT


@pytest.mark.parametrize("change", ["shard", "torn", "no index"])
def test_index_of_another_file_is_replaced(large, change):
    # A stale index would read parts of other samples.
    path = large / "a.tar"
    assert len(open_records(path)) == COUNT
    stored = large / INDEX_FOLDER / "a.tar.npz"
    content = stored.read_bytes()
    if change == "shard":
        modified = path.stat().st_mtime_ns
        path.write_bytes(path.read_bytes().replace(b"number 7", b"number 8"))
        os.utime(path, ns=(modified, modified + 1))
    else:
        stored.write_bytes(content[:-70] if change == "torn" else b"not an index")
    text = "number 8" if change == "shard" else "number 7"
    assert open_records(path).read(7).fields["text"] == text
    assert len(np.load(stored)["keys"]) == COUNT


def test_index_that_cannot_be_stored(large, capsys):
    # Reading goes on, slower; `seed data index` fails.
    # Root may write anywhere, but not below a file.
    (large / INDEX_FOLDER).write_text("a file at the folder's path")
    path = large / "a.tar"
    assert len(open_records(path)) == COUNT
    assert str(path) in capsys.readouterr().err
    with pytest.raises(DataError, match=r"a\.tar\.npz"):
        TarFile(DataFile(path)).write_index()


@pytest.mark.parametrize("rank, first", [("0", "0.tar"), ("1", "2.tar")])
def test_ranks_begin_to_index_at_different_shards(tmp_path, monkeypatch, capsys, rank, first):
    # Each uses what the others have stored by then, so that a run starts N times faster.
    for part in range(4):
        write_texts(tmp_path / f"{part}.tar", TEXTS[:3])
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    # Indexes that cannot be stored are named, in the order of the scans.
    monkeypatch.setenv("SEED_INDEX_DIR", f"{tmp_path}/0.tar/index")
    assert len(open_records(tmp_path)) == 12
    assert f"{tmp_path}/{first}" in capsys.readouterr().err.splitlines()[0]
