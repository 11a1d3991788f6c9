"""Images of training sequences as pixels: opened with their record, cut into views, collated.

Target images have only the view of the complete image. The frozen vision encoder runs on the
training device, so data workers return pixels (uint8), not features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.data.decoders.features import FeatureDecoder, ImageSequence
from seed_multimodal.data.formats.images import IMAGE_KEYS, record_image, text_member
from seed_multimodal.data.formats.record import FieldValue, FileReader, JsonObject, Record
from seed_multimodal.images.io import open_image
from seed_multimodal.images.transforms import ImageTransform
from seed_multimodal.images.views import AnyResolution

# Marks of tokens that stand for views.
INPUT_IMAGE = 1
TARGET_IMAGE = 2


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


class ImageReader:
    """Opens the images of a record, and cuts those of its sequence into views.

    folder: of listed images; None: that of the record's file.
    """

    def __init__(
        self, decoder: FeatureDecoder, files: FileReader, folder: str | None = None
    ) -> None:
        self.decoder = decoder
        self.files = files
        self.folder = folder
        side = decoder.options.base_resolution
        grids = tuple(getattr(decoder.options, "resolution_grids", ("1x1",)))
        self._resize = decoder.options.preprocessing or ImageTransform(side)
        self._tiles = AnyResolution(side, grids)

    def fields(self, record: Record) -> JsonObject:
        """The fields of a record with opened images.

        For a tar also `image` and `text` from its members. Raises BadRecord, ImageError: a missing
        or damaged image; a caption that is not text.
        """
        fields = dict(record.fields)
        # The original keeps trailing blanks.
        text = text_member(record, self.files, keep_whitespace=True)
        if text is not None:
            fields["text"] = text
        image = record.member(*IMAGE_KEYS, files=self.files)
        if image is not None:
            fields["image"] = image

        def open_field(value: FieldValue, name: str) -> Image.Image:
            stored = record_image(value, record, self.folder)
            return open_image(stored, name=f"{record.location}: {name}").image

        return self.decoder.open_images(fields, open_field)

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
