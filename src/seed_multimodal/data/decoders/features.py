"""Decoders whose images are opened with the record, and encoded by the model during training.

The images of a sequence are cut into views, which a batch collates as pixels (uint8): the frozen
vision encoder runs on the training device. Target images have only the view of the complete image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.data.decoders.base import (
    Decoder,
    DecoderOptions,
    OptionValues,
    SegmentPart,
    TrainingSequence,
)
from seed_multimodal.data.formats.conversations import NO_IMAGE
from seed_multimodal.data.formats.images import IMAGE_KEYS, record_image, text_member
from seed_multimodal.data.formats.record import FieldValue, JsonObject, Record, RecordFields
from seed_multimodal.images.io import open_image
from seed_multimodal.images.transforms import ImageTransform
from seed_multimodal.images.views import AnyResolution, Grid, patch_positions
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.settings import positive

OpenImage = Callable[[Any, str], Image.Image]  # value and name of a field → opened image
# Marks of tokens that stand for views.
INPUT_IMAGE = 1
TARGET_IMAGE = 2


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


class View(NamedTuple):
    """What is known of a view without its pixels."""

    position: list[float]  # its centre (x, y) in its image
    is_target: bool  # else an input
    seed: int  # of its image
    n_tokens: int


@dataclass
class SequenceViews:
    """The n views of a sequence's images, in token order."""

    pixels: Tensor  # uint8 [n, 3, S, S]
    views: list[View]
    marks: np.ndarray  # INPUT_IMAGE or TARGET_IMAGE at the tokens of views, else 0: int8 [tokens]


@dataclass
class BatchViews:
    """The V views of a batch `[B, L]`, row by row and in token order."""

    pixels: Tensor  # uint8 [V, 3, S, S]
    positions: Tensor  # centre (x, y) of each view in its image [V, 2]
    is_target: Tensor  # bool [V]
    marks: Tensor  # int8 [B, L]
    seeds: list[int]  # of each view's image
    tokens_per_view: list[int]  # of each view


@dataclass(frozen=True)
class FeatureDecoderOptions(DecoderOptions):
    base_resolution: int = positive(224)  # side of a view in pixels
    # Of complete images; None: squashed to `base_resolution`. A training gives its encoder's.
    preprocessing: ImageTransform | None = None


class FeatureDecoder(Decoder):
    """Base of decoders whose images are opened with the record, and encoded by the model."""

    Options: ClassVar[type[DecoderOptions]] = FeatureDecoderOptions
    image_fields: tuple[str, ...] = ("image", "source_image", "target_image")
    Result = ImageSequence
    options: FeatureDecoderOptions

    def __init__(self, tokenizer: TextTokenizer, options: OptionValues) -> None:
        super().__init__(tokenizer, options)
        side = self.options.base_resolution
        grids = tuple(getattr(self.options, "resolution_grids", ("1x1",)))
        self._resize = self.options.preprocessing or ImageTransform(side)
        self._tiles = AnyResolution(side, grids)

    def read_fields(self, record: Record, folder: str | None) -> JsonObject:
        """The fields of a record with opened images.

        folder: of listed images; None: that of the record's file.

        For a tar also `image` and `text` from its members. Raises BadRecord, ImageError: a missing
        or damaged image; a caption that is not text.
        """
        fields = dict(record.fields)
        # The original keeps trailing blanks.
        text = text_member(record, keep_whitespace=True)
        if text is not None:
            fields["text"] = text
        image = record.member(*IMAGE_KEYS)
        if image is not None:
            fields["image"] = image

        def open_field(value: FieldValue, name: str) -> Image.Image:
            stored = record_image(value, record, folder)
            return open_image(stored, name=f"{record.location}: {name}").image

        return self.open_images(fields, open_field)

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

    def cut(self, sequence: ImageSequence) -> SequenceViews | None:
        """The views of a sequence, or None."""
        if not sequence.images:
            return None
        n_views = sum(1 if image.is_target else image.views for image in sequence.images)
        n_tokens = len(sequence.input_positions) + len(sequence.target_positions)
        pixels = []
        views = []
        for image in sequence.images:
            # [views, 3, S, S]; the last view is the complete image, the only one of a target.
            if image.grid is None:
                image_pixels = self._resize.read(image.image)[None]
            else:
                image_pixels = self._tiles.cut(image.image)
            used = slice(-1, None) if image.is_target else slice(None)
            pixels.append(image_pixels[used])
            for position in image.positions[used]:
                views.append(View(position, image.is_target, image.seed, n_tokens // n_views))

        marks = np.zeros(len(sequence), np.int8)
        marks[sequence.input_positions] = INPUT_IMAGE
        marks[sequence.target_positions] = TARGET_IMAGE
        return SequenceViews(torch.cat(pixels), views, marks)
