"""Frozen weights in FP8: close to the layers they replace by what e4m3 can lose, trained beside as before, refused."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from seed_multimodal.config import load_yaml
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.vocabulary import ImageVocabulary
from seed_multimodal.training.llm.flops import token_flops
from seed_multimodal.training.llm.fp8 import Fp8Linear, freeze_in_fp8, has_fp8, keep_out_of_ddp, product, quantise
from seed_multimodal.training.llm.loss import LossModule, find_llama, packed_loss
from seed_multimodal.training.llm.model import build_llm, save_trained, trained_state
from seed_multimodal.training.llm.model_settings import LlmModelSettings, read_model_settings
from seed_multimodal.training.llm.train import train_llm

ROOT = Path(__file__).resolve().parents[4]
STEP = 2.0**-4  # half of the last of 3 mantissa bits: the most that rounding moves a number of normal size
SMALLEST = 2.0**-10 / 448  # half of e4m3's smallest number: the most that it moves smaller ones, of the row's largest
# Rounding errors are spread evenly over ± that; as they add up in squares, a product has at most those of two operands.
NOISE = math.sqrt(2 / 3) * STEP
HALF_BF16 = 2.0**-8
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
         "max_position_embeddings": 64}
TOKENIZER = SimpleNamespace(vocabulary=ImageVocabulary(60, 8, 4))
WORDS = TOKENIZER.vocabulary.size
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available() or not has_fp8(torch.device("cuda")),
                               reason="needs a GPU that computes FP8")


def build(fp8: bool = True, spread: float = 0.02, **settings: Any) -> Any:
    values: dict[str, Any] = {"dtype": "fp32", "attention": "eager", "lora": LORA, **settings}
    sizes = {**SIZES, "initializer_range": spread}
    return build_llm(LlmModelSettings(sizes=sizes, fp8=fp8, **values), TOKENIZER, "cpu")


def batch(rows: int = 2, length: int = 32) -> SimpleNamespace:
    ids = torch.randint(3, WORDS, (rows, length), generator=torch.Generator().manual_seed(4))
    return SimpleNamespace(input_ids=ids, labels=ids, position_ids=None, attention_mask=None)


def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    """A frozen layer whose rows and columns differ in size by a hundred, as scales must follow."""
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        layer.weight *= torch.logspace(-1, 1, outputs)[:, None] * torch.logspace(-1, 1, inputs)[None]
    return layer.requires_grad_(False)


def moved(values: torch.Tensor) -> torch.Tensor:
    """The most that e4m3 moves each number, with a scale per row."""
    return torch.maximum(STEP * values.abs(), SMALLEST * values.abs().amax(-1, keepdim=True)) * (1 + 1e-6)


def assert_near(found: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    """`found` is `x @ w.T` as far as e4m3 operands and a bf16 result allow, in each number and over all."""
    x, w, found = x.double(), w.double(), found.double()
    wanted = x @ w.t()
    most = x.abs() @ moved(w).t() + moved(x) @ (w.abs() + moved(w)).t()
    most = most + HALF_BF16 * (wanted.abs() + most)
    assert bool(((found - wanted).abs() <= most).all())
    share = float((found - wanted).norm() / wanted.norm())
    assert 0.1 * NOISE < share < NOISE, "neither exact nor further off than two rounded operands"


def passes(layer: Any, x: torch.Tensor, autocast: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, its gradient (drawn) and the input's."""
    own = x.detach().clone().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        y = layer(own)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    y.backward(grad)
    assert own.grad is not None
    return y.detach(), grad, own.grad


def test_rounding_moves_no_number_further_than_e4m3_must() -> None:
    rows = torch.randn(50, 64) * torch.logspace(-30, 30, 50)[:, None]
    rows[7] = 0
    values, scale = quantise(rows)
    assert values.dtype == torch.float8_e4m3fn and scale.shape == (50, 1)
    assert bool(((values.float() * scale - rows).abs() <= moved(rows)).all()) and bool((values[7].float() == 0).all())
    assert torch.equal(values.float().abs().amax(-1)[8:], torch.full((42,), 448.0))
    broken = rows.index_fill(0, torch.tensor([3]), float("nan"))
    weight, weight_scale = quantise(torch.randn(16, 64))
    found = product(broken, weight, weight_scale.flatten(), False)
    assert bool(found[3].isnan().all()) and not bool(found[:3].isnan().any())


