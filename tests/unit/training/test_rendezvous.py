"""Nodes that find each other, or say in one sentence why not; processes that agree on one run."""

import contextlib
import json
import socket
import subprocess
from pathlib import Path

import pytest
from llm_runs import environment
from real_processes import STARTED, free_port, nothing_stays_behind, run_process
from warm_processes import PYTHON
from yaml_tables import read_tables

__all__ = ["nothing_stays_behind"]
pytestmark = pytest.mark.process

MEET = """
import sys
from seed_multimodal.entry import run_guarded
from seed_multimodal.training.rendezvous import meeting
def meet():
    with meeting(sys.argv[1], *map(int, sys.argv[2:])):
        pass
    print("met", flush=True)
    return 0
sys.exit(run_guarded("torchrun", False, meet))
"""
LOCAL = "127.0.0.1"
CASES = read_tables(__file__)


def start(arguments: list[str], **variables: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [PYTHON, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**variables),
    )
    STARTED.append(process)
    return process


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_nodes_meet_or_name_who_is_missing(case):
    port = free_port()
    # Connections are accepted by the kernel, and nobody answers.
    with socket.create_server((LOCAL, port)) if "is_used" in case else contextlib.nullcontext():
        processes = [
            start(["-c", MEET, address, str(port), str(node), str(count)], SEED_RDZV_MINUTES="0.05")
            for node, count, address in case["nodes"]
        ]
        for process, text in zip(processes, case["prints"], strict=True):
            output, _ = process.communicate(timeout=60)
            last = output.splitlines()[-1]
            assert text in last and "Traceback" not in output, output
            assert process.returncode == (0 if text == "met" else 2)
            if text != "met":
                assert socket.gethostname() in last and ("MASTER" in last or "node 0" in last)


@pytest.mark.slow
def test_failed_node_ends_the_others(tmp_path):
    # It fails before it joins; alone the other would wait half an hour for it.
    programs = {"0": "import time; time.sleep(300)", "1": "import sys; sys.exit(3)"}
    port = free_port()
    processes = []
    for node, code in programs.items():
        (tmp_path / f"{node}.py").write_text(code)
        flags = f"--nnodes=2 --node_rank={node} --master_addr={LOCAL} --master_port={port}"
        module = "-m seed_multimodal.training.torchrun --nproc_per_node=1"
        processes.append(start([*module.split(), *flags.split(), str(tmp_path / f"{node}.py")]))
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 3], outputs
    host = socket.gethostname()
    assert outputs[0].startswith(f"torchrun: node 1 ({host}) failed first (exit code 3)")
    assert len(outputs[0].splitlines()) == 1


AGREE = """
import json, os, sys
from pathlib import Path
import torch.distributed as dist
from seed_multimodal.errors import ConfigError
from seed_multimodal.training import agreement
from seed_multimodal.training.distributed import ProcessGroup
dist.init_process_group("gloo")
os.environ["LOCAL_RANK"] = "0"  # as the first process of a node
rank = dist.get_rank()
agreement.FOLDER_SECONDS = 0.2
for config, folder, torch_version in json.loads(sys.argv[1 + min(rank, 1)]):
    os.chdir(Path(folder).parent)
    agreement.version = lambda name: torch_version
    try:
        agreement.agree(ProcessGroup(), config, Path(folder))
        line = f"{rank}: equal"
    except ConfigError as error:
        line = f"{rank}: {error}"
    except SystemExit:  # only the first that differs says how
        line = f"{rank}: ended"
    os.write(1, f"{line}\\n".encode())  # at once: lines of two processes do not mix
"""


@pytest.mark.slow
def test_processes_that_do_not_agree_are_refused(tmp_path):
    for number in "01":
        (tmp_path / number / "shards").mkdir(parents=True)
        (tmp_path / number / "shards" / "a.tar").write_text("a" * 10)
        (tmp_path / number / "wandb").mkdir()
        (tmp_path / number / "p.jsonl").write_text(number * (1 + int(number)))
    (tmp_path / "0" / "shards" / "b.tar").write_text("b")
    (tmp_path / "0" / "wandb" / "log").touch()
    base = {
        "optim": {"rate": 0.1},
        "trainer": {"device": "cpu"},
        "model": {"path": "pretrained/nano"},
    }

    # What the two processes have, and what the sentence names.
    def run(folder="0", torch="2.13", **changes):
        return [{**base, **changes}, str(tmp_path / folder / "out"), torch]

    shards = [{"data": {"files": f"{tmp_path}/{number}/shards"}} for number in "01"]
    prompts = {"data": {"prompts": "p.jsonl"}}
    names = {"data": {"options": {"media": ["shards"]}}, "trainer": {"report_to": ["wandb"]}}
    cases = [
        (run(), run(trainer={"device": "cuda"}), "equal"),
        (run(**shards[0]), run(**shards[0]), "equal"),
        (run(), run(optim={"rate": 0.2}), "optim.rate: 0.1 -> 0.2"),
        (run(**shards[0]), run(**shards[1]), "b.tar: 1 -> not given"),
        (run(), run(torch="2.12"), "versions.torch: 2.13 -> 2.12"),
        (run(), run("1"), "output folder: shared -> not the same"),
        # Names without a slash, from other working directories.
        (run(**prompts), run("1", **prompts), "files.p.jsonl: 1 -> 2; output"),
        (
            run(**names),
            run("1", **names),
            "b.tar: 1 -> not given; output",
        ),
    ]
    program = tmp_path / "agree.py"
    program.write_text(AGREE)
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 3"
    arguments = [json.dumps([case[rank] for case in cases]) for rank in (0, 1)]
    command = [PYTHON, *launcher.split(), str(program), *arguments]
    done = run_process(command, timeout=200, env=environment())
    for rank in "012":
        sentences = [line[3:] for line in done.stdout.splitlines() if line.startswith(f"{rank}: ")]
        assert len(sentences) == len(cases), done
        for sentence, (_, _, expected) in zip(sentences, cases, strict=True):
            if expected == "equal" or rank == "2":
                assert sentence == ("equal" if expected == "equal" else "ended")
                continue
            assert expected in sentence and sentence.count(socket.gethostname()) == 2
            assert sentence.endswith("2 of 3 processes differ from rank 0.")
    assert not list(Path(tmp_path).rglob(".processes-*"))
