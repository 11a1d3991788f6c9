"""Images ⇄ codes of tiles, and the system around a language model."""

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mosaic.spec import MosaicConfig
from seed_multimodal.images.transforms import ImageTransform
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.pipelines.family import Family
from seed_multimodal.pipelines.images import CodeCodec, Placement

COLUMNS = 8
ROWS = 4
# Red and green in two steps, blue in four.
PALETTE = torch.cartesian_prod(
    torch.tensor([0, 255]), torch.tensor([0, 255]), torch.tensor([0, 85, 170, 255])
)
TRANSFORM = ImageTransform(32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


class Tiles(nn.Module):
    """The image tokenizer, without weights."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels `[B, 3, S, S]` → codes `[B, 32]`: the nearest colour of each tile's mean."""
        tiles = F.adaptive_avg_pool2d(pixels, (ROWS, COLUMNS))
        colours = tiles.flatten(2).transpose(1, 2) * 255  # [B, 32, 3]
        distances = (colours[:, :, None] - PALETTE.to(colours)).square().sum(-1)  # [B, 32, 16]
        return distances.argmin(-1)


class MosaicCodec(CodeCodec):
    """Images ⇄ 32 codes of tiles in raster order; drawing needs no network."""

    can_draw = True

    def __init__(self, tile: int, placement: Placement) -> None:
        super().__init__(
            Tiles(),
            placement,
            transform=TRANSFORM,
            codebook_size=len(PALETTE),
            codes_per_image=ROWS * COLUMNS,
        )
        self.tile = tile

    def draw_batch(self, key: object, rows: Sequence[tuple[Tensor, int]]) -> list[Image.Image]:
        """Codes and seed of each image → images; seeds have no effect."""
        images = []
        for codes, _ in rows:
            pixels = PALETTE[codes].reshape(ROWS, COLUMNS, 3).to(torch.uint8).numpy()
            size = (COLUMNS * self.tile, ROWS * self.tile)
            images.append(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST))
        return images


class MosaicFamily(Family):
    """How the parts of a system are loaded."""

    @classmethod
    def load(cls, config: MosaicConfig, placement: Placement) -> Self:
        tokenizer = MultimodalTokenizer.from_pretrained(config.path("tokenizer"))
        return cls.of_parts(config, tokenizer, load_images(config, placement), placement)


def load_images(config: MosaicConfig, placement: Placement) -> MosaicCodec:
    return MosaicCodec(config.tile, placement)
