"""Training in two processes: the original's script on two nodes, unequal data, a killed process
(equal losses and resuming: e2e/test_trainers.py)."""

import os
import signal
import subprocess
from pathlib import Path

import llm_runs as runs
import pytest
import yaml
from data_files import lines
from real_processes import (  # noqa: F401
    STARTED,
    free_port,
    kill,
    nothing_stays_behind,
    processes_with,
    wait_until,
)
from trainers import TRAINERS, TWO

from seed_multimodal.training.checkpoint import checkpoints

pytestmark = [pytest.mark.process, pytest.mark.timeout(600)]
SCRIPT = "scripts/train_a100_lora_multi_node_pretrain.sh"
QUICK = "trainer.timeout_minutes=0.5"


def start(
    tmp_path, max_steps, *more: str, deepspeed: str = "none", **variables: str
) -> subprocess.Popen:
    """The script with groups that replace its own, and so all its flags on them."""
    files = runs.write_files(tmp_path, model={"lora": {**runs.LORA, "lora_dropout": 0.0}})
    options = [f"deepspeed={deepspeed}", f"trainer.max_steps={max_steps}", *more]
    options.append("trainer.save_steps=2")
    process = subprocess.Popen(
        ["sh", SCRIPT, *runs.overrides(files, tmp_path / "out", *options)],
        cwd=runs.APPLICATION,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=runs.environment(**variables),
    )
    STARTED.append(process)
    return process


@pytest.mark.slow
def test_script_on_two_nodes(tmp_path):
    # By the variables of the original's cluster.
    nodes = {"HOST_NUM": "2", "CHIEF_IP": "127.0.0.1", "HOST_GPU_NUM": "1"}
    port = str(free_port())
    processes = [
        start(tmp_path, 3, INDEX=str(index), MASTER_PORT=port, **nodes) for index in range(2)
    ]
    printed = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert list(runs.losses(tmp_path / "out")) == [1, 2, 3]
    assert not printed[1][0].strip()  # only the first one logs


@pytest.mark.slow
def test_script_with_a_killed_process_ends_without_traceback(tmp_path):
    process = start(tmp_path, 100_000, NPROC="2", MASTER_PORT=str(free_port()))
    out = tmp_path / "out"
    wait_until(lambda: len(runs.losses(out)) >= 3, process)
    os.kill(max(processes_with(str(out))), signal.SIGKILL)
    _, errors = process.communicate(timeout=100)
    # The other process may be the first to report that this one is gone.
    assert process.returncode in (2, 128 + signal.SIGKILL), errors
    assert "Traceback" not in errors, errors


@pytest.mark.nightly
def test_script_continues_without_a_lost_node(tmp_path):
    pytest.importorskip("deepspeed")
    zero = {"deepspeed": "configs/deepspeed/stage2_bf16.json", "NPROC": "2"}
    nodes = {"HOST_NUM": "2", "CHIEF_IP": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [start(tmp_path, 100_000, INDEX=str(index), **nodes, **zero) for index in range(2)]
    out = tmp_path / "out"
    wait_until(lambda: bool(checkpoints(out)), processes[0])
    kill(processes[1], group=True)
    _, errors = processes[0].communicate(timeout=100)
    assert processes[0].returncode, errors
    assert "Traceback" not in errors, errors

    # What is left makes the steps of both, or smaller ones in a folder of their own.
    step, last = checkpoints(out)[0]
    options = {
        "out": ["trainer.gradient_accumulation_steps=2"],
        "branch": [f"trainer.resume={last}", f"output_dir={tmp_path / 'branch'}"],
    }
    for name, more in options.items():
        process = start(tmp_path, step + 2, *more, **zero)
        output, errors = process.communicate(timeout=200)
        assert process.returncode == 0, output + errors
        assert "saved with 4 processes, this run has 2" in output
        assert f"resumes from {last}" in output
        assert checkpoints(tmp_path / name)[0][0] == step + 2


@pytest.mark.nightly
def test_train_processes_with_unequal_numbers_of_evaluation_batches(tmp_path):
    # One record for two processes: every forward pass is a collective, so the run could hang.
    files = runs.write_files(tmp_path)
    data = yaml.safe_load(files["data"].read_text())
    chats = Path(data["sources"][1]["files"])
    few = lines(tmp_path / "few.jsonl", chats.read_text().splitlines()[:1])
    source = {**data["sources"][1], "cycles": 1, "files": str(few)}
    held_out = tmp_path / "few.yaml"
    held_out.write_text(yaml.safe_dump({**data, "sources": [source], "rows": 1}))
    options = ["trainer.max_steps=2", "trainer.eval_steps=1", "trainer.eval_batches=100"]
    out = tmp_path / "out"
    arguments = runs.overrides(files, out, f"eval_data={held_out}", *options, QUICK)
    trainer = next(entry for entry in TRAINERS if entry.name == "llm")
    trainer.run(tmp_path, arguments, *TWO)
    assert len([line for line in runs.log_lines(out) if "eval_loss" in line]) == 2
