"""Stage 1 as two processes under torchrun: the losses of one process with a double batch, equal weights everywhere."""

from __future__ import annotations

import pytest
import torch
import warm_python
from lavis_runs import APPLICATION, ROOT, torchrun


@pytest.mark.process
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
    assert "was saved by a run with 2 processes, this one has 1" in error and error.count("\n") == 1
    assert (tmp_path / "two" / "stage1.done.json").is_file()
    (tmp_path / "two" / "stage1.done.json").unlink()
    kept = tmp_path / "two" / "stage1.checkpoints" / "checkpoint-8" / "model.safetensors"
    before = kept.read_bytes()
    assert train.main(yaml("stage1", *options, "run.max_epoch=3", name="two")) == 2
    error = capsys.readouterr().err
    assert "was saved by a run with 2 processes, this one has 1" in error and error.count("\n") == 1
    assert kept.read_bytes() == before


TOGETHER = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
import torch.distributed as dist
from seed_lavis import register
register()
from seed_lavis.datasets import count_bad
from seed_lavis.resume import prepare_resume
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
rank = dist.get_rank()
folder = Path(sys.argv[1])
run = SimpleNamespace(folder=folder, stage="stage1", options=SimpleNamespace(resume="auto", resume_ckpt_path="nowhere"))
task = SimpleNamespace(checkpoint_folder="stage1.checkpoints", record_file="stage1.done.json")
time.sleep(rank)  # the second looks when the first has long decided
prepare_resume(run, task)
bad = count_bad([("a", "torn"), ("b", "torn")] if rank else [("a", "torn")])
(folder / str(rank)).write_text(str(bad))
dist.destroy_process_group()
"""


@pytest.mark.process
def test_all_processes_find_a_done_run_however_late_they_look_and_count_bad_samples_once(start, tmp_path):
    (tmp_path / "stage1.checkpoints" / "checkpoint-4").mkdir(parents=True)
    done = tmp_path / "stage1.done.json"
    done.write_text('{"steps": 10, "batch_size": 8, "processes": 2}')
    (tmp_path / "together.py").write_text(TOGETHER)
    process = start(warm_python.PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                    str(tmp_path / "together.py"), str(tmp_path), PYTHONPATH=f"{ROOT / 'src'}:{APPLICATION}")
    _, error = process.communicate(timeout=170)
    assert process.returncode == 0, error
    assert done.exists() and [(tmp_path / rank).read_text() for rank in "01"] == ["2", "2"]
