"""Both tokenizers: codes, embeddings, causality, gradients, prefixes, half precision."""

import dataclasses

import pytest
import torch
from tiny import write_json
from tiny.seed import loud, seed1_tokenizer

from seed_multimodal.errors import ConfigError
from seed_multimodal.models.seed.modeling import Seed2Tokenizer, SeedTokenizer
from seed_multimodal.pretokenize.encode import fast_encode


@pytest.fixture(params=["seed2", "seed2-reverse", "seed1"])
def model(request, tiny) -> SeedTokenizer:
    if request.param == "seed1":
        return seed1_tokenizer()
    config = dataclasses.replace(tiny, use_qformer_image=request.param == "seed2-reverse")
    return loud(Seed2Tokenizer(config)).eval()


def test_encode_and_decode_in_train_mode(model, images):
    # They build no graph, ignore dropout and leave the mode unchanged.
    model.train().visual_encoder.eval()
    codes = model.encode(images)
    assert not model.decode(codes).requires_grad
    assert model.training
    assert model.Qformer.training
    assert not model.visual_encoder.training
    assert torch.equal(codes, model.eval().encode(images))


def test_decode_without_some_codes(model, images):
    # Their rows are zero, as in stage 2 with `nested`.
    codes = model.encode(images)
    left_out = torch.arange(32) >= torch.tensor([4, 8, 16, 31, 32])[:, None]
    rows = model.quantize.lookup(codes)
    rows.data[left_out] = 0
    decoded = model.decode(codes.masked_fill(left_out, -1))
    expected = model.project(model.decoder_tokens(model.decode_task_layer(rows)))
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-5)


def test_encode_in_half_precision(tiny, images, tmp_path):
    # Some codes change in half precision, most stay.
    model = Seed2Tokenizer(tiny).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.1)
    exact = model.encode(images)
    half = Seed2Tokenizer.from_pretrained(model.save_pretrained(tmp_path), dtype=torch.bfloat16)
    for codes in (half.encode(images), fast_encode(half, torch.bfloat16)(images)):
        assert (codes == exact).float().mean() > 0.7
    torch.testing.assert_close(half.decode(exact).float(), model.decode(exact), rtol=0.1, atol=0.05)


@pytest.mark.parametrize(
    "changes, named",
    [({"vit": {"witdh": 3}}, "'witdh'"), ({"model_type": "llama"}, "Seed2Tokenizer")],
)
def test_read_config_with_wrong_values(tmp_path, changes, named):
    # A misspelt size would be the default's without a word.
    write_json(tmp_path / "config.json", changes)
    with pytest.raises(ConfigError, match=named):
        Seed2Tokenizer.read_config(tmp_path / "config.json")
