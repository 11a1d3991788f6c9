"""The judge: reading, its folder, training on a small world, resuming."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seed_multimodal.errors import CheckpointError
from seed_multimodal.training.loop import train
from seed_multimodal.training.loop_settings import StageSettings
from seed_nano.report.judge import Judge, JudgeConfig, JudgeTask, augmentations, find_judge, judge_scene, pixels_of
from seed_nano.world.scene import Scene, render
from seed_nano.world.splits import scenes
from seed_nano.world.targets import JUDGED, label_tensor
from seed_nano.world.things import HELD_OUT

SHIPPED = Path(__file__).resolve().parents[4] / "pretrained" / "nano" / "judge"


def few_things(seed: int, index: int) -> Scene:
    """Three things, two backgrounds, alone or side by side."""
    things = ("sun", "tree", "whale")
    one, other = things[index % 3], things[(index + 1 + index // 3 % 2) % 3]
    layout = ("large", "left of")[index // 6 % 2]
    return Scene(("noto", "fluent")[index // 12 % 2], ("white", "sea")[index // 24 % 2], layout,
                 (one, other) if layout == "left of" else (one,), jitter=index + 1000 * seed)


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def trained(run_judge, tmp_path_factory) -> Judge:
    return run_judge(tmp_path_factory.mktemp("judge"), 100)


FRESH = [few_things(7, index) for index in range(48)]


def images(shown: list[Scene]) -> list[Image.Image]:
    return [Image.fromarray(render(scene)) for scene in shown]


def test_training_makes_it_read_scenes(trained: Judge) -> None:
    right = (trained.labels(images(FRESH)) == label_tensor(FRESH, JUDGED)).float().mean(0)
    assert right.min() >= 0.7 and right[:2].min() >= 0.9, right
    assert set(trained.config.training["real_pictures"]) == {"val", "pairs", "places", "counts", "styles", "things"}


def test_features_find_the_same_scene(trained: Judge) -> None:
    real = trained.read(images(FRESH))[1]
    assert real.norm(dim=1).numpy() == pytest.approx(1, abs=1e-5)
    nearest = (trained.read([one.resize((40, 40)) for one in images(FRESH)])[1] @ real.T).argmax(1)
    assert np.mean([FRESH[int(i)].key == scene.key for i, scene in zip(nearest, FRESH, strict=True)]) >= 0.9


def test_shipped_judge_reads_every_split() -> None:
    judge = Judge.from_pretrained(SHIPPED)
    for split in ("val", "things"):
        shown = scenes(split)[:60]
        assert (judge.labels(images(shown)) == label_tensor(shown, JUDGED)).all(1).float().mean() >= 0.95, split


def test_save_pretrained_round_trip(trained: Judge, tmp_path: Path) -> None:
    again = Judge.from_pretrained(trained.save_pretrained(tmp_path))
    assert torch.equal(trained.labels(images(FRESH)), again.labels(images(FRESH)))
    assert again.config.training == trained.config.training and again.labels([]).shape == (0, 5)


def test_resumed_training_ends_bit_equal(run_judge, tmp_path: Path) -> None:
    whole = run_judge(tmp_path / "whole", 4)
    run_judge(tmp_path / "parts", 4, stop_after=2)
    parts = run_judge(tmp_path / "parts", 4)
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_from_pretrained_of_other_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no judge in this folder"):
        Judge.from_pretrained(tmp_path)
    Judge(JudgeConfig(layout_width=8)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "layout_width": 16}))
    with pytest.raises(CheckpointError, match="narrow"):
        Judge.from_pretrained(tmp_path)


def test_find_judge_prefers_the_systems_own(tmp_path: Path) -> None:
    assert find_judge("nano").resolve() == find_judge(tmp_path).resolve() == SHIPPED
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "config.json").write_text("{}")
    assert find_judge(tmp_path) == tmp_path / "judge" and find_judge(tmp_path, tmp_path) == tmp_path


def test_training_scenes_cover_held_out_things() -> None:
    assert {name for index in range(400) for name in judge_scene(1, index).things} >= set(HELD_OUT)


def test_pixels_of_averages_areas() -> None:
    array = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    by_hand = array.reshape(32, 2, 32, 2, 3).mean((1, 3)) / 127.5 - 1
    assert pixels_of(Image.fromarray(array), 32)[0].permute(1, 2, 0).numpy() == pytest.approx(by_hand, abs=1e-5)
    assert pixels_of(Image.new("L", (20, 90), 255), 32).unique().tolist() == [1.0]


def test_augmentations_change_a_part() -> None:
    torch.manual_seed(0)
    plain = torch.cat([pixels_of(one, 64) for one in images(FRESH)])
    changed = torch.stack([augmentations(64)(one) for one in images(FRESH)])
    assert changed.shape == plain.shape and (changed - plain).abs().mean() > 0.01
    assert np.corrcoef(changed.mean((2, 3)).flatten(), plain.mean((2, 3)).flatten())[0, 1] > 0.9
    assert 0 < torch.isclose(changed, plain, atol=1e-5).flatten(1).all(1).sum() < 24
