"""Seed2Tokenizer: batches, causality of codes, gradients, refusals of bad images and codes, half precision, sizes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from seed_multimodal.errors import CodesError, ConfigError, ImageError
from seed_multimodal.seed.compile import fast_encode
from seed_multimodal.tokenizers.encoder import evaluating
from seed_multimodal.tokenizers.seed2 import Seed2Config, Seed2Tokenizer


@pytest.fixture
def model(tiny: Seed2Config) -> Seed2Tokenizer:
    model = Seed2Tokenizer(tiny).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.1)
    return model


def test_released_size_without_allocating_it() -> None:
    with torch.device("meta"):
        model, reverse = Seed2Tokenizer(Seed2Config()), Seed2Tokenizer(Seed2Config(use_qformer_image=True))
    state = model.state_dict()
    assert len(state) == 881 and len(reverse.state_dict()) == 1134
    assert sum(p.numel() for p in model.parameters()) == 1_149_998_528
    assert sum(p.numel() for p in reverse.parameters()) == 1_248_743_104
    assert sum(name.startswith("visual_encoder.") for name in state) == 511
    assert tuple(state["visual_encoder.blocks.38.mlp.fc1.weight"].shape) == (6144, 1408)
    assert tuple(state["Qformer.bert.encoder.layer.10.crossattention.self.key.weight"].shape) == (768, 1408)


@pytest.mark.parametrize("batch_size", [None, 1, 2, 5, 64])
def test_encode_and_decode_do_not_depend_on_chunks(model: Seed2Tokenizer, images: torch.Tensor,
                                                   batch_size: int | None) -> None:
    whole = model.encode(images)
    codes = model.encode(images, batch_size=batch_size)
    assert codes.dtype == torch.int64 and codes.shape == (5, 32) and torch.equal(codes, whole)
    torch.testing.assert_close(model.decode(codes, batch_size=batch_size), model.decode(whole), rtol=1e-4, atol=1e-6)
    assert len(codes.unique()) > 5, "the fixture must use several codes"


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused(model: Seed2Tokenizer, images: torch.Tensor, batch_size: int) -> None:
    codes = model.encode(images)
    for call in (lambda: model.encode(images, batch_size=batch_size),
                 lambda: model.decode(codes, batch_size=batch_size)):
        with pytest.raises(ConfigError, match=f"batch_size must be at least 1, not {batch_size}"):
            call()


def test_one_image_one_row_and_none(model: Seed2Tokenizer, images: torch.Tensor) -> None:
    assert torch.equal(model.encode(images[0]), model.encode(images[:1]))
    assert model.encode(images[:0]).shape == (0, 32)
    row = model.encode(images[:1])[0]
    torch.testing.assert_close(model.decode(row.tolist()), model.decode(row[None]))
    assert model.decode(torch.zeros(0, 32, dtype=torch.long)).shape == (0, 10)


def test_early_codes_do_not_depend_on_later_queries(model: Seed2Tokenizer, images: torch.Tensor) -> None:
    before = model.pre_quant(images)
    with torch.no_grad():
        model.query_tokens[0, 20:] += torch.randn(12, 24)
    after = model.pre_quant(images)
    torch.testing.assert_close(after[:, :20], before[:, :20])
    assert bool(((after - before).abs().amax(-1)[:, 20:] > 1e-6).all())


def test_public_calls_build_no_graph_and_ignore_dropout(model: Seed2Tokenizer, images: torch.Tensor) -> None:
    model.train()
    codes = model.encode(images)
    assert torch.equal(codes, model.encode(images)) and not model.decode(codes).requires_grad
    assert model.training and model.Qformer.training
    assert torch.equal(codes, model.eval().encode(images))


def test_lower_methods_carry_gradients_to_every_part(tiny: Seed2Config, images: torch.Tensor) -> None:
    for reverse in (False, True):
        model = Seed2Tokenizer(dataclasses.replace(tiny, use_qformer_image=reverse))
        quant, loss, _ = model.quantize(model.pre_quant(images))
        rebuilt = model.rebuild_queries(model.upsample(quant))
        (model.decode_embeddings(quant).square().mean() + rebuilt.square().mean() + loss).backward()
        without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not without


def test_evaluating_restores_each_submodule(model: Seed2Tokenizer) -> None:
    model.train()
    model.visual_encoder.eval()
    with evaluating(model):
        assert not any(part.training for part in model.modules())
    assert model.training and model.Qformer.training and not model.visual_encoder.training


@pytest.mark.parametrize(("bad", "said"), [
    (torch.zeros(2, 3, 16, 18), r"\[B, 3, 16, 16\], got \[2, 3, 16, 18\]"),
    (torch.zeros(2, 1, 16, 16), r"got \[2, 1, 16, 16\]"),
    (torch.zeros(16, 16), r"got \[16, 16\]"),
    (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "torch.uint8"),
    ([[0.0]], "list"),
])
def test_bad_images_are_refused(model: Seed2Tokenizer, bad: object, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        model.encode(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(("bad", "said"), [
    ([1] * 31, r"has 32 codes, got an array of shape \[31\]|shape \[1, 31\]"),
    (torch.zeros(2, 33, dtype=torch.long), r"shape \[2, 33\]"),
    (torch.zeros(1, 1, 32, dtype=torch.long), "32 codes"),
    ([0] * 31 + [50], r"Code 50 \(image 0, position 31\) is outside the codebook 0\.\.49"),
    ([[0] * 32, [0, -1] + [0] * 30], r"Code -1 \(image 1, position 1\)"),
    ([0.5] * 32, "whole numbers, got float32"),
    ([True] * 32, "whole numbers, got bool"),
    ([2**70] * 32, "rows of 32 whole numbers"),
    ("nonsense", "rows of 32 whole numbers"),
    ([[0] * 32, [0] * 31], "rows of 32 whole numbers"),
    ([], "32 codes"),
])
def test_bad_codes_are_refused(model: Seed2Tokenizer, bad: object, said: str) -> None:
    with pytest.raises(CodesError, match=said):
        model.decode(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.int32])
def test_small_integer_types_are_codes_too(model: Seed2Tokenizer, dtype: torch.dtype) -> None:
    codes = torch.arange(32)
    torch.testing.assert_close(model.decode(codes.to(dtype)), model.decode(codes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_round_trip(model: Seed2Tokenizer, images: torch.Tensor, dtype: torch.dtype) -> None:
    exact = model.encode(images)
    embedding = model.decode(exact)
    half = model.to(dtype)
    codes = half.encode(images)
    assert codes.dtype == torch.int64
    assert (codes == exact).float().mean() > 0.7, "most codes survive half precision"
    assert half.decode(exact).dtype == dtype
    torch.testing.assert_close(half.decode(exact).float(), embedding, rtol=0.1, atol=0.05)


def test_released_weights_work_under_autocast(model: Seed2Tokenizer, images: torch.Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.encode(images).shape == (5, 32)


def test_config_round_trip_and_refusals(tiny: Seed2Config) -> None:
    assert Seed2Config.from_dict(tiny.to_dict()) == tiny
    with pytest.raises(ConfigError, match=r"unknown key 'codebok_size' \(did you mean 'codebook_size'"):
        Seed2Config.from_dict({"codebok_size": 3})
    with pytest.raises(ConfigError, match=r"vit: unknown key 'witdh' \(did you mean 'width'"):
        Seed2Config.from_dict({"vit": {"witdh": 3}})
    with pytest.raises(ConfigError, match="not the configuration"):
        Seed2Config.from_dict({"model_type": "llama"})
    with pytest.raises(ConfigError, match="7 heads"):
        Seed2Tokenizer(dataclasses.replace(tiny, decode_heads=7))


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fast_encode_gives_the_codes_of_the_plain_encoder(model: Seed2Tokenizer, images: torch.Tensor,
                                                          dtype: torch.dtype) -> None:
    exact = model.encode(images)
    codes = fast_encode(model, dtype, compile=dtype == torch.float32)(images)
    assert (codes == exact).float().mean() > (0.99 if dtype == torch.float32 else 0.7)


# ---- progressive decoding


def test_the_first_codes_decode_as_stage_2_trained_them(model: Seed2Tokenizer, images: torch.Tensor) -> None:
    codes = model.encode(images)
    for first in (1, 8, 31):
        rows = model.quantize.lookup(codes)
        rows[:, first:] = 0
        expected = model.decode_embeddings(rows)
        torch.testing.assert_close(model.decode(codes, first=first), expected)
        torch.testing.assert_close(model.decode(codes[:, :first], first=first), expected)
    torch.testing.assert_close(model.decode(codes, first=32), model.decode(codes))
    other = codes.clone()
    other[:, 8:] = codes[:, 8:].flip(1)
    torch.testing.assert_close(model.decode(other, first=8), model.decode(codes, first=8))


def test_a_number_of_codes_for_each_row_or_several_for_one(model: Seed2Tokenizer, images: torch.Tensor) -> None:
    codes = model.encode(images)
    each = torch.cat([model.decode(codes[i], first=k) for i, k in enumerate((4, 8, 16, 31, 32))])
    torch.testing.assert_close(model.decode(codes, first=[4, 8, 16, 31, 32], batch_size=2), each)
    ladder = model.decode(codes[0], first=torch.tensor([4, 32]))
    torch.testing.assert_close(ladder, torch.cat([model.decode(codes[0], first=4), model.decode(codes[0])]))


def test_short_lists_and_odd_numbers_of_codes_are_refused(model: Seed2Tokenizer, images: torch.Tensor) -> None:
    codes = model.encode(images)
    with pytest.raises(CodesError, match="An image has 32 codes"):
        model.decode(codes[:, :8])
    with pytest.raises(CodesError, match="An image has 32 codes"):
        model.decode(codes[:, :8], first=9)
    for first in (0, 33, 2.0, True, "8"):
        with pytest.raises(ConfigError, match="The number of codes to draw from must be"):
            model.decode(codes, first=first)
    for first in ([8, 16], []):
        with pytest.raises(ConfigError, match=f"5 pictures were given with {len(first)} numbers of codes"):
            model.decode(codes, first=first)
