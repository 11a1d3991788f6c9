"""Rewards that cannot be opened for nano, and a training by two processes."""

import json
import os
import subprocess
import sys

import pytest
import rl_runs
from llm_runs import environment
from real_processes import STARTED, free_port, nothing_stays_behind  # noqa: F401
from warm_processes import PYTHON

from seed_multimodal.errors import SeedError


@pytest.mark.parametrize(
    "name, message",
    [
        ("nano", "prompt 'a fish': has no labels"),
        ("genevall", ".genevall. is unknown .did you mean"),
    ],
)
def test_reward_that_cannot_be_opened(tmp_path, name, message):
    with pytest.raises(SeedError, match=message):
        rl_runs.run(tmp_path, "nano", {}, data={"rewards": [{"name": name, "model": "nano"}]})


@pytest.mark.process
@pytest.mark.timeout(300)
def test_rewards_of_all_processes(tmp_path, tiny_folder):
    # One prompt of the evaluation for two processes.
    values = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    values["PYTHONPATH"] = os.pathsep.join(sys.path)
    for rank in "01":
        STARTED.append(
            subprocess.Popen(
                [PYTHON, rl_runs.__file__, str(tmp_path), str(tiny_folder)],
                env=environment(**values, RANK=rank),
            )
        )
    assert [process.wait(250) for process in STARTED] == [0, 0]
    text = (tmp_path / "out" / "summary.json").read_text()
    summary = json.loads(text, parse_constant=pytest.fail)
    assert (summary["evaluation"]["eval_mine"], summary["evaluation"]["eval_reward"]) == (0, 0)
    assert (summary["rewards"]["mine"], summary["rewards"]["flat_groups"]) == (0.5, 0.75)
