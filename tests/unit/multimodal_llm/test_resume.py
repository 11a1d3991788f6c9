"""Resuming a language model's training with other settings (killed runs: e2e/test_trainers.py;
branches: training/test_branch.py)."""

import shutil
from pathlib import Path

import llm_runs as runs
import pytest
import torch
from safetensors.torch import load_file, save_file

from seed_multimodal.errors import CheckpointError, ConfigError


@pytest.fixture
def two_steps(train):
    return train("out", "trainer.max_steps=2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "option, model, error, named",
    [
        ("trainer.max_steps=3", {"lora": runs.LORA}, CheckpointError, "model"),
        ("optim.name=adamw_hf", {}, CheckpointError, "adamw_hf"),
        ("data.length=128", {}, ConfigError, "length: 160 -> 128"),
        ("data.rows=1", {}, CheckpointError, "rows per step.*trainer.resume"),
    ],
)
def test_resume_with_another_model_optimizer_or_data_fails(
    train, two_steps, option, model, error, named
):
    with pytest.raises(error, match=named):
        train("out", "trainer.max_steps=4", option, model=model)


@pytest.mark.slow
def test_resume_with_another_weight_decay(train, two_steps, capsys):
    # The saved optimizer does not restore the old one.
    checkpoint = str(two_steps / "checkpoint-2")
    finals = []
    for decay in ("0.5", "0.25"):
        options = ["trainer.max_steps=3", f"optim.weight_decay={decay}", "--resume", checkpoint]
        options.append("trainer.logging_steps=3")
        out = train(f"with{decay}", *options)
        # A setting that changes no result is not logged.
        output = capsys.readouterr().out
        assert f"weight_decay: not given -> {decay}" in output
        assert "logging_steps" not in output
        finals.append(load_file(out / "checkpoint-3" / "model.safetensors"))
    rate = runs.log_lines(out)[-1]["learning_rate"]
    before = load_file(two_steps / "checkpoint-2" / "model.safetensors")
    for name, value in before.items():
        torch.testing.assert_close(
            finals[1][name] - finals[0][name], rate * 0.25 * value, rtol=1e-3, atol=2e-7
        )


def test_samples_of_a_resumed_run_are_of_the_same_prompts(train):
    # Of a model that does not change they are the same, so what differs is what was learned.
    still = ["optim.learning_rate=0.0", "trainer.sample_steps=1"]
    for steps in (1, 2):
        out = train("out", f"trainer.max_steps={steps}", *still)
    first, second = ((out / "samples" / f"step-{step}.txt").read_text() for step in (1, 2))
    assert first == second


@pytest.fixture
def base(tmp_path) -> Path:
    return runs.write_base(tmp_path / "base")


def test_resume_on_another_base_or_tokenizer_fails(train, base, tmp_path):
    # The same paths with another content: the adapter would belong to a model that is gone.
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(runs.TOKENIZER, tokenizer)
    groups = {
        "model": {"path": str(base), "sizes": None, "lora": runs.LORA},
        "tokenizer": {"pretrained_model_name_or_path": str(tokenizer)},
    }
    train("out", "trainer.max_steps=1", **groups)
    weights = load_file(base / "model.safetensors")
    changed = {**weights, "model.layers.1.mlp.up_proj.weight": torch.zeros(64, 32)}
    save_file(changed, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="another base"):
        train("out", "trainer.max_steps=2", **groups)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    model = tokenizer / "tokenizer.model"
    model.write_bytes(model.read_bytes().replace(b"the", b"teh"))
    with pytest.raises(CheckpointError, match="tokenizer"):
        train("out", "trainer.max_steps=2", **groups)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, runs.LORA])
def test_averaged_weights_are_evaluated_saved_and_resumed(train, base, tmp_path, lora):
    # The averages are the result everywhere: what is served is what was measured.
    model = {"path": str(base), "sizes": None, "lora": lora}
    options = ["trainer.ema=0.7", "trainer.save_steps=2", f"eval_data={tmp_path / 'data.yaml'}"]
    options += ["trainer.eval_steps=4", "trainer.eval_batches=2"]
    runs.write_files(tmp_path)
    out = train("out", "trainer.max_steps=4", *options, model=model)
    train("parts", "trainer.max_steps=2", *options, model=model)
    parts = train("parts", "trainer.max_steps=4", *options, model=model)
    assert runs.losses(parts)[4] == runs.losses(out)[4]

    # The evaluation of the saved weights, as a run of them alone measures it.
    start = {"path": str(out / "checkpoint-4"), "sizes": None, "lora": None}
    if lora is not None:
        start = {**model, "adapter": str(out / "checkpoint-4")}
    still = ["optim.learning_rate=0.0", "trainer.max_steps=1", "trainer.ema=0"]
    again = train("again", *options, *still, model=start)
    measured = [
        [line["eval_loss"] for line in runs.log_lines(run) if "eval_loss" in line][-1]
        for run in (out, parts, again)
    ]
    assert measured == pytest.approx([measured[0]] * 3, rel=1e-6)
