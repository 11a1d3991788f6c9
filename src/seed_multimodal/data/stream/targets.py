"""Targets of pixel decoders from stored pairs, with the vision encoder's view of the same crop."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from seed_multimodal.data.formats.pairs import Pair, Pairs
from seed_multimodal.data.stream.pairs_dataset import SourceDataset
from seed_multimodal.errors import CodesError, ConfigError
from seed_multimodal.images.io import open_image
from seed_multimodal.images.transforms import INTERPOLATIONS, plain_rgb, resize_passes, to_bytes
from seed_multimodal.settings import positive

Size = tuple[int, int]  # height and width in pixels


@dataclass(frozen=True)
class TargetView:
    """The target of a pixel decoder and the vision encoder's square input, of the same crop of an
    image.
    """

    resolution: int = 1024  # side of a square target
    encoder_size: int = 448
    # Centre-crop to the nearest aspect ratio (as in SEED-Story's adapter training); else squash, as
    # in SEED-X's editing, to a size chosen by the image's key.
    keep_ratio: bool = True
    sizes: tuple[Size, ...] = ()  # of targets, instead of `resolution`
    encoder_interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if any(min(size) < 8 for size in self.sizes):
            raise ConfigError(
                f"view: sizes are heights and widths of at least 8 pixels, not {list(self.sizes)}."
            )

    def size_of(self, image: Image.Image, key: str = "") -> Size:
        """The target size of an image."""
        sizes = self.sizes or ((self.resolution, self.resolution),)
        if not self.keep_ratio:
            return sizes[zlib.crc32(key.encode()) % len(sizes)]
        log_ratio = math.log(image.width / image.height)
        return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - log_ratio))

    def target_image(self, image: Image.Image, size: Size) -> Tensor:
        """Target uint8 `[3, H, W]` of a size from `size_of`."""
        return self._crop(image, size, size, "bicubic")

    def encoder_image(self, image: Image.Image, size: Size) -> Tensor:
        """Vision encoder's input uint8 `[3, S, S]`, of the same crop."""
        square = (self.encoder_size, self.encoder_size)
        return self._crop(image, size, square, self.encoder_interpolation)

    def time_ids(self, image: Size, size: Size) -> Tensor:
        """The sizes that condition SDXL `[6]` of an image of (width, height): of image, top left
        of its crop, target.
        """
        width, height = image
        target_height, target_width = size
        # Pixels cropped from an image that is resized to the target's height, or else to its width.
        surplus_width = int(target_height * width / height) - target_width
        surplus_height = int(target_width * height / width) - target_height
        if not self.keep_ratio:
            crop = (0, 0)
        elif surplus_width >= 0:
            crop = (0, round(surplus_width / 2))
        else:
            crop = (round(surplus_height / 2), 0)
        return torch.tensor([height, width, *crop, *size], dtype=torch.float32)

    def _crop(self, image: Image.Image, ratio: Size, size: Size, interpolation: str) -> Tensor:
        """A centre crop resized to `size`, uint8 `[3, H, W]`.

        Without `keep_ratio` the complete image.

        ratio: height and width in proportion to those of the crop.
        """
        image = plain_rgb(image)
        width, height = image.size
        ratio_height, ratio_width = ratio
        resample = INTERPOLATIONS[interpolation]
        if not self.keep_ratio or width * ratio_height == height * ratio_width:
            return to_bytes(resize_passes(image, size[::-1], resample))
        crop_width = min(width, height * ratio_width / ratio_height)
        crop_height = min(height, width * ratio_height / ratio_width)
        left = (width - crop_width) / 2
        top = (height - crop_height) / 2
        box = (left, top, left + crop_width, top + crop_height)
        return to_bytes(image.resize(size[::-1], resample, box=box))


@dataclass
class RecordedCodes:
    """Codes of any tokenizer that stand in the images' records, under `image_ids`: a list or grid.

    codebook_size: codes are below it. codes_per_image: at most.
    """

    codebook_size: int = positive()
    codes_per_image: int = positive()

    def read(self, pair: Pair) -> Tensor:
        """Codes int64 `[codes_per_image]`, padded with -1. Raises CodesError: others."""
        codes = torch.tensor(pair.codes or []).flatten()
        n_missing = self.codes_per_image - len(codes)
        is_row = len(codes) > 0 and n_missing >= 0 and not codes.is_floating_point()
        if not is_row or not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise CodesError(
                f"{pair.location}: image_ids must be 1 to {self.codes_per_image} codes from 0 to "
                f"{self.codebook_size - 1}."
            )
        return F.pad(codes, (0, n_missing), value=-1)


class TargetSample(TypedDict):
    """A sample of `TargetPairs`."""

    image: Tensor  # the target, uint8 [3, H, W]
    encoder_image: Tensor  # uint8 [3, S, S]; with recorded codes these, int64 [n]
    time_ids: Tensor  # [6]
    key: str
    conditioned: bool  # whether it is an edit
    condition: NotRequired[Tensor]  # the image before the edit, uint8 [3, H, W]; zeros if none


class TargetBatch(TypedDict):
    """B samples of `TargetPairs` of one size."""

    image: Tensor  # uint8 [B, 3, H, W]
    encoder_image: Tensor  # uint8 [B, 3, S, S], or recorded codes int64 [B, n]
    time_ids: Tensor  # [B, 6]
    key: list[str]
    conditioned: Tensor  # bool [B]
    condition: NotRequired[Tensor]  # uint8 [B, 3, H, W]


class TargetPairs(SourceDataset[TargetSample]):
    """Targets of a pixel decoder and the vision encoder's input.

    reads_condition: also read the image before the edit.
    recorded: the codes in the records; None: the encoder's input is an image.
    """

    def __init__(
        self,
        source: Pairs,
        view: TargetView,
        *,
        reads_condition: bool = False,
        recorded: RecordedCodes | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(source, seed=seed)
        self.view = view
        self.recorded = recorded
        self.reads_condition = reads_condition

    def sample(self, pair: Pair, seed: int) -> TargetSample:
        """See `SourceDataset`; deterministic."""
        # 1. The target and the encoder's input.
        image = open_image(pair.image, name=pair.location).image
        size = self.view.size_of(image, pair.key)
        if self.recorded is None:
            encoder_image = self.view.encoder_image(image, size)
        else:
            encoder_image = self.recorded.read(pair)
        sample: TargetSample = {
            "image": self.view.target_image(image, size),
            "encoder_image": encoder_image,
            "time_ids": self.view.time_ids(image.size, size),
            "key": pair.key,
            "conditioned": pair.condition is not None,
        }

        # 2. The image before the edit.
        if not self.reads_condition:
            return sample
        if pair.condition is None:
            sample["condition"] = torch.zeros_like(sample["image"])
        else:
            name = f"{pair.location} (the image before the edit)"
            before = open_image(pair.condition, name=name).image
            sample["condition"] = self.view.target_image(before, size)
        return sample


def by_size(samples: Sequence[TargetSample]) -> list[TargetBatch]:
    """Samples batched by size, in order of first appearance."""
    groups: dict[torch.Size, list[TargetSample]] = {}
    for sample in samples:
        groups.setdefault(sample["image"].shape, []).append(sample)
    return [default_collate(group) for group in groups.values()]
