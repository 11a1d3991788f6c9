"""The de-tokenizer's training: what ZeRO refuses, averaged weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_detokenizer import (
    config,
    losses,
    write_parts,
)

import seed_multimodal  # noqa: F401  (before diffusers)
from seed_multimodal.errors import ConfigError
from seed_multimodal.training.seed_x.detokenizer import build_adapter, train_detokenizer
from seed_multimodal.training.seed_x.detokenizer_settings import read_detokenizer_run
from seed_multimodal.weights import load_state_dict

ZERO = {"zero_optimization": {"stage": 2}}
@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("detokenizer"))


def adapters(*runs: Path) -> list[dict[str, torch.Tensor]]:
    return [load_state_dict(run / "adapter" / "model.safetensors") for run in runs]


# ---- processes


@pytest.mark.parametrize(("changes", "said"), [
    ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "ZeRO 3 is not built in for the de-tokenizer"),
    ({"deepspeed": ZERO, "trainer": {"ema": 0.9}}, "ema is not built in with DeepSpeed; set trainer.ema=0"),
    ({"deepspeed": {"zero_optimization": 2}}, "zero_optimization.stage must be 1 or 2"),
    ({"deepspeed": ZERO, "trainer": {"precision": "bf16"}}, "no bf16 block, but trainer.precision is bf16")])
def test_what_zero_refuses(parts: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        train_detokenizer(config(parts, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="deepspeed must be a file of configs/deepspeed, not 'stage2'"):
        train_detokenizer({**config(parts, tmp_path / "run"), "deepspeed": "stage2"})


# ---- averaged weights


@pytest.mark.slow
def test_averaged_weights_are_the_result(parts: Path, tmp_path: Path) -> None:
    """The adapter is the moving average of the weights after each step, computed here again; averaging changes no
    step, and the frozen part stays SDXL's."""
    given = config(parts, tmp_path / "run", trainer={"max_steps": 3, "save_steps": 1, "ema": 0.5})
    train_detokenizer(given)
    train_detokenizer(config(parts, tmp_path / "bare", trainer={"max_steps": 3, "save_steps": 1}))
    assert losses(tmp_path / "run") == losses(tmp_path / "bare")
    expected = dict(build_adapter(read_detokenizer_run(given).model).state_dict())
    for step in (1, 2, 3):
        now = load_state_dict(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors")
        decay = min(0.5, step / (9 + step))
        expected |= {name: decay * expected[name] + (1 - decay) * value for name, value in now.items()}
    averaged, last = adapters(tmp_path / "run", tmp_path / "bare")
    for name, value in averaged.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7, msg=name)
    assert any(not torch.equal(value, last[name]) for name, value in averaged.items())
