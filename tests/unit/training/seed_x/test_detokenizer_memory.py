"""The de-tokenizer's training: what ZeRO refuses, the memory it holds, averaged weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_sdxl
import torch
from tiny_detokenizer import (
    config,
    losses,
    write_parts,
)

import seed_multimodal  # noqa: F401  (before diffusers)
from seed_multimodal.errors import ConfigError
from seed_multimodal.seed_x.adapter import ResamplerXLV2, SDXLAdapter
from seed_multimodal.training.ema import Ema
from seed_multimodal.training.llm.memory import GIB
from seed_multimodal.training.pixel_decoder.memory import held_memory
from seed_multimodal.training.seed_x.detokenizer import build_adapter, train_detokenizer
from seed_multimodal.training.seed_x.detokenizer_settings import read_detokenizer_run
from seed_multimodal.weights import load_state_dict

ZERO = {"zero_optimization": {"stage": 2}}
# The public unet/config.json of SDXL base 1.0, where it differs from the class's defaults.
SDXL_UNET = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816, "sample_size": 128, "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": True}


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


# ---- memory


@pytest.mark.parametrize("which", ["key_value", "all"])
def test_what_is_held_is_what_is_counted(which: Any) -> None:
    adapter = tiny_sdxl.adapter(2)
    trained = adapter.set_trainable(which)
    plan = held_memory(adapter, precision="fp32", ema=True, frozen={"tower": 5.0, "autoencoder": 7.0})
    optimizer, average = torch.optim.AdamW(trained, lr=1e-3), Ema(adapter, 0.9)
    adapter(torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 4, tiny_sdxl.WIDTH), torch.zeros(1, 6),
            torch.randn(1, 4, 8, 8)).square().mean().backward()
    optimizer.step()
    assert plan.weights == sum(p.nbytes for p in adapter.parameters())
    assert plan.gradients == sum(p.grad.nbytes for p in adapter.parameters() if p.grad is not None)
    assert plan.states == sum(value.nbytes for state in optimizer.state.values() for value in state.values()
                              if value.ndim)
    assert plan.average == sum(value.nbytes for value in average.shadow.values())
    assert plan.total == plan.weights + plan.gradients + plan.states + plan.average + 12


def test_the_released_sizes_in_memory() -> None:
    """On the meta device: the first stage's fixed part fits in 40 GB with the tower; the second's whole U-Net with
    ZeRO 2 on eight GPUs, or on one of 80 GB."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        adapter = SDXLAdapter(UNet2DConditionModel.from_config({**SDXL_UNET, "in_channels": 4}), ResamplerXLV2())
        adapter.set_trainable("key_value")
        first = held_memory(adapter, frozen={"tower": 2 * 1_935_610_624, "autoencoder": 4 * 83_653_863})
        kept = held_memory(adapter)
        adapter.add_condition_channels()
        adapter.set_trainable("all")
        second = held_memory(adapter)
        spread = held_memory(adapter, world=8, deepspeed=ZERO)
    assert first.weights / GIB == pytest.approx(4 * 2.628709380 / 1.073741824 + 2 * 0.606832896 / 1.073741824, rel=1e-6)
    assert first.total - kept.total == 2 * 1_935_610_624 + 4 * 83_653_863, "kept features spare tower and autoencoder"
    assert round(first.total / GIB, 1) == 21.6 and round(kept.total / GIB, 1) == 17.7
    assert round(second.total / GIB, 1) == 44.1 and round(spread.total / GIB, 1) < 12
    assert str(kept).startswith("17.7 GiB: U-Net and resampler 10.9 GiB, gradients 2.3 GiB, optimiser states 4.5 GiB")


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
