"""Training by rewards of a system whose drawings are their codes; also a program, one process of
several: `python rl_runs.py FOLDER SYSTEM`."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from data_files import lines
from PIL import Image
from yaml_tables import read_tables

from seed_multimodal.entry import run_and_exit
from seed_multimodal.pipelines.family import Family
from seed_multimodal.rl import rewards
from seed_multimodal.rl.task import RlTask
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.trainer import train


def codes_as_pixels(family, inputs, prompts, seeds, settings) -> list[Image.Image]:
    """Instead of a de-tokenizer: one pixel for each code; the settings and the seed in `info`."""
    images = [Image.frombytes("L", (len(codes), 1), bytes(codes)) for codes in inputs]
    for image, seed in zip(images, seeds, strict=True):
        image.info.update(settings, seed=seed)
    return images


def low_codes(images, records) -> list[float]:
    """The share of codes below 8, as `codes_as_pixels` shows them."""
    return [sum(code < 8 for code in image.tobytes()) / image.width for image in images]


def run(folder, system, functions: Mapping[str, Callable], **settings) -> RlTask:
    """Train two steps of two groups of four; returns the task.

    functions: rewards of these names.
    settings: of each group; `evaluated`: number of prompts.
    """
    evaluated = [{"prompt": f"a bird {index}"} for index in range(settings.pop("evaluated", 0))]
    defaults = read_tables(__file__)
    groups = {
        "model": {"system": str(system)},
        "data": {
            "prompts": str(lines(folder / "prompts.jsonl", [{"prompt": "a fish"}] * 3)),
            "eval_prompts": str(lines(folder / "eval.jsonl", evaluated)) if evaluated else None,
            "rewards": [{"name": name} for name in functions],
            **defaults["data"],
        },
        "optim": defaults["optim"],
        "trainer": {**defaults["trainer"], "eval_steps": int(bool(evaluated))},
    }
    config = {"output_dir": str(folder / "out"), **settings}
    for group, values in groups.items():
        config[group] = {**values, **settings.get(group, {})}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Family, "draw", codes_as_pixels)
        for name, function in functions.items():
            patch.setitem(rewards.BUILT_IN, name, lambda *opened, function=function: function)
        task = RlTask(RlTask.run_type.read(config), ProcessGroup(), torch.device("cpu"))
        train(task, folder / "out")
    return task


def ranks(images, records) -> list[float]:
    """The process's number, but in the first group of the second process."""
    assert images  # there may be fewer prompts of an evaluation than processes
    rank = int(os.environ["RANK"])
    return [rank + 0.1 * rank * (-1) ** index * (index < 4) for index in range(len(images))]


def main() -> int:
    torch.distributed.init_process_group("gloo")
    run(Path(sys.argv[1]), sys.argv[2], {"mine": ranks}, evaluated=1)
    return 0


if __name__ == "__main__":
    run_and_exit(main)  # as the programs end: Python's tear-down after gloo may abort
