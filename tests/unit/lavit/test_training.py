"""LaVIT's losses: stage 1's value and gradients against the paper's formulas, the language model's
embeddings, conditions and heads of pixel decoders."""

import pytest
import stage1_toy as toy
import torch
import torch.nn.functional as F
from tensors import equal
from tiny.lavit import code_decoder, write_lavit_diffusion
from torch import Tensor
from torch.testing import assert_close

from seed_multimodal.errors import ConfigError
from seed_multimodal.models.lavit.diffusion import LavitDetokenizer
from seed_multimodal.recipes.lavit.losses import (
    HEADS,
    LavitLossWeights,
    LavitStage1,
    UnifiedLoss,
    decoder_for,
)
from seed_multimodal.settings import read_settings
from seed_multimodal.training.pixel_decoder.task import TrainedDetokenizer


@pytest.fixture
def model() -> LavitStage1:
    return toy.stage1()


@pytest.fixture(scope="module")
def features() -> Tensor:
    return toy.images(6)[0]


def gumbel(seed) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -torch.empty(6, toy.PATCHES, 2).exponential_(generator=generator).log()


def kept_rows(model: LavitStage1, features: Tensor, keep: Tensor) -> list[Tensor]:
    """Each image's rows in front of the quantizer, on the unit sphere."""
    merged = model.tokenizer.merge(features, keep.float())
    rows = F.normalize(model.tokenizer.to_codebook(merged), dim=-1)
    return [row[mask] for row, mask in zip(rows, keep, strict=True)]


def cosine_errors(model: LavitStage1, features: Tensor, rows: list[Tensor]) -> Tensor:
    """The mean over each image's patches of 1 − cos(x, x̂)."""
    return (1 - F.cosine_similarity(model.decoder.features(rows), features, dim=-1)).mean(1)


# ---- stage 1


@pytest.mark.parametrize("quantize", [False, True])
def test_forward_as_published(model, features, quantize):
    # Eqs. of the paper, computed here from its text.
    out = model.eval()(features, quantize=quantize, noise=gumbel(1))
    keep = model.tokenizer.select(features, noise=gumbel(1)).keep_BN > 0.5
    rows = kept_rows(model, features, keep)
    share = keep.float().mean()
    expected = 2 * (1 / 3 - share) ** 2
    if quantize:
        table = model.quantize.embedding.weight
        codes = [torch.cdist(row, table).argmin(1) for row in rows]
        assert torch.equal(torch.cat(codes), out.codes_T)
        commitment = F.mse_loss(torch.cat(rows), table[torch.cat(codes)])
        assert_close(out.metrics["loss_commitment"], commitment)
        expected = expected + commitment
        rows = [table[row] for row in codes]
    cosine = cosine_errors(model, features, rows).mean()
    assert_close(out.metrics["loss_cosine"], cosine, rtol=1e-3, atol=1e-4)
    assert_close(out.loss, out.metrics["loss_cosine"] + expected)

    # What the log shows.
    counts = keep.sum(1).float()
    log = {name: value.item() for name, value in out.metrics.items()}
    assert ("loss_commitment" in log) == quantize
    assert log["kept"] == pytest.approx(share.item())
    assert log["tokens"] == pytest.approx(counts.mean().item())
    assert log["tokens_deviation"] == pytest.approx(counts.std(correction=0).item())
    assert (log["tokens_least"], log["tokens_most"]) == (counts.min(), counts.max())

    # Codes are used by default, and evaluations draw the same selection each time.
    model.use_codes = quantize
    again, repeated = model(features), model(features)
    assert again.loss == repeated.loss
    assert (again.codes_T is not None) == quantize


@pytest.mark.parametrize("quantize", [False, True])
def test_decisions_have_the_change_of_the_loss_as_gradient(model, features, quantize):
    keep = model.tokenizer.select(features, noise=gumbel(2)).keep_BN > 0.5
    keep[0] = False
    keep[0, 3] = True  # the last patch of an image cannot be dropped

    def loss(keep):  # [B]
        rows = kept_rows(model, features, keep)
        if quantize:
            table = model.quantize.embedding.weight
            rows = [table[torch.cdist(row, table).argmin(1)] for row in rows]
        return cosine_errors(model, features, rows)

    flipped = set()
    for seed in range(8):
        torch.manual_seed(seed)
        p_keep = torch.rand(keep.shape, requires_grad=True)
        value = model.selection_loss(features, p_keep, keep, loss(keep).detach(), quantize)
        value.backward()
        assert value == 0
        assert ((p_keep.grad != 0).sum(1) <= 1).all()
        for image, patch in p_keep.grad.nonzero().tolist():
            selected, dropped = keep.clone(), keep.clone()
            selected[image, patch], dropped[image, patch] = True, False
            change = (loss(selected) - loss(dropped))[image] * toy.PATCHES / len(keep)
            gradient = p_keep.grad[image, patch].item()
            assert gradient == pytest.approx(change.item(), rel=1e-3, abs=1e-6)
            flipped.add((image, patch))
    assert len(flipped) > 8
    assert (0, 3) not in flipped
    assert not any(part.grad is not None and part.grad.any() for part in model.parameters())


def test_gradients_reach_the_trained_parts_only(model, features):
    # `freeze_selector` holds once codes are used.
    frozen = toy.stage1(freeze_selector=True)
    for stage1, quantize, learns in (
        (model, True, True),
        (frozen, False, True),
        (frozen, True, False),
    ):
        stage1.zero_grad()
        codebook = stage1.quantize.embedding.weight.clone()
        stage1.train()(features, quantize=quantize, noise=gumbel(2)).loss.backward()
        # Else flipped decisions would be compared with another codebook's errors.
        assert torch.equal(stage1.quantize.embedding.weight, codebook)
        parts = list(stage1.tokenizer.token_predictor.parameters())
        assert all(bool(part.grad is not None and part.grad.any()) is learns for part in parts)
    trained = {name for name, part in model.named_parameters() if part.grad is not None}
    assert any("causal_encoder" in name for name in trained)
    assert not any(".encoder." in name or "vit_proj" in name or "unet_" in name for name in trained)
    assert not model.tokenizer.encoder.training


