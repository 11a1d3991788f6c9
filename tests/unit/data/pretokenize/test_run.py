"""Runs of the extraction tools: shares, restarts, errors; tars of JPEGs, the nano tokenizer."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
from pathlib import Path

import psutil
import pytest
from data_files import jpeg
from real_processes import (
    STARTED,
    nothing_stays_behind,  # noqa: F401
    processes_with,
    run_checked,
    wait_until,
)
from repository import APPLICATION, NANO
from tiny import read_json, write_json
from warm_processes import PYTHON

from seed_multimodal.data.formats import manifest
from seed_multimodal.data.formats.records import open_records
from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.data.formats.storage import filesystem
from seed_multimodal.disk import try_lock
from seed_multimodal.errors import DataError, SeedError
from seed_multimodal.pretokenize.run import RunSettings, run

SHARDS = 8
SIZE = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    """Eight tars of 12 images.

    In the fourth, one image is cut off, one is no image and one has no text.
    """
    folder = tmp_path_factory.mktemp("in")
    for shard in range(SHARDS):
        samples = []
        for n in range(shard * SIZE, (shard + 1) * SIZE):
            members = {"jpg": jpeg(n), "txt": f"image {n}".encode()}
            if n == 3 * SIZE + 5:
                members["jpg"] = members["jpg"][:-400]
            elif n == 3 * SIZE + 6:
                members["jpg"] = b"not an image"
            elif n == 3 * SIZE + 9:
                del members["txt"]
            samples.append((f"{n:05d}", members))
        write_shard(folder / f"s-{shard:03d}.tar", samples)
    (folder / "data.yaml").write_text(f"files: {folder}\n")
    return {"files": str(folder)}


@pytest.fixture(scope="module")
def start(data):
    """`start(save_dir, **settings)`: run in this process."""

    def run_it(save_dir, **settings) -> int:
        return run(
            RunSettings(
                **{  # type: ignore[arg-type]
                    "kind": "caption",
                    "data": data,
                    "save_dir": str(save_dir),
                    "workers": 0,
                    "batch_size": 10,
                    "tokenizer": str(APPLICATION / "configs" / "tokenizer" / "nano.yaml"),
                    "device": "cpu",
                    **settings,
                }
            )
        )

    return run_it


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, start) -> Path:
    """Output of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder) == 0
    return folder


def content(folder) -> dict[str, bytes]:
    """Every file of an output folder, but for a hidden one that a kill left while counts were
    written.
    """
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".counts.json." not in path.name
    }


def test_run_of_tars(finished_run):
    # A tar of records for each tar of images, named alike, and the index in it as key.
    assert sorted(path.stem for path in finished_run.glob("*.tar")) == [
        f"s-{n:03d}" for n in range(SHARDS)
    ]
    source = open_records(finished_run)
    assert len(source) == SHARDS * SIZE - 3
    assert source.read(1).location == f"{finished_run / 's-000.tar'}: sample 0000001"


@pytest.mark.process
def test_run_beside_others(finished_run, start, tmp_path, monkeypatch, capfd):
    # Job arrays, torchrun, a second start of the same command: each takes the shards that no other
    # process writes, and its share first.
    out = tmp_path / "out"
    out.mkdir()
    living = out / ".s-001.tar.12.tmp"
    living.touch()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        try_lock(out, DataError, ".s-001.tar.lock"),
        try_lock(out, DataError, ".s-006.tar.lock"),
    ):
        assert start(out, shard=(1, 2), workers=2) == 0
    log = capfd.readouterr().err
    assert "2 in this share" in log and "other processes write the rest" in log
    tars = sorted(out.glob("*.tar"), key=lambda path: path.stat().st_mtime_ns)
    assert [path.stem for path in tars[:2]] == ["s-003", "s-007"]
    assert len(tars) == 6 and living.exists()
    # They were killed.
    assert start(out) == 0
    assert content(out) == content(finished_run)


def command_of(data, out) -> list[str]:
    return (
        f"{PYTHON} src/tools/extract_image_ids_to_torchdata_parallel.py "
        f"--tokenizer configs/tokenizer/nano.yaml --data {data} "
        f"--save_dir {out} --num_workers 0 --device cpu --batch_size 1"
    ).split()


