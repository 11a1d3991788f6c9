"""Extraction tools that are killed: what the same command makes afterwards equals an undisturbed run, byte for byte."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from real_processes import children

from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.data.formats.sources import open_records
from seed_multimodal.data.pretokenize.encode import EncoderSettings
from seed_multimodal.data.pretokenize.run import RunSettings, run

ROOT = Path(__file__).resolve().parents[4]
APP = ROOT / "MultiModalLLM"
SHARDS, SIZE = 8, 24
pytestmark = pytest.mark.timeout(900)  # many processes are started, which takes long on a busy machine


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, jpeg: Callable) -> Path:
    """Eight tars of 24 pictures, one of them broken, and their description data.yaml."""
    folder = tmp_path_factory.mktemp("in")
    for shard in range(SHARDS):
        write_shard(folder / f"s-{shard:03d}.tar", [
            (f"{n:05d}", {"jpg": b"broken" if n == 77 else jpeg(n), "txt": f"picture {n}".encode()})
            for n in range(shard * SIZE, (shard + 1) * SIZE)])
    (folder / "data.yaml").write_text(f"files: {folder}\n")
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, jpeg: Callable) -> Path:
    """The same as a parquet file with row groups that are no multiple of the blocks."""
    folder = tmp_path_factory.mktemp("table")
    rows = [{"image": {"bytes": b"broken" if n == 77 else jpeg(n), "path": f"{n}.jpg"}, "text": f"picture {n}"}
            for n in range(SHARDS * SIZE)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet", row_group_size=31)
    (folder / "data.yaml").write_text(f"files: {folder}\n")
    return folder


@pytest.fixture(scope="module")
def start(inputs: Path) -> Callable[..., int]:
    """`start(save_dir)`: run in this process."""

    def run_it(save_dir: Path, data: Path = inputs, **settings: Any) -> int:
        encoder = EncoderSettings(str(APP / "configs" / "tokenizer" / "nano.yaml"), device="cpu")
        return run(RunSettings(kind="caption", data=str(data / "data.yaml"), save_dir=str(save_dir), workers=0,
                               batch_size=1, encoder=encoder, **settings))

    return run_it


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, start: Callable[[Path], int]) -> dict[str, bytes]:
    """Every file of what an undisturbed run makes."""
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder) == 0
    return content(folder)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def parts(folder: Path) -> int:
    return len(list(folder.glob("part-*/manifest.json")))


def tool(inputs: Path, save_dir: Path, *flags: str) -> subprocess.Popen:
    """The caption tool, started as a user does; one picture at a time, so that it can be met in the middle."""
    return subprocess.Popen(
        [sys.executable, "src/tools/extract_image_ids_to_torchdata_parallel.py", "--tokenizer",
         "configs/tokenizer/nano.yaml", "--data", str(inputs / "data.yaml"), "--save_dir", str(save_dir),
         "--num_workers", "0", "--batch_size", "1", "--device", "cpu", *flags],
        cwd=APP, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def wait_for(condition: Callable[[], Any], process: subprocess.Popen) -> None:
    limit = time.monotonic() + 300
    while not condition():
        if process.poll() is not None or time.monotonic() > limit:
            process.kill()
            pytest.fail(f"it ended too early or takes too long: {process.communicate()[1]}")
        time.sleep(0.001)




@pytest.mark.process
@pytest.mark.slow
def test_killed_in_the_middle_and_gone_on(inputs, whole, start, tmp_path, capfd):
    out = tmp_path / "out"
    process = tool(inputs, out, "--num_workers", "1")
    wait_for(lambda: parts(out) >= 2, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    done = parts(out)
    assert 2 <= done < SHARDS and not (out / "manifest.json").exists()
    assert start(out) == 0
    assert f"{done} of 8 units were finished" in capfd.readouterr().err
    assert content(out) == whole


@pytest.mark.process
@pytest.mark.slow
def test_a_table_is_killed_in_the_middle_and_gone_on(table, whole, start, tmp_path, capfd):
    out = tmp_path / "out"
    process = tool(table, out, "--num_workers", "2", "--block", str(SIZE))
    wait_for(lambda: parts(out) >= 2, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    done = parts(out)
    assert 2 <= done < SHARDS
    assert start(out, table, block=SIZE) == 0
    assert f"{done} of 8 units were finished" in capfd.readouterr().err
    assert start(tmp_path / "undisturbed", table, block=SIZE) == 0
    assert content(out) == content(tmp_path / "undisturbed")
    # and what a table holds becomes what tars of it become
    manifest = json.loads(content(out)["manifest.json"])
    assert (manifest["read"], manifest["samples"], manifest["bad"]) == (SHARDS * SIZE, SHARDS * SIZE - 1, 1)
    tars = json.loads(whole["manifest.json"])
    assert [part["samples"] for part in manifest["parts"]] == [part["samples"] for part in tars["parts"]]
    source = open_records(out)
    (tmp_path / "tars").mkdir()
    for name, data in whole.items():
        if name.endswith(".tar"):
            (tmp_path / "tars" / name.replace("/", "-")).write_bytes(data)
    other = open_records(tmp_path / "tars")
    for number in range(0, len(source), 20):
        own, theirs = source.read(number).fields, other.read(number).fields
        assert (own["image_ids"], own["text"]) == (theirs["image_ids"], theirs["text"])


@pytest.mark.process
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_two_processes_one_or_their_parent_is_killed(inputs, whole, start, tmp_path):
    out = tmp_path / "out"
    process = tool(inputs, out, "--gpus", "2")
    wait_for(lambda: parts(out) >= 1, process)
    os.kill(children(process.pid)[-1], signal.SIGKILL)  # the last child: multiprocessing's tracker came first
    said = process.communicate()[1]
    assert process.returncode == 1 and "process 1 was killed by signal 9" in said and "the same command" in said
    done = parts(out)
    assert SHARDS // 2 <= done < SHARDS  # the other one has finished its share
    again = tool(inputs, out, "--gpus", "2")
    wait_for(lambda: parts(out) > done, again)
    orphans = children(again.pid)
    os.kill(again.pid, signal.SIGKILL)
    again.communicate()
    limit = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in orphans) and time.monotonic() < limit:
        time.sleep(0.01)
    assert not [pid for pid in orphans if Path(f"/proc/{pid}").exists()]  # its processes do not go on
    assert start(out) == 0
    assert content(out) == whole
