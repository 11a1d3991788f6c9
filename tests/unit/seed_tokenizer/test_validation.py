"""Held-out losses (`run.valid_splits`, evaluate.py), which do not change the training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lavis_runs import log_of, torchrun
from tensors import equal

# Everything that draws random numbers between steps: k-means start, restarts of dead codes, a data
# worker.
OPTIONS = (
    "model.load_pretrained=False",
    "model.restart_every=2",
    "run.num_workers=1",
    "run.max_epoch=3",
    "run.iters_per_epoch=4",
    "run.log_freq=3",
)


def held_out_lines(folder: Path) -> list[dict[str, float]]:
    """Lines of log.txt with held-out losses; the file begins with the configuration."""
    lines = (folder / "log.txt").read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and "valid_loss" in line]


@pytest.mark.process
def test_train_is_the_same_with_and_without_validation(yaml, run, tmp_path, capsys):
    import evaluate

    plain = run(yaml("stage2", *OPTIONS, name="plain"))
    valid = run(
        yaml("stage2", *OPTIONS, "run.valid_splits=[val]", "run.tensorboard=True", name="valid")
    )
    assert equal(plain.model.state_dict(), valid.model.state_dict())
    validated = log_of(tmp_path / "valid", "stage2")
    without = log_of(tmp_path / "plain", "stage2")
    assert list(without) == [3, 6, 9, 12] and list(validated) == [3, 4, 6, 8, 9, 12]
    for step, line in without.items():
        assert all(
            validated[step][key] == line[key] for key in ("loss", "last_loss", "grad", "loss_embed")
        )
    last = validated[12]
    assert {
        "valid/val/loss",
        "valid/val/loss_embed",
        "valid/val/codebook_used",
        "valid/val/perplexity",
    } <= set(last)
    assert 0 < last["valid/val/codebook_used"] <= 1 <= last["valid/val/perplexity"] <= 64
    assert sorted(file.name for file in (tmp_path / "valid" / "samples").iterdir()) == [
        "val-0.png",
        "val-1.png",
        "val-2.png",
    ]
    assert [line["valid_epoch"] for line in held_out_lines(tmp_path / "valid")] == [0, 1, 2]

    capsys.readouterr()
    saved = (
        "model.load_pretrained=False",
        "model.load_finetuned=True",
        f"model.finetuned={tmp_path}/valid/checkpoint_2.pth",
    )
    assert evaluate.main(yaml("stage2", *saved, "run.test_splits=[val]", name="eval")) == 0
    means = json.loads(capsys.readouterr().out.splitlines()[-1])["val"]
    assert means["samples"] == 24 and means["loss"] > 0 and 0 < means["codebook_used"] <= 1


@pytest.mark.process
def test_train_in_two_processes_that_share_the_split(yaml, run, start, tmp_path):
    options = (
        "model.load_pretrained=False",
        "model.kmeans_start=False",
        "model.restart_every=0",
        "run.max_epoch=1",
        "run.valid_splits=[val]",
        "run.clip_grad=0",
        "run.num_workers=0",
    )
    _, (first, second) = torchrun(start, tmp_path, yaml("stage2", *options, name="two"))
    assert equal(first, second)
    run(yaml("stage2", *options, "run.batch_size_train=16", name="one"))
    pair, single = (log_of(tmp_path / name, "stage2")[4] for name in ("two", "one"))
    keys = [key for key in single if key.startswith("valid/")]
    assert len(keys) >= 5 and [pair[key] for key in keys] == pytest.approx(
        [single[key] for key in keys], rel=1e-3
    )


@pytest.mark.parametrize(
    ("total", "batch", "world", "expected"),
    [
        (24, 16, 1, (12, 2)),
        (1001, 64, 4, (62, 4)),
        (5, 64, 4, (1, 1)),
        (7, 3, 1, (2, 3)),
        (5, 1, 2, (1, 2)),
    ],
)
def test_share_out(total, batch, world, expected):
    from seed_lavis.task import share_out

    size, count = share_out(total, batch, world)
    assert (
        (size, count) == expected
        and size <= batch
        and 0 <= total - size * count * world < count * world
    )
