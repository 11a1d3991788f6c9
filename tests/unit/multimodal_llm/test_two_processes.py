"""Two "nodes" of one process each, by the original's script: one process's numbers; and one of them dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm_python
from real_processes import STARTED, free_port, nothing_stays_behind, processes_with  # noqa: F401

pytestmark = pytest.mark.timeout(600)
SCRIPT = "scripts/train_a100_lora_multi_node_pretrain.sh"


def nodes(runs, arguments: list[str], environment: str = sys.prefix, **names: str) -> list[subprocess.Popen]:
    """The script on two nodes; `names`: the environment's name of the node's number and the like."""
    port, started = str(free_port()), []
    for number in range(2):
        env = runs.environment(**{names["rank"]: str(number), names["nodes"]: "2", names["address"]: "127.0.0.1",
                                  names["processes"]: "1", "MASTER_PORT": port, "VIRTUAL_ENV": environment})
        started.append(subprocess.Popen(["sh", SCRIPT, *arguments], cwd=runs.APPLICATION, env=env, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True))
    STARTED.extend(started)
    return started


def chosen(runs, tmp_path: Path, output: Path, *more: str) -> list[str]:
    """What replaces the script's own choices: groups, and so all its flags on them."""
    lora = {"model": {"lora": {**runs.LORA, "lora_dropout": 0.0}}}
    files = runs.write_files(tmp_path, **lora)
    return runs.overrides(files, output, "deepspeed=none", "trainer.save_steps=2", *more)


@pytest.mark.process
def test_two_nodes_train_and_one_process_resumes(runs, tmp_path, train):
    two = tmp_path / "two"
    arguments = chosen(runs, tmp_path, two, "trainer.max_steps=4")
    started = nodes(runs, arguments, environment=warm_python.ENVIRONMENT, rank="INDEX", nodes="HOST_NUM",
                    address="CHIEF_IP", processes="HOST_GPU_NUM")
    said = [process.communicate(timeout=400) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    lora = {"model": {"lora": {**runs.LORA, "lora_dropout": 0.0}}}
    before = runs.losses(two)
    assert list(before) == [1, 2, 3, 4] and "processes: 2" in said[0][0] and said[1][0].strip() == ""

    # One process resumes where two stopped (plain engine): pending draws are its own now.
    again = train("two", "trainer.gradient_accumulation_steps=2", "trainer.max_steps=6", **lora)
    assert list(runs.losses(again)) == [1, 2, 3, 4, 5, 6]
    assert {step: runs.losses(again)[step] for step in before} == before


@pytest.mark.process
def test_processes_with_unlike_numbers_of_evaluation_batches(runs, tmp_path):
    """Used-up data do not end at the same micro-batch for all; every forward pass is an exchange."""
    import yaml

    from seed_multimodal.data.stream.config import read_data_settings
    from seed_multimodal.data.stream.llm_batches import LlmBatches
    from seed_multimodal.language.tokenizer import MultimodalTokenizer

    out, files = tmp_path / "out", runs.write_files(tmp_path)
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
    arguments = runs.overrides(files, out, "trainer.max_steps=3", "trainer.eval_steps=1", f"eval_data={held_out}",
                               "trainer.eval_batches=100", "trainer.timeout_minutes=0.5")
    runs.run(arguments, before=runs.torchrun())
    evaluated = [line["eval_loss"] for line in runs.log_lines(out) if "eval_loss" in line]
    assert len(evaluated) == 3 and all(0 < loss < 20 for loss in evaluated)


@pytest.mark.process
def test_a_killed_process_of_a_node_is_a_sentence_without_torchruns_traceback(runs, tmp_path):
    out = tmp_path / "out"
    arguments = chosen(runs, tmp_path, out, "trainer.max_steps=100000", "trainer.dataloader_num_workers=0")
    env = runs.environment(NPROC="2", MASTER_PORT=str(free_port()), VIRTUAL_ENV=warm_python.ENVIRONMENT)
    process = subprocess.Popen(["sh", SCRIPT, *arguments], cwd=runs.APPLICATION, env=env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    STARTED.append(process)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None and len(runs.losses(out)) < 3:
        time.sleep(0.05)
    os.kill(max(processes_with(str(out))), signal.SIGKILL)
    _, complained = process.communicate(timeout=100)
    # The other process may say first that this one is gone.
    assert process.returncode in (2, 128 + signal.SIGKILL), complained
    assert "resumes from" in complained and "Traceback" not in complained, complained
