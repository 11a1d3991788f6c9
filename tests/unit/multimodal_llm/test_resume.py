"""Resuming: torn and named checkpoints, changed settings (killed runs: e2e/test_trainers.py)."""

from __future__ import annotations

import json
import shutil

import llm_runs as runs
import pytest
import torch
from safetensors.torch import load_file

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.training.checkpoint import checkpoints


@pytest.mark.slow
def test_resume_after_a_torn_checkpoint(train, tmp_path, capsys):
    options = "trainer.save_steps=1", "trainer.max_steps=4", "trainer.save_total_limit=3"
    out = train("out", *options)
    assert [step for step, _ in checkpoints(out)] == [4, 3, 2]
    losses = runs.losses(out)
    files = {path.name for path in (out / "checkpoint-4").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        "added_tokens.json",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "trainer_state.json",
    } <= files
    state = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == state["max_steps"] == 4

    (out / ".checkpoint-5.tmp").mkdir()  # of a run that was killed while it saved
    shutil.rmtree(out / "checkpoint-4")
    capsys.readouterr()
    train("out", *options)
    assert "(step 3)" in capsys.readouterr().out
    assert runs.losses(out) == losses and not (out / ".checkpoint-5.tmp").exists()
    assert [step for step, _ in checkpoints(out)] == [4, 3, 2]

    train("out", *options)  # nothing is left to do
    assert "4 steps" in capsys.readouterr().out and runs.losses(out) == losses


@pytest.mark.slow
def test_resume_from_a_named_checkpoint_or_with_another_model_or_data(train, tmp_path):
    out = train("out", "trainer.max_steps=3", "trainer.save_steps=1")
    with pytest.raises(CheckpointError, match="contains checkpoints of an earlier run"):
        train("out", "--resume", "never")
    with pytest.raises(CheckpointError, match="no checkpoint to resume"):
        train("other", "--resume", str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"was saved with model .*start from its weights"):
        train("out", model={"lora": runs.LORA})
    with pytest.raises(CheckpointError, match='with optimizer "adamw", this run has "adamw_hf"'):
        train("out", "optim.name=adamw_hf")
    with pytest.raises(ConfigError, match="length: 160 -> 128"):
        train("out", "trainer.max_steps=4", "data.length=128")
    before = runs.losses(out)
    # Later checkpoints of the earlier run do not push out the one just written.
    train(
        "out",
        "trainer.max_steps=2",
        "trainer.save_total_limit=1",
        "--resume",
        str(out / "checkpoint-1"),
    )
    assert [step for step, _ in checkpoints(out)] == [2] and runs.losses(out)[2] == before[2]
    assert [step for step, _ in checkpoints(out / "abandoned-1")] == [3, 2]


@pytest.mark.slow
def test_resume_with_changed_settings(train, tmp_path, capsys):
    """The saved optimizer does not restore its weight decay.

    A setting that changes no result is not logged.
    """
    checkpoint = str(train("out", "trainer.max_steps=2", "optim.weight_decay=0.5") / "checkpoint-2")
    train("same", "trainer.max_steps=3", "optim.weight_decay=0.5", "--resume", checkpoint)
    assert "other settings" not in capsys.readouterr().out
    train(
        "less",
        "trainer.max_steps=3",
        "optim.weight_decay=0.25",
        "trainer.logging_steps=3",
        "--resume",
        checkpoint,
    )
    assert (
        "settings changed since the checkpoint: optim.weight_decay: 0.5 -> 0.25.\n"
        in capsys.readouterr().out
    )
    before, same, less = (
        load_file(tmp_path / folder / "model.safetensors")
        for folder in ("out/checkpoint-2", "same/checkpoint-3", "less/checkpoint-3")
    )
    rate = runs.log_lines(tmp_path / "less")[-1]["learning_rate"]
    for name, value in before.items():
        torch.testing.assert_close(
            less[name] - same[name], rate * 0.25 * value, rtol=1e-3, atol=2e-7
        )
