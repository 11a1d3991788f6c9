"""The fast encoder against the plain one: codes in fp32 and bf16, every lever, compiled, and its refusals."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import threading
from collections import Counter

import pytest
import tiny_seed1
import torch
from torch.utils.flop_counter import FlopCounterMode

from seed_multimodal.errors import ConfigError, ImageError
from seed_multimodal.tokenizers.fast import STATIC_SIZES, FastTokenizer, FastTower, Levers, optimise, plan
from seed_multimodal.tokenizers.fast_encoder import compiler, vision_block
from seed_multimodal.tokenizers.flops import encode_flops
from seed_multimodal.tokenizers.qformer import QFormerConfig
from seed_multimodal.tokenizers.seed2 import Seed2Config, Seed2Tokenizer
from seed_multimodal.vision.eva import EvaConfig

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def built(config: Seed2Config) -> Seed2Tokenizer:
    """Weights, gains and biases all random, so that nothing that packing moves is zero or one."""
    model = Seed2Tokenizer(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            is_gain = value.ndim == 1 and name.endswith("weight")
            value.normal_(1.0 if is_gain else 0.0, 0.2 if value.ndim == 1 else value.shape[-1] ** -0.5)
    return model


@pytest.fixture
def model(tiny: Seed2Config) -> Seed2Tokenizer:
    return built(tiny)


@pytest.mark.parametrize("change", [
    {}, {"codebook_size": 64, "codebook_sections": 32}, {"normalize_codes": True},
    {"num_query": 9}, {"cross": 1}, {"cross": 3}, {"pre_norm": True}], ids=str)
def test_fp32_codes_and_features_are_the_plain_ones(tiny: Seed2Config, change: dict) -> None:
    change = dict(change)
    every = change.pop("cross", tiny.qformer.cross_attention_freq)
    qformer = dataclasses.replace(tiny.qformer, cross_attention_freq=every)
    vit = dataclasses.replace(tiny.vit, pre_norm=change.pop("pre_norm", False))
    model = built(dataclasses.replace(tiny, qformer=qformer, vit=vit, **change))
    images, fast = torch.randn(64, 3, 16, 16), optimise(model)
    codes = model.encode(images)
    assert torch.equal(fast.encode(images), codes) and len(codes.unique()) > 8
    with torch.no_grad():
        torch.testing.assert_close(fast.vit_features(images), model.visual_encoder(images), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fast.query_features(images), model.query_features(images), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fast.encoder.pre_quant(images), model.pre_quant(images), rtol=1e-4, atol=1e-4)


def test_seed1_is_encoded_fast_too() -> None:
    model, images = tiny_seed1.tokenizer(), torch.randn(16, 3, 16, 16)
    fast, codes = optimise(model), model.encode(images)
    assert torch.equal(fast.encode(images), codes) and torch.equal(fast.codes_from(fast.vit_features(images)), codes)
    assert torch.equal(fast.decode(codes), model.decode(codes)) and len(codes.unique()) > 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_tower_under_training(model: Seed2Tokenizer, dtype: torch.dtype) -> None:
    """As the trainer's plain tower: matrix products in `dtype` under autocast, everything else in float32."""
    tower, images = model.visual_encoder, torch.randn(4, 3, 16, 16)
    fast = FastTower(tower, dtype)
    with torch.autocast("cpu", torch.bfloat16):  # the loop's, which is not the tower's
        got = fast(images)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        want = tower(images).float()
    assert got.dtype == torch.float32 and not got.requires_grad
    near = 1e-4 if dtype == torch.float32 else 0.02 * float(want.abs().max())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=near)
    with torch.no_grad():
        tower.blocks[0].mlp.fc2.bias += 1.0
    assert (fast(images) - got).abs().max() > 0.5, "packed anew after a change"
    with pytest.raises(ImageError, match=r"\[B, 3, 16, 16\]"):
        fast(torch.zeros(1, 3, 8, 8))


