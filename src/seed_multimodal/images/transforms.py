"""Image transforms of vision encoders: float32 [3, S, S], normalised with the encoder's mean and
deviation, by default CLIP's.

The original code has two ways of resizing with different codes for the same file, so both are
available:

* `get_transform(..., keep_ratio=False)`, the scripts, the demo and the training data: both sides
  squashed, bilinear; with `keep_ratio=True` the shorter side is scaled and the centre cut out.
* `seed_image_processor()`, the tokenizer's preprocessing (also LAVIS's evaluation and LaVIT):
  squash, bicubic.

Pillow resizes in two passes with 8-bit intermediate pixels; since 13.0 the vertical one comes first
for tall images, which changes single pixels by a few grey levels. `resize_passes` uses the order of
13.0, as in the golden fixtures.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.io import ImageSource, open_image, to_rgb
from seed_multimodal.settings import check_settings, check_value, positive, setting

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
TYPES = ("clip", "blip")  # the original "blip" differs from "clip" in its name only
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
PROCESSOR = "preprocessor_config.json"
# Beginnings of the classes of transformers that take one number as the sides of a square.
SQUASHING = ("ViT", "Siglip", "Blip")
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
Channels = tuple[float, float, float]  # a value of each channel
# Above this ratio to the output size (a 1 x 30,000 strip) only the centre crop is resized.
_MAX_OVERSIZE = 16


def plain_rgb(image: Image.Image) -> Image.Image:
    """An opaque RGB image as is; others converted."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    return to_rgb(image)


def to_bytes(image: Image.Image) -> Tensor:
    """RGB image → its pixels, uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)


def normalise(pixels: Tensor, mean: Channels = CLIP_MEAN, std: Channels = CLIP_STD) -> Tensor:
    """uint8 [..., 3, H, W] → float32 on the same device, (value / 255 - mean) / std."""
    return (
        pixels.float()
        .div_(255)
        .sub_(_channels(mean, pixels.device))
        .div_(_channels(std, pixels.device))
    )


@functools.cache
def _channels(values: Channels, device: torch.device) -> Tensor:
    """[3, 1, 1]; cached, because a copy to a GPU synchronizes."""
    # An ordinary tensor, so that later calls with gradients can use it.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)


def resize_passes(
    image: Image.Image, size: tuple[int, int], filter: Image.Resampling
) -> Image.Image:
    """`image.resize(size, filter)` with Pillow 13's order of passes, under every version."""
    width, height = size
    # The vertical pass comes first if it shrinks the image much more than the horizontal one.
    vertical_first = image.height - height > 2 * max(0, image.width - width)
    between = (image.width, height) if vertical_first else (width, image.height)
    return image.resize(between, filter).resize(size, filter)


@dataclass(frozen=True)
class ImageTransform:
    """An image → float32 [3, S, S]; `batch` does several → [B, 3, S, S].

    keep_ratio: scale the shorter side and cut the centre out; False: squash.
    shorter_side: to which it is scaled; None: `image_size`.
    mean, std: of each channel, of values from 0 to 1.
    """

    image_size: int = positive(224)
    keep_ratio: bool = False
    interpolation: str = setting("bilinear", choices=tuple(INTERPOLATIONS))
    shorter_side: int | None = positive(None)
    mean: Channels = CLIP_MEAN
    std: Channels = setting(CLIP_STD, above=0)

    def __post_init__(self) -> None:
        check_settings(self, "image transform")

    def __call__(self, image: Image.Image) -> Tensor:
        return normalise(to_bytes(self.resize(image)), self.mean, self.std)

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [..., 3, H, W] → float32 on the same device."""
        return normalise(pixels, self.mean, self.std)

    def to_image(self, pixels: Tensor) -> Image.Image:
        """Normalised pixels [3, H, W] → RGB image; values outside the 8-bit range are clipped."""
        cpu = torch.device("cpu")
        pixels = pixels.detach().float().cpu()
        values = pixels * _channels(self.std, cpu) + _channels(self.mean, cpu)
        levels = values.mul(255).round().clamp(0, 255).byte()  # [3, H, W]
        return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())

    def uncropped(self, image: Image.Image) -> Image.Image:
        """An image of S x S pixels with a border, so that `resize` gives exactly this image."""
        shorter_side = max(self.shorter_side or self.image_size, self.image_size)
        if not self.keep_ratio:
            return image
        bordered = Image.new("RGB", (shorter_side, shorter_side))
        border = _crop_offset(shorter_side, self.image_size)
        bordered.paste(image, (border, border))
        return bordered

    def describe(self) -> dict[str, object]:
        """Plain values; the last three only where they are not the defaults."""
        values = dataclasses.asdict(self)
        for field in dataclasses.fields(self)[3:]:
            if values[field.name] == field.default:
                del values[field.name]
        return values

    def with_resizing_of(self, other: ImageTransform) -> ImageTransform:
        """Another transform's resizing with this one's mean and deviation."""
        return dataclasses.replace(other, mean=self.mean, std=self.std)

    def scaled_to(self, image_size: int) -> ImageTransform:
        """The same view of an image in S = `image_size` pixels a side."""
        shorter_side = self.shorter_side
        if shorter_side is not None:
            shorter_side = round(shorter_side * image_size / self.image_size)
        return dataclasses.replace(self, image_size=image_size, shorter_side=shorter_side)

    def convert(self, pixels: Tensor, target: ImageTransform) -> Tensor:
        """Normalised pixels [B, 3, S, S] → those of another encoder, also of another size."""
        if (self.mean, self.std) != (target.mean, target.std):
            device = pixels.device
            values = pixels * _channels(self.std, device) + _channels(self.mean, device)
            pixels = (values - _channels(target.mean, device)) / _channels(target.std, device)
        if self.image_size != target.image_size:
            size = (target.image_size, target.image_size)
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True)
        return pixels

    def read(
        self,
        source: ImageSource,
        *,
        name: str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A stored image → uint8 [3, S, S] for `normalise`; nothing is random.

        Raises as `open_image`.
        """
        return to_bytes(self.resize(open_image(source, name=name).image))

    def batch(self, images: Sequence[Image.Image]) -> Tensor:
        """Images of any sizes → [B, 3, S, S]."""
        return torch.stack([self(image) for image in images])

    def resize(self, image: Image.Image) -> Image.Image:
        """What the model sees, as an RGB image of S x S pixels."""
        image = plain_rgb(image)
        size = self.image_size
        filter_ = INTERPOLATIONS[self.interpolation]
        if not self.keep_ratio:
            return resize_passes(image, (size, size), filter_)

        # The shorter side gets `size` pixels; the crop is the centre of the result.
        width, height = image.size
        shorter_side = max(self.shorter_side or size, size)
        longer_side = int(shorter_side * max(width, height) / min(width, height))
        new_width = shorter_side
        new_height = shorter_side
        if width <= height:
            new_height = longer_side
        else:
            new_width = longer_side
        left = _crop_offset(new_width, size)
        top = _crop_offset(new_height, size)
        right = left + size
        bottom = top + size

        # Of a very long image the crop alone is resized, by its box in the source's pixels.
        if longer_side > _MAX_OVERSIZE * size:
            scale_x = width / new_width
            scale_y = height / new_height
            box = (left * scale_x, top * scale_y, right * scale_x, bottom * scale_y)
            return image.resize((size, size), filter_, box=box)
        resized = resize_passes(image, (new_width, new_height), filter_)
        return resized.crop((left, top, right, bottom))


