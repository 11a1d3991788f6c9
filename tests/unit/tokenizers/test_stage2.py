"""Stage 2: what is trained, corruption, read-out loss, warm-up without quantiser, hand-over to the tokenizer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.tokenizers.seed2 import Seed2Config, Seed2Tokenizer
from seed_multimodal.tokenizers.stage1 import Stage1Model
from seed_multimodal.tokenizers.stage2 import Stage2Model, Stage2Weights


@pytest.fixture
def target() -> torch.Tensor:
    return torch.randn(5, 10, generator=torch.Generator().manual_seed(2))


def _trained(model: Stage2Model) -> set[str]:
    return {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}


DECODER = {"pos_embed", "pos_embed_image", "quantize", "encode_task_layer", "decode_task_layer", "blocks",
           "blocks_image", "image_down", "distill_image_proj"}


def test_frozen_and_trained_encoder(tiny: Seed2Config, images: torch.Tensor, target: torch.Tensor) -> None:
    frozen = Stage2Model(tiny)
    frozen(images, target).loss.backward()
    assert _trained(frozen) == DECODER
    free = Stage2Model(tiny, freeze_qformer=False)
    free(images, target).loss.backward()
    assert _trained(free) == DECODER | {"Qformer", "query_tokens", "ln_vision"}


def test_frozen_dropout_is_a_choice(tiny: Seed2Config, images: torch.Tensor) -> None:
    noisy, clean = Stage2Model(tiny), Stage2Model(tiny, frozen_dropout=False)
    assert noisy.Qformer.training and not clean.Qformer.training and not noisy.visual_encoder.training
    assert not torch.equal(noisy.encoder_output(images), noisy.encoder_output(images))
    assert torch.equal(clean.encoder_output(images), clean.encoder_output(images))
    assert not noisy.eval().Qformer.training


def test_loss_is_the_weighted_sum(tiny: Seed2Config, images: torch.Tensor, target: torch.Tensor) -> None:
    readout = torch.randn(7, 10)
    model = Stage2Model(tiny, weights=Stage2Weights(1.0, 3.0, 4.0, 0.5), frozen_dropout=False, readout_weight=readout)
    out = model(images, target)
    torch.testing.assert_close(out.loss, out.loss_embed + out.loss_recon_s + out.loss_distil_image + out.loss_readout)
    torch.testing.assert_close(out.loss_embed, out.loss_embed_raw)
    torch.testing.assert_close(out.loss_distil_image, 4.0 * F.mse_loss(out.image_embeds, target))
    torch.testing.assert_close(out.loss_readout, 0.5 * F.mse_loss(out.image_embeds @ readout.T, target @ readout.T))
    cosine = F.cosine_similarity(out.recon_s, out.query_output, dim=-1)
    torch.testing.assert_close(out.loss_recon_s, 3.0 * (1 - cosine).mean())
    assert "readout_weight" not in model.state_dict()


def test_a_scaled_start_lets_the_codes_reach_the_embedding(tiny: Seed2Config) -> None:
    wide = dataclasses.replace(tiny, codebook_size=64)
    spread = {}
    for scaled in (False, True):
        torch.manual_seed(0)
        model = Stage2Model(wide)
        if scaled:
            model.scale_start()
        nn.init.normal_(model.quantize.embedding.weight)  # codes of unit size
        spread[scaled] = float(model.decode(torch.randint(64, (100, 32))).std(0).mean())
    assert spread[True] > 0.1 > 5 * spread[False]


def test_cached_features_give_the_same_losses(tiny: Seed2Config, images: torch.Tensor, target: torch.Tensor) -> None:
    model = Stage2Model(tiny).eval()
    with torch.no_grad():
        whole = model(images, target).loss
        from_tower = model(None, target, vit_features=model.visual_encoder(images)).loss
        from_queries = model(None, target, query_features=model.query_features(images)).loss
    torch.testing.assert_close(from_tower, whole)
    torch.testing.assert_close(from_queries, whole)


def test_warm_up_without_quantiser(tiny: Seed2Config, images: torch.Tensor, target: torch.Tensor) -> None:
    model = Stage2Model(tiny, frozen_dropout=False)
    out = model(images, target, quantize=False)
    assert out.indices is None and float(out.loss_embed) == 0.0
    assert torch.equal(out.quant, out.pre_quant)
    out.loss.backward()
    assert model.quantize.embedding.weight.grad is None
    assert model.encode_task_layer[0].weight.grad is not None


def test_corruption_swaps_up_to_the_given_fraction(tiny: Seed2Config) -> None:
    model = Stage2Model(tiny, corrupt=0.5)
    quant = torch.full((400, 32, 6), 7.0, requires_grad=True)
    swapped = model.corrupt_codes(quant, torch.Generator().manual_seed(0))
    share = (swapped != quant).any(-1).float().mean(1)
    assert share.max() < 0.8 and share.mean() == pytest.approx(0.25, abs=0.03)
    assert share.std() > 0.1, "the fraction differs between samples"
    rows = {tuple(row) for row in model.quantize.embedding.weight.tolist()}
    assert all(tuple(row) in rows for row in swapped[(swapped != quant).any(-1)].tolist())
    again = model.corrupt_codes(quant, torch.Generator().manual_seed(0))
    assert torch.equal(again, swapped)
    swapped.sum().backward()
    assert model.quantize.embedding.weight.grad is None
    assert torch.equal(model.eval().corrupt_codes(quant, None), quant)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        Stage2Model(tiny, corrupt=30)


def test_nested_keeps_a_prefix_of_the_codes(tiny: Seed2Config) -> None:
    model = Stage2Model(tiny, nested=0.5)
    quant = torch.ones(2000, 32, 6)
    shown = model.keep_prefix(quant, torch.Generator().manual_seed(0))[..., 0].bool()
    kept = shown.sum(1)
    assert torch.equal(shown, torch.arange(32) < kept[:, None]), "what is kept is a prefix"
    assert kept.min() == 1 and (kept == 32).float().mean() == pytest.approx(0.5 + 0.5 / 32, abs=0.04)
    assert kept[kept < 32].float().mean() == pytest.approx(16, abs=1)
    assert torch.equal(model.eval().keep_prefix(quant, None), quant)


def test_no_query_reconstruction_without_its_blocks(tiny: Seed2Config, images: torch.Tensor,
                                                    target: torch.Tensor) -> None:
    model = Stage2Model(dataclasses.replace(tiny, recon_s=False))
    out = model(images, target)
    assert out.recon_s is None and float(out.loss_recon_s) == 0.0
    assert not any(name.startswith(("blocks.", "pos_embed.")) or name == "pos_embed" for name in model.state_dict())
    with pytest.raises(ConfigError, match="recon_s=False"):
        model.rebuild_queries(out.query_up)


def test_corruption_does_not_change_the_codebook_loss(tiny: Seed2Config, images: torch.Tensor,
                                                      target: torch.Tensor) -> None:
    plain = Stage2Model(tiny, frozen_dropout=False)
    wild = Stage2Model(tiny, frozen_dropout=False, corrupt=1.0)
    wild.load_state_dict(plain.state_dict())
    a, b = plain(images, target), wild(images, target)
    assert torch.equal(a.loss_embed, b.loss_embed) and torch.equal(a.indices, b.indices)
    assert not torch.equal(a.loss_distil_image, b.loss_distil_image)


def test_a_target_is_needed(tiny: Seed2Config, images: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="target image embedding"):
        Stage2Model(tiny)(images)


@pytest.mark.parametrize("reverse", [False, True])
def test_tokenizer_shares_the_trained_weights(tiny: Seed2Config, images: torch.Tensor, target: torch.Tensor,
                                              reverse: bool) -> None:
    model = Stage2Model(dataclasses.replace(tiny, use_qformer_image=reverse), ema_decay=0.9)
    model(images, target).loss.backward()
    tokenizer = model.to_tokenizer()
    assert type(tokenizer) is Seed2Tokenizer and not tokenizer.training
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    assert model.encode_task_layer[0].weight.requires_grad
    codes = tokenizer.encode(images)
    assert torch.equal(codes, model.encode(images))
    with torch.no_grad():
        model.distill_image_proj.bias += 1.0
    torch.testing.assert_close(tokenizer.decode(codes), model.decode(codes))
    assert list(tokenizer.state_dict()) == list(Seed2Tokenizer(tokenizer.config).state_dict())


def test_stage1_weights_transfer_by_name(tiny: Seed2Config, images: torch.Tensor) -> None:
    first = Stage1Model(tiny, vocab_size=30, embed_dim=8, embedding_dim=10).eval()
    second = Stage2Model(tiny)
    report = second.load_stage1(first.state_dict())
    assert {name.split(".")[0] for name in report.loaded} == {"visual_encoder", "ln_vision", "Qformer", "query_tokens"}
    with torch.no_grad():
        expected = first.query_features(first.vit_features(images))
    torch.testing.assert_close(second.to_tokenizer().query_features(images), expected)


def test_stage1_training_checkpoint_without_tower_and_a_broken_one(tiny: Seed2Config) -> None:
    first, second = Stage1Model(tiny, vocab_size=30, embed_dim=8), Stage2Model(tiny)
    trained = {n: v for n, v in first.state_dict().items() if not n.startswith("visual_encoder.")}
    before = second.visual_encoder.cls_token.clone()
    report = second.load_stage1(trained)
    assert torch.equal(second.visual_encoder.cls_token, before)
    assert any(name.startswith("visual_encoder.") for name in report.missing)
    del trained["query_tokens"]
    with pytest.raises(CheckpointError, match="query_tokens"):
        second.load_stage1(trained, "half.pth")


def test_a_few_steps_learn_the_embedding(tiny: Seed2Config, images: torch.Tensor, target: torch.Tensor) -> None:
    model = Stage2Model(tiny, frozen_dropout=False, corrupt=0.1, weights=Stage2Weights(distil_image=5.0))
    with torch.no_grad():
        for part in (model.visual_encoder, model.Qformer):  # untrained, they hardly tell one image from another
            for parameter in part.parameters():
                parameter.normal_(std=0.3)
    model.quantize.init_from(model.pre_quant(images))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(120):
        optimizer.zero_grad()
        out = model(images, target)
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss_distil_image.item())
    assert sum(losses[-5:]) / 5 < 0.3 * losses[0]
