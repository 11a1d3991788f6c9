"""Training of nano by the rewards of this package, and by two processes."""

import json
import os
import subprocess
import sys

import pytest
import rl_runs
from data_files import lines
from llm_runs import environment, log_lines
from real_processes import STARTED, free_port, nothing_stays_behind  # noqa: F401
from repository import ROOT

from seed_multimodal.errors import SeedError

NANO = {"name": "nano", "model": "nano"}
GENEVAL = {"name": "geneval", "model": "nano"}
DOG = {"prompt": "a dog", "tag": "one", "include": [{"class": "dog", "count": 1}]}


def run(folder, prompt: dict, reward: dict) -> dict:
    """Train two steps; returns the last line of the log."""
    data = {"rewards": [reward], "prompts": str(lines(folder / "nano.jsonl", [prompt]))}
    rl_runs.run(folder, "nano", {}, data={**data, "drawing": {"num_inference_steps": 1}})
    return log_lines(folder / "out")[-1]


@pytest.mark.parametrize(
    "prompt, reward, message",
    [
        ({"prompt": "a dog"}, NANO, "line 1: has no labels"),
        ({"prompt": "a dog"}, GENEVAL, "line 1: tag"),
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
        run(tmp_path, prompt, reward)


def test_geneval(tmp_path):
    # A group whose answers are all right teaches nothing.
    line = run(tmp_path, DOG, GENEVAL)
    assert 0 <= line["geneval"] <= 1 and 0 <= line["flat_groups"] <= 1


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
