"""A judge that was trained a little, on a small world."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from seed_multimodal.training.loop import train
from seed_multimodal.training.loop_settings import StageSettings
from seed_nano.report.judge import Judge, JudgeConfig, JudgeTask
from seed_nano.world.scene import Scene


def few_things(seed: int, index: int) -> Scene:
    """Three things, two backgrounds, alone or side by side."""
    things = ("sun", "tree", "whale")
    one, other = things[index % 3], things[(index + 1 + index // 3 % 2) % 3]
    layout = ("large", "left of")[index // 6 % 2]
    return Scene(("noto", "fluent")[index // 12 % 2], ("white", "sea")[index // 24 % 2], layout,
                 (one, other) if layout == "left of" else (one,), jitter=index + 1000 * seed)


@pytest.fixture(scope="session")
def run_judge():
    """Train a small judge: (folder, steps, stop_after=None)."""
    def run(folder: Path, steps: int, stop_after: int | None = None) -> Judge:
        settings = StageSettings(steps=steps, batch_size=24, lr=3e-3, warmup=5, seed=5, curves=False)
        config = JudgeConfig(widths=(16, 24, 32), blocks=(0, 1, 1))
        task = JudgeTask(settings, folder / "judge", torch.device("cpu"), config, few_things, probes=4)
        if stop_after is not None:  # as data that ends: the checkpoint of that step remains
            task.begin_step = lambda step: step < stop_after
        train(task, task.settings, folder)
        return task.judge.eval()

    return run


@pytest.fixture(scope="session")
def trained(run_judge, tmp_path_factory) -> Judge:
    return run_judge(tmp_path_factory.mktemp("judge"), 100)
