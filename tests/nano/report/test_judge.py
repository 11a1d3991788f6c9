"""The independent judge: its folder, its size, its training (really trained on a small world) and resuming."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from known_world import few_things
from PIL import Image

from seed_multimodal.errors import CheckpointError, DataError
from seed_nano.report import train_judge
from seed_nano.report.augment import augment
from seed_nano.report.judge import Judge, JudgeConfig, pixels_of
from seed_nano.world.scene import Scene, render
from seed_nano.world.targets import JUDGED, label_tensor
from seed_nano.world.things import HELD_OUT

FRESH = [few_things(7, index) for index in range(48)]


def pictures(scenes: list[Scene]) -> np.ndarray:
    return np.stack([render(scene) for scene in scenes])


def test_training_makes_it_read_scenes(trained: Judge) -> None:
    right = (trained.labels(pictures(FRESH)) == label_tensor(FRESH, JUDGED)).float().mean(0)
    assert right.min() >= 0.7 and right[:2].min() >= 0.9, right
    # The same things the other way round are another picture to it.
    turned = [scene.but(things=scene.things[::-1]) for scene in FRESH if scene.layout == "left of"]
    read = trained.labels(pictures(turned))
    assert (read[:, :2] == label_tensor(turned, JUDGED)[:, :2]).float().mean() >= 0.9


def test_features_find_the_same_scene(trained: Judge) -> None:
    real = trained.embed_images(pictures(FRESH))
    assert real.norm(dim=1).numpy() == pytest.approx(1, abs=1e-5) and real.shape[1] == trained.features
    blurred = [Image.fromarray(p).resize((40, 40)).resize((64, 64)) for p in pictures(FRESH)]
    nearest = (trained.embed_images(blurred) @ real.T).argmax(1)
    same = [FRESH[int(i)].key == scene.key for i, scene in zip(nearest, FRESH, strict=True)]
    assert np.mean(same) >= 0.9


def test_folder_round_trip(trained: Judge, tmp_path) -> None:
    again = Judge.from_pretrained(trained.save_pretrained(tmp_path / "judge"))
    assert again.config == trained.config
    assert torch.equal(trained.labels(pictures(FRESH)), again.labels(pictures(FRESH)))
    before, after = trained.embed_images(pictures(FRESH)), again.embed_images(pictures(FRESH))
    assert torch.nn.functional.cosine_similarity(before, after).min() > 0.9999  # stored as fp16
    empty = again.read([])
    assert empty[0].shape == (0, 5) and empty[1].shape == (0, again.features)


def test_stopped_and_resumed_training_ends_bit_equal(run_judge, tmp_path) -> None:
    whole = run_judge(tmp_path / "whole", 4)
    run_judge(tmp_path / "parts", 4, stop_after=2)
    parts = run_judge(tmp_path / "parts", 4)
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_missing_and_foreign_folders(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no judge in this folder"):
        Judge.from_pretrained(tmp_path)
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read \(Not a directory"):
        Judge.from_pretrained(tmp_path / "taken")
    for text in ('{"widths": [16], "model_type": "llama"}', '{"widths": [64, 96], "words": ["cat"], "styles": []}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="not a config of a judge of scenes"):
            Judge.from_pretrained(tmp_path)
    other = {**JudgeConfig().labels, "style": ["pencil", "noto", "twemoji"]}
    Judge(JudgeConfig(labels=other)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="a judge of another world"):
        Judge.from_pretrained(tmp_path)


def test_shipped_size_stays_small() -> None:
    assert sum(p.numel() for p in Judge(JudgeConfig()).parameters()) <= 1_500_000


def test_it_is_trained_on_everything() -> None:
    scenes = [train_judge.judge_scene(1, index) for index in range(400)]
    assert {name for scene in scenes for name in scene.things} >= set(HELD_OUT)
    assert (label_tensor(scenes, JUDGED) >= 0).all()
    assert train_judge.judge_scene(1, 7) == scenes[7] != train_judge.judge_scene(2, 7)


def test_accuracy_on_real_pictures_is_by_split_and_label(trained: Judge) -> None:
    scores = train_judge.real_picture_scores(trained, 6)
    assert set(scores) == {"train", "val", "pairs", "places", "counts", "styles", "things"}
    assert set(scores["val"]) == {*JUDGED, "all"} and scores["things"]["first"] == 0


def test_pictures_of_any_size_and_kind() -> None:
    array = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    images = [Image.fromarray(a) for a in array]
    assert torch.equal(pixels_of(array, 32), pixels_of(images, 32))
    # Halving is the mean of 2x2 pixels.
    by_hand = array.reshape(3, 32, 2, 32, 2, 3).mean((2, 4)) / 127.5 - 1
    assert pixels_of(array, 32).permute(0, 2, 3, 1).numpy() == pytest.approx(by_hand, abs=1e-5)
    sizes = [(1, 7), (20, 90), (100, 33)]
    assert pixels_of([Image.new("L", size, 255) for size in sizes], 32).unique().tolist() == [1.0]
    with pytest.raises(DataError, match="uint8"):
        pixels_of(array.astype(np.float32), 32)


def test_augmentation_is_repeatable_and_changes_pictures() -> None:
    pixels = torch.from_numpy(pictures(FRESH)).permute(0, 3, 1, 2)
    one = augment(pixels, 64, torch.Generator().manual_seed(1))
    assert torch.equal(one, augment(pixels, 64, torch.Generator().manual_seed(1)))
    other = augment(pixels, 64, torch.Generator().manual_seed(2))
    assert one.shape == (48, 3, 64, 64) and one.min() >= -1 and one.max() <= 1
    assert (one - other).abs().mean() > 0.02
    # Still pictures of the same colours, a part of them as they were.
    plain = pixels_of(pictures(FRESH), 64)
    assert np.corrcoef(one.mean((2, 3)).flatten().numpy(), plain.mean((2, 3)).flatten().numpy())[0, 1] > 0.9
    assert 0 < (one == plain).all(1).all(1).all(1).sum() < 24
