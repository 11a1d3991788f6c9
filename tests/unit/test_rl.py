"""Training by rewards: what stops it, and the distribution that it trains."""

import json

import pytest
from data_files import lines
from repository import ROOT

from seed_multimodal.errors import SeedError
from seed_multimodal.rl import rewards
from seed_multimodal.rl.task import RlTask
from seed_multimodal.training.distributed import TrainingError
from seed_nano.report.reward import prompt_records

NANO = {"name": "nano", "model": "nano"}
GENEVAL = {"name": "geneval", "model": "nano"}


@pytest.fixture
def run(tmp_path):
    """Train for a step with changed settings; returns its log line."""

    def train(prompts: list[dict], reward: dict = NANO, trainer=(), **model) -> dict:
        lines(tmp_path / "prompts.jsonl", prompts)
        config = {
            "output_dir": str(tmp_path / "out"),
            "model": {"system": "nano", **model},
            "data": {
                "prompts": str(tmp_path / "prompts.jsonl"),
                "rewards": [reward],
                "batch_size": len(prompts),
                "group_size": 4,
                "drawing": {"num_inference_steps": 1},
            },
            "optim": {"learning_rate": 1e-3, "lr_scheduler_type": "constant"},
            "trainer": {
                "max_steps": 2,
                "precision": "fp32",
                "device": "cpu",
                "report_to": [],
                "curves": False,
                **dict(trainer),
            },
        }
        RlTask.train(config)
        log = (tmp_path / "out" / "train.log.jsonl").read_text().splitlines()
        return json.loads(log[-1])

    return train


@pytest.mark.parametrize("lora", [None, {"r": 4, "modules_to_save": []}], ids=["all", "lora"])
def test_trains_what_was_sampled(run, lora):
    line = run(prompt_records(2, 1)[0], trainer={"kl_weight": 0.1, "max_steps": 3}, lora=lora)
    assert line["drift"] < 1e-5
    assert 0 < line["reward"] <= 1 and line["kl"] > 0


@pytest.mark.parametrize(
    "prompt, reward, message",
    [
        ({"text": "a dog"}, NANO, "item 0: has no prompt"),
        ({"prompt": "a dog"}, NANO, "line 1: has no labels"),
        ({"prompt": "a dog"}, GENEVAL, "line 1: tag"),
        (
            {"prompt": "a lion", "tag": "one", "include": [{"class": "sphinx", "count": 1}]},
            GENEVAL,
            "no class for sphinx",
        ),
        (
            {"prompt": "a dog"},
            {"name": "genevall"},
            "'genevall' is unknown .did you mean .geneval.",
        ),
        ({"prompt": "a dog"}, {"name": "clip", "model": str(ROOT / "docs")}, "docs"),
    ],
)
def test_refused(run, prompt, reward, message):
    with pytest.raises(SeedError, match=message):
        run([prompt], reward)


def test_reward_not_finite(run, monkeypatch):
    def broken(model, records, device):
        return lambda images, records: [float("nan")] * len(images)

    monkeypatch.setitem(rewards.BUILT_IN, "broken", broken)
    with pytest.raises(TrainingError, match="Reward broken is not finite"):
        run([{"prompt": "a dog"}], {"name": "broken"})


def test_geneval_and_flat_groups(run):
    """A detector's reward; a group whose answers are all right teaches nothing."""
    prompt = {"prompt": "a dog", "tag": "one", "include": [{"class": "dog", "count": 1}]}
    line = run([prompt] * 2, GENEVAL)
    assert 0 <= line["geneval"] <= 1 and line["flat_groups"] in (0, 0.5, 1)
