"""LaVIT's stage 1: loss and gradients against the paper's formulas, export, heads of pixel
decoders.
"""

from __future__ import annotations

import pytest
import stage1_toy as toy
import torch
import torch.nn.functional as F
from tensors import equal
from tiny.lavit import code_decoder, write_lavit_diffusion

from seed_multimodal.models.lavit.diffusion import LavitDetokenizer
from seed_multimodal.models.lavit.losses import HEADS, LavitLossWeights, LavitStage1, decoder_for


@pytest.fixture
def model() -> LavitStage1:
    return toy.stage1()


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return toy.images(6)[0]


def gumbel(seed: int, count: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -torch.empty(count, toy.PATCHES, 2).exponential_(generator=generator).log()


@pytest.mark.parametrize("quantize", [False, True])
def test_forward_as_published(model: LavitStage1, features: torch.Tensor, quantize):
    model.eval()
    out = model(features, quantize=quantize, noise=gumbel(1))
    keep = model.tokenizer.select(features, noise=gumbel(1)).keep_BN > 0.5
    rows = F.normalize(
        model.tokenizer.to_codebook(model.tokenizer.merge(features, keep.float())), dim=-1
    )
    selected = [row[mask] for row, mask in zip(rows, keep, strict=True)]
    if quantize:
        table = model.quantize.embedding.weight
        codes = [torch.cdist(row, table).argmin(1) for row in selected]
        assert torch.equal(torch.cat(codes), out.codes_T)
        commitment = F.mse_loss(torch.cat(selected), table[torch.cat(codes)])
        torch.testing.assert_close(out.loss_commitment, commitment)
        selected = [table[row] for row in codes]
    rebuilt = model.decoder.features(selected)
    cosine = (1 - F.cosine_similarity(rebuilt, features, dim=-1)).mean()
    torch.testing.assert_close(out.loss_cosine, cosine, rtol=1e-3, atol=1e-4)
    share = keep.float().mean()
    torch.testing.assert_close(out.keep_share, share)
    expected = out.loss_cosine + 2 * (1 / 3 - share) ** 2 + (out.loss_commitment if quantize else 0)
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("quantize", [False, True])
def test_decisions_have_the_change_of_the_loss_as_gradient(
    model: LavitStage1, features: torch.Tensor, quantize
):
    keep = model.tokenizer.select(features, noise=gumbel(2)).keep_BN > 0.5
    keep[0] = False
    keep[0, 3] = True  # the last patch of an image cannot be dropped

    def loss(keep: torch.Tensor) -> torch.Tensor:  # [B]
        rows = F.normalize(
            model.tokenizer.to_codebook(model.tokenizer.merge(features, keep.float())), dim=-1
        )
        table = model.quantize.embedding.weight
        selected = [
            table[torch.cdist(row[mask], table).argmin(1)] if quantize else row[mask]
            for row, mask in zip(rows, keep, strict=True)
        ]
        return (1 - F.cosine_similarity(model.decoder.features(selected), features, dim=-1)).mean(1)

    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        p_keep = torch.rand(keep.shape, requires_grad=True)
        model.selection_loss(features, p_keep, keep, loss(keep).detach(), quantize).backward()
        assert ((p_keep.grad != 0).sum(1) <= 1).all()
        for image, patch in p_keep.grad.nonzero().tolist():
            selected = keep.clone()
            dropped = keep.clone()
            selected[image, patch], dropped[image, patch] = True, False
            change = (loss(selected) - loss(dropped))[image] * toy.PATCHES / len(keep)
            assert p_keep.grad[image, patch].item() == pytest.approx(
                change.item(), rel=1e-3, abs=1e-6
            )
            seen.add((image, patch))
    assert len(seen) > 8 and (0, 3) not in seen
    assert not any(part.grad is not None and part.grad.any() for part in model.parameters())


def test_gradients_reach_the_trained_parts_only(model: LavitStage1, features: torch.Tensor):
    frozen = toy.stage1(weights=LavitLossWeights(ratio=0.0), freeze_selector=True)
    for stage1, learns in ((model, True), (frozen, False)):
        stage1.train()(features, quantize=True, noise=gumbel(2)).loss.backward()
        parts = list(stage1.tokenizer.token_predictor.parameters())
        assert all(bool(part.grad is not None and part.grad.any()) is learns for part in parts)
    trained = {name for name, part in model.named_parameters() if part.grad is not None}
    assert any("causal_encoder" in name for name in trained)
    assert not any(".encoder." in name or "vit_proj" in name or "unet_" in name for name in trained)


def test_finished_networks_encode_and_decode_as_trained(model: LavitStage1, features: torch.Tensor):
    pixels = torch.randn(2, 3, 32, 32)
    noise = gumbel(4, 2)
    model.train()(features)  # moves the codebook
    out = model.eval()(pixels, noise=noise)
    tokenizer, decoder = model.trained_networks()
    assert tokenizer.vit_proj is None  # stage 2 trains one
    codes = tokenizer.encode(pixels, noise=noise)
    assert torch.equal(torch.cat(codes), out.codes_T)
    rebuilt = decoder.features([tokenizer.embed_codes(row) for row in codes])
    cosine = (1 - F.cosine_similarity(rebuilt, tokenizer.patch_features(pixels), dim=-1)).mean()
    torch.testing.assert_close(cosine, out.loss_cosine, rtol=1e-3, atol=1e-4)
    assert not any(part.requires_grad for part in (*tokenizer.parameters(), *decoder.parameters()))


# ---- pixel decoders


def test_decoder_for_a_unet_of_the_other_kind(tmp_path):
    high, low = (
        LavitDetokenizer.load_part(write_lavit_diffusion(tmp_path / head, head), "unet")  # type: ignore[arg-type]
        for head in ("highres", "lowres")
    )
    folder = code_decoder().save_pretrained(tmp_path / "decoder")
    saved = code_decoder().state_dict()
    same, new = decoder_for(high, folder)
    assert not new and equal(same.state_dict(), saved)
    other, new = decoder_for(low, folder, seed=3)
    assert new and other.config.head == "lowres" and other.unet_proj.out_features == 16
    assert all(
        torch.equal(value, saved[name])
        for name, value in other.state_dict().items()
        if not name.startswith(HEADS)
    )
    assert torch.equal(decoder_for(low, folder, seed=3)[0].unet_proj.weight, other.unet_proj.weight)
