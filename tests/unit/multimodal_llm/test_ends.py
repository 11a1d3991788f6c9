"""How runs end: used-up data, a loss that is not finite."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from seed_multimodal.errors import CheckpointError, ConfigError, DataError, SeedError
from seed_multimodal.training.checkpoint import checkpoints
from seed_multimodal.training.distributed import TrainingError, translate_errors


def test_a_loss_that_is_not_finite_ends_the_run(runs, train, tmp_path):
    with pytest.raises(TrainingError, match=r"became (nan|inf) at step \d+; the last checkpoint \(.*-\d+\) is intact"):
        train("out", "optim.learning_rate=1e30", "optim.warmup_ratio=0", "trainer.save_steps=1")
    step, folder = checkpoints(tmp_path / "out")[0]
    assert step == max(runs.losses(tmp_path / "out"))


def test_used_up_data_end_the_run_and_bad_records_are_in_the_summary(runs, tmp_path, capsys):
    import yaml

    from seed_multimodal.training.llm.cli import run

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
    given = runs.overrides(files, out, "trainer.max_steps=500", "trainer.logging_steps=50", "trainer.eval_steps=10",
                           f"eval_data={files['data']}", "trainer.eval_batches=2")
    run("train", runs.APPLICATION / "configs", given)
    summary = json.loads((out / "summary.json").read_text())
    assert 10 < summary["steps"] < 100 and (out / f"checkpoint-{summary['steps']}").is_dir()
    captions = summary["data"]["sources"]["captions"]
    assert captions["sequences"] == 59 and summary["data"]["sources"]["chats"]["sequences"] == 60
    named = [where for entry in captions["skipped"].values() for where in entry["first"]]
    assert sum(entry["count"] for entry in captions["skipped"].values()) == 2
    assert all("captions.jsonl" in where for where in named)
    assert any("line 4" in where for where in named) and any("line 61" in where for where in named)
    said = capsys.readouterr().out
    assert "all sources are exhausted" in said and "skipped" in said
    evaluated = [line for line in runs.log_lines(out) if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [*range(10, summary["steps"] + 1, 10), summary["steps"]][
        :len(evaluated)]
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False])
def test_the_last_step_takes_what_is_left(packing, runs, train, tmp_path):
    """Data that end inside a step are learned all the same, with the weight of a step of that size."""
    data = runs.write_data(tmp_path / "data", runs.CODES, runs.PER_IMAGE, records=14)
    data["packing"] = packing
    for source in data["sources"]:
        source["cycles"] = 1
    more = ("trainer.max_steps=50", "optim.learning_rate=0.0")
    whole = train("one", *more, data=data)
    steps = len(runs.losses(whole))
    assert steps > 3
    few = train("few", *more, f"trainer.logging_steps={steps - 1}", data=data)
    assert list(runs.losses(few)) == [steps - 1, steps]  # the last line is not lost
    for count in (2, steps - 1, steps + 2):
        some = train(f"of{count}", *more, f"trainer.gradient_accumulation_steps={count}", data=data)
        record = json.loads((some / "summary.json").read_text())
        assert record["steps"] == -(-steps // count)
        assert max(runs.losses(some)) == record["steps"]
        assert record["tokens"] == json.loads((whole / "summary.json").read_text())["tokens"]
        if not packing and count == steps - 1:  # one micro-batch is left, and its mean is the step's
            assert runs.losses(some)[2] == pytest.approx(runs.losses(whole)[steps], rel=1e-5)


@pytest.mark.slow
def test_a_finished_run_says_its_last_evaluation_once(runs, train, tmp_path):
    """The evaluation of the end comes after the checkpoint of its step; the same command again finds it in the log."""
    files = runs.write_files(tmp_path)
    for _ in range(2):
        out = train("out", "trainer.max_steps=4", "trainer.save_steps=2", "trainer.eval_steps=3",
                    "trainer.eval_batches=1", f"eval_data={files['data']}")
        assert [line["step"] for line in runs.log_lines(out) if "eval_loss" in line] == [3, 4]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["evaluation"] == runs.log_lines(out)[-1] and summary["evaluation"]["step"] == 4


def test_a_second_run_is_kept_out_of_the_output_folder(runs, train, tmp_path):
    """It would remove what the first is writing, and mix their logs."""
    from seed_multimodal.disk import folder_lock

    with folder_lock(tmp_path / "out", CheckpointError, name=".run.lock"):
        with pytest.raises(CheckpointError, match="out: another run is using this output folder"):
            train("out", "trainer.max_steps=1")
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".run.lock"]
    train("out", "trainer.max_steps=1")
    assert not (tmp_path / "out" / ".run.lock").exists()  # the run has let go


def test_data_without_a_usable_record_are_no_success(runs, train, tmp_path):
    data = runs.write_data(tmp_path / "data", runs.CODES, runs.PER_IMAGE, records=2)
    for source in data["sources"]:
        source["cycles"] = 1
    with pytest.raises(DataError, match="no usable record"):
        train("out", "data.length=20", data=data)
    assert not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.process
@pytest.mark.parametrize(("name", "value"), [("NPROC", "0"), ("NPROC", "two"), ("HOST_NUM", "x"), ("NNODES", "-1")])
def test_the_scripts_name_the_variable_that_is_no_count(name, value, runs):
    env = runs.environment(**{"NPROC": "1", name: value, "VIRTUAL_ENV": sys.prefix})
    done = subprocess.run(["sh", "scripts/train_a100_lora_multi_node_sft.sh"], cwd=runs.APPLICATION, env=env, text=True,
                          capture_output=True, timeout=60)
    wanted = "NPROC (NPROC_PER_NODE, HOST_GPU_NUM)" if name == "NPROC" else "NNODES (HOST_NUM)"
    assert done.returncode == 2 and f"{wanted} must be a number from 1 on, not '{value}'." in done.stderr


@pytest.mark.slow
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


def test_whatever_stops_the_writing_thread_ends_the_run(tmp_path):
    """An error that is not the disk's: what cannot be kept in a state."""
    from seed_multimodal.training.checkpoint import CheckpointStore
    from seed_multimodal.training.config import TrainerConfig
    from seed_multimodal.training.distributed import ProcessGroup

    saver = CheckpointStore(tmp_path, ProcessGroup(), TrainerConfig())
    with pytest.raises(TrainingError, match="The checkpoint of step 3 cannot be written: .*not JSON serializable"):
        saver._write(3, lambda folder: None, {"trainer_state.json": {"no": {1, 2}}})
    assert saver.saved is None and not list(tmp_path.iterdir())


def test_what_machines_do_becomes_a_sentence():
    import torch

    for raised, words in ((torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "Out of memory"),
                          (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:9"), "Another process died")):
        with pytest.raises(TrainingError, match=f"{words}.*nothing was saved yet"), \
                translate_errors("step 3", "nothing was saved yet"):
            raise raised
    with pytest.raises(TrainingError, match="Out of memory at step 3.*data.rows"), translate_errors("step 3", "x"):
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match="shapes") as caught, translate_errors("step 3", ""):
        raise RuntimeError("shapes differ")
    assert not isinstance(caught.value, SeedError)


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
