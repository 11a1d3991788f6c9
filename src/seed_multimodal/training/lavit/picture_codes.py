"""A picture's own codes, by the frozen dynamic tokenizer."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from seed_multimodal.data.stream.pair_dataset import sample_seed
from seed_multimodal.images.transforms import normalise
from seed_multimodal.lavit.modeling import DynamicTokenizer
from seed_multimodal.training.frozen_features import FrozenFeatures

Mode = Literal["draw", "threshold"]


class PictureCodes(FrozenFeatures):
    """Pixels of the tokenizer's size → codes int32 `[B, N]` in raster order of the patches, -1 behind the last one.

    Args:
        selection: of patches, as of `DynamicTokenizer.select`; what is drawn follows from the picture and `seed`, so a
            picture has the same codes whenever it is asked for.
    """

    def __init__(self, tokenizer: DynamicTokenizer, device: torch.device, selection: Mode = "draw", seed: int = 0,
                 at_once: int = 16, cache: str | Path | None = None) -> None:
        precision = str(tokenizer.encode_task_layer[0].weight.dtype).removeprefix("torch.")
        drawn = f"{selection}-{seed}" if selection == "draw" else selection
        super().__init__(tokenizer, device, at_once, cache, variant=f"-{precision}-{drawn}")
        self.selection, self.seed, self.places = selection, seed, tokenizer.config.patches

    def compute(self, pixels: Tensor) -> Tensor:
        """See `FrozenFeatures`."""
        generators = [torch.Generator().manual_seed(sample_seed(self.seed, 0, zlib.crc32(one.numpy().tobytes())))
                      for one in pixels.cpu()] if self.selection == "draw" else None
        found = self.model.encode(normalise(pixels), mode=self.selection, generator=generators)
        codes = torch.full((len(found), self.places), -1, dtype=torch.int32, device=self.device)
        for row, one in zip(codes, found, strict=True):
            row[:len(one)] = one
        return codes