@pytest.mark.parametrize("autocast", [False, True])
def test_output_and_gradient_are_as_near_as_e4m3_allows(autocast: bool) -> None:
    plain = linear(96, 48, bias=True)
    layer, x = Fp8Linear(plain), torch.randn(3, 40, 96)
    y, grad, x_grad = passes(layer, x, autocast)
    wanted, _, _ = passes(plain, x, autocast)
    assert (y.shape, y.dtype, x_grad.dtype) == (wanted.shape, wanted.dtype, torch.float32)
    without_bias = product(x.flatten(0, 1), layer.weight, layer.scale, False)
    torch.testing.assert_close(y, (without_bias.to(y.dtype) + plain.bias.to(y.dtype)).view_as(y), rtol=0, atol=0)
    assert_near(without_bias, x.flatten(0, 1), plain.weight)
    assert_near(x_grad.flatten(0, 1), grad.flatten(0, 1), plain.weight.t())


def test_checkpointing_and_compilation_change_no_number() -> None:
    layer, x = Fp8Linear(linear(64, 32)), torch.randn(2, 9, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    whole = torch.compile(lambda value: checkpoint(layer, value, use_reentrant=False), fullgraph=True,
                          backend="aot_eager")
    for autocast in (False, True):
        wanted = passes(layer, x, autocast)
        again = [lambda value: checkpoint(layer, value, use_reentrant=False)]
        for other in [*again, whole if autocast else compiled]:
            assert all(map(torch.equal, wanted, passes(other, x, autocast)))


def test_what_is_frozen_in_the_layers_is_replaced_and_nothing_else() -> None:
    model = build(lora={**LORA, "target_modules": ["q_proj", "down_proj"],
                        "modules_to_save": ["lm_head", "up_proj", "norm"]})
    llama = find_llama(model)
    kinds = {name for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    ends = ("q_proj.base_layer", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj.base_layer")
    assert len(kinds) == SIZES["num_hidden_layers"] * len(ends) and all(name.endswith(ends) for name in kinds)
    assert type(llama.lm_head.modules_to_save["default"]) is nn.Linear
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert freeze_in_fp8(model) == len(kinds), "a second time changes nothing"
    odd = build(lora={**LORA, "r": 16}, spread=0.02)
    assert not any(isinstance(module, Fp8Linear) for name, module in odd.named_modules() if "lora_" in name)
    small = build(fp8=False)
    find_llama(small).model.layers[0].mlp.up_proj.base_layer = linear(32, 40)
    freeze_in_fp8(small)
    kinds_of = [type(layer.mlp.up_proj.base_layer) for layer in find_llama(small).model.layers]
    assert kinds_of == [nn.Linear, Fp8Linear], "40 is no multiple of 16"


def test_two_bytes_a_number() -> None:
    plain = linear(512, 256)
    layer = Fp8Linear(plain)
    taken = sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()))
    assert taken == 2 * plain.weight.numel() + 4 * (512 + 256)
    assert layer.weight.dtype == layer.transposed.dtype == torch.float8_e4m3fn


def test_counts_and_saved_state_are_those_of_the_plain_model(tmp_path: Path) -> None:
    plain, model = build(fp8=False, dtype="bf16"), build(dtype="bf16")
    assert token_flops(model, 40) == token_flops(plain, 40)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    state, wanted = trained_state(model), trained_state(plain)
    assert state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in wanted)
    with torch.no_grad():
        next(value for name, value in state.items() if "lora_B" in name).fill_(0.5)
    again = build(dtype="bf16", adapter=str(save_trained(model, tmp_path)))
    assert all(torch.equal(value, state[name]) for name, value in trained_state(again).items())


def test_adapters_get_nearly_the_gradients_of_the_plain_model() -> None:
    found = []
    for fp8 in (False, True):
        model = build(fp8)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # else the adapters' first halves get none
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        packed_loss(model, batch()).mean.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    wanted, grads = found
    for half in ("lora_A", "lora_B"):
        off = sum(float((grads[name] - wanted[name]).square().sum()) for name in wanted if half in name)
        whole = sum(float(wanted[name].square().sum()) for name in wanted if half in name)
        # A gradient is a product of an activation and a gradient, both of them carried past the noise by the residual.
        assert 0.1 * NOISE < math.sqrt(off / whole) < math.sqrt(2) * NOISE


