"""How runs end: used-up data, a loss that is not finite, a full disk, SIGTERM; the last checkpoint stays whole."""

from __future__ import annotations

import json
import resource
import signal
import time

import pytest

from seed_multimodal.errors import ConfigError, SeedError
from seed_multimodal.training.llm.failures import TrainingError, explained
from seed_multimodal.training.llm.folders import checkpoints, fault_of


def test_a_loss_that_is_not_finite_ends_the_run(runs, train, tmp_path):
    with pytest.raises(TrainingError, match=r"became (nan|inf) at step \d+; the last checkpoint \(.*-\d+\) is intact"):
        train("out", "optim.learning_rate=1e30", "optim.warmup_ratio=0", "trainer.save_steps=1")
    step, folder = checkpoints(tmp_path / "out")[0]
    assert not fault_of(folder) and step == max(runs.losses(tmp_path / "out"))


def test_a_full_disk_ends_the_run(runs, train, tmp_path):
    """The limit on the size of files stands for a disk without room: writes fail in the same place."""
    out = train("out", "trainer.max_steps=2")
    before = {path.name: path.read_bytes() for path in (out / "checkpoint-2").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        for more in ((), ("trainer.async_save=false",)):
            with pytest.raises(TrainingError, match=r"The checkpoint of step 4 cannot be written: the disk or quota is "
                                                    r"full .*checkpoint-2\) is intact"):
                train("out", "trainer.max_steps=30", "trainer.save_steps=2", *more)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not fault_of(out / "checkpoint-2") and not list(out.glob(".checkpoint-*"))
    assert before == {path.name: path.read_bytes() for path in (out / "checkpoint-2").iterdir()}
    train("out", "trainer.max_steps=4")
    assert [step for step, _ in checkpoints(out)] == [4, 2]


def test_sigterm_saves_and_the_rest_is_as_without(runs, train, tmp_path):
    """Through the original's flags; a process of its own, because the signal is real."""
    files = runs.write_files(tmp_path)
    out = tmp_path / "out"
    flags = ["--model", files["model"], "--tokenizer", files["tokenizer"], "--train_data", files["data"],
             "--output_dir", out, "--max_steps", "400", "--learning_rate", "1e-2", "--logging_steps", "1",
             "--report_to", "none", "--use_cpu", "--dataloader_num_workers", "1", "--save_steps", "1000"]
    process = runs.start([str(flag) for flag in flags])
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and process.poll() is None and len(runs.losses(out)) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, complained = process.communicate(timeout=60)
    assert process.returncode == 143, said + complained
    assert "stopped by SIGTERM after step" in said and not complained.strip()
    step, folder = checkpoints(out)[0]
    assert not fault_of(folder) and list(runs.losses(out)) == list(range(1, step + 1))
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["optimizer"] == "adamw_hf" and state["global_step"] == step


def test_used_up_data_end_the_run_and_bad_records_are_in_the_summary(runs, tmp_path, capsys):
    import yaml

    from seed_multimodal.training.llm.app import run

    files = runs.write_files(tmp_path)
    data = yaml.safe_load(files["data"].read_text())
    broken = tmp_path / "data" / "captions.jsonl"
    lines = broken.read_text().splitlines()
    lines[3] = '{"image_ids": [1, 2, 3], "text": "too few codes"}'
    broken.write_text("\n".join([*lines, "{torn"]) + "\n")
    for source in data["sources"]:
        source["cycles"] = 1
    files["data"].write_text(yaml.safe_dump(data))
    out = tmp_path / "out"
    run(runs.overrides(files, out, "trainer.max_steps=500", "trainer.logging_steps=50", "trainer.eval_steps=10",
                       f"eval_data={files['data']}", "trainer.eval_batches=2"), runs.APPLICATION / "configs")
    summary = json.loads((out / "summary.json").read_text())
    assert 10 < summary["steps"] < 100 and (out / f"checkpoint-{summary['steps']}").is_dir()
    captions = summary["data"]["sources"]["captions"]
    assert captions["sequences"] == 59 and summary["data"]["sources"]["chats"]["sequences"] == 60
    named = [where for entry in captions["skipped"].values() for where in entry["first"]]
    assert sum(entry["count"] for entry in captions["skipped"].values()) == 2
    assert all("captions.jsonl" in where for where in named)
    assert any("line 4" in where for where in named) and any("line 61" in where for where in named)
    said = capsys.readouterr().out
    assert "every source is used up" in said and "skipped" in said
    evaluated = [line for line in runs.log_lines(out) if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [*range(10, summary["steps"] + 1, 10), summary["steps"]][
        :len(evaluated)]
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"]


@pytest.mark.parametrize("packing", [True, False])
def test_the_last_step_takes_what_is_left(packing, runs, train, tmp_path):
    """Data that end inside a step are learned all the same, with the weight of a step of that size."""
    data = runs.write_data(tmp_path / "data", runs.CODES, runs.PER_IMAGE, records=7)
    data["packing"] = packing
    for source in data["sources"]:
        source["cycles"] = 1
    more = ("trainer.max_steps=50", "optim.learning_rate=0.0")
    whole = train("one", *more, data=data)
    steps = len(runs.losses(whole))
    assert steps > 3
    for count in (2, steps - 1, steps + 2):
        some = train(f"of{count}", *more, f"trainer.gradient_accumulation_steps={count}", data=data)
        record = json.loads((some / "summary.json").read_text())
        assert record["steps"] == -(-steps // count)
        assert record["tokens"] == json.loads((whole / "summary.json").read_text())["tokens"]
        if not packing and count == steps - 1:  # one micro-batch is left, and its mean is the step's
            assert runs.losses(some)[2] == pytest.approx(runs.losses(whole)[steps], rel=1e-5)


def test_evaluation_does_not_disturb_training(runs, train, tmp_path):
    files = runs.write_files(tmp_path)
    lora = {"model": {"lora": runs.LORA}}
    alone = train("alone", "trainer.max_steps=4", **lora)
    watched = train("watched", "trainer.max_steps=4", "trainer.eval_steps=1", "trainer.eval_batches=2",
                    f"eval_data={files['data']}", "trainer.report_to=[tensorboard]", **lora)
    assert runs.losses(alone) == runs.losses(watched)
    assert len([line for line in runs.log_lines(watched) if "eval_loss" in line]) == 4
    assert list((watched / "tensorboard").rglob("events*"))
    line = runs.log_lines(alone)[-1]
    assert {"text_loss", "image_loss", "learning_rate", "grad_norm", "tokens_per_s", "useful_tokens_per_s", "tflops",
            "fill", "wait_share", "peak_memory_mib", "eta_seconds"} <= line.keys() and "mfu" not in line
    assert 0 < line["useful_tokens_per_s"] <= line["tokens_per_s"] and 0.5 < line["fill"] <= 1


def test_evaluation_that_cannot_be_is_said_before_the_first_step(runs, train, tmp_path, capsys):
    with pytest.raises(SeedError, match="nowhere"):
        train("out", "trainer.eval_steps=8", "++eval_data.sources=[{name: a, files: nowhere.jsonl, decoder: chat}]")
    assert not runs.losses(tmp_path / "out")
    train("out", "trainer.max_steps=1", "trainer.eval_steps=1")
    assert "there is no eval_data: nothing is evaluated" in capsys.readouterr().out
    files = runs.write_files(tmp_path)
    train("out", "trainer.max_steps=2", f"eval_data={files['data']}")
    assert "trainer.eval_steps is 0: nothing is evaluated" in capsys.readouterr().out


def test_whatever_stops_the_writing_thread_ends_the_run(tmp_path):
    """An error that is not the disk's: what cannot be kept in a state."""
    from datetime import timedelta

    from seed_multimodal.training.llm.checkpoint import Checkpoints
    from seed_multimodal.training.llm.processes import RunPeers

    saver = Checkpoints(tmp_path, RunPeers(timedelta(minutes=1)), limit=None, asynchronous=True, log=print)

    def fill(folder):
        (folder / "trainer_state.json").write_text(json.dumps({"no": {1, 2}}))

    saver._write(3, fill)
    with pytest.raises(TrainingError, match="The checkpoint of step 3 cannot be written: .*not JSON serializable"):
        saver.finish()
    assert saver.saved is None and not list(tmp_path.iterdir())


def test_what_machines_do_becomes_a_sentence():
    import torch

    for raised, words in ((torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "Out of GPU memory"),
                          (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:9"), "Another process died")):
        with pytest.raises(TrainingError, match=f"{words}.* at step 3.*nothing was saved yet"), \
                explained("step 3", "nothing was saved yet"):
            raise raised
    with pytest.raises(TrainingError, match="Out of memory at step 3.*data.rows"), explained("step 3", "x"):
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match="shapes") as caught, explained("step 3", ""):
        raise RuntimeError("shapes differ")
    assert not isinstance(caught.value, SeedError)


def test_deepspeeds_smallest_loss_scale_becomes_a_sentence(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    scalers = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    scaler = scalers.DynamicLossScaler(1, scale_window=10, min_scale=1, delayed_shift=1, consecutive_hysteresis=False)
    with pytest.raises(TrainingError, match="overflow at any loss scale at step 3"), explained("step 3", "x"):
        scaler.update_scale(True)


@pytest.mark.parametrize(("more", "words"), [
    (("trainer.precision=fp16",), "fp16 needs a GPU"),
    (("trainer.report_to=[wandb]",), "wandb, but the package is not installed"),
    (("trainer.device=cuda",), "no usable CUDA device"),
    (("data.sources=[]",), "at least one source"),
    (("model.lora={r: 0}",), "lora: .*positive integer"),
    (("optim.learning_rat=1",), "did you mean 'learning_rate'"),
])
def test_refusals_before_the_first_step(train, more, words):
    import importlib.util

    import torch

    if ("wandb" in words and importlib.util.find_spec("wandb")) or torch.cuda.is_available():
        pytest.skip("this machine can do it")
    with pytest.raises(ConfigError, match=words):
        train("out", *more)
