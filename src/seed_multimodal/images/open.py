"""Opening pictures from outside: every file becomes a plain 8-bit RGB image, or is refused in one sentence.

The choices, all in one place:

* The header is checked before anything is decoded, so a decompression bomb costs nothing. Pillow's own guard
  (twice `PIL.Image.MAX_IMAGE_PIXELS`) still applies, whatever limits are given.
* Only raster formats are tried: Pillow would run Ghostscript for EPS.
* Animations and multi-page files give their first frame. EXIF rotation is applied. Transparency is laid over white.
* 16-bit grey is scaled to 8 bits (value / 257). 32-bit integers above 16 bits and floats outside [0, 1] have no
  natural white, so their own range is stretched.
* CMYK and the other colour spaces go through Pillow's plain conversion; embedded colour profiles are not applied,
  as in the released preprocessing.
"""

from __future__ import annotations

import functools
import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from seed_multimodal.errors import ImageError

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000", "PCX", "TGA")
_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's decoders raise on damaged bytes; anything else is a programming error and is not caught.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError,
                  AttributeError, RuntimeError, MemoryError, struct.error, zlib.error)
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
ImageSource = str | Path | bytes | bytearray | memoryview | Image.Image


@dataclass(frozen=True)
class ImageLimits:
    """Limits checked before decoding: pixels (width × height), bytes of the file, and length of one side in pixels."""

    max_pixels: int = 100_000_000
    max_bytes: int = 200 << 20
    max_side: int = 30_000

    def check_size(self, size: tuple[int, int], name: str) -> None:
        """Raise ImageError for a picture of `size` (width, height) outside the limits."""
        width, height = size
        if width < 1 or height < 1:
            raise ImageError(f"{name}: the picture has no pixels ({width}x{height}).")
        if width * height > self.max_pixels or max(width, height) > self.max_side:
            raise ImageError(f"{name}: refused unread, because its header claims {width}x{height} pixels "
                             f"(limit: {self.max_pixels} pixels, {self.max_side} a side).")

    def check_bytes(self, count: int, name: str) -> None:
        """Raise ImageError for an empty or too long file."""
        if count == 0:
            raise ImageError(f"{name}: the file is empty (0 bytes).")
        if count > self.max_bytes:
            raise ImageError(f"{name}: refused unread, because it has {count} bytes (limit: {self.max_bytes}).")


DEFAULT_LIMITS = ImageLimits()


def open_image(source: ImageSource, *, name: str | None = None, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Read one picture.

    Args:
        source: a path, the bytes of a file, or a PIL image (which gets the same conversions).
        name: for error sentences; default: the file's name, or "image".

    Returns:
        An RGB image, 8 bits a channel, upright, without metadata.

    Raises:
        ImageError: missing, a folder, empty, not a picture, damaged, or outside `limits`.
    """
    if isinstance(source, Image.Image):
        shown = name or "image"
        limits.check_size(source.size, shown)
        return _decode(source, shown, limits)
    if isinstance(source, (bytes, bytearray, memoryview)):
        shown, data = name or "image", bytes(source)
        limits.check_bytes(len(data), shown)
    else:
        path = Path(source)
        shown = name or path.name or str(path)
        data = _read(path, shown, limits)
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except _BOMBS as error:
        raise ImageError(f"{shown}: refused unread, because its header claims too many pixels ({error}).") from error
    except _DECODE_ERRORS as error:
        raise ImageError(f"{shown}: not a picture in a known format, or its header is damaged.") from error
    with image:
        limits.check_size(image.size, shown)
        return _decode(image, shown, limits)


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats this build of Pillow can read, of those we try."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _read(path: Path, name: str, limits: ImageLimits) -> bytes:
    try:
        if path.is_dir():
            raise ImageError(f"{name}: this is a folder, not a picture.")
        if not path.exists():
            where = "" if name.endswith(str(path)) else f" ({path})"
            raise ImageError(f"{name}: there is no such file{where}.")
        if not path.is_file():
            raise ImageError(f"{name}: this is not an ordinary file.")
        limits.check_bytes(path.stat().st_size, name)
        return path.read_bytes()
    except (OSError, ValueError) as error:  # no permission; a path with a null byte
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ImageError(f"{name}: cannot be read ({reason}).") from error


def _decode(image: Image.Image, name: str, limits: ImageLimits) -> Image.Image:
    try:
        image.load()
    except _BOMBS as error:
        raise ImageError(f"{name}: refused, because a part of it claims too many pixels ({error}).") from error
    except _DECODE_ERRORS as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ImageError(f"{name}: the picture is truncated or damaged ({reason}).") from error
    limits.check_size(image.size, name)  # some formats (ICO) hold a frame larger than in their header
    try:
        return to_rgb(_apply_orientation(image))
    except ValueError as error:  # Pillow has no conversion from this mode
        raise ImageError(f"{name}: pictures of mode {image.mode} cannot be turned into RGB ({error}).") from error


def _apply_orientation(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except _DECODE_ERRORS:  # damaged metadata must not make the picture unreadable
        return image
    method = _ORIENTATIONS.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode -> a new RGB image without metadata; transparent pixels are laid over white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_8_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layered = image.convert("RGBA")
        canvas = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        image = Image.alpha_composite(canvas, layered)
    plain = image.convert("RGB")
    if plain is image:
        plain = image.copy()
    plain.info = {}
    return plain


def _to_8_bit(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F" and 0 <= low and high <= 1:
        values = values * 255
    elif image.mode != "F" and 0 <= low and high <= 65535:
        values = values / 257
    else:
        values = (values - low) * (255 / max(high - low, 1e-12))
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
