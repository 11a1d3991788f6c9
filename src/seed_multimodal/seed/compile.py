"""A faster `encode`: compiled blocks, and half precision with the residual stream in fp32.

    encode = fast_encode(tokenizer, torch.float16, compile=True)
    codes = encode(images)

fp16 converts the whole model, as released. bf16 has too few bits for the sums of 39 blocks: only matrix products are
in bf16, under autocast. The first call with a new batch size compiles, which takes seconds to minutes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from seed_multimodal.nn.layers import cast_layers


def fast_encode(tokenizer: nn.Module, dtype: torch.dtype = torch.float32, *, compile: bool = False,
                mode: str | None = None) -> Callable[[Tensor], Tensor]:
    """`tokenizer.encode` in a precision; the tokenizer is changed in place.

    `mode`: of `torch.compile`, for example `max-autotune-no-cudagraphs`.
    """
    mixed = dtype == torch.bfloat16
    if mixed:
        cast_layers(tokenizer, dtype)
    else:
        tokenizer.to(dtype)
    if compile:
        for layers in [part for part in tokenizer.modules() if isinstance(part, nn.ModuleList)]:
            for layer in layers:
                layer.compile(mode=mode)

    def encode(images: Tensor) -> Tensor:
        with torch.autocast(tokenizer.device.type, torch.bfloat16, enabled=mixed):
            return tokenizer.encode(images)

    return encode