@torch.no_grad()
@pytest.mark.parametrize("keep, start", [(1 / 3, 1 / 3), (1.0, 0.999), (0.0, 0.001)])
def test_the_selector_starts_at_the_share_to_keep(features, keep, start):
    # Starting at one half, it would first learn to drop patches at random; at 0 or 1 never.
    model = toy.stage1(weights=read_settings(LavitLossWeights, {"keep": keep}, "loss"))
    model.tokenizer.token_predictor.out_conv[4].weight.zero_()
    p_keep = model.tokenizer.token_predictor(features).softmax(-1)[..., 0]
    assert_close(p_keep, torch.full_like(p_keep, start))
    for wrong in (keep - 1.1, keep + 1.1):
        with pytest.raises(ConfigError, match="keep"):
            read_settings(LavitLossWeights, {"keep": wrong}, "loss")


# ---- the language model


def test_unified_loss_reads_features_in_the_place_of_tokens():
    from tiny.language import llama
    from tiny.lavit import TOKENIZER, small_tokenizer

    from seed_multimodal.training.llm.loss import LossModule, LossWeights

    torch.manual_seed(0)
    llm = llama(40)
    merger = small_tokenizer().causal_encoder.requires_grad_(True)
    projector = torch.nn.Linear(TOKENIZER.vit.width, llm.config.hidden_size)
    weights = LossWeights(first_code=30)
    model = UnifiedLoss(llm, merger, projector, weights)
    ids = torch.randint(3, 30, (2, 6))
    image = {
        "features": torch.randn(1, 16, TOKENIZER.vit.width),
        "keep": torch.ones(1, 16),
        "patch_indices": torch.tensor([2, 7]),
        "token_indices": torch.tensor([7, 8]),  # of the second row
    }
    embeds = llm.get_input_embeddings()(ids)
    embeds[1, 1:3] = projector(merger(image["features"], image["keep"]))[0, [2, 7]]
    expected = LossModule(llm, weights)(ids, ids, embeds=embeds)
    assert_close(model(ids, ids, **image).mean, expected.mean)

    # Without images the same parameters have gradients, of zero: processes wait for each other.
    plain = model(ids, ids)
    assert_close(plain.mean, LossModule(llm, weights)(ids, ids).mean)
    plain.mean.backward()
    assert not any(part.grad.any() for part in projector.parameters())


# ---- pixel decoders


@torch.no_grad()
@pytest.mark.parametrize("head", ["highres", "lowres"])
def test_pixels_are_predicted_with_and_without_conditions(head, tmp_path):
    pixels = LavitDetokenizer.from_pretrained(write_lavit_diffusion(tmp_path, head))
    decoder, _ = decoder_for(pixels.unet, code_decoder(head).save_pretrained(tmp_path / "decoder"))
    null_embeds = pixels.null_embeds if head == "lowres" else None
    pixels.decoder = decoder
    model = TrainedDetokenizer(pixels, pixels.trained).eval()
    rows = [torch.randn(count, decoder.config.code_dim) for count in (3, 5)]
    latents, steps = torch.randn(2, 4, 8, 8), torch.tensor([3, 500])
    ids = torch.randint(8, 64, (2, 6)).float()
    without = torch.tensor([False, True])
    predicted = model(latents, steps, rows, ids, without)

    # The first image reads its codes, the second nothing but its sizes.
    read = decoder(rows)
    prompt, mask = read.prompt_embeds.clone(), None
    prompt[1] = 0
    if null_embeds is not None:
        length = null_embeds.shape[1]
        prompt[1, :length] = null_embeds
        mask = torch.ones(prompt.shape[:2], dtype=torch.bool)
        mask[1, length:] = False
    inputs = {"encoder_hidden_states": prompt, "encoder_attention_mask": mask}
    if read.pooled is not None:
        pooled = read.pooled * torch.tensor([[1.0], [0.0]])
        inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
    assert_close(predicted, pixels.unet(latents, steps, **inputs).sample)


def test_decoder_for_a_unet_of_the_other_kind(tmp_path):
    # The stored blocks serve both U-Nets; heads that fit are kept.
    high, low = (
        LavitDetokenizer.load_part(write_lavit_diffusion(tmp_path / head, head), "denoiser")
        for head in ("highres", "lowres")
    )
    folder = code_decoder().save_pretrained(tmp_path / "decoder")
    saved = code_decoder().state_dict()
    same, is_new = decoder_for(high, folder)
    assert not is_new
    assert equal(same.state_dict(), saved)
    other, is_new = decoder_for(low, folder, seed=3)
    assert is_new
    assert (other.config.head, other.unet_proj.out_features) == ("lowres", 16)
    blocks = {name: value for name, value in saved.items() if not name.startswith(HEADS)}
    assert equal(blocks, other.state_dict())
    # New heads depend on the seed alone.
    again = decoder_for(low, folder, seed=3)[0]
    assert torch.equal(again.unet_proj.weight, other.unet_proj.weight)
    back, is_new = decoder_for(high, other.save_pretrained(tmp_path / "low"))
    assert is_new
    assert (back.config.context_dim, back.config.pooled_dim) == (16, same.config.pooled_dim)
