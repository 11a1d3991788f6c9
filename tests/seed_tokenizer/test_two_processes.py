"""Stage 1 as two processes under torchrun: the losses of one process with a double batch, equal weights everywhere."""

from __future__ import annotations

import pytest
import torch
from lavis_runs import torchrun


def test_as_one_process_with_a_double_batch(yaml, run, start, losses, tmp_path, capsys):
    import train

    options = ("model.gather_gradient=True", "run.clip_grad=0")
    out, (first, second) = torchrun(start, tmp_path, yaml("stage1", *options, name="two"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert out.count("Stage 1 (causal Q-Former): 8 steps, 128 pictures") == 1  # rank 0 only
    run(yaml("stage1", *options, "run.batch_size_train=16", name="one"))
    two, one = losses(tmp_path / "two", "stage1"), losses(tmp_path / "one", "stage1")
    assert list(two) == list(one) == list(range(1, 9))
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-4)

    # One process cannot go on with what two have trained, finished or not.
    capsys.readouterr()
    assert train.main(yaml("stage1", *options, "run.max_epoch=3", name="two")) == 2
    error = capsys.readouterr().err
    assert "had 2 processes of 8 x 1 samples" in error and error.count("\n") == 1
    assert (tmp_path / "two" / "stage1.done.json").is_file()
    (tmp_path / "two" / "stage1.done.json").unlink()
    before = (tmp_path / "two" / "stage1.state.pt").read_bytes()
    assert train.main(yaml("stage1", *options, "run.max_epoch=3", name="two")) == 2
    error = capsys.readouterr().err
    assert "was saved by a run with 2 processes, this one has 1" in error and error.count("\n") == 1
    assert (tmp_path / "two" / "stage1.state.pt").read_bytes() == before