def learned(fp8: bool) -> list[float]:
    """Losses of 20 steps on one batch, as the trainer computes them."""
    model, losses = build(fp8, spread=0.1, dtype="bf16", gradient_checkpointing="selective"), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            loss = packed_loss(model, batch(1, 24)).mean
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_short_training_goes_as_in_bf16() -> None:
    bf16, fp8 = learned(False), learned(True)
    assert bf16[-1] < 0.5 * bf16[0]
    assert all(abs(one - other) < 0.1 * other for one, other in zip(fp8, bf16, strict=True))
    assert fp8 != bf16


def test_data_parallel_training_leaves_fp8_weights_where_they_are(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        modules = [LossModule(build()), LossModule(build())]
        with pytest.raises(RuntimeError, match="Invalid scalar type"):
            nn.parallel.DistributedDataParallel(modules[0])
        keep_out_of_ddp(modules[1])
        model = nn.parallel.DistributedDataParallel(modules[1])
        one = batch()
        model(one.input_ids, one.labels).mean.backward()
    finally:
        dist.destroy_process_group()
    alone = LossModule(build())
    alone(one.input_ids, one.labels).mean.backward()
    for (name, found), wanted in zip(modules[1].named_parameters(), alone.parameters(), strict=True):
        assert (found.grad is None) == (wanted.grad is None), name
        assert wanted.grad is None or torch.equal(found.grad, wanted.grad), name


@pytest.mark.parametrize(("config", "sentence"), [
    ({"path": "x", "fp8": True}, "fp8 is for frozen weights, and without lora none are; give lora"),
    ({"path": "x", "fp8": True, "lora": {}, "quantization": "4bit"}, "fp8 and quantization exclude each other"),
    ({"path": "x", "fp8": "e4m3", "lora": {}}, "fp8: input should be a valid boolean")])
def test_wrong_settings_are_refused(config: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_model_settings(config)


def test_deepspeed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"DeepSpeed would cast fp8 weights back .*; use the plain engine\."):
        train_llm({"output_dir": str(tmp_path), "tokenizer": str(tmp_path), "data": {"sources": []}, "optim": {},
                   "model": {"sizes": SIZES, "lora": LORA, "fp8": True}, "trainer": {"device": "cpu"},
                   "deepspeed": {"zero_optimization": {"stage": 2}}})


def test_released_files_may_ask_for_it() -> None:
    file = ROOT / "MultiModalLLM" / "configs" / "model" / "vicuna_7b_lora.yaml"
    settings = read_model_settings({**load_yaml(file), "fp8": True})
    assert settings.fp8 and settings.lora is not None and not read_model_settings(dict(load_yaml(file))).fp8


@needs_gpu
@pytest.mark.parametrize("rows", [1, 40, 333])
def test_a_gpu_computes_the_emulated_numbers(rows: int) -> None:
    plain, x = linear(256, 128), torch.randn(rows, 256)
    wanted = passes(Fp8Linear(plain), x)
    layer = Fp8Linear(plain.to("cuda"))
    assert layer.native
    for run in (layer, torch.compile(layer, fullgraph=True)):
        y, _, grad = passes(run, x.to("cuda"))
        for found, other in ((y, wanted[0]), (grad, wanted[2])):
            # Two roundings to bf16, and a sum that the tensor core keeps with about 14 bits.
            assert float((found.cpu() - other).norm() / other.norm()) < 2 * HALF_BF16


@needs_gpu
def test_a_model_trains_on_a_gpu() -> None:
    sizes = {**SIZES, "initializer_range": 0.1}
    settings = LlmModelSettings(sizes=sizes, fp8=True, attention="sdpa", lora=LORA, gradient_checkpointing="selective")
    model = build_llm(settings, TOKENIZER, "cuda")
    one = SimpleNamespace(**{k: None if v is None else v.to("cuda") for k, v in vars(batch()).items()})
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3), []
    for _ in range(20):
        with torch.autocast("cuda", torch.bfloat16):
            loss = packed_loss(model, one).mean
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
