"""LaVIT's dynamic tokenizer at a tiny size: the merger's softmax, the selection, codes and continuous rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_lavit_tokenizer import TINY, tiny_tokenizer
from torch import Tensor

from seed_multimodal.errors import CheckpointError, CodesError, ConfigError, ImageError
from seed_multimodal.nn.layers import cast_layers
from seed_multimodal.tokenizers.lavit import DynamicTokenizer, as_nested, kept_rows, padded
from seed_multimodal.tokenizers.lavit_merger import Merger, causal_mask, dropped_mask, masked_softmax
from seed_multimodal.tokenizers.lavit_selector import Selection, choose, gumbel_noise

PICTURES, PATCHES, WIDTH = 4, 16, 16


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def model() -> DynamicTokenizer:
    return tiny_tokenizer()


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(PICTURES, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def log_probs() -> Tensor:
    return F.log_softmax(2 * torch.randn(PICTURES, PATCHES, 2, generator=torch.Generator().manual_seed(2)), -1)


# ---- the masked softmax and the merger


def test_masked_softmax_is_its_formula_and_its_rows_sum_to_one() -> None:
    scores = 3 * torch.randn(2, 3, 5, 5)
    allowed = torch.tensor([1.0, 0, 1, 1, 0])
    weights = masked_softmax(scores, allowed)
    assert (weights.sum(-1) - 1).abs().max() < 1e-6
    for row, made in zip(scores.reshape(-1, 5), weights.reshape(-1, 5), strict=True):
        e = [torch.exp(value - max(row)) * see for value, see in zip(row, allowed, strict=True)]
        want = torch.stack([(one + 1e-6 / 5) / (sum(e) + 1e-6) for one in e])
        assert torch.allclose(made, want, atol=1e-7)
    assert 0 < weights[..., 1].max() < 1e-3
    nothing = masked_softmax(scores, torch.zeros(5))
    assert torch.allclose(nothing, torch.full_like(nothing, 0.2))


def test_masked_key_that_dominates_counts_for_the_maximum() -> None:
    weights = masked_softmax(torch.tensor([[[[100.0, 1.0, 2.0]]]]), torch.tensor([0.0, 1, 1]))
    assert torch.allclose(weights, torch.full_like(weights, 1 / 3))


def test_half_scores_give_half_weights_computed_in_fp32() -> None:
    scores = torch.randn(1, 1, 4, 300)
    half = masked_softmax(scores.bfloat16(), torch.ones(300))
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, masked_softmax(scores.bfloat16().float(), torch.ones(300)).bfloat16())


def test_masks_by_hand() -> None:
    keep = torch.tensor([[1.0, 0, 1]])
    assert causal_mask(keep).tolist() == [[[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]]
    assert dropped_mask(keep).tolist() == [[[[0, 1, 0]]]]


@pytest.fixture
def merger() -> Merger:
    return Merger(WIDTH, 2, 2, 24).eval()


def changed(features: Tensor, patch: int) -> Tensor:
    other = features.clone()
    other[:, patch] += torch.randn(WIDTH)
    return other


@torch.no_grad()
def test_a_later_kept_patch_does_not_change_earlier_rows(merger: Merger) -> None:
    features, keep = torch.randn(2, PATCHES, WIDTH), torch.ones(2, PATCHES)
    keep[:, 3] = 0  # with nothing dropped the cross-attention averages everything
    before, after = merger(features, keep), merger(changed(features, 9), keep)
    assert (before - after)[:, :9].abs().max() < 1e-5
    assert (before - after)[:, 9:].abs().amax(2).min() > 1e-3


@torch.no_grad()
def test_a_dropped_patch_reaches_kept_rows_through_the_cross_attention_alone(merger: Merger) -> None:
    features, keep = torch.randn(2, PATCHES, WIDTH), torch.ones(2, PATCHES)
    keep[:, [3, 7]] = 0
    other, kept = changed(features, 7), keep[0] > 0
    assert (merger(features, keep) - merger(other, keep))[:, kept].abs().amax(2).min() > 1e-3
    for block in merger.blocks:
        block.token_cross_attn.value.weight.zero_()
    assert (merger(features, keep) - merger(other, keep))[:, kept].abs().max() < 1e-5


@torch.no_grad()
def test_with_everything_kept_the_cross_attention_averages_the_picture(merger: Merger) -> None:
    attention, source = merger.blocks[0].token_cross_attn, torch.randn(2, PATCHES, WIDTH)
    made = attention(torch.randn(2, PATCHES, WIDTH), source, dropped_mask(torch.ones(2, PATCHES)))
    average = attention.proj(attention.value(source).mean(1, keepdim=True))
    assert torch.allclose(made, average.expand_as(made), atol=1e-6)


@pytest.mark.slow  # torch's checkpointing imports much
def test_checkpointed_merger_has_the_same_gradients() -> None:
    plain, repeated = Merger(WIDTH, 2, 2, 24), Merger(WIDTH, 2, 2, 24, grad_checkpoint=True)
    repeated.load_state_dict(plain.state_dict())
    features, keep = torch.randn(2, PATCHES, WIDTH), (torch.rand(2, PATCHES) > 0.5).float()
    gradients = []
    for one in (plain, repeated):
        soft = keep.clone().requires_grad_()
        one(features, soft).square().sum().backward()
        gradients.append([soft.grad, *(p.grad for p in one.parameters())])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))
    assert gradients[0][0].abs().min() > 0


# ---- the selection


def test_keep_frequency_is_the_probability(log_probs: Tensor) -> None:
    draws = 4000
    many = log_probs[:1].expand(draws, -1, -1)
    frequency = choose(many, generator=torch.Generator().manual_seed(3), allow_empty=True).keep_BN.mean(0)
    p = log_probs[0, :, 0].exp()
    assert ((frequency - p).abs() < 4.5 * (p * (1 - p) / draws).sqrt() + 1e-3).all()


def test_global_draw_is_torchs_own_gumbel_softmax(log_probs: Tensor) -> None:
    torch.manual_seed(7)
    made = choose(log_probs, allow_empty=True).keep_BN
    torch.manual_seed(7)
    assert torch.equal(made, F.gumbel_softmax(log_probs, tau=1, hard=True)[..., 0].round())


def test_seeded_draws_repeat_and_others_differ(log_probs: Tensor) -> None:
    one, again, other = (choose(log_probs, generator=torch.Generator().manual_seed(s)).keep_BN for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_a_generator_for_each_picture_makes_a_picture_independent_of_its_batch(log_probs: Tensor) -> None:
    together = choose(log_probs, generator=generators(*range(PICTURES))).keep_BN
    alone = [choose(log_probs[i:i + 1], generator=generators(i)).keep_BN for i in range(PICTURES)]
    assert torch.equal(together, torch.cat(alone))
    with pytest.raises(ConfigError, match="2 generators for 4 pictures"):
        choose(log_probs, generator=generators(1, 2))


def test_threshold_keeps_what_is_more_probable_than_not(log_probs: Tensor) -> None:
    selection = choose(log_probs, mode="threshold")
    assert torch.equal(selection.keep_BN > 0, selection.p_keep_BN > 0.5)
    assert selection.counts_B.tolist() == (log_probs[..., 0] > log_probs[..., 1]).sum(1).tolist()
    with pytest.raises(ConfigError, match="Unknown selection 'topk'"):
        choose(log_probs, mode="topk")


@pytest.mark.parametrize("mode", ["draw", "threshold"])
def test_an_empty_picture_keeps_its_most_probable_patch(mode: str) -> None:
    p = torch.full((2, PATCHES), 1e-12)
    p[0, 5], p[1, 2] = 1e-9, 0.9999999
    log_probs = torch.stack([p.log(), (1 - p).log()], -1)
    seed = torch.Generator().manual_seed(0)
    keep = choose(log_probs, mode=mode, generator=seed).keep_BN
    assert keep.nonzero().tolist() == [[0, 5], [1, 2]]
    assert choose(log_probs, mode=mode, generator=seed, allow_empty=True).counts_B.tolist() == [0, 1]


@pytest.mark.parametrize("mode", ["draw", "threshold"])
def test_decisions_are_hard_with_the_gradient_of_the_soft_ones(mode: str, log_probs: Tensor) -> None:
    noise = gumbel_noise(log_probs.shape, log_probs.device, torch.Generator().manual_seed(4))
    logits = log_probs.clone().requires_grad_()
    keep = choose(logits, mode=mode, noise=noise).keep_BN
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    weights = torch.randn(PICTURES, PATCHES)
    (keep * weights).sum().backward()
    soft = log_probs.clone().requires_grad_()
    value = (soft + noise).softmax(-1)[..., 0] if mode == "draw" else soft[..., 0].exp()
    (value * weights).sum().backward()
    assert torch.allclose(logits.grad, soft.grad, atol=1e-6)


def test_training_reaches_the_selector_through_the_merger(pixels: Tensor) -> None:
    model = tiny_tokenizer().requires_grad_(True).train()
    features = model.patch_features(pixels).detach()
    selection = model.select(features, generator=generators(*range(PICTURES)))
    kept_rows(model.merge(features, selection.keep_BN), selection.keep_BN)[0].square().sum().backward()
    gradients = [p.grad for p in model.token_predictor.parameters()]
    assert all(g is not None and torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients)


# ---- pictures to rows and codes


def test_features_are_the_last_blocks_patches_without_norm(model: DynamicTokenizer, pixels: Tensor) -> None:
    features = model.patch_features(pixels)
    assert features.shape == (PICTURES, PATCHES, WIDTH)
    tower, x = model.encoder, model.encoder.patch_embed(pixels)
    x = torch.cat([tower.cls_token.expand(PICTURES, -1, -1), x], 1) + tower.pos_embed
    for block in tower.blocks:
        x = block(x)
    assert torch.allclose(features, x[:, 1:], atol=1e-6)


@pytest.mark.parametrize("way", ["threshold", "draw"])
def test_a_picture_alone_and_in_a_batch_is_equal(way: str, model: DynamicTokenizer, pixels: Tensor) -> None:
    def options(seeds: list[int]) -> dict[str, object]:
        return {"mode": "threshold"} if way == "threshold" else {"generator": generators(*seeds)}

    codes = model.encode(pixels, **options(list(range(PICTURES))))
    rows = model.continuous(pixels, **options(list(range(PICTURES))))
    assert len({len(one) for one in codes}) > 1, "the pictures should differ in their number of tokens"
    for i in range(PICTURES):
        assert torch.equal(model.encode(pixels[i:i + 1], **options([i]))[0], codes[i])
        assert torch.allclose(model.continuous(pixels[i:i + 1], **options([i]))[0], rows[i], atol=1e-5)
        assert rows[i].shape == (len(codes[i]), TINY.llm_width)


def test_rows_are_the_kept_patches_in_raster_order(model: DynamicTokenizer, pixels: Tensor) -> None:
    features = model.patch_features(pixels)
    selection = model.select(features, mode="threshold")
    merged = model.merge(features, selection.keep_BN)
    rows, counts = model.rows(pixels, mode="threshold")
    want = [merged[b, n] for b in range(PICTURES) for n in range(PATCHES) if selection.keep_BN[b, n]]
    assert torch.allclose(rows, torch.stack(want), atol=1e-6)
    assert torch.equal(counts, selection.counts_B)


@torch.no_grad()
def test_queries_are_normalised_and_rows_taken_as_stored() -> None:
    model = tiny_tokenizer()
    model.quantize.embedding.weight.mul_(torch.linspace(0.3, 2, TINY.codebook_size)[:, None])
    rows = torch.randn(30, WIDTH)
    codes, made = model.quantize_rows(rows)
    queries = F.normalize(model.encode_task_layer(rows), dim=-1)
    assert codes.tolist() == torch.cdist(queries, model.quantize.embedding.weight).argmin(1).tolist()
    assert torch.equal(made, model.quantize.embedding.weight[codes])
    assert torch.equal(model.embed_codes(codes), made)


@pytest.mark.parametrize("code", [-1, TINY.codebook_size])
def test_codes_beyond_the_codebook_are_refused(code: int, model: DynamicTokenizer) -> None:
    with pytest.raises(CodesError, match=rf"code {code} is not in the codebook, which has 0 to 19\."):
        model.embed_codes(torch.tensor([1, code]))


def test_pictures_of_any_size_are_squashed_and_wrong_tensors_refused(model: DynamicTokenizer) -> None:
    pictures = [Image.new("RGB", size, color) for size, color in (((37, 90), "red"), ((5, 3), "blue"))]
    pixels = model.pixels(pictures)
    assert pixels.shape == (2, 3, 16, 16)
    assert len(model.encode(pixels, mode="threshold")) == 2
    with pytest.raises(ImageError, match=r"must be \[B, 3, 16, 16\]"):
        model.encode(torch.zeros(1, 3, 20, 20))


def test_without_a_projector_there_are_codes_alone(pixels: Tensor) -> None:
    model = tiny_tokenizer()
    model.vit_proj = None
    assert model.encode(pixels, mode="threshold")
    with pytest.raises(CheckpointError, match="for drawing alone"):
        model.continuous(pixels)


def test_lists_as_nested_and_as_padded_tensors() -> None:
    parts = [torch.randn(n, 3, requires_grad=True) for n in (2, 0, 4)]
    nested = as_nested(parts)
    assert nested.is_nested and nested.layout == torch.jagged
    assert [one.shape for one in nested.unbind()] == [one.shape for one in parts]
    filled, lengths = padded(parts, value=7)
    assert filled.shape == (3, 4, 3) and lengths.tolist() == [2, 0, 4]
    assert torch.equal(filled[0, :2], parts[0]) and (filled[1] == 7).all() and (filled[0, 2:] == 7).all()
    filled.sum().backward()
    assert torch.equal(parts[2].grad, torch.ones(4, 3))
    codes, lengths = padded([torch.tensor([3, 4]), torch.tensor([5])])
    assert codes.tolist() == [[3, 4], [5, 0]] and codes.dtype == torch.int64


# ---- precision


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_layers_keep_an_fp32_stream(dtype: torch.dtype, model: DynamicTokenizer, pixels: Tensor) -> None:
    half = cast_layers(tiny_tokenizer(), dtype)
    assert half.encoder.blocks[0].norm1.weight.dtype == half.encoder.cls_token.dtype == torch.float32
    assert half.quantize.embedding.weight.dtype == half.encoder.blocks[0].attn.q_bias.dtype == torch.float32
    features = half.patch_features(pixels)
    assert features.dtype == torch.float32
    assert not torch.equal(features, features.to(dtype).float()), "the stream was rounded"
    want = model.patch_features(pixels)
    assert (features - want).abs().max() < 0.02 * want.abs().max()
    keep = model.select(want, mode="threshold").keep_BN
    merged, exact = half.merge(want, keep), model.merge(want, keep)
    assert merged.dtype == torch.float32 and (merged - exact).abs().max() < 0.05 * exact.abs().max()
    assert half.continuous(pixels, mode="threshold")[0].dtype == dtype
    assert half.select(want).log_probs_BN2.dtype == torch.float32


@torch.no_grad()
def test_surrounding_autocast_holds_and_the_stream_stays_fp32(model: DynamicTokenizer, pixels: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        features = model.patch_features(pixels)
    assert features.dtype == torch.float32
    assert not torch.equal(features, features.bfloat16().float())
    assert not torch.equal(features, model.patch_features(pixels))


# ---- sizes


def test_config_returns_from_its_plain_values_and_other_models_are_refused() -> None:
    assert type(TINY).from_dict(TINY.to_dict()) == TINY
    with pytest.raises(ConfigError, match="not the configuration of a LaVIT tokenizer"):
        type(TINY).from_dict({"model_type": "seed2"})
    with pytest.raises(ConfigError, match="merger_depth"):
        type(TINY).from_dict({**TINY.to_dict(), "merger_deepth": 2})


def test_sizes_that_do_not_fit_are_one_sentence() -> None:
    with pytest.raises(ConfigError, match="does not divide into 3 heads"):
        DynamicTokenizer(dataclasses.replace(TINY, merger_heads=3))
    with pytest.raises(ConfigError, match="not a multiple of 4"):
        DynamicTokenizer(dataclasses.replace(TINY, merger_heads=1, vit=dataclasses.replace(TINY.vit, width=6, heads=2)))


def test_selection_counts(log_probs: Tensor) -> None:
    keep = torch.zeros(PICTURES, PATCHES)
    keep[1, :3] = 1
    assert Selection(log_probs, keep).counts_B.tolist() == [0, 3, 0, 0]
