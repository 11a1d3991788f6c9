"""The memory plan: numbers of weights as models have them, kept activations as autograd keeps them, published sizes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from seed_multimodal.language.vocabulary import ImageVocabulary
from seed_multimodal.training.llm.loss import LossModule, find_llama, round_residual
from seed_multimodal.training.llm.memory import GIB, LlamaSizes, Spread, layer_bytes, memory_plan
from seed_multimodal.training.llm.model import build_llm
from seed_multimodal.training.llm.model_settings import LlmModelSettings

TOKENIZER = SimpleNamespace(vocabulary=ImageVocabulary(300, 64, 32))
VICUNA = LlamaSizes(4096, 11008, 32, 4096, 4096, 40194)
LLAMA_13B = LlamaSizes(5120, 13824, 40, 5120, 5120, 40194)
A100, A100_80 = 39.5 * GIB, 79.1 * GIB  # as their driver gives them


def build(layers: int = 3, kv: int = 2, lora: dict[str, Any] | None = None, dtype: str = "bf16", **more: Any) -> Any:
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": layers, "num_attention_heads": 4,
             "num_key_value_heads": kv, "max_position_embeddings": 512, **more.pop("sizes", {})}
    return build_llm(LlmModelSettings(sizes=sizes, dtype=dtype, lora=lora, attention="sdpa", **more), TOKENIZER, "cpu")


@pytest.mark.parametrize(("lora", "tied"), [
    (None, False), (None, True), ({}, False), ({"r": 4, "target_modules": ["q_proj", "down_proj"]}, False),
    ({"r": 4, "modules_to_save": ["lm_head"]}, False)])
def test_weights_are_counted_as_models_have_them(lora: dict[str, Any] | None, tied: bool) -> None:
    model = build(lora=lora, sizes={"tie_word_embeddings": tied})
    sizes = LlamaSizes.of(find_llama(model).config, TOKENIZER.vocabulary.size)
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad == trained) for trained in (False, True)]
    assert sizes.weights(lora) == tuple(counts)


def test_the_published_model_trains_the_published_number_of_weights() -> None:
    assert VICUNA.weights({})[1] == 39_976_960 + 2 * 164_634_624 + 266_240
    assert LLAMA_13B.weights({})[1] == 62_586_880 + 2 * 205_793_280 + 81 * 5120


def kept(precision: str, layers: int, length: int, **settings: Any) -> int:
    """Bytes that autograd keeps for the backward pass, weights left out, each storage once."""
    model = build(layers, **settings)
    module = LossModule(model)
    round_residual(module, precision)
    ids = torch.randint(3, 290, (2, length), generator=torch.Generator().manual_seed(0))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, tuple[int, torch.Tensor]] = {}  # the tensors stay alive, so no address comes twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found.setdefault(storage.data_ptr(), (storage.nbytes(), tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), \
            torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
        module(ids, ids, torch.arange(length)[None].repeat(2, 1))
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize(("precision", "lora", "checkpointing", "kv"), [
    ("bf16", {}, False, 4), ("bf16", {}, False, 2), ("bf16", {"lora_dropout": 0.0}, False, 4), ("bf16", None, False, 4),
    ("bf16", {}, True, 4), ("bf16", None, True, 4), ("fp32", None, False, 4), ("fp32", {}, False, 4)])
def test_activations_are_what_autograd_keeps(precision: str, lora: dict[str, Any] | None, checkpointing: bool,
                                             kv: int) -> None:
    dtype = "fp32" if precision == "fp32" else "bf16"
    counted = {(layers, length): kept(precision, layers, length, kv=kv, lora=lora, dtype=dtype,
                                      gradient_checkpointing=checkpointing)
               for layers in (1, 3) for length in (32, 64)}
    layer = sum(sign * counted[layers, length] for sign, layers, length in
                ((1, 3, 64), (-1, 3, 32), (-1, 1, 64), (1, 1, 32))) / 2 / 64  # of a position
    sizes, number = LlamaSizes(128, 320, 3, 128, 32 * kv, 366), 4 if precision == "fp32" else 2
    if checkpointing:
        assert layer == (2 if lora is not None else 4) * 128
    else:
        assert layer == pytest.approx(layer_bytes(sizes, lora, number, dtype == "bf16"), rel=0.07)
    plan = memory_plan(sizes, Spread(), lora=lora, precision=precision, base_bytes=number, checkpointing=checkpointing)
    assert plan.position >= sizes.layers * layer  # and what is at work


def test_the_published_pretraining_fits_the_published_gpus() -> None:
    """64 A100 of 40 GB, ZeRO-2, micro-batches of up to 26,624 positions; without spreading it would not."""
    plan = memory_plan(VICUNA, Spread(64, 2, True), lora={})
    assert 24_400 <= plan.rows(A100, 1) <= 30_000 and plan.rows(A100, 2048) == 12
    assert memory_plan(VICUNA, Spread(), lora={}).rows(A100, 2048) < 12
    assert memory_plan(VICUNA, Spread(32, 2, True, True), lora={}).rows(A100_80, 1) > 26_624  # tuning: 32 of 80 GB
    assert memory_plan(LLAMA_13B, Spread(64, 2, True), lora={}).rows(A100, 2048) in range(2, 8)
    assert memory_plan(LLAMA_13B, Spread(), lora=None).rows(A100_80, 2048) == 0  # 16 bytes a weight


def test_what_saves_memory_is_planned_to() -> None:
    def rows(spread: Spread | None = None, **more: Any) -> int:
        return memory_plan(VICUNA, spread or Spread(), lora={}, **more).rows(A100_80, 2048)

    assert rows(checkpointing=False) < rows(checkpointing="selective") < rows()
    assert rows(base_bytes=0.57) > rows(base_bytes=1.0) > rows()
    assert rows(kernel="plain", positions=24_576) < rows()
    assert rows(Spread(8, 3)) > rows(Spread(8)) and rows(Spread(8, 2, True)) > rows(Spread(8, 1, True))
    assert rows(Spread(1, 2, True, states_on_cpu=True)) > rows(Spread(1, 2, True))
    assert rows(precision="fp32", base_bytes=4.0) < rows()
    plan = memory_plan(VICUNA, Spread(), lora={})
    assert plan.total(4096) == plan.fixed + 4096 * plan.position and "14.7 GiB weights" in plan.text(4096)
