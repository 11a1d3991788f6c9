"""Reading of image files and base64 text as 8-bit RGB, with errors that name the source.

* The header is checked before decoding; Pillow's guard against decompression bombs applies.
* Only raster formats are tried: Pillow would run Ghostscript for EPS.
* Animations and multi-page files give their first frame. EXIF rotation is applied.
* Transparency is laid over white. 16-bit grey is scaled to 8 bits (value / 257). Colour profiles
  are not applied.
* With `at_least`, images of more than `MAX_EXACT_PIXELS` pixels are reduced by 2, 4 or 8 while
  decoding; smaller ones are decoded in full.
"""

from __future__ import annotations

import base64
import functools
import io
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from PIL import Image, JpegImagePlugin

from seed_multimodal.errors import ImageError, first_line

FORMATS = tuple("PNG JPEG GIF WEBP BMP DIB TIFF PPM ICO AVIF JPEG2000 PCX TGA".split())
# Returns an image's pixels, uint8 [H, W, 3].
ImageFunction = Callable[[], np.ndarray]
ImageSource: TypeAlias = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | IO[bytes]
    | Image.Image
    | np.ndarray
    | ImageFunction
)
MAX_EXACT_PIXELS = 12_500_000  # 12 megapixels
MIN_OVERSAMPLING = 3  # reduction to three times the final size is visually lossless
# EXIF orientation -> how to turn the image upright; 1 is upright.
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DATA_URL = re.compile(rb"\s*data:[\w.+-]+/[\w.+-]+(?:;[\w=.+-]+)*;base64,", re.ASCII)


@dataclass(frozen=True)
class ImageLimits:
    """Limits checked before decoding."""

    max_pixels: int = 100_000_000  # width × height
    max_bytes: int = 200 << 20  # of the file
    max_side: int = 30_000  # pixels
    formats: tuple[str, ...] = FORMATS

    def check_size(self, size: tuple[int, int], name: str) -> None:
        """Raise ImageError for an image of `size` (width, height) outside the limits."""
        width, height = size
        if not 0 < width * height <= self.max_pixels or max(size) > self.max_side:
            raise ImageError(
                f"{name}: rejected, because its header claims {width}x{height} pixels "
                f"(limit: {self.max_pixels} pixels, {self.max_side} a side)."
            )

    def check_bytes(self, count: int, name: str) -> None:
        """Raise ImageError for an empty or too long file."""
        if count == 0:
            raise ImageError(f"{name}: the file is empty (0 bytes).")
        if count > self.max_bytes:
            raise ImageError(
                f"{name}: rejected, because it has {count} bytes (limit: {self.max_bytes})."
            )


DEFAULT_LIMITS = ImageLimits()


