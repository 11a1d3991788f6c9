"""SEED-1's stage 2: losses, what is trained, text targets, training checkpoints, hand-over to the tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tiny_seed1
import torch
import torch.nn.functional as F

from seed_multimodal.errors import ConfigError
from seed_multimodal.tokenizers.seed1 import Seed1Tokenizer
from seed_multimodal.tokenizers.seed1_stage2 import Seed1Stage2Model, Seed1Stage2Weights
from seed_multimodal.tokenizers.seed2 import Seed2Config
from seed_multimodal.tokenizers.stage1 import Stage1Model

DECODER = {"pos_embed", "blocks", "pos_embed_text", "blocks_text", "quantize", "encode_task_layer",
           "decode_task_layer", "Reverse_Qformer", "reverse_tokens", "distill_text_proj"}


@pytest.fixture
def target() -> torch.Tensor:
    return torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(2))


def _model(**options: object) -> Seed1Stage2Model:
    torch.manual_seed(0)
    model = Seed1Stage2Model(tiny_seed1.config(), **options)  # type: ignore[arg-type]
    return tiny_seed1.loud(model)  # type: ignore[return-value]


def _trained(model: Seed1Stage2Model) -> set[str]:
    return {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_loss_is_the_weighted_sum(images: torch.Tensor, target: torch.Tensor) -> None:
    model = _model().eval()
    out = model(images, target)
    torch.testing.assert_close(out.loss, out.loss_embed + out.loss_recon_s + out.loss_distil_text)
    rows = model.quantize.embedding(out.indices)
    torch.testing.assert_close(out.loss_embed, 5 * 1.25 * F.mse_loss(rows, out.pre_quant))
    cosine = F.cosine_similarity(out.recon_s, out.query_output, dim=-1)
    torch.testing.assert_close(out.loss_recon_s, 2 * (1 - cosine).mean())
    torch.testing.assert_close(out.loss_distil_text, 0.5 * F.mse_loss(out.text_embeds, target))
    torch.testing.assert_close(out.text_embeds.detach(), model.decode(out.indices), atol=1e-5, rtol=1e-5)
    other = _model(weights=Seed1Stage2Weights(1.0, 3.0, 4.0)).eval()(images, target)
    torch.testing.assert_close(other.loss, out.loss_embed / 5 + out.loss_recon_s * 1.5 + out.loss_distil_text * 8)


def test_reconstruction_has_its_own_blocks(images: torch.Tensor, target: torch.Tensor) -> None:
    model = _model().eval()
    before = model(images, target)
    with torch.no_grad():
        model.pos_embed += 1.0
    after = model(images, target)
    assert not torch.equal(after.recon_s, before.recon_s) and torch.equal(after.text_embeds, before.text_embeds)


def test_frozen_and_trained_encoder(images: torch.Tensor, target: torch.Tensor) -> None:
    frozen = _model()
    frozen(images, target).loss.backward()
    assert _trained(frozen) == DECODER
    free = _model(freeze_qformer=False)
    free(images, target).loss.backward()
    assert _trained(free) == DECODER | {"Qformer", "query_tokens", "ln_vision"}


def test_frozen_dropout_is_a_choice(images: torch.Tensor) -> None:
    noisy, clean = _model(), _model(frozen_dropout=False)
    assert noisy.Qformer.training and not noisy.visual_encoder.training
    assert not clean.Qformer.training and clean.Reverse_Qformer.training
    assert not torch.equal(noisy.encoder_output(images), noisy.encoder_output(images))
    assert torch.equal(clean.encoder_output(images), clean.encoder_output(images))


def test_text_encoder_makes_the_target(images: torch.Tensor) -> None:
    encoder = tiny_seed1.text_encoder()
    model = _model(text_encoder=encoder, frozen_dropout=False)
    assert not any(p.requires_grad for p in encoder.parameters()) and not model.train().text_encoder.training
    ids = torch.tensor([[2, 0, 1, 3, 3, 3, 3], [2, 1, 3, 3, 3, 3, 3]] * 2 + [[2, 3, 3, 3, 3, 3, 3]])
    out = model(images, input_ids=ids)
    with torch.no_grad():
        torch.testing.assert_close(out.target, encoder(ids).last_hidden_state)
    assert out.target.shape == (5, 7, 16) and not out.target.requires_grad
    out.loss.backward()
    assert _trained(model) == DECODER
    with pytest.raises(ConfigError, match="needs target text features"):
        model(images)
    with pytest.raises(ConfigError, match="needs target text features"):
        _model()(images, input_ids=ids)
    with pytest.raises(ConfigError, match=r"must be \[5, 7, 16\], got \[5, 6, 16\]"):
        model(images, torch.zeros(5, 6, 16))
    with pytest.raises(ConfigError, match="16 wide, the tokenizer's embeddings 20"):
        Seed1Stage2Model(dataclasses.replace(tiny_seed1.config(), text_features_dim=20), text_encoder=encoder)


def test_corruption_reaches_the_decoders_only(images: torch.Tensor, target: torch.Tensor) -> None:
    plain, wild = _model(frozen_dropout=False), _model(frozen_dropout=False, corrupt=1.0)
    a = plain(images, target)
    b = wild(images, target, generator=torch.Generator().manual_seed(0))
    assert torch.equal(a.loss_embed, b.loss_embed) and torch.equal(a.indices, b.indices)
    assert not torch.equal(a.query_up, b.query_up)
    share = (wild.corrupt_codes(torch.full((400, 32, 6), 7.0), torch.Generator().manual_seed(0)) != 7.0).any(-1).float()
    assert share.mean() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(wild.eval()(images, target).quant, plain.eval()(images, target).quant)
    with pytest.raises(ConfigError, match="corrupt must be a probability"):
        _model(corrupt=30)
    with pytest.raises(ConfigError, match="nested must be a probability"):
        _model(nested=-1)


def test_warm_up_without_quantiser(images: torch.Tensor, target: torch.Tensor) -> None:
    out = _model(frozen_dropout=False)(images, target, quantize=False)
    assert out.indices is None and float(out.loss_embed) == 0.0 and torch.equal(out.quant, out.pre_quant)


def test_cached_features_give_the_same_losses(images: torch.Tensor, target: torch.Tensor) -> None:
    model = _model().eval()
    with torch.no_grad():
        whole = model(images, target).loss
        torch.testing.assert_close(model(None, target, vit_features=model.visual_encoder(images)).loss, whole)
        torch.testing.assert_close(model(None, target, query_features=model.query_features(images)).loss, whole)


def test_tokenizer_shares_the_trained_weights(images: torch.Tensor, target: torch.Tensor) -> None:
    model = _model(ema_decay=0.9, text_encoder=tiny_seed1.text_encoder())
    model(images, target).loss.backward()
    tokenizer = model.to_tokenizer()
    assert type(tokenizer) is Seed1Tokenizer and not tokenizer.training
    assert list(tokenizer.state_dict()) == list(Seed1Tokenizer(tokenizer.config).state_dict())
    codes = tokenizer.encode(images)
    assert torch.equal(codes, model.encode(images))
    with torch.no_grad():
        model.distill_text_proj.bias += 1.0
    torch.testing.assert_close(tokenizer.decode(codes), model.decode(codes))


def test_stage1_weights_transfer_by_name(images: torch.Tensor) -> None:
    config = tiny_seed1.config()
    first = Stage1Model(Seed2Config(vit=config.vit, qformer=config.qformer), vocab_size=30, embed_dim=8).eval()
    model = _model()
    report = model.load_stage1(first.state_dict())
    assert {name.split(".")[0] for name in report.loaded} == {"visual_encoder", "ln_vision", "Qformer", "query_tokens"}
    with torch.no_grad():
        expected = first.query_features(first.vit_features(images))
    torch.testing.assert_close(model.to_tokenizer().query_features(images), expected)


def test_checkpoints_of_the_stages_are_the_released_layout(images: torch.Tensor, tmp_path: Path) -> None:
    """Each without what it froze, as the trainer saves them."""
    model = _model(text_encoder=tiny_seed1.text_encoder()).eval()
    first = Stage1Model(Seed2Config(vit=model.config.vit, qformer=model.config.qformer), vocab_size=30, embed_dim=8)
    model.load_stage1(tiny_seed1.loud(first).state_dict())
    for name, stage in (("causal_qformer.pth", first), ("seed_tokenizer.pth", model)):
        frozen = {n for n, parameter in stage.named_parameters() if not parameter.requires_grad}
        kept = {n: value for n, value in stage.state_dict().items() if n not in frozen}
        torch.save({"model": kept, "epoch": 0}, tmp_path / name)
    torch.save(first.visual_encoder.state_dict(), tmp_path / "eva_vit_g.pth")
    loaded = Seed1Tokenizer.from_pretrained(tmp_path, config=model.config)
    assert torch.equal(loaded.encode(images), model.encode(images))
    torch.testing.assert_close(loaded.predict(images)[1], model.predict(images)[1])


@pytest.mark.slow
def test_a_few_steps_learn_the_text_features(images: torch.Tensor, target: torch.Tensor) -> None:
    model = Seed1Stage2Model(tiny_seed1.config(), frozen_dropout=False, corrupt=0.1,
                             weights=Seed1Stage2Weights(distil_text=5.0))
    tiny_seed1.loud(model.visual_encoder)
    tiny_seed1.loud(model.Qformer)
    with torch.no_grad():
        model.quantize.init_from(model.pre_quant(images))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        out = model(images, target)
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss_distil_text.item())
    same_for_all = 5 * F.mse_loss(target.mean(0).expand_as(target), target)
    assert sum(losses[-5:]) / 5 < 0.85 * same_for_all, "what it says depends on the picture"
