"""Stage 1 in two processes: the losses of one with a double batch, another number at a resume, a process that hangs."""

from __future__ import annotations

import signal
import socket
import sys
import time

import pytest
import torch
import warm_python
from lavis_runs import APPLICATION, ROOT, torchrun

from seed_multimodal.training.failures import STUCK


@pytest.mark.process
@pytest.mark.slow
def test_two_processes_one_and_two_again_are_one_with_a_double_batch(yaml, run, start, losses, tmp_path, capsys):
    """The order of samples follows from the step and the samples of all processes together, so their number may change
    at a resume: the losses of a run that was never stopped."""
    import train

    options = ("model.gather_gradient=True", "run.clip_grad=0", "run.init_lr=1e-3", "run.min_lr=1e-3")
    out, (first, second) = torchrun(start, tmp_path, yaml("stage1", *options, "run.max_epoch=1", name="some"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert out.count("Stage 1 (causal Q-Former): 4 steps, 64 pictures") == 1  # rank 0 only
    single = (*options, "run.batch_size_train=16")
    run(yaml("stage1", *single, "run.max_epoch=2", name="some"))
    assert "the checkpoint was saved with 2 processes, this run has 1." in capsys.readouterr().out
    out, (first, second) = torchrun(start, tmp_path, yaml("stage1", *options, "run.max_epoch=3", name="some"))
    assert "the checkpoint was saved with 1 processes, this run has 2." in out and "(step 8)" in out
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    run(yaml("stage1", *single, "run.max_epoch=3", name="one"))
    some, one = losses(tmp_path / "some", "stage1"), losses(tmp_path / "one", "stage1")
    assert list(some) == list(one) == list(range(1, 13))
    assert list(some.values()) == pytest.approx(list(one.values()), rel=1e-4)

    # With other samples in a step, each step would see others: refused, finished or not.
    for name in ("stage1.done.json", None):
        capsys.readouterr()
        assert train.main(yaml("stage1", *options, "run.max_epoch=4", name="some")) == 2
        error = capsys.readouterr().err
        assert "was saved by a run with 16 samples per step, this one has 8" in error and error.count("\n") == 1
        if name:
            (tmp_path / "some" / name).unlink()
    assert (tmp_path / "some" / "stage1.checkpoints" / "checkpoint-12" / "model.safetensors").is_file()


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


@pytest.mark.process
def test_a_process_that_hangs_ends_the_other_after_the_time_given(yaml, start, losses, tmp_path):
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = str(place.getsockname()[1])
    arguments = yaml("stage1", "run.iters_per_epoch=100000", "run.timeout_minutes=0.05", "run.save_seconds=0",
                     "run.num_workers=0", "run.tensorboard=False", name="hang")
    # The second is no child of the warm interpreter, so that the signal stops the process itself.
    both = [start(python, "train.py", *arguments, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                  MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            for rank, python in enumerate((warm_python.PYTHON, sys.executable))]
    log = tmp_path / "hang" / "stage1.log.jsonl"
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and both[0].poll() is None and not log.is_file():
            time.sleep(0.05)
        both[1].send_signal(signal.SIGSTOP)
        out, error = both[0].communicate(timeout=60)
    finally:
        both[1].kill()
        both[1].communicate()
    assert both[0].returncode in (2, STUCK), out + error
    assert "did not answer" in error or "has taken more than 0.05 minutes" in error, error
    assert "the same command resumes from there" in error and "Traceback" not in error
