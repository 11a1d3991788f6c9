"""What rewards return, their weighted sum, and those of this package."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from yaml_tables import read_tables

from seed_multimodal.errors import ConfigError
from seed_multimodal.evaluation import clip, detection, judges
from seed_multimodal.evaluation.detection import Detection, Limits
from seed_multimodal.rl import rewards
from seed_multimodal.rl.config import RewardSettings
from seed_multimodal.rl.rewards import checked_rewards, open_reward, weighted_sum
from seed_multimodal.training.distributed import TrainingError

NAN = math.nan
TABLES = read_tables(__file__)


@pytest.mark.parametrize(
    "values, expected",
    [
        ((True, -2, None), [1, -2, NAN]),
        (np.array([True, False, True]), [1, 0, 1]),
        ([np.float16(0.5), np.int64(3), np.bool_(True)], [0.5, 3, 1]),
        (torch.tensor([1.5, 2, 3], dtype=torch.bfloat16, requires_grad=True), [1.5, 2, 3]),
        ([torch.tensor(2), 1e300, 10**300], [2, 1e300, 1e300]),
    ],
)
def test_checked_rewards(values, expected):
    # Whatever a library of scores calls a number.
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(checked_rewards("mine", values, 3), expected, equal_nan=True)


@pytest.mark.parametrize(
    "values, named",
    [
        *TABLES["refused"],
        (torch.tensor(0.5), "float"),
        (np.ones((3, 1)), r"\[1.0\] for drawing 1"),
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
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(weighted_sum(list(table), weights), expected, equal_nan=True)


def test_open_reward_of_another_package(monkeypatch):
    # What is wrong is found at the start, not after the first images.
    def opener(model, records, device, *, scale=None):
        return [1.0] if scale is None else lambda images, records: [scale * len(model)]

    monkeypatch.setattr(rewards, "registered", lambda group: {"mine": "module:open_reward"})
    monkeypatch.setattr(rewards, "import_entry", lambda entry: opener)
    opened = partial(open_reward, records=[], device=torch.device("cpu"))
    assert opened(RewardSettings("mine", "nano", options={"scale": 0.5}))(["image"], []) == [2.0]
    for options, named in (({}, "not a function"), ({"scal": 1}, "options of mine: unknown key")):
        with pytest.raises(ConfigError, match=named):
            opened(RewardSettings("mine", options=options))


class Stub(SimpleNamespace):
    """A model that answers the same to anything."""

    limits = Limits(0.3, 0.9, 1.0)
    knows_colours = False
    labels = None

    def detect(self, images, labels):
        return [[Detection(label[0], 0.5, (0, 0, 9, 9))] for label in labels]

    def probabilities(self, image, questions):
        assert questions[0].text == "Does this image show a dog?"
        return [(0.6, 0.2)]

    def texts(self, texts):
        return torch.tensor([[0.6, 0.8]] * len(texts))

    def images(self, images):
        return torch.tensor([[1.0, 0.0]] * len(images))


@pytest.mark.parametrize(
    "name, expected", [("geneval", [1, 0, 0]), ("judge", [0.75] * 3), ("clip", [0.6] * 3)]
)
def test_built_in_rewards(name, expected, monkeypatch):
    for module, opened in ((detection, "load_detector"), (judges, "load_judge"), (clip, "Clip")):
        monkeypatch.setattr(module, opened, lambda *arguments: Stub())
    records = TABLES["prompts"]
    reward = open_reward(RewardSettings(name, "model"), records, torch.device("cpu"))
    assert reward(["image"] * 3, records) == pytest.approx(expected)
    if name == "geneval":
        with pytest.raises(ConfigError, match="prompt .*: model does not know colours"):
            open_reward(RewardSettings(name, "model"), [TABLES["red"]], torch.device("cpu"))
