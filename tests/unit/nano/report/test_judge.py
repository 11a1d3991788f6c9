"""The judge: training on a small world, labels, features, its folder."""

import numpy as np
import pytest
import torch
from PIL import Image

from seed_multimodal.training.config import StageSettings
from seed_multimodal.training.trainer import train
from seed_nano.report.judge import Judge, JudgeConfig, JudgeTask
from seed_nano.world.scene import Scene, render
from seed_nano.world.targets import JUDGE_CLASSES, label_tensor


def few_things(seed, index) -> Scene:
    """Three things, two backgrounds, alone or side by side."""
    things = ("sun", "tree", "whale")
    first = things[index % 3]
    second = things[(index + 1 + index // 3 % 2) % 3]
    layout = ("large", "left of")[index // 6 % 2]
    return Scene(
        ("noto", "fluent")[index // 12 % 2],
        ("white", "sea")[index // 24 % 2],
        layout,
        (first, second) if layout == "left of" else (first,),
        jitter=index + 1000 * seed,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Judge:
    folder = tmp_path_factory.mktemp("judge")
    settings = StageSettings(
        max_steps=100, batch_size=16, learning_rate=3e-3, warmup_steps=5, seed=5, curves=False
    )
    config = JudgeConfig(image_size=32, widths=(16, 24), blocks=(0, 1))
    device = torch.device("cpu")
    task = JudgeTask(settings, folder / "judge", device, config, few_things, probes=4)
    train(task, folder)
    return Judge.from_pretrained(folder / "judge")


FRESH = [few_things(7, index) for index in range(48)]


@pytest.mark.nightly
def test_a_trained_judge_reads_scenes_and_finds_equal_ones(trained):
    drawings = [Image.fromarray(render(scene)) for scene in FRESH]
    right = (trained.labels(drawings) == label_tensor(FRESH, JUDGE_CLASSES)).float().mean(0)
    assert right.min() >= 0.5
    assert right[:2].min() >= 0.9
    # Features are nearest for the same scene.
    features = trained.read(drawings)[1]
    resized = trained.read([image.resize((40, 40)) for image in drawings])[1]
    nearest = (resized @ features.T).argmax(1)
    same = [FRESH[int(row)].key == scene.key for row, scene in zip(nearest, FRESH, strict=True)]
    assert np.mean(same) >= 0.9
