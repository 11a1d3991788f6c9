"""Both tokenizers: codes, embeddings, causality, gradients, progressive decoding, half precision,
sizes.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import tiny_seed1
import torch

from seed_multimodal.data.pretokenize.encode import fast_encode
from seed_multimodal.errors import ConfigError
from seed_multimodal.models.seed.configuration import Seed2Config
from seed_multimodal.models.seed.modeling import Seed1Tokenizer, Seed2Tokenizer, SeedTokenizer


@pytest.fixture(params=["seed2", "seed2-reverse", "seed1"])
def model(request, tiny: Seed2Config) -> SeedTokenizer:
    if request.param == "seed1":
        return tiny_seed1.tokenizer()
    config = dataclasses.replace(tiny, use_qformer_image=request.param == "seed2-reverse")
    return tiny_seed1.loud(Seed2Tokenizer(config)).eval()  # type: ignore[return-value]


def test_encode_and_decode_do_not_depend_on_batches(model: SeedTokenizer, images: torch.Tensor):
    codes = model.encode(images)
    assert codes.dtype == torch.int64 and codes.shape == (5, 32) and len(codes.unique()) > 5
    embeddings = model.decode(codes)
    assert embeddings.shape == ((5, 7, 16) if isinstance(model, Seed1Tokenizer) else (5, 10))
    for size in (1, 2, 64):
        assert torch.equal(model.encode(images, batch_size=size), codes)
        torch.testing.assert_close(
            model.decode(codes, batch_size=size), embeddings, rtol=1e-4, atol=1e-5
        )
    assert torch.equal(model.encode(images[0]), codes[:1]) and model.encode(images[:0]).shape == (
        0,
        32,
    )


def test_pre_quant_is_causal(model: SeedTokenizer, images: torch.Tensor):
    with torch.no_grad():
        before = model.pre_quant(images)
        model.query_tokens[0, 20:] += torch.randn(12, 24)
        after = model.pre_quant(images)
    torch.testing.assert_close(after[:, :20], before[:, :20])
    assert bool(((after - before).abs().amax(-1)[:, 20:] > 1e-6).all())


def test_encode_and_decode_in_train_mode(model: SeedTokenizer, images: torch.Tensor):
    """They build no graph, ignore dropout and leave the mode unchanged."""
    model.train().visual_encoder.eval()
    codes = model.encode(images)
    assert torch.equal(codes, model.encode(images)) and not model.decode(codes).requires_grad
    assert model.training and model.Qformer.training and not model.visual_encoder.training
    assert torch.equal(codes, model.eval().encode(images))


def test_gradients_reach_every_parameter(model: SeedTokenizer, images: torch.Tensor):
    quant, loss, indices = model.quantize(model.pre_quant(images))
    embeddings = model.decode_embeddings(quant)
    torch.testing.assert_close(embeddings, model.decode(indices), atol=1e-3, rtol=1e-3)
    total = embeddings.square().mean() + loss
    if isinstance(model, Seed2Tokenizer):
        total = total + model.rebuild_queries(model.decode_task_layer(quant)).square().mean()
    total.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_decode_with_lengths(model: SeedTokenizer, images: torch.Tensor):
    """Later rows are zero, as in stage 2 with `nested`."""
    codes = model.encode(images)
    lengths = torch.tensor([4, 8, 16, 31, 32])
    rows = model.quantize.lookup(codes)
    for row, length in zip(rows, lengths, strict=True):
        row.data[length:] = 0
    expected = model.decode_embeddings(rows)
    torch.testing.assert_close(model.decode(codes, lengths), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        model.decode(codes, lengths, batch_size=2), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_encode_in_half_precision(tiny: Seed2Config, images: torch.Tensor, tmp_path, dtype):
    model = Seed2Tokenizer(tiny).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.1)
    exact = model.encode(images)
    half = Seed2Tokenizer.from_pretrained(model.save_pretrained(tmp_path), dtype=dtype)
    assert half.dtype == dtype and half.Qformer.bert.embeddings.position_ids.dtype == torch.int64
    assert (half.encode(images) == exact).float().mean() > 0.7
    torch.testing.assert_close(half.decode(exact).float(), model.decode(exact), rtol=0.1, atol=0.05)
    assert (fast_encode(half, dtype)(images) == exact).float().mean() > 0.7


@pytest.mark.slow
@pytest.mark.process
def test_fast_encode_compiled(tiny: Seed2Config, images: torch.Tensor):
    model: SeedTokenizer = tiny_seed1.loud(Seed2Tokenizer(tiny)).eval()  # type: ignore[assignment]
    assert torch.equal(fast_encode(model, compile=True)(images), model.encode(images))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vit": {"witdh": 3}}, r"config.json: vit: unknown key 'witdh' \(did you mean 'width'"),
        ({"codebook_sections": 8}, "codebook_sections must be 1 or num_query"),
        ({"model_type": "llama"}, "not the configuration of a Seed2Tokenizer"),
    ],
)
def test_read_config_with_wrong_values(tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(changes))
    with pytest.raises(ConfigError, match=message):
        Seed2Tokenizer.read_config(tmp_path / "config.json")
