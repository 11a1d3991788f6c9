"""`run.valid_splits`: held-out losses during training, which goes on as if nothing had been evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lavis_runs import log_of, torchrun

# Everything that draws random numbers between steps: k-means start, restarts of dead codes, a data worker.
OPTIONS = ("model.load_pretrained=False", "model.restart_every=2", "run.num_workers=1", "run.max_epoch=3",
           "run.iters_per_epoch=4", "run.log_freq=3")


def told_of(folder: Path) -> list[dict[str, float]]:
    """What log.txt, which begins with the configuration, says of held-out losses."""
    lines = (folder / "log.txt").read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and "valid_loss" in line]


@pytest.mark.process
def test_training_is_the_same_with_and_without(yaml, run, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain = run(yaml("stage2", *OPTIONS, name="plain"))
    valid = run(yaml("stage2", *OPTIONS, "run.valid_splits=[val]", "run.tensorboard=True", name="valid"))
    assert all(torch.equal(value, valid._model.state_dict()[name])
               for name, value in plain._model.state_dict().items())
    with_it, without = log_of(tmp_path / "valid", "stage2"), log_of(tmp_path / "plain", "stage2")
    assert list(without) == [3, 6, 9, 12] and list(with_it) == [3, 4, 6, 8, 9, 12]  # lines of their own
    for step, line in without.items():
        assert all(with_it[step][key] == line[key] for key in ("loss", "last_loss", "grad", "loss_embed"))
    records = [json.loads((tmp_path / name / "stage2.done.json").read_text()) for name in ("plain", "valid")]
    assert all(records[0][key] == records[1][key] for key in records[0] if key not in ("seconds", "checkpoint"))

    logged = {step: {key: value for key, value in line.items() if key.startswith("valid/")}
              for step, line in with_it.items()}
    assert [bool(numbers) for numbers in logged.values()] == [False, True, False, True, False, True]
    last = logged[12]
    assert {"valid/val/loss", "valid/val/loss_embed", "valid/val/codebook_used", "valid/val/perplexity"} <= set(last)
    assert 0 < last["valid/val/codebook_used"] <= 1 <= last["valid/val/perplexity"] <= 64
    assert logged[4]["valid/val/loss"] != last["valid/val/loss"]
    # what evaluate.py says of the same weights
    valid.options.test_splits = ["val"]
    means = valid.evaluate()["val"]
    assert means["samples"] == 24
    assert {f"valid/val/{key}": value for key, value in means.items() if isinstance(value, float)} == last

    told = told_of(tmp_path / "valid")
    assert [line["valid_epoch"] for line in told] == [0, 1, 2] and told[2]["valid_loss"] == last["valid/val/loss"]
    events = EventAccumulator(str(tmp_path / "valid" / "tensorboard" / "stage2"))
    events.Reload()
    assert [event.step for event in events.Scalars("valid/val/loss")] == [4, 8, 12]


@pytest.mark.process
def test_every_other_epoch_and_a_part_of_the_split(yaml, run, tmp_path):
    run(yaml("stage1", "run.max_epoch=3", "run.valid_splits=[val]", "run.valid_every_epochs=2", "run.valid_batches=2",
             "run.iters_per_epoch=1"))
    (told,) = told_of(tmp_path / "stage1")
    assert (told["valid_epoch"], told["valid_samples"]) == (1, 8) and told["valid_loss_itc"] > 0


@pytest.mark.process
def test_two_processes_share_the_split(yaml, run, start, tmp_path):
    options = ("model.load_pretrained=False", "model.kmeans_start=False", "run.valid_splits=[val]", "run.max_epoch=1",
               "run.clip_grad=0")
    torchrun(start, tmp_path, yaml("stage2", *options, name="two"))
    run(yaml("stage2", *options, "run.batch_size_train=16", name="one"))
    two, one = (log_of(tmp_path / name, "stage2")[4] for name in ("two", "one"))
    keys = [key for key in one if key.startswith("valid/")]
    assert len(keys) >= 5 and [two[key] for key in keys] == pytest.approx([one[key] for key in keys], rel=1e-3)


def test_a_split_that_is_not_there_is_refused_at_once(yaml, tmp_path, capsys):
    import train

    assert train.main(yaml("stage1", "run.valid_splits=[valid]")) == 2
    error = capsys.readouterr().err
    assert "has a split 'valid'" in error and error.count("\n") == 1
    assert not list((tmp_path / "stage1").glob("*.checkpoints"))


@pytest.mark.parametrize(("total", "batch", "world", "most", "expected"), [
    (24, 16, 1, 0, (12, 2)), (1001, 64, 1, 0, (62, 16)), (1001, 64, 4, 0, (62, 4)), (1001, 64, 4, 2, (62, 2)),
    (5, 64, 4, 0, (1, 1)), (7, 3, 1, 0, (2, 3)),
    (5, 1, 2, 0, (1, 2)), (1, 1, 1, 0, (1, 1))])
def test_shares_are_equal_and_leave_little_over(total, batch, world, most, expected):
    from seed_lavis.validation import share_out

    size, count = share_out(total, batch, world, most)
    assert (size, count) == expected and size <= batch
    assert most or 0 <= total - size * count * world < count * world


def test_too_few_pictures_for_the_processes(monkeypatch):
    from seed_lavis import register

    register()
    import torch.distributed as dist
    from seed_lavis.validation import mean_losses

    from seed_multimodal.errors import ConfigError

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    with pytest.raises(ConfigError, match="Split 'val' has 3 pictures, too few for 4 processes"):
        mean_losses(None, [0, 1, 2], batch_size=2, device=torch.device("cpu"), where="Split 'val'")
