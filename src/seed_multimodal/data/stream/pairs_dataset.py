"""Training samples from stored pairs: an image with one of its captions.

Randomness of a sample is determined by (seed, epoch, index).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor

from seed_multimodal.data.formats.bad_records import RecordNote
from seed_multimodal.data.formats.pairs import Pair, Pairs
from seed_multimodal.data.stream.order import sample_seed
from seed_multimodal.data.stream.step_batches import Sample, SampleDataset
from seed_multimodal.device import seeded
from seed_multimodal.images.io import open_image


class SourceDataset(SampleDataset[Sample]):
    """Training samples of stored pairs; subclasses define `sample`, and pass `seed` on."""

    def __init__(self, source: Pairs, *, seed: int = 0) -> None:
        self.source = source
        self.seed = seed
        self.shard_sizes = source.shard_sizes

    def __len__(self) -> int:
        return len(self.source)

    def get(self, index: int, epoch: int = 0) -> Sample:
        """One sample. Raises one of `RECORD_FAULTS`."""
        return self.sample(self.source.read(index), sample_seed(self.seed, epoch, index))

    def broken(self, index: int, error: Exception) -> RecordNote:
        """A sample whose `get` raised one of `RECORD_FAULTS`."""
        return self.source.broken(index, error)

    def checksum(self) -> int:
        """Of the files."""
        return self.source.checksum()

    def sample(self, pair: Pair, seed: int) -> Sample:
        """The sample of a pair; its randomness comes only from `seed`."""
        raise NotImplementedError


class CaptionedImage(TypedDict):
    """A sample of `PairDataset`."""

    image: Tensor  # output of the image transform
    caption: str
    key: str


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
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(source, seed=seed)
        self.image_transform = image_transform
        self.text_transform = text_transform

    def sample(self, pair: Pair, seed: int) -> CaptionedImage:
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
            with seeded(seed):
                image = self.image_transform(open_image(pair.image, name=pair.location).image)
        return {"image": image, "caption": caption, "key": pair.key}
