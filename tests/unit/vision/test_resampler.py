"""Qwen's resampler and tables of positions: sizes, batches, precision, what is kept per size, refusals."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.vision.positions import SquarePositions, resize_square, sine_table
from seed_multimodal.vision.resampler import INPUT_RESAMPLER, OUTPUT_RESAMPLER, Resampler, ResamplerConfig

SMALL = ResamplerConfig(grid_size=2, embed_dim=24, num_heads=3, kv_dim=10)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.slow  # the first model on the meta device imports much of torch
@pytest.mark.parametrize(("config", "numbers"), [(INPUT_RESAMPLER, 126_525_440), (OUTPUT_RESAMPLER, 88_637_440)])
def test_the_released_sizes(config: ResamplerConfig, numbers: int) -> None:
    with torch.device("meta"):
        resampler = Resampler(config)
    assert sum(value.numel() for value in resampler.state_dict().values()) == numbers
    assert [name for name, value in resampler.named_parameters() if not value.requires_grad] == ["pos_embed"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 2e-3)])
def test_a_picture_gives_the_same_alone_and_in_a_batch(dtype: torch.dtype, tolerance: float) -> None:
    resampler, features = Resampler(SMALL).eval(), torch.randn(5, 9, 10)
    with torch.no_grad():
        exact = resampler(features)
        resampler.to(dtype)
        together = resampler(features.to(dtype))
        alone = torch.cat([resampler(one[None].to(dtype)) for one in features])
        assert resampler(features[:0].to(dtype)).shape == (0, 4, 24)
    assert together.dtype == dtype and together.shape == (5, 4, 24)
    torch.testing.assert_close(alone, together, rtol=0, atol=tolerance)
    torch.testing.assert_close(together.float(), exact, rtol=0, atol=tolerance)


def test_positions_make_the_keys_differ_but_stay_out_of_the_values() -> None:
    resampler, features = Resampler(SMALL).eval(), torch.randn(1, 9, 10)
    with torch.no_grad():
        resampler.attn.in_proj_weight.normal_(std=0.5)
        turned = resampler(features.flip(1))
        assert (turned - resampler(features)).abs().max() > 1e-3
        same = features[:, :1].expand(-1, 9, -1)  # equal features everywhere: attention cannot change them
        torch.testing.assert_close(resampler(same), resampler(features[:, :1]).expand(-1, 4, -1), rtol=0, atol=1e-5)


def test_features_that_do_not_fit_are_refused_in_a_sentence() -> None:
    resampler = Resampler(SMALL)
    with pytest.raises(ConfigError, match=r"^The resampler's input has 8 patches, which is not a square grid\.$"):
        resampler(torch.zeros(1, 8, 10))
    for shape in ((1, 9, 24), (9, 10)):
        with pytest.raises(ConfigError, match=r"^The resampler needs features \[B, N, 10\], got \["):
            resampler(torch.zeros(shape))


@pytest.mark.parametrize(("values", "words"), [
    ({"num_heads": 5}, "does not divide into 5 heads"), ({"grid_size": 0}, "grid_size must be at least 1"),
    ({"embed_dim": 21, "num_heads": 3}, "width 21 is not a multiple of 4"),
    ({"norm_eps": math.nan}, "norm_eps must be a finite number")])
def test_sizes_that_cannot_be_are_refused_in_a_sentence(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Resampler(ResamplerConfig(**{**vars(SMALL), **values}))


def test_sines_tell_the_column_first() -> None:
    table = sine_table(8, 3).view(3, 3, 8)
    assert torch.equal(table[0, :, 4:], table[0, :1, 4:].expand(3, -1))  # one row: the second half stays
    assert torch.equal(table[:, 0, :4], table[:1, 0, :4].expand(3, -1))
    torch.testing.assert_close(table[0, 2, :4], torch.tensor([2.0, 0.02, 0, 0]).sin() + torch.tensor(
        [0, 0, math.cos(2.0), math.cos(0.02)]))


def test_a_frozen_table_is_resized_once_per_size_until_it_changes() -> None:
    positions, table = SquarePositions(), nn.Parameter(torch.randn(16, 6), requires_grad=False)
    with torch.inference_mode():
        first, other = positions(table, 9, "it"), positions(table, 36, "it")
    for kept, tokens in ((first, 9), (other, 36)):
        assert positions(table, tokens, "it").data_ptr() == kept.data_ptr()
    assert torch.equal(first, resize_square(table, 3)) and not first.is_inference()
    with torch.no_grad():
        table.mul_(2)
    torch.testing.assert_close(positions(table, 9, "it"), 2 * first)
    assert positions(table, 16, "it").data_ptr() == table.data_ptr()
    replaced = nn.Parameter(torch.ones(16, 6), requires_grad=False)
    torch.testing.assert_close(positions(replaced, 9, "it"), torch.ones(9, 6))
    positions.to(torch.bfloat16)
    assert positions.kept == {}


def test_a_trained_table_gets_gradients_at_every_size() -> None:
    positions, table = SquarePositions(), nn.Parameter(torch.randn(16, 6))
    for tokens in (9, 9, 25):
        positions(table, tokens, "it").square().sum().backward()
    assert table.grad is not None and table.grad.abs().min() > 0 and positions.kept == {}


def test_what_is_kept_is_no_part_of_a_checkpoint_and_moves_with_the_weights() -> None:
    resampler, features = Resampler(SMALL).eval(), torch.randn(2, 9, 10)
    names = list(resampler.state_dict())
    before = resampler(features)
    assert list(resampler.state_dict()) == names
    for again in (copy.deepcopy(resampler), resampler.to(torch.float64).to(torch.float32)):
        torch.testing.assert_close(again(features), before)
    state = {name: value + 0.1 for name, value in resampler.state_dict().items()}
    fresh = Resampler(SMALL).eval()
    fresh.load_state_dict(state)
    resampler.load_state_dict(state)
    torch.testing.assert_close(resampler(features), fresh(features))
