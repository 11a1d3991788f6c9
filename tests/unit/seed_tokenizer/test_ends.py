"""Runs that end before their time end at once, data workers included, and leave a state to resume from."""

from __future__ import annotations

import json
import shutil

import pytest
import warm_python

SHORT = ("run.max_epoch=1", "run.iters_per_epoch=1", "run.batch_size_train=2")
OPTIONS = ("run.num_workers=1", "run.iters_per_epoch=400", "run.max_epoch=1", "run.batch_size_train=4")


@pytest.mark.process
def test_a_loss_that_is_not_finite(yaml, start, tmp_path):
    process = start(warm_python.PYTHON, "train.py", *yaml("stage1", *OPTIONS, "run.init_lr=1e30", "run.warmup_steps=0",
                                                      "run.warmup_lr=-1"))
    _, error = process.communicate(timeout=150)
    assert process.returncode == 2 and "Traceback" not in error
    assert error.startswith("train.py: The ") and error.count("\n") == 1 and "nothing was saved yet" in error


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
    assert not list((tmp_path / "other").glob("*.checkpoints"))


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


def test_other_batches_with_as_many_samples_per_step_are_told(yaml, run, tmp_path, capsys):
    """8 x 1 and 4 x 2 samples pass the state's check, but a loss over a batch is another one."""
    whole, split = ("run.iters_per_epoch=1",), ("run.iters_per_epoch=2", "run.accum_grad_iters=2")
    run(yaml("stage1", "run.max_epoch=1", "run.batch_size_train=8", *whole))
    (tmp_path / "stage1" / "stage1.done.json").unlink()  # as a kill leaves it
    capsys.readouterr()
    run(yaml("stage1", "run.max_epoch=2", "run.batch_size_train=4", *split,
             f"run.resume_ckpt_path={tmp_path}/stage1/checkpoint_0.pth"))
    out = capsys.readouterr().out
    assert "run.accum_grad_iters: 1 -> 2; run.batch_size_train: 8 -> 4; run.iters_per_epoch: 1 -> 2" in out
    assert "so run.resume_ckpt_path is ignored" in out


def test_neither_torn_settings_nor_unlimited_ones_keep_a_run_from_going_on(yaml, run, tmp_path, capsys):
    run(yaml("stage1", *SHORT))
    (tmp_path / "stage1" / "config.yaml").write_text("run:\n  train_splits: [tra")
    run(yaml("stage1", *SHORT, "run.max_epoch=2", "run.save_seconds=.inf", "run.clip_grad=.inf"))
    out = capsys.readouterr().out
    assert "run.max_epoch: 1 -> 2" in out and "checkpoint-1 (step 1)" in out
    assert json.loads((tmp_path / "stage1" / "stage1.done.json").read_text())["steps"] == 2


def test_a_refused_start_keeps_the_record(yaml, run, tmp_path, capsys):
    import train

    run(yaml("stage1", *SHORT))
    done = tmp_path / "stage1" / "stage1.done.json"
    before = done.read_bytes()
    state = tmp_path / "stage1" / "stage1.checkpoints" / "checkpoint-1" / "model.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    capsys.readouterr()
    assert train.main(yaml("stage1", *SHORT, "run.max_epoch=2")) == 2
    assert "stage1.checkpoints" in capsys.readouterr().err and done.read_bytes() == before


def test_speed_after_a_checkpoint_counts_this_runs_steps_only(yaml, run, tmp_path, capsys):
    two = ("run.iters_per_epoch=2", "run.batch_size_train=4")
    run(yaml("stage1", *two, "run.max_epoch=1"))
    file = tmp_path / "stage1" / "checkpoint_0.pth"
    capsys.readouterr()
    run(yaml("stage1", *two, "run.max_epoch=2", f"run.resume_ckpt_path={file}", name="other"))
    said = "4 steps (2 of them before run.resume_ckpt_path), 8 pictures in"
    assert said in capsys.readouterr().out
    record = json.loads((tmp_path / "other" / "stage1.done.json").read_text())
    assert (record["steps"], record["begun"]) == (4, 2)
    run(yaml("stage1", *two, "run.max_epoch=3", name="other"))  # from its own state, which knows it, too
    assert "6 steps (2 of them before run.resume_ckpt_path), 16 pictures in" in capsys.readouterr().out


def test_bad_samples_of_the_time_before_a_resume_count(yaml, run, pictures, tmp_path):
    """The first leg sees a torn picture, the second only the other half of the set."""
    from seed_multimodal.data.stream.order import EpochOrder

    own = tmp_path / "own"
    shutil.copytree(pictures, own)
    items = json.loads((own / "pairs.json").read_text())
    torn = items[int(EpochOrder(24, 42).parts(0, 12)[0][1][0])]["image"]
    (own / torn).write_bytes(b"not a picture")
    pairs = f"{{train: {{storage: [{own}/pairs.json]}}, val: {{storage: [{own}/pairs.json]}}}}"
    info = f"datasets.coco_caption.build_info={{annotations: {pairs}, images: {{storage: {own}}}}}"
    half = (info, "run.iters_per_epoch=1", "run.batch_size_train=12", "run.seed=42")
    for epochs in (1, 2):
        run(yaml("stage1", *half, f"run.max_epoch={epochs}"))
        record = json.loads((tmp_path / "stage1" / "stage1.done.json").read_text())
        log = [json.loads(line) for line in (tmp_path / "stage1" / "stage1.log.jsonl").read_text().splitlines()]
        assert record["bad_samples"] == 1 and [line["bad_samples"] for line in log] == [1] * epochs
