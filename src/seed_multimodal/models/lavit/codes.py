"""Codes of LaVIT's dynamic tokenizer for pre-tokenization: a variable number for each image.

# tokenizer.yaml
_target_: seed_multimodal.models.lavit.codes.lavit_codes
pretrained_model_name_or_path: pretrained/LaVIT-7B-v2
"""

from __future__ import annotations

import zlib
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor, nn

from seed_multimodal.hub import locate
from seed_multimodal.models.lavit.checkpoints import load_dynamic_tokenizer
from seed_multimodal.models.lavit.modeling import MODES, DynamicTokenizer
from seed_multimodal.nn.layers import cast_layers


class DynamicCodes(nn.Module):
    """`encode`: normalized pixels `[B, 3, S, S]` → codes `[B, N]`, padded with -1.

    Token selection depends only on pixels and seed, so shards are reproducible.
    """

    def __init__(self, tokenizer: DynamicTokenizer, selection: str, seed: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.selection = selection
        self.seed = seed
        self.device = tokenizer.device
        # Part of the encoder's fingerprint, since it changes the codes.
        self.register_buffer("drawn_by", torch.tensor([MODES.index(selection), seed]))

    def to(self, dtype: torch.dtype) -> Self:  # type: ignore[override]
        """Convert the layers to a dtype; other parameters stay fp32."""
        cast_layers(self.tokenizer, dtype)
        return self

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """See the class."""
        generators = []
        for image in pixels.cpu().contiguous():
            image_seed = zlib.crc32(image.numpy().tobytes(), self.seed)
            generators.append(torch.Generator().manual_seed(image_seed))
        codes = self.tokenizer.encode(pixels, mode=self.selection, generator=generators)
        return nn.utils.rnn.pad_sequence(codes, batch_first=True, padding_value=-1)


def lavit_codes(
    pretrained_model_name_or_path: str, selection: str = "draw", seed: int = 0, device: str = "cpu"
) -> Any:
    """`model` and `transform` for `data.pretokenize.encode.Encoder`.

    Raises CheckpointError, as `load_dynamic_tokenizer`.
    """
    folder = locate(pretrained_model_name_or_path) or pretrained_model_name_or_path
    tokenizer = load_dynamic_tokenizer(folder, device=device)
    return SimpleNamespace(
        model=DynamicCodes(tokenizer, selection, seed), transform=tokenizer.transform, fp16=False
    )
