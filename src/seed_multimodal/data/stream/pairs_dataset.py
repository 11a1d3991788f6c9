"""Training samples from stored pairs: an image with one of its captions, or targets of a pixel
decoder.

Randomness of a sample is determined by (seed, epoch, index). An unusable sample is counted
and replaced by the next usable one; `max_bad_in_a_row` consecutive ones stop the run.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from seed_multimodal.data.formats.pairs import Pair, Pairs
from seed_multimodal.data.formats.record import RECORD_FAULTS, BadRecords, find_part
from seed_multimodal.data.stream.loader import Sample, SampleDataset
from seed_multimodal.data.stream.sampler import MixedOrder
from seed_multimodal.diffusion.networks import size_ids
from seed_multimodal.errors import CodesError, ConfigError
from seed_multimodal.images.io import open_image
from seed_multimodal.images.transforms import INTERPOLATIONS, plain_rgb, resize_passes, to_bytes
from seed_multimodal.settings import setting


class SourceDataset(SampleDataset[Sample]):
    """Training samples of stored pairs; subclasses define `sample`, and pass these options on."""

    def __init__(
        self,
        source: Pairs,
        *,
        seed: int = 0,
        max_bad_in_a_row: int = 20,
        log: Callable[[str], None] | None = print,
    ) -> None:
        super().__init__(log)
        self.source = source
        self.seed = seed
        self.max_bad_in_a_row = max_bad_in_a_row
        self.shard_sizes = source.shard_sizes

    def __len__(self) -> int:
        return len(self.source)

    def get(self, index: int, epoch: int = 0) -> Sample:
        """One sample, or the next usable one.

        Raises DataError: `max_bad_in_a_row` consecutive samples are unusable.
        """
        # Seeded by the requested index, so a replacement differs from its regular use in this
        # epoch.
        seed = sample_seed(self.seed, epoch, index)
        limit = min(self.max_bad_in_a_row, len(self.source))
        in_a_row = BadRecords(limit)
        candidate = index
        while True:
            try:
                return self.sample(self.source.read(candidate), candidate, seed)
            except RECORD_FAULTS as error:
                note = self.source.broken(candidate, error)
                self.faults.append(note)
                in_a_row.add(note)
            candidate = (candidate + 1) % len(self.source)

    def sample(self, pair: Pair, index: int, seed: int) -> Sample:
        """The sample of the pair at `index`; its randomness comes only from `seed`."""
        raise NotImplementedError


class CaptionedImage(TypedDict):
    """A sample of `PairDataset`."""

    image: Tensor  # output of the image transform
    caption: str
    key: str
    index: int  # in the source


class PairDataset(SourceDataset[CaptionedImage]):
    """An image with one of its captions.

    image_transform: one of ours, whose `read` returns uint8 for normalization on the device, or any
        image -> tensor, called with torch's global generator seeded.
    text_transform: caption -> caption; None: unchanged.
    """

    def __init__(
        self,
        source: Pairs,
        image_transform: Callable[..., Tensor],
        text_transform: Callable[[str], str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(source, **options)
        self.image_transform = image_transform
        self.text_transform = text_transform

    def sample(self, pair: Pair, index: int, seed: int) -> CaptionedImage:
        """See `SourceDataset`."""
        # 1. A caption.
        generator = torch.Generator().manual_seed(seed)
        captions = pair.captions or [""]  # source without captions
        caption = captions[int(torch.randint(len(captions), (), generator=generator))]
        if self.text_transform:
            caption = self.text_transform(caption)

        # 2. The image.
        if hasattr(self.image_transform, "read"):
            image = self.image_transform.read(pair.image, name=pair.location, generator=generator)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                image = self.image_transform(open_image(pair.image, name=pair.location).image)
        return {"image": image, "caption": caption, "key": pair.key, "index": index}


class JoinedPairs(SampleDataset[Sample]):
    """Concatenated data sets with one list of bad samples."""

    def __init__(self, parts: Sequence[SourceDataset[Sample]]) -> None:
        super().__init__(log=parts[0].bad.log)
        self.parts = parts
        self._ends = list(itertools.accumulate(map(len, parts)))
        for part in parts:
            part.faults = self.faults
        if any(part.shard_sizes is not None for part in parts):
            # A set without shards counts as one shard.
            sizes = [
                np.array([len(part)]) if part.shard_sizes is None else part.shard_sizes
                for part in parts
            ]
            self.shard_sizes = np.concatenate(sizes)

    def __len__(self) -> int:
        return self._ends[-1]

    def get(self, index: int, epoch: int = 0) -> Sample:
        """As `SourceDataset.get`."""
        part, part_index = find_part(self._ends, index)
        return self.parts[part].get(part_index, epoch)


def join_pairs(
    parts: Sequence[SourceDataset[Sample]], weights: Sequence[float], seed: int
) -> tuple[SampleDataset[Sample], MixedOrder | None]:
    """One data set of all parts, and its order by their weights (none: by their sizes)."""
    if len(parts) == 1:
        return parts[0], None
    order = None
    if weights:
        sizes = list(map(len, parts))
        shard_sizes = [part.shard_sizes for part in parts]
        order = MixedOrder(sizes, weights, seed, shard_sizes=shard_sizes)
    return JoinedPairs(parts), order


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """A 63-bit hash of the arguments."""
    (state,) = np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)
    return int(state >> np.uint64(1))


# ---- targets of pixel decoders

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
        """SDXL's size conditions `[6]` of an image of (width, height): original size, crop, target
        size.
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
        return size_ids(size, original=(height, width), crop=crop)[0]

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

    codebook_size: int = setting(minimum=1)
    codes_per_image: int = setting(minimum=1)

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
    index: int  # in the source
    conditioned: bool  # whether it is an edit
    condition: NotRequired[Tensor]  # the image before the edit, uint8 [3, H, W]; zeros if none


class TargetBatch(TypedDict):
    """B samples of `TargetPairs` of one size."""

    image: Tensor  # uint8 [B, 3, H, W]
    encoder_image: Tensor  # uint8 [B, 3, S, S], or recorded codes int64 [B, n]
    time_ids: Tensor  # [B, 6]
    key: list[str]
    index: Tensor  # [B]
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
        **options: Any,
    ) -> None:
        super().__init__(source, **options)
        self.view = view
        self.recorded = recorded
        self.reads_condition = reads_condition

    def sample(self, pair: Pair, index: int, seed: int) -> TargetSample:
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
            "index": index,
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