class StoredImage:
    """An image whose header was read.

    size: (width, height) as stored.

    Raises ImageError: missing, empty, not an image, or outside `limits`.
    """

    def __init__(
        self, source: ImageSource, name: str | None = None, limits: ImageLimits = DEFAULT_LIMITS
    ) -> None:
        # 1. The name in error messages.
        if callable(source):
            source = source()
        file_name = Path(source).name if isinstance(source, str | os.PathLike) else ""
        self.name = name or file_name or "image"
        self.limits = limits

        # 2. Pixels, or a file of which only the header is decoded.
        if isinstance(source, np.ndarray):
            image = Image.fromarray(source)
        elif isinstance(source, Image.Image):
            image = source
        else:
            data = _read_bytes(source, self.name, limits)
            try:
                image = Image.open(io.BytesIO(data), formats=_readable_formats(limits.formats))
            except Exception as error:
                raise ImageError(
                    f"{self.name}: not an image in a known format ({', '.join(limits.formats)}), "
                    "or its header is damaged or claims too many pixels."
                ) from error
        limits.check_size(image.size, self.name)
        self.image = image
        self.size = image.size
        self.is_jpeg = isinstance(image, JpegImagePlugin.JpegImageFile)

    def orientation(self) -> int:
        """EXIF orientation, 1 for upright or damaged metadata."""
        try:
            return int(self.image.getexif().get(0x0112) or 1)
        except Exception:  # noqa: BLE001
            return 1

    def decode(self, factor: int = 1) -> Image.Image:
        """The image as RGB, upright, without metadata.

        factor: 1, 2, 4 or 8, by which both sides are divided (rounded up).

        Raises ImageError: damaged contents.
        """
        try:
            if factor > 1 and self.is_jpeg:
                # The JPEG decoder itself reduces, if it can (then the image's size changes).
                width, height = self.size
                self.image.draft(None, (width // factor, height // factor))
                if self.image.size != self.size:
                    factor = 1
            self.image.load()
            plain = to_rgb(self.image) if factor == 1 else _reduced(self.image, factor)
        except Exception as error:
            raise ImageError(
                f"{self.name}: the image is truncated or damaged ({first_line(error)})."
            ) from error
        # An icon may be larger than in its header.
        self.limits.check_size(plain.size, self.name)
        # The orientation is read after decoding, because Pillow rotates TIFFs itself.
        turn = _ORIENTATIONS.get(self.orientation())
        return plain if turn is None else plain.transpose(turn)


def open_image(
    source: ImageSource,
    *,
    name: str | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
    at_least: int | None = None,
) -> Image.Image:
    """Read one image as RGB, 8 bits a channel, upright, without metadata.

    Args:
        source: a path, the bytes of a file, an open file, a PIL image, an array uint8 [H, W] or
            [H, W, C], or a function that returns one.
        name: for error messages; default: the file's name, or "image".
        at_least: a large image may be reduced to no fewer than this many pixels a side; None:
            never.

    Raises:
        ImageError: missing, empty, not an image, damaged, or outside `limits`.
    """
    stored = StoredImage(source, name, limits)
    width, height = stored.size
    factor = 1
    if at_least is not None and width * height > MAX_EXACT_PIXELS:
        factor = reduction_factor(stored.size, at_least)
    return stored.decode(factor)


def image_size(
    source: ImageSource, *, name: str | None = None, limits: ImageLimits = DEFAULT_LIMITS
) -> tuple[int, int]:
    """(width, height) from the header, without decoding.

    Raises as `open_image`, except for damaged contents.
    """
    return StoredImage(source, name, limits).size


def reduction_factor(size: tuple[int, int], min_side: int) -> int:
    """Reduction factor (1, 2, 4 or 8) with which the shorter side keeps `min_side` pixels."""
    for factor in (8, 4, 2):
        if min(size) // factor >= min_side:
            return factor
    return 1


def is_open_file(value: object) -> bool:
    """Whether `value` is an open file (or something like it)."""
    return hasattr(value, "read") and hasattr(value, "seekable")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode → a new RGB image without metadata.

    Raises `ValueError` for a mode that Pillow cannot convert.
    """
    # 1. Eight bits a channel.
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip
        levels = np.asarray(image).clip(0, 65535) / 257
        image = Image.fromarray(np.rint(levels).astype(np.uint8))
    elif image.mode == "F":  # 0…1, or 0…255
        levels = np.asarray(image)
        if levels.max() <= 1:
            levels = levels * 255
        image = Image.fromarray(np.rint(levels.clip(0, 255)).astype(np.uint8))

    # 2. Transparency over white.
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, layer)
    plain = image.convert("RGB")
    plain.info = {}
    return plain


def _reduced(image: Image.Image, factor: int) -> Image.Image:
    """As RGB, both sides divided by `factor`.

    It is made of strips, so that memory holds no second copy of a large image.
    """
    # The range of mode F (0…1 or 0…255) is known from all pixels only: one strip.
    strip_height = image.height if image.mode == "F" else 64 * factor
    reduced_width = math.ceil(image.width / factor)
    reduced_height = math.ceil(image.height / factor)
    plain = Image.new("RGB", (reduced_width, reduced_height))
    for top in range(0, image.height, strip_height):
        bottom = min(top + strip_height, image.height)
        strip = image.crop((0, top, image.width, bottom))
        plain.paste(to_rgb(strip).reduce(factor), (0, top // factor))
    return plain


def _read_bytes(
    source: str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes],
    name: str,
    limits: ImageLimits,
) -> bytes:
    """The bytes of an image file, from a path, memory or an open file."""
    try:
        if isinstance(source, str | os.PathLike):
            path = Path(source)
            if re.match(r"\w{2,}:/", str(path)):  # more letters than a drive of Windows
                raise ImageError(f"{source}: is a URL; download it and pass the file.")
            if not path.is_file():
                problem = "is a folder" if path.is_dir() else "no such file"
                full_path = "" if name.endswith(str(path)) else f" ({path})"
                raise ImageError(f"{name}: {problem}{full_path}.")
            limits.check_bytes(path.stat().st_size, name)
            return path.read_bytes()
        data: Any = source
        if is_open_file(source):
            # From the start: conversations read their images again at each turn.
            data.seek(0)
            data = data.read(limits.max_bytes + 1)
    except (OSError, ValueError) as error:  # no permission; a path with a null byte; a closed file
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{name}: cannot be read ({reason}).") from error
    limits.check_bytes(len(data), name)
    return bytes(data)


@functools.cache
def _readable_formats(formats: tuple[str, ...]) -> tuple[str, ...]:
    """The formats that this build of Pillow can read."""
    Image.init()
    return tuple(name for name in formats if name in Image.OPEN)


def image_to_bytes(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file; `options` as of Pillow's `save`."""
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def image_to_base64(image: Image.Image, format: str = "PNG") -> str:
    """An image file as base64 text."""
    return base64.b64encode(image_to_bytes(image, format)).decode("ascii")


def image_from_base64(
    text: str | bytes, name: str = "image", limits: ImageLimits = DEFAULT_LIMITS
) -> Image.Image:
    """Read an image from base64 text; raises `ImageError` as `bytes_from_base64` and
    `open_image`."""
    return open_image(bytes_from_base64(text, name, limits), name=name, limits=limits)


def bytes_from_base64(
    text: str | bytes, name: str = "image", limits: ImageLimits = DEFAULT_LIMITS
) -> bytes:
    """An image file from base64 text (a `data:image/…;base64,` prefix and line breaks are allowed).

    Raises ImageError: other text, or a longer one than the limit.
    """
    try:
        body = text.encode("ascii") if isinstance(text, str) else text
        prefix = _DATA_URL.match(body)
        if prefix is not None:
            body = body[prefix.end() :]
        body = body.translate(None, b" \t\r\n\f\v")
        # Four characters are three bytes; the limit is checked before decoding.
        limits.check_bytes(len(body) * 3 // 4, name)
        return base64.b64decode(body, validate=True)
    except ValueError as error:
        raise ImageError(f"{name}: not base64 text.") from error


def fit_longer_side(image: Image.Image, length: int = 512) -> Image.Image:
    """Resize so that the longer side has `length` pixels; the other one is rounded down."""
    longer_side = max(image.size)
    width = max(1, image.width * length // longer_side)
    height = max(1, image.height * length // longer_side)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def crop_to_aspect(image: Image.Image, max_aspect: float = 1.3) -> Image.Image:
    """Cut the longer side, centred, so that it is at most `max_aspect` times the shorter one."""
    width, height = image.size
    new_width = min(width, int(height * max_aspect))
    new_height = min(height, int(width * max_aspect))
    left = (width - new_width) // 2
    top = (height - new_height) // 2
    return image.crop((left, top, left + new_width, top + new_height))


def chat_image(image: Image.Image) -> Image.Image:
    """A user's image as the original chat demo stores it.

    RGB, longer side 512, at most 1.3 times as long as wide.
    """
    return crop_to_aspect(fit_longer_side(image.convert("RGB"), 512), 1.3)


def request_image(image: Image.Image, size: int = 256) -> Image.Image:
    """A stored image as the original chat demo sends it: squashed to `size` x `size`."""
    return image.resize((size, size), Image.Resampling.BICUBIC)
