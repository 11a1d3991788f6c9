"""How runs end: exhausted data, evaluations, another run in the folder;
settings that no run starts with."""

import importlib.util
import sys

import llm_runs as runs
import pytest
import torch
from tiny import read_json

from seed_multimodal.errors import CheckpointError, ConfigError


def summary(out) -> dict:
    return read_json(out / "summary.json")


def evaluations(out) -> list[dict[str, float]]:
    return [line for line in runs.log_lines(out) if "eval_loss" in line]


@pytest.mark.slow
def test_train_on_data_that_end_inside_a_step(train, tmp_path):
    # The micro-batches that are left make a step of their size, whose loss is their mean.
    options = ("trainer.max_steps=50", "optim.learning_rate=0.0")
    data = runs.write_data(tmp_path / "data", runs.CODES, runs.PER_IMAGE, 14)
    for source in data["sources"]:
        source["cycles"] = 1
    whole = train("whole", *options, data=data)
    steps = len(runs.losses(whole))
    accumulate = f"trainer.gradient_accumulation_steps={steps - 1}"
    out = train("parts", *options, accumulate, "trainer.logging_steps=50", data=data)
    done = summary(out)
    assert max(runs.losses(out)) == done["steps"] == 2
    assert done["tokens"] == summary(whole)["tokens"]
    assert [source["sequences"] for source in done["data"]["sources"].values()] == [14, 14]


@pytest.mark.slow
def test_train_is_the_same_with_and_without_evaluation(train, tmp_path):
    files = runs.write_files(tmp_path)
    lora = {"model": {"lora": runs.LORA}}
    without = train("without", "trainer.max_steps=3", **lora)
    more = ["trainer.eval_batches=2", f"eval_data={files['data']}"]
    options = ["trainer.max_steps=3", "trainer.eval_steps=2", *more]
    evaluated = train("evaluated", *options, **lora)
    assert runs.losses(without) == runs.losses(evaluated)

    line = runs.log_lines(without)[-1]
    assert 0 < line["useful_tokens_per_s"] <= line["tokens_per_s"]
    assert 0.5 < line["fill"] <= 1

    # The last evaluation comes after the checkpoint of its step, and is not repeated.
    assert [line["step"] for line in evaluations(evaluated)] == [2, 3]
    train("evaluated", *options, **lora)
    assert [line["step"] for line in evaluations(evaluated)] == [2, 3]
    assert summary(evaluated)["evaluation"] == evaluations(evaluated)[-1]


@pytest.mark.slow
def test_step_crosses_few_files(train, monkeypatch):
    # These are the files that a reader of the training follows.
    from seed_multimodal.training.trainer import Trainer

    files = set()
    train_step = Trainer._train_step

    def record(frame, event, argument):
        if "seed_multimodal" in frame.f_code.co_filename:
            files.add(frame.f_code.co_filename)

    def recorded_step(trainer):
        sys.setprofile(record if trainer.step == 5 else None)
        return train_step(trainer)

    monkeypatch.setattr(Trainer, "_train_step", recorded_step)
    train("out", "trainer.max_steps=7", "trainer.logging_steps=9")
    assert 8 < len(files) <= 12


def test_train_with_frozen_tied_embeddings_logs_that_the_head_is_frozen(train, capsys):
    sizes = {**runs.SIZES, "tie_word_embeddings": True}
    train("out", "trainer.max_steps=1", model={"sizes": sizes, "freeze_embeddings": True})
    assert "head is frozen" in capsys.readouterr().out


@pytest.mark.slow
def test_train_in_the_output_folder_of_a_running_run(train, tmp_path):
    from seed_multimodal.disk import folder_lock

    with folder_lock(tmp_path / "out", CheckpointError, name=".run.lock"):
        with pytest.raises(CheckpointError, match="out"):
            train("out", "trainer.max_steps=1")
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".run.lock"]


def out_of_memory():
    torch.empty(2**50)


def closed_by_peer():
    raise RuntimeError(
        "[gloo.cc:5] Connection closed by peer [127.0.0.1]:9. Check the logs of it. GLHF!"
    )


@pytest.mark.parametrize(
    "fails, named", [(out_of_memory, "data.rows"), (closed_by_peer, "process")]
)
def test_errors_of_torch_become_errors_of_the_run(fails, named):
    # One line with the step, what to change and the last checkpoint, not a traceback of C++.
    from seed_multimodal.training.distributed import TrainingError, translate_errors

    with (
        pytest.raises(TrainingError, match=rf"{named}.*checkpoint-2") as caught,
        translate_errors("step 3", lambda: "checkpoint-2"),
    ):
        fails()
    assert "step 3" in str(caught.value) and "gloo" not in str(caught.value).lower()
    assert "GLHF" not in str(caught.value)


@pytest.mark.parametrize(
    "more, named",
    [
        ("trainer.precision=fp16", "fp16"),
        ("trainer.report_to=[wandb]", "wandb"),
        ("trainer.device=cuda", "CUDA"),
    ],
)
def test_train_without_a_gpu_or_an_extra(train, more, named):
    if ("wandb" in more and importlib.util.find_spec("wandb")) or torch.cuda.is_available():
        pytest.skip("this machine has a GPU or wandb")
    with pytest.raises(ConfigError, match=named):
        train("out", more)
