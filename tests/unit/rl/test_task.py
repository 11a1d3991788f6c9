"""GRPO: its values in tables, and steps of a tiny system."""

import functools
import math
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import rl_runs
import torch
from data_files import lines
from llm_runs import log_lines
from rl_runs import low_codes
from tiny import read_json
from yaml_tables import read_tables

from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.rl.task import RlTask, advantages, read_prompts

TABLES = read_tables(__file__)


@pytest.mark.parametrize("case", TABLES["advantages"], ids=str)
def test_advantages(case):
    result = advantages(torch.tensor(case["groups"], dtype=torch.float64), case["spread"])
    expected = torch.tensor(case["expected"], dtype=torch.float64)
    torch.testing.assert_close(result, expected)
    assert result[expected == 0].eq(0).all()


def objective(kl_weight, *arguments):
    task = SimpleNamespace(settings=SimpleNamespace(kl_weight=kl_weight))
    return RlTask.objective(task, *arguments)


def test_objective():
    # Two answers, of two tokens and of one; the second one's padding counts for nothing.
    log_probs = torch.tensor([[0.5, 0.25], [0.5, 1.0]]).log().requires_grad_()
    losses, distances = objective(0.0, log_probs, None, [1.0, -2.0], [2, 1])
    (gradient,) = torch.autograd.grad(losses.sum(), log_probs)
    assert (losses.tolist(), distances.tolist()) == ([-1, 2], [0, 0])
    # A step against it makes the first answer likelier, and the second one less likely.
    assert gradient.tolist() == [[-0.5, -0.5], [2, 0]]

    start = torch.tensor([[0.5, 0.5], [0.25, 0.1]]).log()
    losses, distances = objective(0.5, log_probs, start, [0.0, 0.0], [2, 1])
    (gradient,) = torch.autograd.grad(losses.sum(), log_probs)
    expected = [(1 - math.log(2)) / 2, math.log(2) - 0.5]
    torch.testing.assert_close(distances, torch.tensor(expected))
    torch.testing.assert_close(losses, 0.5 * distances)
    torch.testing.assert_close(gradient, torch.tensor([[0, -0.25], [0.25, 0]]))


@pytest.mark.parametrize("record", [{"text": "a cat"}, {"prompt": " "}, {"prompt": 3}])
def test_prompts_that_are_none(tmp_path, record):
    with pytest.raises(DataError, match="line 2: has no prompt"):
        read_prompts(lines(tmp_path / "prompts.jsonl", [{"prompt": "a cat"}, record]))


@pytest.fixture
def run(tmp_path, tiny_folder):
    """`rl_runs.run` of the tiny system."""
    return functools.partial(rl_runs.run, tmp_path, tiny_folder)


def test_rewarded_codes_become_likelier(run):
    # A wrong sign would learn the opposite.
    before = run({"low": low_codes}, trainer={"max_steps": 1}).meter.last["low"]
    assert run({"low": low_codes}, trainer={"max_steps": 6}).meter.last["low"] > before + 0.2


@pytest.mark.parametrize("lora", [None, {"r": 4, "modules_to_save": []}], ids=["all", "lora"])
def test_log_of_steps(run, tmp_path, lora):
    # Sampled and trained distributions are one; micro-steps share the step's answers.
    values = iter(range(100))
    task = run(
        {"low": low_codes, "mine": lambda images, records: [next(values) for _ in images]},
        model={"lora": lora},
        data={
            "rewards": [{"name": "low", "weight": -2}, {"name": "mine", "weight": 0.5}],
            "eval_prompts": "none.jsonl",  # is not read with `eval_steps: 0`
        },
        trainer={"kl_weight": 0.1, "gradient_accumulation_steps": 2},
    )
    first, second = log_lines(tmp_path / "out")
    assert max(first["drift"], second["drift"]) < 1e-5 and first["kl"] < 1e-6 < second["kl"]
    assert (first["mine"], task.meter.last["mine"], task.meter.last["flat_groups"]) == (
        7.5,
        23.5,
        0,
    )
    assert task.meter.last["mine_std"] == pytest.approx(np.std(range(16), ddof=1))
    assert task.meter.last["reward"] == pytest.approx(23.5 / 2 - 2 * task.meter.last["low"])


