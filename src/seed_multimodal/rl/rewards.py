"""Rewards: functions of drawings and the records that asked for them.

    reward = open_reward(RewardSettings("geneval", "owlv2-base-patch16"), records, device)
    reward(images, records)    # [1.0, 0.0, ...], one number for each image

Other packages register theirs by an entry point of the group `seed_multimodal.rewards`: a function
(model, records, device, **options) -> reward. `records` are all that will be asked for, those of
the evaluation, too. A reward may return
None for an image that it does not apply to.
"""

from __future__ import annotations

import inspect
import math
import reprlib
import sys
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import ConfigError
from seed_multimodal.plugins import import_entry, registered
from seed_multimodal.rl.config import RewardSettings
from seed_multimodal.settings import check_keys, nearest
from seed_multimodal.training.distributed import TrainingError

Records = Sequence[JsonObject]
Reward = Callable[[Sequence[Image.Image], Records], Sequence[float | None]]
OpenReward = Callable[[str, Records, torch.device], Reward]
LARGEST = sys.float_info.max
QUESTION = "Does this image show {}?"


def open_reward(settings: RewardSettings, records: Records, device: torch.device) -> Reward:
    """The reward of these settings. Raises ConfigError, CheckpointError: no such reward or model;
    DataError: records that it cannot read."""
    # 1. What opens it; its options are parameters after those that all have.
    name = settings.name
    entries = registered("rewards")
    opener = import_entry(entries[name]) if name in entries else BUILT_IN.get(name)
    if opener is None:
        suggestion = nearest(name, [*BUILT_IN, *entries])
        raise ConfigError(f"data: rewards: {name!r} is unknown{suggestion}.")
    option_names = list(inspect.signature(opener).parameters)[3:]
    check_keys(settings.options, option_names, f"data: rewards: options of {name}")

    # 2. The function.
    reward = opener(settings.model, records, device, **settings.options)
    if not callable(reward):
        raise ConfigError(f"data: rewards: {name} opens {reward!r}, not a function.")
    return reward


def checked_rewards(name: str, values: object, n: int) -> Tensor:
    """What reward `name` returned for `n` drawings, in fp64 `[n]`; NaN stands for None.

    A list or tuple, an array or tensor with one dimension; its numbers may be truth values, or of
    numpy and torch.

    Raises TrainingError: another number of values, or one that is no finite number.
    """
    values = _without_arrays(values)
    if not isinstance(values, list | tuple):
        kind = type(values).__name__
        raise TrainingError(f"Reward {name} returned {kind}, not a list of {n} numbers.")
    if len(values) != n:
        raise TrainingError(f"Reward {name} returned {len(values)} values for {n} drawings.")
    rewards = torch.full((n,), math.nan, dtype=torch.float64)
    for index, value in enumerate(map(_without_arrays, values)):
        if value is None:
            continue
        if not isinstance(value, int | float) or not abs(value) <= LARGEST:
            raise TrainingError(
                f"Reward {name} returned {reprlib.repr(value)} for drawing {index + 1} of {n}; it "
                "must be a finite number, or None where the reward does not apply."
            )
        rewards[index] = float(value)
    return rewards


def _without_arrays(value: object) -> object:
    """Arrays, tensors and their numbers as lists and Python's numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def weighted_sum(rewards: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The sum `[N]` of those of some rewards `[N]` that apply to each drawing; NaN: none does."""
    table = torch.stack([*rewards])
    totals = (table * table.new_tensor(weights)[:, None]).nansum(0)
    return totals.masked_fill(table.isnan().all(0), math.nan)


def geneval_reward(model: str, records: Records, device: torch.device) -> Reward:
    """1 if a detector finds what the rules of GenEval ask for, else 0.

    model: a detector of `load_detector`. records: lines of `evaluation_metadata.jsonl`.
    """
    from seed_multimodal.evaluation.detection import load_detector
    from seed_multimodal.evaluation.geneval import (
        check_classes,
        counted_detections,
        object_prompt,
        rule_faults,
    )

    detector = load_detector(model, device)
    prompts = [
        object_prompt(index, f"data: prompt {record.get('prompt')!r}", record)
        for index, record in enumerate(records)
    ]
    check_classes(detector, prompts)
    for prompt in prompts:
        if any(item.colour for item in prompt.item.include) and not detector.knows_colours:
            raise ConfigError(f"{prompt.location}: {model} does not know colours.")

    def reward(images: Sequence[Image.Image], records: Records) -> list[float]:
        prompts = [object_prompt(index, "", record) for index, record in enumerate(records)]
        found = detector.detect(images, [prompt.labels for prompt in prompts])
        values: list[float] = []
        for prompt, detections in zip(prompts, found, strict=True):
            kept = counted_detections(prompt, detections, detector.limits)
            values.append(float(not rule_faults(prompt, kept)))
        return values

    return reward


def judge_reward(model: str, records: Records, device: torch.device) -> Reward:
    """The probability of "yes" to the question whether an image shows its prompt.

    model: an image-text model of transformers, or a system.
    """
    from seed_multimodal.evaluation.judges import Question, answer_forms, load_judge

    judge = load_judge(model, device)
    answers = [answer_forms("yes"), answer_forms("no")]

    def reward(images: Sequence[Image.Image], records: Records) -> list[float]:
        values: list[float] = []
        for image, record in zip(images, records, strict=True):
            question = Question(QUESTION.format(record["prompt"].rstrip(".")), answers)
            ((yes, no),) = judge.probabilities(image, [question])
            values.append(yes / (yes + no))
        return values

    return reward


def clip_reward(model: str, records: Records, device: torch.device) -> Reward:
    """The cosine of image and prompt in CLIP's space; model: its folder, or OpenAI's file."""
    from seed_multimodal.config import project_path
    from seed_multimodal.evaluation.clip import Clip

    clip = Clip(project_path(model), device)

    def reward(images: Sequence[Image.Image], records: Records) -> list[float]:
        texts = clip.texts([record["prompt"] for record in records])
        return (clip.images(images) * texts).sum(-1).tolist()

    return reward


BUILT_IN: dict[str, OpenReward] = {
    "geneval": geneval_reward,
    "judge": judge_reward,
    "clip": clip_reward,
}
