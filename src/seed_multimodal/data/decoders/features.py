"""Decoders whose images are opened with the record, and encoded by the model during training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from PIL import Image

from seed_multimodal.data.decoders.base import (
    Decoder,
    DecoderOptions,
    SegmentPart,
    TrainingSequence,
)
from seed_multimodal.data.formats.conversations import NO_IMAGE
from seed_multimodal.data.formats.record import JsonObject, RecordFields
from seed_multimodal.images.transforms import ImageTransform
from seed_multimodal.images.views import Grid, patch_positions
from seed_multimodal.settings import setting

OpenImage = Callable[[Any, str], Image.Image]  # value and name of a field → opened image


@dataclass(frozen=True)
class OpenedImage:
    """An opened image, and how it is encoded."""

    image: Image.Image
    grid: Grid | None  # of tiles; None: only the whole image
    is_target: bool = False
    seed: int = 0  # of random choices at encoding

    @property
    def views(self) -> int:
        """Number of tiles plus one."""
        return len(self.positions)

    @property
    def positions(self) -> list[list[float]]:
        """The centre (x, y) of each view; the whole image is the last one."""
        positions: list[list[float]] = patch_positions(self.grid or (1, 1)).tolist()
        return positions if self.grid else positions[-1:]


@dataclass
class ImageSequence(TrainingSequence):
    """A sequence with its images, and the indices of their tokens in `ids`."""

    images: list[OpenedImage] = field(default_factory=list)
    input_positions: list[int] = field(default_factory=list)
    target_positions: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class FeatureDecoderOptions(DecoderOptions):
    base_resolution: int = setting(224, minimum=1)  # side of a view in pixels
    # Of complete images; None: squashed to `base_resolution`. A training gives its encoder's.
    preprocessing: ImageTransform | None = None


class FeatureDecoder(Decoder):
    """Base of decoders whose images are opened with the record, and encoded by the model."""

    Options: ClassVar[type[DecoderOptions]] = FeatureDecoderOptions
    image_fields: ClassVar[tuple[str, ...]] = ("image", "source_image", "target_image")
    Result = ImageSequence
    options: FeatureDecoderOptions

    def open_images(self, fields: RecordFields, open_image_field: OpenImage) -> JsonObject:
        """The fields, with images opened by `open_image_field(value, name)`."""
        opened = dict(fields)
        for name in self.image_fields:
            if fields.get(name, "") not in NO_IMAGE:
                opened[name] = open_image_field(fields[name], name)
        return opened

    def _add(
        self, sequence: TrainingSequence, part: SegmentPart, ids: list[int], labels: list[int]
    ) -> None:
        """Append a text, or the tokens of an image."""
        assert isinstance(sequence, ImageSequence)
        if isinstance(part, OpenedImage):
            positions = sequence.target_positions if part.is_target else sequence.input_positions
            for position, id in enumerate(ids, len(sequence)):
                if self.vocabulary.is_code_id(id):
                    positions.append(position)
            sequence.images.append(part)
        super()._add(sequence, part, ids, labels)

    def _limit(self, sequence: TrainingSequence, max_length: int | None) -> None:
        """Truncate an over-long sequence; drop it if that cuts an image or ends in one."""
        assert isinstance(sequence, ImageSequence)
        if max_length is None or len(sequence) <= max_length:
            return
        # Tokens of an image cannot be missing: its features have a position each.
        positions = [*sequence.input_positions, *sequence.target_positions]
        image_end = max(positions, default=-2) + 1
        ends_in_image = self.vocabulary.eoi_id in sequence.ids[-2:]
        if image_end >= max_length or ends_in_image:
            sequence.drop_reason = f"its images do not fit into {max_length} tokens"
            return
        super()._limit(sequence, max_length)
