"""What rewards return, and their weighted sum."""

import math

import numpy as np
import pytest
import torch

from seed_multimodal.rl import rewards
from seed_multimodal.rl.config import RewardSettings
from seed_multimodal.rl.rewards import checked_rewards, open_reward, weighted_sum
from seed_multimodal.training.distributed import TrainingError

NAN = math.nan


@pytest.mark.parametrize(
    "values, expected",
    [
        ((True, False, 28), [1, 0, 28]),
        ([None, 0.5, None], [NAN, 0.5, NAN]),
        (np.array([True, False, True]), [1, 0, 1]),
        ([np.float16(0.5), np.int64(3), np.bool_(True)], [0.5, 3, 1]),
        (torch.tensor([1.5, 2, 3], dtype=torch.bfloat16, requires_grad=True), [1.5, 2, 3]),
        ([torch.tensor(2), torch.tensor(0.25), None], [2, 0.25, NAN]),
        (np.array([None, 1, 2.5], dtype=object), [NAN, 1, 2.5]),
        ([1e300, 10**300, -1e300], [1e300, 1e300, -1e300]),
    ],
)
def test_checked_rewards(values, expected):
    # Whatever a library of scores calls a number.
    checked = checked_rewards("mine", values, 3)
    assert checked.dtype == torch.float64
    result = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(checked, result, equal_nan=True)


@pytest.mark.parametrize(
    "values, named",
    [
        ([0.5, 0.5], "2 values for 3"),
        ([], "0 values"),
        (None, "NoneType"),
        (0.5, "float"),
        (torch.tensor(0.5), "float"),
        ("123", "str"),
        ({0: 1.0, 1: 2.0, 2: 3.0}, "dict"),
        ((value for value in [1, 2, 3]), "generator"),
        ([1, 2, NAN], "nan for drawing 3 of 3"),
        (torch.tensor([1, 2, NAN]), "drawing 3"),
        ([1, "0.5", 2], "'0.5' for drawing 2"),
        ([1, 2, 3j], "drawing 3"),
        ([[0.5], [0.5], [0.5]], r"\[0.5\] for drawing 1"),
        ([torch.ones(1)] * 3, "drawing 1"),
        ([10**400, 1, 2], "drawing 1"),
    ],
)
def test_checked_rewards_refuses(values, named):
    # By the reward's name and the drawing, instead of a wrong result or a traceback.
    with pytest.raises(TrainingError, match=f"Reward mine returned .*{named}"):
        checked_rewards("mine", values, 3)


@pytest.mark.parametrize(
    "weights, expected",
    [([1.0, 0.0], [0.1, 2.0, 0.0, NAN]), ([1.0, -1.0], [0.0, 2.0, -5.0, NAN])],
)
def test_weighted_sum(weights, expected):
    # A reward that does not apply to a drawing is no reward of 0: it adds nothing.
    table = torch.tensor([[0.1, 2.0, NAN, NAN], [0.1, NAN, 5.0, NAN]], dtype=torch.float64)
    total = weighted_sum(list(table), weights)
    torch.testing.assert_close(total, torch.tensor(expected).double(), equal_nan=True)


@pytest.mark.parametrize("opened", [None, [1.0]])
def test_open_reward_without_a_function(opened, monkeypatch):
    # Found at the start, not after the first images.
    monkeypatch.setattr(rewards, "registered", lambda group: {"mine": "module:open_reward"})
    monkeypatch.setattr(rewards, "import_entry", lambda entry: lambda *arguments: opened)
    with pytest.raises(rewards.ConfigError, match="mine .*not a function"):
        open_reward(RewardSettings("mine"), [], torch.device("cpu"))
