"""Two "nodes" of one process each, by the original's script: one process's numbers; and one of them dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from seed_multimodal.training.llm.folders import checkpoints, fault_of

pytestmark = pytest.mark.timeout(600)
STARTED: list[subprocess.Popen] = []
SCRIPT = "scripts/train_a100_lora_multi_node_pretrain.sh"


def free_port() -> str:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return str(place.getsockname()[1])


def nodes(runs, arguments: list[str], **names: str) -> list[subprocess.Popen]:
    """The script on two nodes; `names`: the environment's name of the node's number and the like."""
    port, started = free_port(), []
    for number in range(2):
        env = runs.environment(**{names["rank"]: str(number), names["nodes"]: "2", names["address"]: "127.0.0.1",
                                  names["processes"]: "1", "MASTER_PORT": port, "VIRTUAL_ENV": sys.prefix})
        started.append(subprocess.Popen(["sh", SCRIPT, *arguments], cwd=runs.APPLICATION, env=env, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True))
    STARTED.extend(started)
    return started


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Iterator[list[subprocess.Popen]]:
    """Whatever a failed test leaves running ends with it."""
    STARTED.clear()
    yield STARTED
    for process in STARTED:
        for pid in [*children(process.pid), process.pid] if process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)


def chosen(runs, tmp_path: Path, output: Path, *more: str) -> list[str]:
    """What replaces the script's own choices: groups, and so all its flags on them."""
    lora = {"model": {"lora": {**runs.LORA, "lora_dropout": 0.0}}}
    files = runs.write_files(tmp_path, **lora)
    return runs.overrides(files, output, "deepspeed=none", "trainer.save_steps=2", *more)


def test_two_nodes_are_one_process_with_twice_the_micro_batches_and_resume_as_one(runs, tmp_path, train):
    two = tmp_path / "two"
    arguments = chosen(runs, tmp_path, two, "trainer.max_steps=4")
    started = nodes(runs, arguments, rank="INDEX", nodes="HOST_NUM", address="CHIEF_IP", processes="HOST_GPU_NUM")
    said = [process.communicate(timeout=400) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    lora = {"model": {"lora": {**runs.LORA, "lora_dropout": 0.0}}}
    one = train("one", "trainer.gradient_accumulation_steps=2", "trainer.max_steps=6", **lora)
    # The schedule runs over four steps there and over six here, so the same length is asked for below.
    same = train("same", "trainer.gradient_accumulation_steps=2", "trainer.max_steps=4", **lora)
    assert runs.losses(two) == pytest.approx(runs.losses(same), abs=1e-6)
    assert "2 processes on cpu" in said[0][0] and said[1][0].strip() == ""

    # One process goes on where two stopped (plain engine), with as many micro-batches a step: the same data.
    again = train("two", "trainer.gradient_accumulation_steps=2", "trainer.max_steps=6", **lora)
    assert list(runs.losses(again)) == [1, 2, 3, 4, 5, 6] and not fault_of(again / "checkpoint-6")
    sums = [[line["tokens"] for line in runs.log_lines(folder)] for folder in (one, again)]
    assert sums[0] == sums[1]


def test_a_dead_process_ends_the_other_with_a_sentence(runs, tmp_path):
    out = tmp_path / "out"
    arguments = chosen(runs, tmp_path, out, "trainer.max_steps=100000", "trainer.timeout_minutes=1",
                       "trainer.dataloader_num_workers=0")
    started = nodes(runs, arguments, rank="NODE_RANK", nodes="NNODES", address="MASTER_ADDR", processes="NPROC")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and started[0].poll() is None and len(runs.losses(out)) < 4:
        time.sleep(0.05)
    # The second node's torchrun and the process that trains: the whole node is gone at once.
    for pid in [started[1].pid, *children(started[1].pid)]:
        os.kill(pid, signal.SIGKILL)
    said, complained = started[0].communicate(timeout=200)
    started[1].communicate(timeout=60)
    assert started[0].returncode not in (0, None)
    sentence = next(line for line in complained.splitlines() if "Another process died" in line)
    assert "train.py: " in sentence and "is intact; the same command goes on from there" in sentence, complained
    step, folder = checkpoints(out)[0]
    assert not fault_of(folder) and step >= 2


def children(parent: int) -> list[int]:
    """Processes that a process has started."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = place.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(place.parent.name))
    return found
