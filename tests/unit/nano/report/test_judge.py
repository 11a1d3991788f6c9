"""The judge: training on a small world, labels, features, its folder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from seed_multimodal.errors import CheckpointError
from seed_multimodal.training.config import StageSettings
from seed_multimodal.training.trainer import train
from seed_nano.report.judge import Judge, JudgeConfig, JudgeTask, pixels_of
from seed_nano.world.scene import Scene, render
from seed_nano.world.targets import JUDGE_CLASSES, label_tensor


def few_things(seed: int, index: int) -> Scene:
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
    train(
        JudgeTask(settings, folder / "judge", torch.device("cpu"), config, few_things, probes=4),
        settings,
        folder,
    )
    return Judge.from_pretrained(folder / "judge")


FRESH = [few_things(7, index) for index in range(48)]


def images(scenes: list[Scene]) -> list[Image.Image]:
    return [Image.fromarray(render(scene)) for scene in scenes]


@pytest.mark.slow
def test_labels_of_a_trained_judge(trained: Judge):
    right = (trained.labels(images(FRESH)) == label_tensor(FRESH, JUDGE_CLASSES)).float().mean(0)
    assert right.min() >= 0.5 and right[:2].min() >= 0.9, right
    assert set(trained.config.training["real_pictures"]) == {
        "val",
        "pairs",
        "places",
        "counts",
        "styles",
        "things",
    }


@pytest.mark.slow
def test_features_are_nearest_for_the_same_scene(trained: Judge):
    real = trained.read(images(FRESH))[1]
    assert real.norm(dim=1).numpy() == pytest.approx(1, abs=1e-5)
    nearest = (
        trained.read([image.resize((40, 40)) for image in images(FRESH)])[1] @ real.T
    ).argmax(1)
    assert (
        np.mean([FRESH[int(i)].key == scene.key for i, scene in zip(nearest, FRESH, strict=True)])
        >= 0.9
    )


def test_from_pretrained_of_a_folder_without_a_judge(tmp_path):
    with pytest.raises(CheckpointError, match="no judge in this folder"):
        Judge.from_pretrained(tmp_path)
    Judge(JudgeConfig(layout_width=8)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "layout_width": 16}))
    with pytest.raises(CheckpointError, match="narrow"):
        Judge.from_pretrained(tmp_path)


def test_pixels_of_averages_areas():
    array = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    by_hand = array.reshape(32, 2, 32, 2, 3).mean((1, 3)) / 127.5 - 1
    assert pixels_of(Image.fromarray(array), 32)[0].permute(1, 2, 0).numpy() == pytest.approx(
        by_hand, abs=1e-5
    )
    assert pixels_of(Image.new("L", (20, 90), 255), 32).unique().tolist() == [1.0]
