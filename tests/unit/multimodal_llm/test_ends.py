"""How runs end: exhausted data, a loss that is not finite, evaluations, another run in the folder;
settings that no run starts with."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import llm_runs as runs
import pytest
import yaml
from real_processes import run_process

from seed_multimodal.errors import CheckpointError, ConfigError, DataError, SeedError


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


def evaluations(out: Path) -> list[dict[str, float]]:
    return [line for line in runs.log_lines(out) if "eval_loss" in line]


def once(folder: Path, records: int = 60, **changes: Any) -> dict[str, Any]:
    """Data that are read once."""
    data = {**runs.write_data(folder, runs.CODES, runs.PER_IMAGE, records), **changes}
    for source in data["sources"]:
        source["cycles"] = 1
    return data


def test_train_until_the_loss_is_not_finite(train, tmp_path):
    from seed_multimodal.training.checkpoint import checkpoints
    from seed_multimodal.training.distributed import TrainingError

    with pytest.raises(TrainingError, match=r"checkpoint-\d+"):
        train("out", "optim.learning_rate=1e30", "optim.warmup_ratio=0", "trainer.save_steps=1")
    step, _ = checkpoints(tmp_path / "out")[0]
    assert step == max(runs.losses(tmp_path / "out"))


@pytest.mark.slow
def test_train_on_exhausted_data_with_bad_records(train, tmp_path, capsys):
    # The run ends by itself with a checkpoint and its last evaluation; a user finds each bad record
    # by file and line.
    data = once(tmp_path / "data")
    file = tmp_path / "data" / "captions.jsonl"
    lines = file.read_text().splitlines()
    lines[3] = '{"image_ids": [1, 2, 3], "text": "too few codes"}'
    file.write_text("\n".join([*lines, "{torn"]) + "\n")
    held_out = tmp_path / "held_out.yaml"
    held_out.write_text(yaml.safe_dump(data))
    options = ["trainer.max_steps=500", "trainer.eval_steps=10", "trainer.eval_batches=2"]
    out = train("out", *options, f"eval_data={held_out}", data=data)
    done = summary(out)
    assert 10 < done["steps"] < 100
    assert (out / f"checkpoint-{done['steps']}").is_dir()
    captions = done["data"]["sources"]["captions"]
    assert captions["sequences"] == 59
    assert done["data"]["sources"]["chats"]["sequences"] == 60
    places = " ".join(place for entry in captions["skipped"].values() for place in entry["first"])
    assert "captions.jsonl: line 4" in places and "captions.jsonl: line 61" in places
    assert sum(entry["count"] for entry in captions["skipped"].values()) == 2
    steps = [line["step"] for line in evaluations(out)]
    assert steps[0] == 10 and steps[-1] == done["steps"]
    assert evaluations(out)[-1]["eval_loss"] < evaluations(out)[0]["eval_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False])
def test_train_on_data_that_end_inside_a_step(packing, train, tmp_path):
    # The micro-batches that are left make a step of their size, whose loss is their mean.
    options = ("trainer.max_steps=50", "optim.learning_rate=0.0")
    data = once(tmp_path / "data", 14, packing=packing)
    whole = train("whole", *options, data=data)
    steps = len(runs.losses(whole))
    n_micro = 2 if packing else steps - 1
    accumulate = f"trainer.gradient_accumulation_steps={n_micro}"
    out = train("parts", *options, accumulate, "trainer.logging_steps=50", data=data)
    n_steps = -(-steps // n_micro)
    assert max(runs.losses(out)) == summary(out)["steps"] == n_steps
    assert summary(out)["tokens"] == summary(whole)["tokens"]


@pytest.mark.slow
def test_train_is_the_same_with_and_without_evaluation(train, tmp_path):
    files = runs.write_files(tmp_path)
    lora = {"model": {"lora": runs.LORA}}
    without = train("without", "trainer.max_steps=3", **lora)
    more = ["trainer.eval_batches=2", f"eval_data={files['data']}"]
    options = ["trainer.max_steps=3", "trainer.eval_steps=2", *more]
    evaluated = train("evaluated", *options, "trainer.report_to=[tensorboard]", **lora)
    assert runs.losses(without) == runs.losses(evaluated)
    assert list((evaluated / "tensorboard").rglob("events*"))
    line = runs.log_lines(without)[-1]
    assert 0 < line["useful_tokens_per_s"] <= line["tokens_per_s"]
    assert 0.5 < line["fill"] <= 1

    # The last evaluation comes after the checkpoint of its step, and is not repeated.
    assert [line["step"] for line in evaluations(evaluated)] == [2, 3]
    train("evaluated", *options, **lora)
    assert [line["step"] for line in evaluations(evaluated)] == [2, 3]
    assert summary(evaluated)["evaluation"] == evaluations(evaluated)[-1]


@pytest.mark.slow
def test_train_stopped_in_an_evaluation_leaves_the_evaluation(train, tmp_path):
    # SIGTERM in the second of ten evaluation batches: a cluster gives a job seconds to end.
    from seed_multimodal.training.cli import compose, parse
    from seed_multimodal.training.llm.task import LlmTask

    read = []

    class Signalled(LlmTask):
        def loss_parts(self, model, batch):
            if not model.training:
                read.append(batch)
                if len(read) == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
            return super().loss_parts(model, batch)

    files = runs.write_files(tmp_path)
    options = [
        "trainer.max_steps=4",
        "trainer.eval_steps=2",
        "trainer.sample_steps=0",
        "trainer.eval_batches=10",
        f"eval_data={files['data']}",
    ]
    out = tmp_path / "out"
    config = compose(parse(runs.overrides(files, out, *options)), runs.APPLICATION / "configs")
    with pytest.raises(SystemExit):
        Signalled.train(config)
    assert len(read) == 2
    assert (out / "checkpoint-2").is_dir()
    LlmTask.train(config)
    assert [line["step"] for line in evaluations(out)] == [4]


def test_train_in_the_output_folder_of_a_running_run(train, tmp_path):
    from seed_multimodal.disk import folder_lock

    with folder_lock(tmp_path / "out", CheckpointError, name=".run.lock"):
        with pytest.raises(CheckpointError, match="out"):
            train("out", "trainer.max_steps=1")
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".run.lock"]


def test_train_on_data_without_a_usable_record(train, tmp_path):
    with pytest.raises(DataError, match="captions"):
        train("out", "data.length=20", data=once(tmp_path / "data", 2))
    assert not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.process
@pytest.mark.parametrize(("name", "value"), [("NPROC", "0"), ("HOST_NUM", "x")])
def test_script_with_a_wrong_number_of_processes(name, value):
    env = runs.environment(**{"NPROC": "1", name: value, "VIRTUAL_ENV": sys.prefix})
    command = ["sh", "scripts/train_a100_lora_multi_node_sft.sh"]
    done = run_process(command, cwd=runs.APPLICATION, env=env, timeout=60)
    assert done.returncode == 2
    assert name in done.stderr and f"'{value}'" in done.stderr


def out_of_memory() -> None:
    import torch

    torch.empty(2**50)


def closed_by_peer() -> None:
    raise RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:9")


def smallest_loss_scale() -> None:
    scaler = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    options = {"delayed_shift": 1, "consecutive_hysteresis": False, "dtype": None}
    scale = scaler.DynamicLossScaler(
        init_scale=1, scale_window=10, min_scale=1, raise_error_at_min_scale=True, **options
    )
    scale.update_scale(True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("fails", "named"),
    [(out_of_memory, "data.rows"), (closed_by_peer, "process"), (smallest_loss_scale, "bf16")],
)
def test_errors_of_torch_become_errors_of_the_run(fails, named):
    # One line with the step, what to change and the last checkpoint, not a traceback of C++.
    from seed_multimodal.training.distributed import TrainingError, translate_errors

    with (
        pytest.raises(TrainingError, match=rf"{named}.*checkpoint-2") as caught,
        translate_errors("step 3", "checkpoint-2"),
    ):
        fails()
    assert "step 3" in str(caught.value)


def test_other_errors_are_not_translated():
    from seed_multimodal.training.distributed import translate_errors

    with pytest.raises(RuntimeError) as caught, translate_errors("step 3", ""):
        raise RuntimeError("shapes differ")
    assert not isinstance(caught.value, SeedError)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("trainer.precision=fp16", "fp16"),
        ("trainer.report_to=[wandb]", "wandb"),
        ("trainer.device=cuda", "CUDA"),
    ],
)
def test_train_without_a_gpu_or_an_extra(train, more, named):
    import torch

    if ("wandb" in more and importlib.util.find_spec("wandb")) or torch.cuda.is_available():
        pytest.skip("this machine has a GPU or wandb")
    with pytest.raises(ConfigError, match=named):
        train("out", more)
