"""Training in two processes, started by the original's script: losses, resuming in one process, a
killed process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import llm_runs as runs
import pytest
import warm_python
from real_processes import STARTED, free_port, nothing_stays_behind, processes_with  # noqa: F401

pytestmark = pytest.mark.timeout(600)
SCRIPT = "scripts/train_a100_lora_multi_node_pretrain.sh"


def start(arguments: list[str], **variables: str) -> subprocess.Popen:
    """The script, its environment with these variables."""
    process = subprocess.Popen(
        ["sh", SCRIPT, *arguments],
        cwd=runs.APPLICATION,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=runs.environment(VIRTUAL_ENV=warm_python.ENVIRONMENT, **variables),
    )
    STARTED.append(process)
    return process


def chosen(tmp_path: Path, output: Path, *more: str) -> list[str]:
    """Groups that replace the script's own, and so all its flags on them."""
    files = runs.write_files(tmp_path, **lora())
    return runs.overrides(files, output, "deepspeed=none", "trainer.save_steps=2", *more)


def lora() -> dict:
    return {"model": {"lora": {**runs.LORA, "lora_dropout": 0.0}}}


@pytest.mark.process
def test_script_on_two_nodes_and_resuming_in_one_process(tmp_path, train):
    out = tmp_path / "out"
    port = str(free_port())
    arguments = chosen(tmp_path, out, "trainer.max_steps=3")
    processes = [
        start(
            arguments,
            INDEX=str(number),
            HOST_NUM="2",
            CHIEF_IP="127.0.0.1",
            HOST_GPU_NUM="1",
            MASTER_PORT=port,
        )
        for number in range(2)
    ]
    printed = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    before = runs.losses(out)
    assert (
        list(before) == [1, 2, 3]
        and "processes: 2" in printed[0][0]
        and printed[1][0].strip() == ""
    )

    train("out", "trainer.gradient_accumulation_steps=2", "trainer.max_steps=4", **lora())
    assert list(runs.losses(out)) == [1, 2, 3, 4]
    assert {step: runs.losses(out)[step] for step in before} == before


@pytest.mark.process
def test_train_processes_with_unequal_numbers_of_evaluation_batches(tmp_path):
    """Exhausted data do not end at the same micro-batch in all processes.

    Every forward pass is a collective.
    """
    import yaml

    from seed_multimodal.data.stream.config import read_data_settings
    from seed_multimodal.data.stream.llm_batches import LlmBatches
    from seed_multimodal.language.tokenizer import MultimodalTokenizer

    out = tmp_path / "out"
    files = runs.write_files(tmp_path)
    data = yaml.safe_load(files["data"].read_text())
    data["rows"] = 1
    data["sources"] = [{**data["sources"][1], "cycles": 1}]
    lines = Path(data["sources"][0]["files"]).read_text().splitlines(keepends=True)
    few = tmp_path / "few.jsonl"
    few.write_text(lines[0])
    data["sources"][0]["files"] = str(few)
    held_out = tmp_path / "held_out.yaml"
    held_out.write_text(yaml.safe_dump(data))
    tokenizer = MultimodalTokenizer.from_pretrained(runs.TOKENIZER)
    settings = read_data_settings(data, "data")
    counts = [len(list(LlmBatches(settings, tokenizer, rank=rank, world=2))) for rank in range(2)]
    assert counts[0] != counts[1], counts
    arguments = runs.overrides(
        files,
        out,
        "trainer.max_steps=2",
        "trainer.eval_steps=1",
        f"eval_data={held_out}",
        "trainer.eval_batches=100",
        "trainer.timeout_minutes=0.5",
    )
    runs.run(arguments, before=runs.torchrun())
    evaluated = [line["eval_loss"] for line in runs.log_lines(out) if "eval_loss" in line]
    assert len(evaluated) == 2 and all(0 < loss < 20 for loss in evaluated)


@pytest.mark.process
def test_train_writes_no_samples_when_the_first_process_has_no_data_left(tmp_path):
    """Without evaluation data, the samples continue sequences of a step."""
    import yaml

    out = tmp_path / "out"
    files = runs.write_files(tmp_path)
    data = yaml.safe_load(files["data"].read_text())
    data["sources"] = [{**data["sources"][0], "cycles": 1}]
    captions = Path(data["sources"][0]["files"])
    _, usable, *_ = captions.read_text().splitlines(keepends=True)
    bad = '{"image_ids": [1, 2, 3], "text": "too few codes"}\n'  # of the first process
    captions.write_text(bad + usable)
    files["data"].write_text(yaml.safe_dump(data))
    arguments = runs.overrides(files, out, "trainer.sample_steps=1", "trainer.timeout_minutes=0.5")
    runs.run(arguments, before=runs.torchrun())
    assert list(runs.losses(out)) == [1]
    assert not (out / "samples").exists()


@pytest.mark.process
def test_script_with_a_killed_process_ends_without_traceback(tmp_path):
    out = tmp_path / "out"
    arguments = chosen(
        tmp_path, out, "trainer.max_steps=100000", "trainer.dataloader_num_workers=0"
    )
    process = start(arguments, NPROC="2", MASTER_PORT=str(free_port()))
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None and len(runs.losses(out)) < 3:
        time.sleep(0.05)
    os.kill(max(processes_with(str(out))), signal.SIGKILL)
    _, errors = process.communicate(timeout=100)
    # The other process may be the first to report that this one is gone.
    assert process.returncode in (2, 128 + signal.SIGKILL), errors
    assert "resumes from" in errors and "Traceback" not in errors, errors
