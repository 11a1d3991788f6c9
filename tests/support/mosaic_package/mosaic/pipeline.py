"""Images ⇄ codes of tiles, and the system around a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mosaic.spec import MosaicConfig
from seed_multimodal.errors import CodesError
from seed_multimodal.images.io import ImageSource
from seed_multimodal.language.messages import Codes
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.pipelines.code_system import CodeCodec, CodeSystem
from seed_multimodal.pipelines.images import Log, Placement

COLUMNS = 8
ROWS = 4
# Red and green in two steps, blue in four.
PALETTE = torch.cartesian_prod(
    torch.tensor([0, 255]), torch.tensor([0, 255]), torch.tensor([0, 85, 170, 255])
)


class MosaicCodec(CodeCodec):
    """Images ⇄ 32 codes of tiles in raster order; no network, so there is nothing to offload."""

    can_draw = True

    def __init__(self, tile: int, placement: Placement) -> None:
        super().__init__(nn.Identity(), placement.of_codec(None), min_side=32)
        self.tile = tile

    def encode(self, images: Sequence[ImageSource]) -> list[Tensor]:
        """The nearest colour of each tile's mean."""
        codes: list[Tensor] = []
        for image in images:
            tiles = self.open(image).resize((COLUMNS, ROWS), Image.Resampling.BOX)
            colours = torch.from_numpy(np.array(tiles)).flatten(0, 1).long()  # [32, 3]
            distances = (colours[:, None] - PALETTE).square().sum(-1)  # [32, 16]
            codes.append(distances.argmin(-1))
        return codes

    def encode_batch(self, key: object, rows: Sequence[object]) -> list[object]:
        return [*rows]

    def check_codes(self, codes: Sequence[Codes]) -> list[Tensor]:
        rows = [torch.as_tensor(row) for row in codes]
        for row in rows:
            if len(row) != COLUMNS * ROWS:
                raise CodesError(f"An image has {COLUMNS * ROWS} tiles, not {len(row)}.")
        return rows

    def check_drawing(self, **settings: object) -> None:
        pass

    def draw(
        self,
        values: Sequence[Codes],
        *,
        seeds: Sequence[int],
        batch_size: int = 8,
        **settings: object,
    ) -> list[Image.Image]:
        """An image of each row of codes; seeds have no effect."""
        images: list[Image.Image] = []
        for row in self.check_codes(values):
            pixels = PALETTE[row].reshape(ROWS, COLUMNS, 3).to(torch.uint8).numpy()
            size = (COLUMNS * self.tile, ROWS * self.tile)
            images.append(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST))
        return images

    def draw_batch(self, key: object, rows: Sequence[object]) -> list[Image.Image]:
        raise NotImplementedError


class Mosaic(CodeSystem):
    """The system."""

    config: MosaicConfig

    @classmethod
    def load(cls, config: MosaicConfig, placement: Placement, log: Log = None) -> Self:
        tokenizer = MultimodalTokenizer.from_pretrained(config.path("tokenizer"))
        images = load_images(config, placement)
        llm, engine = cls.load_language_model(config, tokenizer, placement)
        return cls(config, tokenizer, llm, images, log, engine=engine)


def load_images(config: MosaicConfig, placement: Placement) -> MosaicCodec:
    return MosaicCodec(config.tile, placement)
