"""How runs end: exhausted data, a loss that is not finite, out of memory.

Settings that no run starts with.
"""

from __future__ import annotations

import json
import os
import signal
import sys

import llm_runs as runs
import pytest
import torch
from real_processes import run_process

from seed_multimodal.errors import CheckpointError, ConfigError, DataError, SeedError
from seed_multimodal.training.checkpoint import checkpoints
from seed_multimodal.training.distributed import TrainingError, translate_errors


def test_train_until_the_loss_is_not_finite(train, tmp_path):
    with pytest.raises(
        TrainingError,
        match=r"became (nan|inf) at step \d+; the last checkpoint \(.*-\d+\) is intact",
    ):
        train("out", "optim.learning_rate=1e30", "optim.warmup_ratio=0", "trainer.save_steps=1")
    step, folder = checkpoints(tmp_path / "out")[0]
    assert step == max(runs.losses(tmp_path / "out"))


def test_train_on_exhausted_data_with_bad_records(tmp_path, capsys):
    import yaml

    from seed_multimodal.training.cli import parse, run

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
    run(
        "train",
        runs.APPLICATION / "configs",
        parse(
            runs.overrides(
                files,
                out,
                "trainer.max_steps=500",
                "trainer.logging_steps=50",
                "trainer.eval_steps=10",
                f"eval_data={files['data']}",
                "trainer.eval_batches=2",
            )
        ),
    )
    summary = json.loads((out / "summary.json").read_text())
    assert 10 < summary["steps"] < 100 and (out / f"checkpoint-{summary['steps']}").is_dir()
    captions = summary["data"]["sources"]["captions"]
    assert captions["sequences"] == 59 and summary["data"]["sources"]["chats"]["sequences"] == 60
    places = [where for entry in captions["skipped"].values() for where in entry["first"]]
    assert sum(entry["count"] for entry in captions["skipped"].values()) == 2
    assert all("captions.jsonl" in where for where in places)
    assert any("line 4" in where for where in places) and any(
        "line 61" in where for where in places
    )
    printed = capsys.readouterr().out
    assert "all sources are exhausted" in printed and "skipped" in printed
    evaluated = [line for line in runs.log_lines(out) if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [
        *range(10, summary["steps"] + 1, 10),
        summary["steps"],
    ][: len(evaluated)]
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False])
def test_train_on_data_that_end_inside_a_step(packing, train, tmp_path):
    """The micro-batches that are left make a step of their size; the last log line is written."""
    data = runs.write_data(tmp_path / "data", runs.CODES, runs.PER_IMAGE, records=14)
    data["packing"] = packing
    for source in data["sources"]:
        source["cycles"] = 1
    options = ("trainer.max_steps=50", "optim.learning_rate=0.0")
    whole = train("whole", *options, data=data)
    steps = len(runs.losses(whole))
    assert steps > 3
    for count, logging_steps in ((2, 50), (steps + 2 if packing else steps - 1, 1)):
        out = train(
            f"of{count}",
            *options,
            f"trainer.gradient_accumulation_steps={count}",
            f"trainer.logging_steps={logging_steps}",
            data=data,
        )
        summary = json.loads((out / "summary.json").read_text())
        assert max(runs.losses(out)) == summary["steps"] == -(-steps // count)
        assert summary["tokens"] == json.loads((whole / "summary.json").read_text())["tokens"]
    if not packing:  # one micro-batch is left, and its mean is the step's
        assert runs.losses(out)[2] == pytest.approx(runs.losses(whole)[steps], rel=1e-5)


@pytest.mark.slow
def test_train_again_after_the_end_logs_no_second_evaluation(train, tmp_path):
    """The last evaluation comes after the checkpoint of its step."""
    files = runs.write_files(tmp_path)
    for _ in range(2):
        out = train(
            "out",
            "trainer.max_steps=4",
            "trainer.save_steps=2",
            "trainer.eval_steps=3",
            "trainer.eval_batches=1",
            f"eval_data={files['data']}",
        )
        assert [line["step"] for line in runs.log_lines(out) if "eval_loss" in line] == [3, 4]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["evaluation"] == runs.log_lines(out)[-1] and summary["evaluation"]["step"] == 4


@pytest.mark.slow
def test_train_stopped_in_an_evaluation_leaves_the_evaluation(train, tmp_path):
    """SIGTERM in the second of ten evaluation batches."""
    from seed_multimodal.training.cli import compose, parse
    from seed_multimodal.training.llm.task import LlmTask

    files = runs.write_files(tmp_path)
    read = []

    class Signalled(LlmTask):
        def loss_parts(self, model, batch):
            if not model.training:
                read.append(batch)
                if len(read) == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
            return super().loss_parts(model, batch)

    options = runs.overrides(
        files,
        tmp_path / "out",
        "trainer.max_steps=4",
        "trainer.eval_steps=2",
        "trainer.sample_steps=0",
        f"eval_data={files['data']}",
        "trainer.eval_batches=10",
    )
    config = compose(parse(options), runs.APPLICATION / "configs")
    with pytest.raises(SystemExit):
        Signalled.train(config)
    assert len(read) == 2 and [step for step, _ in checkpoints(tmp_path / "out")] == [2]
    LlmTask.train(config)
    assert [line["step"] for line in runs.log_lines(tmp_path / "out") if "eval_loss" in line] == [4]


@pytest.mark.slow
def test_train_in_the_output_folder_of_a_running_run(train, tmp_path):
    from seed_multimodal.disk import folder_lock

    with folder_lock(tmp_path / "out", CheckpointError, name=".run.lock"):
        with pytest.raises(CheckpointError, match="out: another run is using this output folder"):
            train("out", "trainer.max_steps=1")
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".run.lock"]
    train("out", "trainer.max_steps=1")