def _crop_offset(length: int, size: int) -> int:
    """Pixels before a centre crop of `size` pixels, rounded as torchvision does."""
    return int(round((length - size) / 2.0))


def get_transform(
    type: str = "clip",
    keep_ratio: bool = True,
    image_size: int = 224,
    interpolation: str = "bilinear",
) -> ImageTransform:
    """The original `get_transform`; `interpolation` is an addition."""
    if type not in TYPES:
        raise ConfigError(f"Unknown image transform {type!r}: use {' or '.join(TYPES)}.")
    return ImageTransform(
        image_size=image_size, keep_ratio=bool(keep_ratio), interpolation=interpolation
    )


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """Keys of every preprocessor's file: what is done in any case has one value."""

    image_mean: Channels = CLIP_MEAN
    image_std: Channels = setting(CLIP_STD, above=0)
    rescale_factor: float = setting(1 / 255, choices=(1 / 255,))
    do_resize: bool = setting(True, choices=(True,))
    do_rescale: bool = setting(True, choices=(True,))
    do_normalize: bool = setting(True, choices=(True,))


@dataclass(frozen=True, kw_only=True)
class Preprocessing(Normalisation):
    """Keys of the file of a vision encoder that reads squares; sizes: also by name."""

    size: int | dict[str, int | None] = positive(224)
    crop_size: int | dict[str, int | None] | None = positive(None)
    do_center_crop: bool = True
    resample: int = setting(3, choices=tuple(RESAMPLE))


Keys = TypeVar("Keys", bound=Normalisation)


def read_keys(kind: type[Keys], values: object, label: str) -> Keys:
    """The keys of a preprocessor's file that matter; null is the default. Raises ConfigError: a
    value of another type, or a step that is not followed."""
    if isinstance(values, dict):
        names = {entry.name for entry in dataclasses.fields(kind)}
        values = {key: values[key] for key in names & values.keys() if values[key] is not None}
    keys: Keys = check_value(kind, values, label)
    return keys


def read_preprocessing(folder: str | Path, advice: str = "") -> ImageTransform:
    """The transform of a `preprocessor_config.json`: squash (BLIP, SigLIP), or scale the shorter
    side and cut the centre out (CLIP, DINOv2). Raises ConfigError: missing, not JSON, or a value
    that is not followed.
    """
    # 1. The keys.
    file = Path(folder) / PROCESSOR
    values = read_json_object(file, ConfigError, advice)
    keys = read_keys(Preprocessing, values, str(file))

    # 2. The size; as one number it has the meaning of the file's class.
    size = keys.size
    if not isinstance(size, dict):
        name = values.get("image_processor_type") or values.get("feature_extractor_type")
        squashes = str(name).startswith(SQUASHING)
        size = {"height": size} if squashes else {"shortest_edge": size}
    shorter_side = size.get("shortest_edge") or size.get("height")
    if shorter_side is None or size.get("width") not in (None, size.get("height")):
        raise ConfigError(f"{file}: size {size} is no square and no shortest_edge.")
    image_size = shorter_side
    if "shortest_edge" in size and keys.do_center_crop:
        crop = keys.crop_size or shorter_side
        image_size = crop.get("height") or shorter_side if isinstance(crop, dict) else crop
    return ImageTransform(
        image_size=image_size,
        keep_ratio="shortest_edge" in size,
        interpolation=RESAMPLE[keys.resample],
        shorter_side=None if image_size == shorter_side else shorter_side,
        mean=keys.image_mean,
        std=keys.image_std,
    )


def seed_image_processor(
    image_size: int = 224,
    keep_ratio: bool = False,
    interpolation: str = "bicubic",
    shorter_side: int | None = None,
) -> ImageTransform:
    """The tokenizer's own preprocessing of a file: by default squash, bicubic."""
    return ImageTransform(image_size, keep_ratio, interpolation, shorter_side)
