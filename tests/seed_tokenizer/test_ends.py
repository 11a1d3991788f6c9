"""Runs that end before their time end at once, data workers included, and leave a state to go on from."""

from __future__ import annotations

import json
import resource
import signal
import sys
import time

import pytest

SHORT = ("run.max_epoch=1", "run.iters_per_epoch=1", "run.batch_size_train=2")
OPTIONS = ("run.num_workers=1", "run.iters_per_epoch=400", "run.max_epoch=1", "run.batch_size_train=4")


def test_a_loss_that_is_not_finite(yaml, start, tmp_path):
    process = start(sys.executable, "train.py", *yaml("stage1", *OPTIONS, "run.init_lr=1e30", "run.warmup_steps=0",
                                                      "run.warmup_lr=-1"))
    _, error = process.communicate(timeout=150)
    assert process.returncode == 2 and "Traceback" not in error
    assert error.startswith("train.py: The ") and error.count("\n") == 1 and "nothing was saved yet" in error


def test_sigterm_finishes_the_step_and_saves(yaml, start, tmp_path):
    process = start(sys.executable, "train.py", *yaml("stage1", *OPTIONS))
    log = tmp_path / "stage1" / "stage1.log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not log.is_file():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    assert "the same command goes on from there" in out
    left = {file.name for file in (tmp_path / "stage1").iterdir()}
    assert "stage1.state.pt" in left and "stage1.done.json" not in left


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_run_ended_between_its_last_state_and_its_record(yaml, run, tmp_path, ema):
    """As SIGTERM in the last step, or a kill while the record is made, leaves it: no step is left to make."""
    options, folder = (*SHORT, f"run.ema={ema}"), tmp_path / "stage1"
    run(yaml("stage1", *options))
    before = json.loads((folder / "stage1.done.json").read_text())
    (folder / "stage1.done.json").unlink()
    run(yaml("stage1", *options))
    after = json.loads((folder / "stage1.done.json").read_text())
    assert (after["steps"], after["checkpoint"]) == (before["steps"], before["checkpoint"]) == (
        1, str(folder / "checkpoint_0.pth"))


def test_a_checkpoint_with_all_epochs_behind_it_is_no_start(yaml, run, tmp_path, capsys):
    import train

    run(yaml("stage1", *SHORT))
    file = tmp_path / "stage1" / "checkpoint_0.pth"
    assert train.main(yaml("stage1", *SHORT, f"run.resume_ckpt_path={file}", name="other")) == 2
    error = capsys.readouterr().err
    assert "has 1 epochs behind it, so run.max_epoch=1 leaves nothing to train" in error and error.count("\n") == 1
    assert not list((tmp_path / "other").glob("*.pt"))


def test_a_done_run_is_told_by_its_own_sizes_and_a_damaged_record_is_named(yaml, run, tmp_path, capsys):
    import train

    run(yaml("stage1", *SHORT))
    capsys.readouterr()
    run(yaml("stage1", *SHORT, "run.batch_size_train=8"))
    out = capsys.readouterr().out
    assert "already done" in out and "1 steps, 2 pictures in" in out
    (tmp_path / "stage1" / "stage1.done.json").write_text('{"stage": ')
    assert train.main(yaml("stage1", *SHORT)) == 2
    error = capsys.readouterr().err
    assert "stage1.done.json: not valid json" in error and "remove it" in error and error.count("\n") == 1


def test_a_disk_that_takes_nothing_is_one_sentence(yaml, tmp_path, capsys):
    """The system refuses to write beyond a size (RLIMIT_FSIZE): the logged settings, then the checkpoint."""
    import train

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size, sentence in ((100, "cannot be written (File too large)"),
                           (50_000, "checkpoint_0.pth: cannot be written (File too large)")):
        arguments = yaml("stage1", *SHORT, name=str(size))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            code = train.main(arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        error = capsys.readouterr().err
        assert code == 2 and sentence in error and error.count("\n") == 1, error
        left = {file.name for file in (tmp_path / str(size)).iterdir()}
        assert left <= {"log.txt", "result", "config.yaml", "config.json"}, left
    (tmp_path / "file").touch()
    assert train.main(yaml("stage1", *SHORT, f"run.output_dir={tmp_path}/file/x")) == 2
    error = capsys.readouterr().err
    assert "file/x: the folder cannot be made (Not a directory)" in error and error.count("\n") == 1
