"""What the tests of evaluation share: the samples of a small report, who knows them, and a judge that was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from known_world import KnowingJudge, Oracle, few_things

from seed_multimodal.training.loop import train
from seed_multimodal.training.loop_settings import StageSettings
from seed_nano.report import train_judge
from seed_nano.report.judge import Judge, JudgeConfig
from seed_nano.report.samples import Samples, Sizes, make_samples

SIZES = Sizes.limited(12)


@pytest.fixture(scope="session")
def val() -> Samples:
    return make_samples("val", SIZES)


@pytest.fixture(scope="session")
def knowing() -> KnowingJudge:
    return KnowingJudge()


@pytest.fixture(scope="session")
def oracle(knowing: KnowingJudge, val: Samples) -> Oracle:
    return Oracle(knowing, val)


@pytest.fixture(scope="session")
def run_judge():
    """Train a small judge on that world: (folder, steps, stop_after=None)."""
    def run(folder: Path, steps: int, stop_after: int | None = None, seed: int = 5) -> Judge:
        settings = StageSettings(steps=steps, batch_size=24, lr=3e-3, warmup=5, seed=seed, curves=False)
        config = JudgeConfig(widths=(16, 24, 32), blocks=(0, 1, 1))
        task = train_judge.JudgeTask(settings, folder / "judge", torch.device("cpu"), config, few_things, probes=4)
        if stop_after is not None:  # as data that ends: the checkpoint of that step is what is left
            task.begin_step = lambda step: step < stop_after
        train(task, task.settings, folder)
        return task.judge.eval()

    return run


@pytest.fixture(scope="session")
def trained(run_judge, tmp_path_factory) -> Judge:
    """A judge that really learned its small world."""
    return run_judge(tmp_path_factory.mktemp("judge"), 100)
