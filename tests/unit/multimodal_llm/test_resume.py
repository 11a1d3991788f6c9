"""Resuming: torn checkpoints are passed over, named ones taken, changed settings said (kills: e2e/test_trainers.py)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.training.checkpoint import checkpoints


@pytest.mark.slow
def test_keep_last_and_torn_checkpoints(runs, train, tmp_path, capsys):
    out = train("out", "trainer.save_steps=2", "trainer.max_steps=8", "trainer.save_total_limit=3")
    assert [step for step, _ in checkpoints(out)] == [8, 6, 4]
    whole = runs.losses(out)
    released = {path.name for path in (out / "checkpoint-8").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.model", "added_tokens.json", "special_tokens_map.json",
            "tokenizer_config.json", "trainer_state.json"} <= released
    state = json.loads((out / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["global_step"] == state["max_steps"] == 8

    (out / ".checkpoint-9.tmp").mkdir()  # of a run that was killed while it saved
    shutil.rmtree(out / "checkpoint-8")
    capsys.readouterr()
    train("out", "trainer.save_steps=2", "trainer.max_steps=8", "trainer.save_total_limit=3")
    assert "(step 6)" in capsys.readouterr().out
    assert runs.losses(out) == whole and not (out / ".checkpoint-9.tmp").exists()
    assert [step for step, _ in checkpoints(out)] == [8, 6, 4]

    capsys.readouterr()
    train("out", "trainer.max_steps=8")  # there is nothing left to do
    assert "8 steps" in capsys.readouterr().out and runs.losses(out) == whole


@pytest.mark.slow
def test_named_and_never(runs, train, tmp_path):
    out = train("out", "trainer.max_steps=2", "trainer.save_steps=1", "trainer.save_total_limit=2")
    with pytest.raises(CheckpointError, match="contains checkpoints of an earlier run"):
        train("out", "--resume", "never")
    with pytest.raises(CheckpointError, match="no checkpoint to resume"):
        train("other", "--resume", str(tmp_path / "nowhere"))
    other = train("other", "trainer.max_steps=2", "--resume", str(out / "checkpoint-1"))
    assert runs.losses(other)[2] == runs.losses(out)[2]
    # Later checkpoints (of the run before, or torn) do not push out the one just written.
    branch = train("out", "trainer.max_steps=5", "trainer.save_steps=1", "trainer.save_total_limit=2")
    assert [step for step, _ in checkpoints(branch)] == [5, 4]
    train("branch", "trainer.max_steps=4", "trainer.save_steps=1")
    train("branch", "trainer.max_steps=3", "trainer.save_total_limit=1", "--resume",
          str(tmp_path / "branch" / "checkpoint-2"))
    assert [step for step, _ in checkpoints(tmp_path / "branch")] == [4, 3]
    # Nothing left to do, from another folder: the sentence and the summary name the folder that there is.
    train("third", "trainer.max_steps=3", "--resume", str(tmp_path / "branch" / "checkpoint-3"))
    summary = json.loads((tmp_path / "third" / "summary.json").read_text())
    assert Path(summary["checkpoint"]) == tmp_path / "branch" / "checkpoint-3"
    with pytest.raises(CheckpointError, match=r"was saved with model .*start from its weights"):
        train("out", model={"lora": runs.LORA})
    with pytest.raises(CheckpointError, match='with optimizer "adamw", this run has "adamw_hf"'):
        train("out", "optim.name=adamw_hf")
    with pytest.raises(ConfigError, match="length: 160 -> 128"):
        train("out", "trainer.max_steps=3", "data.length=128")


@pytest.mark.slow
def test_changed_settings_are_logged_and_apply(runs, train, tmp_path, capsys):
    """The saved optimizer does not bring back its weight decay; what changes no number is not mentioned."""
    train("out", "trainer.max_steps=2", "optim.weight_decay=0.5")
    train("same", "trainer.max_steps=3", "optim.weight_decay=0.5", "--resume", str(tmp_path / "out" / "checkpoint-2"))
    assert "other settings" not in capsys.readouterr().out
    train("less", "trainer.max_steps=3", "optim.weight_decay=0.25", "trainer.logging_steps=3",
          "--resume", str(tmp_path / "out" / "checkpoint-2"))
    assert "settings changed since the checkpoint: optim.weight_decay: 0.5 -> 0.25.\n" in (
        capsys.readouterr().out)
    before, same, less = (load_file(tmp_path / folder / "model.safetensors") for folder in
                          ("out/checkpoint-2", "same/checkpoint-3", "less/checkpoint-3"))
    rate = runs.log_lines(tmp_path / "less")[-1]["learning_rate"]
    for name, value in before.items():
        torch.testing.assert_close(less[name] - same[name], rate * 0.25 * value, rtol=1e-3, atol=2e-7)
