"""Resuming a language model's training with other settings (killed runs: e2e/test_trainers.py;
branches: training/test_branch.py)."""

from __future__ import annotations

import llm_runs as runs
import pytest

from seed_multimodal.errors import CheckpointError, ConfigError


@pytest.fixture
def two_steps(train):
    return train("out", "trainer.max_steps=2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "model", "error", "named"),
    [
        ("trainer.max_steps=3", {"lora": runs.LORA}, CheckpointError, "model"),
        ("optim.name=adamw_hf", {}, CheckpointError, "adamw_hf"),
        ("data.length=128", {}, ConfigError, "length: 160 -> 128"),
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
    import torch
    from safetensors.torch import load_file

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