@pytest.mark.process
def test_run_started_twice(data, finished_run, tmp_path):
    command = command_of(data["files"], tmp_path / "out")
    processes = [subprocess.Popen(command, cwd=APPLICATION) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert content(tmp_path / "out") == content(finished_run)


@pytest.mark.nightly
@pytest.mark.process
@pytest.mark.timeout(300)
def test_killed_run_of_two_processes_resumes(data, finished_run, tmp_path):
    # Finished shards are kept, the others are made again.
    out = tmp_path / "out"
    command = [*command_of(f"{data['files']}/data.yaml", out), "--gpus", "2"]
    process = subprocess.Popen(command, cwd=APPLICATION)
    wait_until(lambda: any(out.glob("*.tar")), process, 120)
    workers = processes_with(str(out))
    assert len(workers) >= 2
    for pid in (process.pid, *workers):
        with contextlib.suppress(ProcessLookupError):  # it ended with its parent
            os.kill(pid, signal.SIGKILL)
    process.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert 0 < len(finished) < SHARDS
    log = run_checked(command, cwd=APPLICATION).stderr
    assert "2 in this share" not in log and log.count("4 in this share") == 2
    assert all((out / name).stat().st_mtime_ns == modified for name, modified in finished.items())
    assert content(out) == content(finished_run)


def visible(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if not name.startswith(".")}


def test_run_at_a_url(finished_run, start, capfd):
    url = "memory://codes/a"
    files, root = filesystem(url)

    def run_there() -> str:
        assert start(url) == 0
        stored = {name.removeprefix(f"{root}/"): files.cat(name) for name in files.find(root)}
        assert stored == visible(content(finished_run))
        return capfd.readouterr().err

    assert "0 of all exist already" in run_there()
    assert "8 of all exist already" in run_there()
    # A deleted shard, and one whose upload a kill ended, are made again.
    files.rm([f"{root}/s-002.tar", f"{root}/s-005.counts.json"])
    assert "6 of all exist already" in run_there()
    records = open_records(url)
    expected = [record.fields for record in map(open_records(finished_run).read, range(93))]
    assert [record.fields for record in map(records.read, range(len(records)))] == expected
    with pytest.raises(DataError, match="memory:///codes/a: was started .*views: 1 -> 2"):
        start(url, views=2)


@pytest.mark.process
def test_killed_run_of_two_shares_at_a_url(data, finished_run, tmp_path):
    out = tmp_path / "out"
    command = command_of(data["files"], f"file://{out}")
    shares = [[*command, "--shard", f"{index}/2"] for index in range(2)]
    process = subprocess.Popen(shares[0], cwd=APPLICATION)
    wait_until(lambda: any(out.glob("*.tar")), process, 120)
    process.kill()
    process.wait()
    first = subprocess.Popen(shares[0], cwd=APPLICATION)
    log = run_checked(shares[1], cwd=APPLICATION).stderr
    assert "own share only" in log and "4 in this share" in log
    assert first.wait(120) == 0
    assert content(out) == visible(content(finished_run))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://host/codes", "are only read"),
        ("simplecache::memory://codes", "are only read"),
        ("none://codes", "cannot be read .Protocol not known"),
        ("file:///dev/null/codes", "cannot be written"),
    ],
)
def test_run_refuses_a_url(start, url, reason):
    with pytest.raises(SeedError, match=reason) as refusal:
        start(url)
    assert url in str(refusal.value)


def test_run_writes_the_manifest(finished_run, start, tmp_path, monkeypatch):
    # Else each process of a training opens each shard once.
    monkeypatch.setattr(manifest, "MIN_FILES", SHARDS)
    out = tmp_path / "out"
    shutil.copytree(finished_run, out)
    (out / "counts.json").unlink()
    assert start(out) == 0
    entries = manifest.read(map(str, out.glob("*.tar")))
    n_records = {Path(path).stem: entry.records for path, entry in entries.items()}
    assert n_records == {f"s-{n:03d}": SIZE - 3 * (n == 3) for n in range(SHARDS)}


