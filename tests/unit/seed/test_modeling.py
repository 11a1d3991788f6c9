"""Both tokenizers: codes, embeddings, causality, gradients, prefixes, half precision."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from tiny.seed import loud, seed1_tokenizer

from seed_multimodal.data.pretokenize.encode import fast_encode
from seed_multimodal.errors import ConfigError
from seed_multimodal.models.seed.configuration import Seed2Config
from seed_multimodal.models.seed.modeling import Seed1Tokenizer, Seed2Tokenizer, SeedTokenizer


@pytest.fixture(params=["seed2", "seed2-reverse", "seed1"])
def model(request, tiny: Seed2Config) -> SeedTokenizer:
    if request.param == "seed1":
        return seed1_tokenizer()
    config = dataclasses.replace(tiny, use_qformer_image=request.param == "seed2-reverse")
    return loud(Seed2Tokenizer(config)).eval()


def test_encode_and_decode_do_not_depend_on_batches(model, images):
    # Codes of a data set must not depend on the batch size.
    codes = model.encode(images)
    assert codes.shape == (5, 32)
    assert len(codes.unique()) > 5
    embeddings = model.decode(codes)
    assert embeddings.shape == ((5, 7, 16) if isinstance(model, Seed1Tokenizer) else (5, 10))
    for size in (1, 2, 64):
        assert torch.equal(model.encode(images, batch_size=size), codes)
        decoded = model.decode(codes, batch_size=size)
        torch.testing.assert_close(decoded, embeddings, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.encode(images[0]), codes[:1])
    assert model.encode(images[:0]).shape == (0, 32)


@torch.no_grad()
def test_pre_quant_is_causal(model, images):
    # Code n does not see later queries: else prefixes of codes could not be drawn.
    before = model.pre_quant(images)
    model.query_tokens[0, 20:] += torch.randn(12, 24)
    after = model.pre_quant(images)
    torch.testing.assert_close(after[:, :20], before[:, :20])
    assert ((after - before).abs().amax(-1)[:, 20:] > 1e-6).all()


def test_encode_and_decode_in_train_mode(model, images):
    # They build no graph, ignore dropout and leave the mode unchanged.
    model.train().visual_encoder.eval()
    codes = model.encode(images)
    assert not model.decode(codes).requires_grad
    assert model.training
    assert model.Qformer.training
    assert not model.visual_encoder.training
    assert torch.equal(codes, model.eval().encode(images))


def test_gradients_reach_every_parameter(model, images):
    # Under DDP a parameter without a gradient is an error.
    quant, loss, indices = model.quantize(model.pre_quant(images))
    embeddings = model.decode_embeddings(quant)
    torch.testing.assert_close(embeddings, model.decode(indices), atol=1e-3, rtol=1e-3)
    total = embeddings.square().mean() + loss
    if isinstance(model, Seed2Tokenizer):
        total = total + model.rebuild_queries(model.decode_task_layer(quant)).square().mean()
    total.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_decode_with_lengths(model, images):
    # Later rows are zero, as in stage 2 with `nested`.
    codes = model.encode(images)
    lengths = torch.tensor([4, 8, 16, 31, 32])
    rows = model.quantize.lookup(codes)
    rows.data[torch.arange(32) >= lengths[:, None]] = 0
    expected = model.decode_embeddings(rows)
    for options in ({}, {"batch_size": 2}):
        decoded = model.decode(codes, lengths, **options)
        torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_encode_in_half_precision(tiny, images, tmp_path, dtype):
    # Some codes change in half precision, most stay.
    model = Seed2Tokenizer(tiny).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.1)
    exact = model.encode(images)
    half = Seed2Tokenizer.from_pretrained(model.save_pretrained(tmp_path), dtype=dtype)
    assert half.dtype == dtype
    for codes in (half.encode(images), fast_encode(half, dtype)(images)):
        assert (codes == exact).float().mean() > 0.7
    torch.testing.assert_close(half.decode(exact).float(), model.decode(exact), rtol=0.1, atol=0.05)


@pytest.mark.nightly
@pytest.mark.process
def test_fast_encode_compiled(tiny, images):
    # Pre-tokenising gives the codes of serving.
    model = loud(Seed2Tokenizer(tiny)).eval()
    assert torch.equal(fast_encode(model, compile=True)(images), model.encode(images))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vit": {"witdh": 3}}, "vit: unknown key 'witdh'"),
        ({"codebook_sections": 8}, "codebook_sections"),
        ({"model_type": "llama"}, "Seed2Tokenizer"),
    ],
)
def test_read_config_with_wrong_values(tmp_path, changes, named):
    # A misspelt size would be the default's without a word.
    (tmp_path / "config.json").write_text(json.dumps(changes))
    with pytest.raises(ConfigError, match=named):
        Seed2Tokenizer.read_config(tmp_path / "config.json")