def test_train_on_data_without_a_usable_record(train, tmp_path):
    data = runs.write_data(tmp_path / "data", runs.CODES, runs.PER_IMAGE, records=2)
    for source in data["sources"]:
        source["cycles"] = 1
    with pytest.raises(DataError, match="no usable record"):
        train("out", "data.length=20", data=data)
    assert not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.process
@pytest.mark.parametrize(("name", "value"), [("NPROC", "0"), ("HOST_NUM", "x")])
def test_script_with_a_wrong_number_of_processes(
    name,
    value,
):
    env = runs.environment(**{"NPROC": "1", name: value, "VIRTUAL_ENV": sys.prefix})
    done = run_process(
        ["sh", "scripts/train_a100_lora_multi_node_sft.sh"],
        cwd=runs.APPLICATION,
        env=env,
        timeout=60,
    )
    wanted = "NPROC (NPROC_PER_NODE, HOST_GPU_NUM)" if name == "NPROC" else "NNODES (HOST_NUM)"
    assert (
        done.returncode == 2
        and f"{wanted} must be a number from 1 on, not '{value}'." in done.stderr
    )


@pytest.mark.slow
def test_train_is_the_same_with_and_without_evaluation(train, tmp_path):
    files = runs.write_files(tmp_path)
    lora = {"model": {"lora": runs.LORA}}
    without = train("without", "trainer.max_steps=3", **lora)
    evaluated = train(
        "evaluated",
        "trainer.max_steps=3",
        "trainer.eval_steps=1",
        "trainer.eval_batches=2",
        f"eval_data={files['data']}",
        "trainer.report_to=[tensorboard]",
        **lora,
    )
    assert runs.losses(without) == runs.losses(evaluated)
    assert len([line for line in runs.log_lines(evaluated) if "eval_loss" in line]) == 3
    assert list((evaluated / "tensorboard").rglob("events*"))
    line = runs.log_lines(without)[-1]
    assert {
        "text_loss",
        "image_loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_s",
        "useful_tokens_per_s",
        "tflops",
        "fill",
        "wait_share",
        "peak_memory_mib",
        "eta_seconds",
    } <= line.keys() and "mfu" not in line
    assert 0 < line["useful_tokens_per_s"] <= line["tokens_per_s"] and 0.5 < line["fill"] <= 1


def test_translate_errors_of_memory_and_processes():
    for raised, words in (
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "Out of memory"),
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:9"), "Another process died"),
    ):
        with (
            pytest.raises(TrainingError, match=f"{words}.*nothing was saved yet"),
            translate_errors("step 3", "nothing was saved yet"),
        ):
            raise raised
    with (
        pytest.raises(TrainingError, match="Out of memory at step 3.*data.rows"),
        translate_errors("step 3", "x"),
    ):
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match="shapes") as caught, translate_errors("step 3", ""):
        raise RuntimeError("shapes differ")
    assert not isinstance(caught.value, SeedError)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_translate_errors_of_deepspeeds_loss_scale():
    scaler = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    scale = scaler.DynamicLossScaler(
        init_scale=1,
        scale_window=10,
        min_scale=1,
        delayed_shift=1,
        consecutive_hysteresis=False,
        raise_error_at_min_scale=True,
        dtype=torch.half,
    )
    sentence = r"overflow at any loss scale \(use bf16 or fp32\) at step 3; x is intact\."
    with pytest.raises(TrainingError, match=sentence), translate_errors("step 3", "x is intact"):
        scale.update_scale(True)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("trainer.precision=fp16",), "fp16 needs a GPU"),
        (("trainer.report_to=[wandb]",), "wandb, but the package is not installed"),
        (("trainer.device=cuda",), "no usable CUDA device"),
    ],
)
def test_train_without_a_gpu_or_an_extra(train, more, words):
    import importlib.util

    import torch

    if ("wandb" in words and importlib.util.find_spec("wandb")) or torch.cuda.is_available():
        pytest.skip("this machine has a GPU or wandb")
    with pytest.raises(ConfigError, match=words):
        train("out", *more)
