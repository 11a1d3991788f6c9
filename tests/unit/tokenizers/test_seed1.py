"""SEED-1's tokenizer: codes, embeddings, the causal rule, sizes of the released model, refusals."""

from __future__ import annotations

import dataclasses

import pytest
import tiny_seed1
import torch

from seed_multimodal.errors import CodesError, ConfigError, ImageError
from seed_multimodal.tokenizers.seed1 import Seed1Config, Seed1Tokenizer


@pytest.fixture(scope="module")
def model() -> Seed1Tokenizer:
    return tiny_seed1.tokenizer()


def test_codes_and_embeddings(model: Seed1Tokenizer, images: torch.Tensor) -> None:
    codes, embeds = model.predict(images)
    assert codes.shape == (5, 32) and codes.dtype == torch.long and 0 <= codes.min() and codes.max() < 50
    assert embeds.shape == (5, 7, 16) and not embeds.requires_grad
    assert torch.equal(codes, model.encode(images)) and len(codes.unique(dim=0)) == 5
    torch.testing.assert_close(embeds, model.decode(codes))
    one = model.decode(codes[0].tolist())
    torch.testing.assert_close(one, embeds[:1])
    for size in (1, 2, 7):
        again = model.predict(images, batch_size=size)
        assert torch.equal(again[0], codes)
        torch.testing.assert_close(again[1], embeds)
    assert model.decode(torch.empty(0, 32, dtype=torch.long)).shape == (0, 7, 16)
    assert model.encode(images[0]).shape == (1, 32)


def test_straight_through_codes_give_the_same_embeddings(model: Seed1Tokenizer, images: torch.Tensor) -> None:
    with torch.no_grad():
        quant, _, indices = model.quantize(model.pre_quant(images))
        torch.testing.assert_close(model.decode_embeddings(quant), model.decode(indices), atol=1e-5, rtol=1e-5)


def test_a_query_changes_only_what_comes_after_it(model: Seed1Tokenizer, images: torch.Tensor) -> None:
    with torch.no_grad():
        before = model.query_features(images)
        kept = model.query_tokens[0, 20].clone()
        model.query_tokens[0, 20] = torch.randn(24)
        after = model.query_features(images)
        model.query_tokens[0, 20] = kept
    torch.testing.assert_close(after[:, :20], before[:, :20], atol=1e-6, rtol=1e-6)
    assert bool(((after - before).abs().amax(-1) > 1e-4)[:, 20:].all())


def test_reverse_queries_see_each_other_whatever_their_number() -> None:
    """With 32 of them the original would make them causal; here the Reverse Q-Former never is."""
    model = tiny_seed1.loud(Seed1Tokenizer(dataclasses.replace(tiny_seed1.config(), text_tokens=32))).eval()
    with torch.no_grad():
        tokens = torch.randn(1, 32, 24)
        before = model.reverse_queries(tokens)
        model.reverse_tokens[0, -1] = torch.randn(24)
        assert bool(((model.reverse_queries(tokens) - before).abs().amax(-1) > 1e-4).all())


def test_encoding_is_free_of_dropout_and_restores_modes(model: Seed1Tokenizer, images: torch.Tensor) -> None:
    codes, embeds = model.predict(images)
    model.train()
    try:
        assert torch.equal(model.encode(images), codes)
        torch.testing.assert_close(model.decode(codes), embeds)
        assert model.Qformer.training and model.Reverse_Qformer.training
    finally:
        model.eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(images: torch.Tensor, dtype: torch.dtype) -> None:
    model = tiny_seed1.tokenizer().to(dtype)
    codes, embeds = model.predict(images)
    assert embeds.dtype == dtype and embeds.isfinite().all() and codes.shape == (5, 32)


def test_released_sizes() -> None:
    """917 keys and 1,154,069,952 parameters; the golden fixture has every name and shape."""
    with torch.device("meta"):
        model = Seed1Tokenizer(Seed1Config())
    assert len(model.state_dict()) == 917
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert counts["visual_encoder"] == 985_894_528
    assert counts["Qformer"] == 105_137_664 and counts["Reverse_Qformer"] == 33_080_832
    assert sum(p.numel() for p in model.parameters()) == 1_154_069_952


def test_sizes_are_read_off_a_checkpoint() -> None:
    """From shapes alone (meta device), also with the released tower's unused 40th block."""
    for config in (Seed1Config(), dataclasses.replace(
            Seed1Config(), codebook_size=512, codebook_dim=16, decode_depth=2, reverse_depth=3, text_tokens=20,
            text_features_dim=100, vit=dataclasses.replace(Seed1Config().vit, image_size=448, depth=5))):
        deeper = dataclasses.replace(config, vit=dataclasses.replace(config.vit, depth=40 if config.vit.depth == 39
                                                                     else config.vit.depth))
        with torch.device("meta"):
            state = Seed1Tokenizer(deeper).state_dict()
        assert Seed1Config.infer(state, "here") == config


def test_config_as_a_dictionary() -> None:
    config = dataclasses.replace(tiny_seed1.config(), normalize_codes=True, codebook_sections=32, codebook_size=64)
    assert Seed1Config.from_dict(config.to_dict()) == config
    assert config.with_image_size(32).vit.grid == 4
    with pytest.raises(ConfigError, match="did you mean 'codebook_size'"):
        Seed1Config.from_dict({"codebok_size": 3})
    with pytest.raises(ConfigError, match="vit: unknown key 'widht'"):
        Seed1Config.from_dict({"vit": {"widht": 3}})
    with pytest.raises(ConfigError, match="not the configuration of a SEED-1"):
        Seed1Config.from_dict({"model_type": "seed2_tokenizer"})
    with pytest.raises(ConfigError, match="codebook_sections must be 1 or num_query"):
        Seed1Config(codebook_sections=3)


def test_refusals(model: Seed1Tokenizer) -> None:
    with pytest.raises(ImageError, match=r"\[B, 3, 16, 16\], got \[1, 3, 8, 8\]"):
        model.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ImageError, match="uint8"):
        model.predict(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(CodesError, match="32 codes"):
        model.decode([1, 2, 3])
    with pytest.raises(CodesError, match="Code 50 .*outside the codebook 0..49"):
        model.decode([50] * 32)
