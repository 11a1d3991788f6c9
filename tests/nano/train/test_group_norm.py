"""FastGroupNorm gives PyTorch's numbers, values and gradients, and swaps in and out without touching parameters."""

import pytest
import torch
from torch import nn

from seed_nano.train.group_norm import FastGroupNorm, restore_group_norm, use_fast_group_norm


@pytest.mark.parametrize(("groups", "channels", "height", "width"), [(4, 16, 8, 8), (1, 6, 5, 3), (8, 8, 1, 7)])
def test_values_and_gradients_equal_pytorch(groups: int, channels: int, height: int, width: int) -> None:
    torch.manual_seed(0)
    norm = nn.GroupNorm(groups, channels)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (torch.randn(3, channels, height, width) * 2 + 1).to(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn(3, channels, height, width)
    expected = norm(x)
    expected.backward(grad)
    reference = [expected.detach(), x.grad, norm.weight.grad, norm.bias.grad]
    x.grad = norm.weight.grad = norm.bias.grad = None
    use_fast_group_norm(norm)
    assert type(norm) is FastGroupNorm
    output = norm(x)
    output.backward(grad)
    for ours, theirs in zip([output.detach(), x.grad, norm.weight.grad, norm.bias.grad], reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    restore_group_norm(norm)
    assert type(norm) is nn.GroupNorm
