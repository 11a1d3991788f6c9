"""The independent scorer: its folder, its size, its training (really trained on a toy set) and resuming."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from seed_multimodal.errors import CheckpointError, DataError
from seed_multimodal.evaluation import train_judge
from seed_multimodal.evaluation.augment import augment
from seed_multimodal.evaluation.judge import Judge, JudgeConfig, pixels_of, split_words
from seed_multimodal.weights import load_state_dict


def test_training_makes_it_know_the_pictures(toy, trained: Judge) -> None:
    untrained = train_judge.new_judge(train_judge.build_corpus(toy), 5).eval()
    scores = train_judge.real_picture_scores(trained, toy)
    blind = train_judge.real_picture_scores(untrained, toy)
    assert set(scores) == {"train", "val", "test_combo", "test_concept"}
    assert scores["train"]["pictures"] == scores["train"]["texts"] == 15
    assert scores["train"]["picture_to_text_r1"] >= 0.6 > blind["train"]["picture_to_text_r1"]
    assert scores["train"]["style"] >= 0.9


def test_folder_round_trip(toy, trained: Judge, tmp_path) -> None:
    folder = trained.save_pretrained(tmp_path / "judge")
    again = Judge.from_pretrained(folder)
    assert again.config == trained.config
    before, after = trained.embed_images(toy.images()), again.embed_images(toy.images())
    assert torch.nn.functional.cosine_similarity(before, after).min() > 0.9999  # stored as fp16
    assert after.norm(dim=1).numpy() == pytest.approx(1, abs=1e-5)
    texts = ["a flat drawing of red disc", "", "word_never_seen"]
    assert torch.allclose(trained.embed_texts(texts), again.embed_texts(texts), atol=2e-2)
    assert again.styles_of(after) == trained.styles_of(before)


def test_stopped_and_resumed_training_ends_bit_equal(run_judge, tmp_path) -> None:
    whole = run_judge(tmp_path / "whole", 6)
    run_judge(tmp_path / "parts", 6, stop_after=3)
    parts = run_judge(tmp_path / "parts", 6)
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_checkpoint_of_other_data_is_refused(toy, run_judge, tmp_path) -> None:
    run_judge(tmp_path, 1)
    toy_plan = train_judge.Plan(steps=2, batch=24, seed=6)
    with pytest.raises(CheckpointError, match="another data set, seed or batch"):
        train_judge.train_judge(train_judge.build_corpus(toy), toy_plan, tmp_path, torch.device("cpu"))


def test_missing_and_foreign_folders(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no judge in this folder"):
        Judge.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"widths": [16], "model_type": "llama"}')
    with pytest.raises(CheckpointError, match="not a judge's config"):
        Judge.from_pretrained(tmp_path)


def test_shipped_size_stays_small() -> None:
    judge = Judge(JudgeConfig(words=[f"w{i}" for i in range(3500)], styles=["a", "b", "c"]))
    assert sum(p.numel() for p in judge.parameters()) <= 1_500_000


def test_pictures_of_any_size_and_kind() -> None:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    images = [Image.fromarray(a) for a in array]
    assert torch.equal(pixels_of(array, 32), pixels_of(images, 32))
    # Halving is the mean of 2x2 pixels.
    by_hand = array.reshape(3, 32, 2, 32, 2, 3).mean((2, 4)) / 127.5 - 1
    assert pixels_of(array, 32).permute(0, 2, 3, 1).numpy() == pytest.approx(by_hand, abs=1e-5)
    sizes = [(1, 7), (20, 90), (100, 33)]
    assert pixels_of([Image.new("L", size, 255) for size in sizes], 32).unique().tolist() == [1.0]
    with pytest.raises(DataError, match="uint8"):
        pixels_of(array.astype(np.float32), 32)


def test_words() -> None:
    assert split_words("A twemoji-style Cat's face, No_1") == ["twemoji", "style", "cat", "s", "face", "no", "1"]


def test_loss_by_hand() -> None:
    images, texts = torch.eye(2), torch.eye(2)
    scale, right = torch.tensor(2.0), torch.eye(2, dtype=torch.bool)
    one = math.log(1 + math.exp(-2))  # -log(e^2 / (e^2 + e^0))
    assert train_judge.contrastive_loss(images, texts, scale, right).item() == pytest.approx(one, rel=1e-5)
    # Both texts right for both pictures: half of each row's weight lies on the wrong one, which costs 2 more.
    both = torch.ones(2, 2, dtype=torch.bool)
    assert train_judge.contrastive_loss(images, texts, scale, both).item() == pytest.approx(one + 1, rel=1e-5)


def test_what_a_corpus_holds(toy) -> None:
    corpus = train_judge.build_corpus(toy)
    assert corpus.style_names == ["flat", "line"] and len(corpus.labels.unique()) == 12
    for i, record in enumerate(toy.records):
        assert corpus.texts[int(corpus.canonical[i])] == record.captions[0]
        assert set(record.captions) == {corpus.texts[t] for t in corpus.captions[i]}
    named = {corpus.texts[t]: int(s) for t, s in enumerate(corpus.text_styles)}
    assert named["a line drawing of red disc"] == 1 and named["red disc"] == -1


def test_every_picture_is_seen_once_an_epoch() -> None:
    rows = [train_judge.batch_rows(24, 8, seed=1, step=step) for step in range(6)]
    assert sorted(torch.cat(rows[:3]).tolist()) == sorted(torch.cat(rows[3:]).tolist()) == list(range(24))
    assert torch.cat(rows[:3]).tolist() != torch.cat(rows[3:]).tolist()
    assert train_judge.batch_rows(24, 8, seed=1, step=4).tolist() == rows[4].tolist()


def test_augmentation_is_repeatable_and_changes_pictures(toy) -> None:
    pixels = torch.from_numpy(toy.images().transpose(0, 3, 1, 2).copy())
    one = augment(pixels, 32, torch.Generator().manual_seed(1))
    assert torch.equal(one, augment(pixels, 32, torch.Generator().manual_seed(1)))
    other = augment(pixels, 32, torch.Generator().manual_seed(2))
    assert one.shape == (24, 3, 32, 32) and one.min() >= -1 and one.max() <= 1
    assert (one - other).abs().mean() > 0.02
    # Still pictures of the same colours: the channel means follow those of the originals.
    plain = pixels_of(toy.images(), 32)
    assert np.corrcoef(one.mean((2, 3)).flatten().numpy(), plain.mean((2, 3)).flatten().numpy())[0, 1] > 0.7


def test_training_by_the_clock_ends_when_the_time_is_over(toy, tmp_path) -> None:
    plan = train_judge.Plan(minutes=0.5 / 60, batch=24, seed=5)
    judge, record = train_judge.train_judge(train_judge.build_corpus(toy), plan, tmp_path, torch.device("cpu"))
    assert 1 <= record["steps"] < 1000 and not judge.training
    kept = tmp_path / "judge.checkpoints" / f"checkpoint-{record['steps']}" / "model.safetensors"
    assert torch.equal(load_state_dict(kept)["log_scale"], judge.log_scale)
