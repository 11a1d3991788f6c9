"""Rewards that cannot be opened for nano, and a training by two processes."""

import json
import os
import subprocess
import sys

import pytest
import rl_runs
from data_files import lines
from llm_runs import environment
from real_processes import STARTED, free_port, nothing_stays_behind  # noqa: F401
from repository import ROOT

from seed_multimodal.errors import SeedError

NANO = {"name": "nano", "model": "nano"}
GENEVAL = {"name": "geneval", "model": "nano"}
DOG = {"prompt": "a dog"}


@pytest.mark.parametrize(
    "prompt, reward, message",
    [
        (DOG, NANO, "line 1: has no labels"),
        (
            {"prompt": "a lion", "tag": "one", "include": [{"class": "sphinx", "count": 1}]},
            GENEVAL,
            "no class for sphinx",
        ),
        (DOG, {"name": "genevall"}, "'genevall' is unknown .did you mean .geneval."),
        (DOG, {"name": "clip", "model": str(ROOT / "docs")}, "docs"),
    ],
)
def test_refused(tmp_path, prompt, reward, message):
    with pytest.raises(SeedError, match=message):
        data = {"rewards": [reward], "prompts": str(lines(tmp_path / "nano.jsonl", [prompt]))}
        rl_runs.run(tmp_path, "nano", {}, data=data)


@pytest.mark.process
@pytest.mark.timeout(300)
def test_rewards_of_all_processes(tmp_path, tiny_folder):
    # One prompt of the evaluation for two processes.
    values = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    values["PYTHONPATH"] = os.pathsep.join(sys.path)
    for rank in "01":
        STARTED.append(
            subprocess.Popen(
                [sys.executable, rl_runs.__file__, str(tmp_path), str(tiny_folder)],
                env=environment(**values, RANK=rank),
            )
        )
    assert [process.wait(250) for process in STARTED] == [0, 0]
    text = (tmp_path / "out" / "summary.json").read_text()
    summary = json.loads(text, parse_constant=pytest.fail)
    assert (summary["evaluation"]["eval_mine"], summary["evaluation"]["eval_reward"]) == (0, 0)
    assert (summary["rewards"]["mine"], summary["rewards"]["flat_groups"]) == (0.5, 0.75)