def test_repeated_command_keeps_its_results(run, tmp_path):
    # It made no step, and wrote an empty sheet and no rewards over those of the run.
    results = []
    for _ in range(2):
        run({"low": low_codes}, trainer={"sample_steps": 1})
        rewards = read_json(tmp_path / "out" / "summary.json")["rewards"]
        results.append((rewards, (tmp_path / "out" / "samples" / "step-2.png").read_bytes()))
    assert results[0] == results[1]
    assert [*rewards] == ["low", "low_std", "reward", "reward_std", "flat_groups"]


def test_rewards_that_do_not_apply(run):
    # None is no reward of 0, neither in the means nor in the groups.
    def first(images, records) -> list[float | None]:
        return [1.0 * (index % 2) if index < 4 else None for index in range(len(images))]

    task = run({"first": first, "never": lambda images, records: [None] * len(images)})
    assert [answer.advantage > 0 for answer in task.answers] == [False, True] * 2 + [False] * 4
    shares = [task.meter.last[name] for name in ("first", "reward", "flat_groups")]
    assert shares == [0.5] * 3 and "never" not in task.meter.last


def test_a_reward_of_a_user_is_named_and_changes_no_records(run):
    def clears(images, records) -> list[float]:
        n_images = len(images)
        records[0].clear()
        records.clear()
        images.clear()
        return [1.0] * n_images

    def raises(images, records) -> list[float]:
        raise KeyError("subject")

    with pytest.raises(KeyError) as caught:
        run({"clears": clears, "mine": raises})
    assert "mine" in caught.value.__notes__[0]
    assert run({"clears": clears}).meter.last["clears"] == 1


def test_rewarded_codes_alone_are_drawn_and_trained(run, monkeypatch):
    lengths = []

    original = RlTask.objective

    def recorded(task, *arguments):
        lengths.extend(arguments[3])
        return original(task, *arguments)

    monkeypatch.setattr(RlTask, "objective", recorded)
    task = run({"low": low_codes}, data={"rewarded_codes": 3})
    assert lengths == [3] * 16
    assert {(answer.image.width, answer.image.info["codes"]) for answer in task.answers} == {(3, 3)}


def test_evaluation_draws_the_same_of_each_prompt(run, tmp_path, capsys):
    # Other drawings for each prompt; of the same weights, the same ones at every evaluation.
    drawings = []

    def recorded(images, records) -> list[float]:
        if len(images) == 2:
            drawings.append([(image.info["seed"], image.tobytes()) for image in images])
        return low_codes(images, records)

    run({"low": recorded}, evaluated=2, optim={"learning_rate": 0.0})
    (first, second), again = drawings
    assert [first, second] == again and first[0] != second[0] and first[1] != second[1]
    shares = [sum(code < 8 for code in codes) / 32 for _, codes in again]
    line = log_lines(tmp_path / "out")[-1]
    assert line["eval_low"] == pytest.approx(np.mean(shares))
    assert line["eval_low_std"] == pytest.approx(np.std(shares, ddof=1))
    assert "evaluation of 2 prompts every 1 steps and at the end" in capsys.readouterr().out


def test_stop_during_an_evaluation(run):
    # Five hundred prompts may take minutes, a cluster waits for seconds.
    calls = []

    def stopping(images, records) -> list[float]:
        calls.append(len(images))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return low_codes(images, records)

    with pytest.raises(SystemExit):
        run({"low": stopping}, evaluated=80)
    assert calls == [8, 32]


@pytest.mark.parametrize("case", TABLES["unread"], ids=str)
def test_settings_that_nothing_reads(run, case):
    # Answers would come from another network than the one that learns, or of other codes.
    with pytest.raises(ConfigError, match=case["named"]):
        run({"low": low_codes}, **case["settings"])