@pytest.mark.nightly
@pytest.mark.process
@pytest.mark.timeout(600)
def test_run_on_ray_with_a_killed_worker(data, finished_run, tmp_path):
    # Ray restarts the worker, whose shards are those of a plain run.
    pytest.importorskip("ray", reason="needs the extra ray")
    out = tmp_path / "out"
    command = [*command_of(data["files"], os.path.relpath(out, APPLICATION)), "--ray", "--gpus=2"]
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # its sockets need a short path
        environment = {
            "RAY_TMPDIR": folder,
            "RAY_AUTH_MODE": "disabled",
            "RAY_DEDUP_LOGS": "0",
            "RAY_worker_niceness": "0",
        }
        process = subprocess.Popen(
            command,
            cwd=APPLICATION,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        STARTED.append(process)
        wait_until(lambda: any(out.glob("*.tar")), process)
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in children if "ray::_run_in" in child.cmdline()]
        assert len(workers) == 2
        workers[0].kill()
        assert len([*out.glob("*.tar")]) < SHARDS
        log = process.communicate()[0]
    assert process.returncode == 0, log
    assert log.count("4 in this share") == 3, log
    for lock in out.glob(".*.tar.lock"):  # of a kill just after a shard was written
        lock.unlink()
    assert content(out) == content(finished_run)


def test_run_resumed_with_another_tokenizer_or_setting(finished_run, start, tmp_path):
    # Codes of different tokenizers must not be mixed.
    from seed_multimodal.state_dicts import load_state_dict, save_state_dict

    folder = tmp_path / "tokenizer"
    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy)
    shutil.copytree(
        NANO / "seed_tokenizer",
        folder,
        ignore=shutil.ignore_patterns("diffusion_model"),
    )
    state = load_state_dict(folder / "model.safetensors")
    state["query_tokens"] = state["query_tokens"] * 1.01
    save_state_dict(state, folder / "model.safetensors")
    for change, named in (
        ({"tokenizer": str(folder)}, "tokenizer"),
        (
            {"image_transform": str(APPLICATION / "configs/processer/nano_transform.yaml")},
            "transform",
        ),
        ({"views": 2}, "views: 1 -> 2"),
    ):
        with pytest.raises(DataError, match=named):
            start(copy, **change)
    assert start(copy) == 0 and content(copy) == content(finished_run)


def write_tar(folder, caption, count):
    write_shard(folder / "b", [(str(n), {"jpg": jpeg(n), "txt": caption}) for n in range(count)])
    # In place: this process keeps the file open.
    (folder / "a.tar").write_bytes((folder / "b").read_bytes())


def write_images(folder, caption, count):
    for n in range(count):
        (folder / f"{n:02d}.jpg").write_bytes(jpeg(n))
        (folder / f"{n:02d}.txt").write_bytes(caption)


def write_list(folder, caption, count):
    write_images(folder / "images", caption, count)
    rows = [{"image": f"images/{n:02d}.jpg", "caption": caption.decode()} for n in range(count)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "write, file, caption, count",
    [
        (write_tar, "a.tar", b"a dog", 40),
        (write_list, "a.jsonl", b"a dog", 40),
        (write_images, "", b"a dog", 40),
        (write_images, "", b"a cat", 41),
    ],
)
@pytest.mark.parametrize("at_url", [False, True])
def test_run_refuses_a_shard_of_other_contents(
    start, tmp_path, write, file, caption, count, at_url
):
    # Another file of equal size; one more image, which is the last.
    folder = tmp_path / "in"
    (folder / "images").mkdir(parents=True)
    out = tmp_path / "out"
    url = f"file://{out}" if at_url else out
    settings = {"data": {"files": str(folder / file)}, "block": 30}
    write(folder, b"a cat", 40)
    assert start(url, **settings) == 0
    # A copy of the same has another time only.
    write(folder, b"a cat", 40)
    assert start(url, **settings) == 0
    write(folder, caption, count)
    with pytest.raises(DataError, match="has changed since: .*delete these shards"):
        start(url, **settings)
    for tar in out.glob("*.tar"):
        tar.unlink()
    assert start(url, **settings) == 0
    records = open_records(out)
    texts = [records.read(index).fields["text"] for index in range(len(records))]
    assert texts == [caption.decode()] * count