def test_bf16_keeps_99_of_100_codes() -> None:
    """At the released depth, where rounding adds up; the same in bf16 throughout stays below."""
    model = built(Seed2Config(
        vit=EvaConfig(image_size=48, patch_size=8, width=32, depth=39, heads=2, mlp_width=64),
        qformer=QFormerConfig(width=32, depth=12, heads=2, mlp_width=64), codebook_size=512, codebook_dim=32,
        decode_heads=4))
    with torch.no_grad():
        for block in model.visual_encoder.blocks:  # as after training, a block adds a little to the stream
            block.attn.proj.weight.mul_(0.3)
            block.mlp.fc2.weight.mul_(0.3)
    images, half = torch.randn(64, 3, 48, 48), torch.bfloat16
    codes = model.encode(images)
    fast = optimise(model, levers=Levers(dtype=half))
    assert fast.dtype == half and model.dtype == torch.float32 and fast.vit_features(images[:0]).dtype == torch.float32
    everywhere = optimise(model, levers=Levers(dtype=half, query_dtype=half, residual_dtype=half))
    assert _kept(fast, images, codes) >= 0.99 > _kept(everywhere, images, codes)


def _kept(fast: FastTokenizer, images: torch.Tensor, codes: torch.Tensor) -> float:
    return float((fast.encode(images) == codes).float().mean())


@pytest.mark.parametrize("levers", [
    Levers(head_width=16), Levers(head_width=8), Levers(attention="math"), Levers(attention="flash"),
    Levers(dtype=torch.float64, residual_dtype=torch.float64), Levers(query_dtype=torch.float64)], ids=str)
def test_exact_levers_change_no_code(model: Seed2Tokenizer, levers: Levers) -> None:
    images = torch.randn(64, 3, 16, 16)
    assert torch.equal(optimise(model, levers=levers).encode(images), model.encode(images))


def test_the_tanh_formula_is_close_and_another(model: Seed2Tokenizer) -> None:
    images = torch.randn(8, 3, 16, 16)
    exact, near = optimise(model).query_features(images), optimise(model, levers=Levers(gelu="tanh"))
    error = (near.query_features(images) - exact).abs().max()
    assert 0 < error < 0.02
    assert (near.encode(images) == model.encode(images)).float().mean() > 0.97


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_tokenizer_is_taken_as_it_is(model: Seed2Tokenizer, dtype: torch.dtype) -> None:
    images = torch.randn(32, 3, 16, 16)
    exact = model.encode(images)
    fast = optimise(model.to(dtype))
    assert fast.dtype == dtype and (fast.encode(images) == exact).float().mean() > 0.9


def test_batches_modes_and_autocast_do_not_matter(model: Seed2Tokenizer, images: torch.Tensor) -> None:
    fast, codes = optimise(model), model.encode(images)
    for size in (1, 2, 5, 64):
        assert torch.equal(fast.encode(images, batch_size=size), codes)
    assert torch.equal(fast.encode(images[0]), codes[:1])
    assert fast.encode(images[:0]).shape == (0, 32) and fast.query_features(images[:0]).shape == (0, 32, 24)
    model.train()
    again = optimise(model)
    assert model.training and torch.equal(again.encode(images), codes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fast.encode(images), codes)
    assert torch.equal(fast.decode(codes), model.decode(codes)) and fast.config is model.config
    assert not fast.query_features(images).requires_grad


