"""Held-out losses (`run.valid_splits`, evaluate.py), which do not change the training."""

import json

import pytest
from lavis_runs import APPLICATION, log_of
from llm_runs import environment
from real_processes import run_checked
from tensors import equal
from trainers import TWO
from warm_processes import PYTHON

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


@pytest.mark.slow
@pytest.mark.process
def test_train_is_the_same_with_and_without_validation(yaml, run, tmp_path):
    # Its random numbers and its k-means are not those of the training.
    plain = run(yaml("stage2", *OPTIONS, name="plain"))
    more = ("run.valid_splits=[val]", "run.tensorboard=True")
    valid = run(yaml("stage2", *OPTIONS, *more, name="valid"))
    assert equal(plain.model.state_dict(), valid.model.state_dict())
    validated = log_of(tmp_path / "valid", "stage2")
    without = log_of(tmp_path / "plain", "stage2")
    assert list(validated) == [3, 4, 6, 8, 9, 12]
    for step, line in without.items():
        for key in ("loss", "last_loss", "grad", "loss_embed"):
            assert validated[step][key] == line[key], (step, key)
    last = validated[12]
    assert last["valid/val/loss"] > 0
    assert 0 < last["valid/val/codebook_used"] <= 1 <= last["valid/val/perplexity"] <= 64
    assert len(list((tmp_path / "valid" / "samples").glob("val-*.png"))) == 3
    # The configuration is the beginning of this file.
    lines = (tmp_path / "valid" / "log.txt").read_text().splitlines()
    held_out = [line for line in lines if line.startswith("{") and "valid_loss" in line]
    assert [json.loads(line)["valid_epoch"] for line in held_out] == [0, 1, 2]


@pytest.mark.nightly
@pytest.mark.process
def test_train_in_two_processes_that_share_the_split(yaml, run, tmp_path):
    # Means over both, each image counted once.
    options = (
        "model.load_pretrained=False",
        "model.kmeans_start=False",
        "model.restart_every=0",
        "run.max_epoch=1",
        "run.valid_splits=[val]",
        "run.clip_grad=0",
        "run.num_workers=0",
    )
    arguments = yaml("stage2", *options, name="two")
    command = [PYTHON, *TWO, "train.py", *arguments]
    run_checked(command, 170, cwd=APPLICATION, env=environment())
    run(yaml("stage2", *options, "run.batch_size_train=16", name="one"))
    pair, single = (log_of(tmp_path / name, "stage2")[4] for name in ("two", "one"))
    keys = [key for key in single if key.startswith("valid/")]
    assert len(keys) >= 5
    expected = pytest.approx([single[key] for key in keys], rel=1e-3)
    assert [pair[key] for key in keys] == expected