def test_run_of_shards_without_counts(start, finished_run, tmp_path):
    # Copied without their small files, they are taken as they are.
    out = tmp_path / "out"
    shutil.copytree(finished_run, out, ignore=shutil.ignore_patterns("s-*.counts.json"))
    assert start(out) == 0


def test_run_writes_strict_json(start, tmp_path):
    # Python's json writes NaN, which is not JSON; LAION's metadata contains it.
    metadata = b'{"hash": NaN, "deep": [{"a": Infinity}], "similarity": 0.3}'
    members = {"jpg": jpeg(1), "txt": b"a"}
    samples = [
        ("0", {**members, "json": b'{"similarity": 0.1}'}),
        ("1", {**members, "json": metadata}),
    ]
    write_shard(tmp_path / "in.tar", samples)
    data = {"files": str(tmp_path / "in.tar"), "similarity_thr": 0.2}
    assert start(tmp_path / "out", data=data) == 0
    counts = read_json(tmp_path / "out" / "counts.json")
    assert (counts["samples"], counts["dropped: similarity"]) == (1, 1)
    with tarfile.open(tmp_path / "out" / "in.tar") as tar:
        text = tar.extractfile(tar.getmembers()[0]).read().decode()
    assert "NaN" not in text
    expected = {"hash": None, "deep": [{"a": None}], "similarity": 0.3}
    assert json.loads(text)["metadata"] == expected


def test_run_ends_after_many_broken_samples_in_a_row(start, tmp_path, capfd):
    for shard, bad in enumerate((2, 4)):
        samples = [
            (f"{n}", {"jpg": b"broken" if n < bad else jpeg(n), "txt": b"words"}) for n in range(6)
        ]
        write_shard(tmp_path / "in" / f"{shard}.tar", samples)
    images = {"files": str(tmp_path / "in")}
    with pytest.raises(DataError, match=r"1\.tar: sample 2"):
        start(tmp_path / "out", max_bad=3, data=images)
    # The finished shard stays, and the next run goes on behind it.
    names = sorted(path.name for path in (tmp_path / "out").glob("[!.]*"))
    assert names == ["0.counts.json", "0.tar", "settings.json"]
    assert "0.tar: sample 1" in capfd.readouterr().err
    assert start(tmp_path / "out", max_bad=5, data=images) == 0
    assert read_json(tmp_path / "out" / "counts.json")["bad"] == 6


def test_run_without_a_usable_record(start, tmp_path, capfd):
    # Exit code 1 also of a repeated run: else a job array seems to have succeeded.
    rows = [{"image": f"{n}.jpg", "caption": "words"} for n in range(7)]
    write_json(tmp_path / "a.json", rows)
    for _ in range(2):
        assert start(tmp_path / "out", data={"files": str(tmp_path / "a.json")}) == 1
        log = capfd.readouterr().err
        assert "bad 7" in log and "no record was written" in log


@pytest.mark.process
def test_finished_shards_cost_no_calls_each(tmp_path):
    # 1,000 processes over 100,000 finished shards would keep a metadata server busy for hours.
    for index in range(2_000):
        (tmp_path / f"{index:06d}.tar").touch()
    program = """
import os, sys
from collections import Counter
from pathlib import Path
from seed_multimodal.pretokenize.run import Shard, ShardQueue
calls, stat = Counter(), os.stat
def counted(*args, **options):
    calls["stat"] += 1
    return stat(*args, **options)
os.stat = counted
audited = ("open", "os.", "fcntl")
sys.addaudithook(lambda event, _: calls.update([event] * event.startswith(audited)))
queue = ShardQueue(Path(sys.argv[1]), [Shard(f"{n:06d}", None) for n in range(2_000)], 20)
assert (queue.count_missing(), list(queue), queue.count_missing()) == (0, [], 0)
queue.check_inputs()
print(sum(calls.values()), calls)
"""
    output = run_checked([PYTHON, "-c", program, str(tmp_path)]).stdout
    assert int(output.split()[0]) <= 0.01 * 2_000, output