def test_the_tokenizer_is_left_alone(model: Seed2Tokenizer, images: torch.Tensor) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimise(model, levers=Levers(dtype=torch.bfloat16, head_width=16)).encode(images)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("bad", [torch.zeros(2, 3, 16, 18), torch.zeros(1, 3, 16, 16, dtype=torch.uint8), [[0.0]]])
def test_bad_images_are_refused_as_before(model: Seed2Tokenizer, bad: object) -> None:
    with pytest.raises(ImageError, match="Images must be"):
        optimise(model).encode(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(("asked", "said"), [
    ({"levers": Levers(head_width=4)}, "own width 8, got 4"),
    ({"levers": Levers(gelu="quick")}, "erf, tanh"),
    ({"levers": Levers(attention="flesh")}, "flash, cudnn"),
    ({"levers": Levers(dtype=torch.int8)}, "not int8"),
    ({"compile": "reduce-overhead"}, "default, max-autotune"),
])
def test_impossible_levers_are_refused(model: Seed2Tokenizer, asked: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        optimise(model, **asked)


def test_graphs_need_a_gpu(model: Seed2Tokenizer) -> None:
    with pytest.raises(ConfigError, match="CUDA graphs need a tokenizer on a CUDA device, this one is on cpu"):
        optimise(model, cuda_graph=True)


@pytest.mark.parametrize("count", [0, 1, 3, 5, 16, 17, 31, 100, 200, 250, 256, 257, 1000])
@pytest.mark.parametrize("limit", [None, 1, 7, 64, 256])
def test_plan_takes_every_image_once_and_wastes_little(count: int, limit: int | None) -> None:
    assert plan(count, limit, ()) == [(min(limit or count, count - i), min(limit or count, count - i))
                                      for i in range(0, count, limit or count or 1)]
    chunks = plan(count, limit, STATIC_SIZES)
    assert sum(images for images, _ in chunks) == count
    assert all(0 < images <= rows and images <= (limit or 256) for images, rows in chunks)
    assert all(rows in STATIC_SIZES and (rows <= 16 or 4 * images >= 3 * rows) for images, rows in chunks)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """The compiler without its slow last part, C++ or Triton; counts what it compiled."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    with torch._dynamo.config.patch(recompile_limit=1):  # by default 8 of a function, too few for every batch size
        yield torch._dynamo.utils.counters["stats"]
    torch.compiler.reset()


@pytest.mark.slow
def test_blocks_share_one_compilation_for_each_batch_size(model: Seed2Tokenizer, traced: Counter) -> None:
    fast, images = optimise(model, compile=True), torch.randn(6, 3, 16, 16)
    assert torch.equal(fast.encode(images, batch_size=4), model.encode(images))
    # patches, block, keys and values, task layer, search; first, plain and crossing Q-Former layer: for batches 4 and 2
    assert traced["unique_graphs"] == 2 * 8
    fast.warm_up([2, 3, 4])
    again = optimise(built(model.config), compile=True)
    assert torch.equal(again.encode(images[:3]), again.tokenizer.encode(images[:3]))
    assert traced["unique_graphs"] == 2 * 8, "the same functions serve another tokenizer of these sizes"
    torch.testing.assert_close(fast.query_features(images[:3])[0], fast.query_features(images[0])[0])


@pytest.mark.process
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler for CPUs needs g++")
def test_a_block_compiled_for_this_machine(model: Seed2Tokenizer) -> None:
    torch.compiler.reset()
    fast = optimise(model)
    x, h = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    arguments = (x, h, fast.encoder.vision.blocks[0], 2, fast.encoder.vision.scale, "erf")
    with torch.no_grad():
        torch.testing.assert_close(compiler("default")(vision_block)(*arguments), vision_block(*arguments))
    torch.compiler.reset()


@CUDA
@pytest.mark.parametrize("compile", [False, True])
def test_graphs_replay_equal_codes_from_several_threads(model: Seed2Tokenizer, compile: bool) -> None:
    model.to("cuda")
    fast, images = optimise(model, compile=compile, cuda_graph=True), torch.randn(8, 9, 3, 16, 16)
    want, got = [model.encode(part) for part in images], [torch.empty(0)] * 8

    def work(place: int) -> None:
        got[place] = fast.encode(images[place])

    threads = [threading.Thread(target=work, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@CUDA
def test_half_precision_on_a_gpu_uses_fp16_queries(model: Seed2Tokenizer) -> None:
    images, codes = torch.randn(64, 3, 16, 16), model.to("cuda").encode(torch.zeros(1, 3, 16, 16))
    fast: FastTokenizer = optimise(model, levers=Levers(dtype=torch.bfloat16, gelu="tanh"))
    assert fast.encoder.kv.dtype == torch.float16 and codes.is_cuda
    assert (fast.encode(images) == model.encode(images)).float().mean() > 0.95


@pytest.mark.parametrize("levers", [
    Levers(dtype=torch.bfloat16, query_dtype=torch.float16), Levers(dtype=torch.float16, head_width=96, gelu="tanh")],
    ids=str)
def test_released_sizes_fit_together_without_allocating_them(levers: Levers) -> None:
    with torch.device("meta"):
        model, images = Seed2Tokenizer(Seed2Config()), torch.zeros(2, 3, 224, 224)
    fast = optimise(model, levers=levers)
    with FlopCounterMode(display=False) as counter:
        codes = fast.encode(images)
    tower = fast.encoder.vision
    assert codes.shape == (2, 32) and codes.dtype == torch.long and tower.blocks[0].fc1.dtype == levers.dtype
    assert len(tower.blocks) == 39 and fast.encoder.kv.shape == (6 * 2 * 768, 1408)
    assert tower.stem.patch.shape[1] % 8 == 0
    if levers.gelu == "erf":  # another operator hides its products from the counter
        assert counter.get_total_flops() == pytest.approx(2 * encode_flops(model.config), rel=0.005)
