"""Opening pictures from outside: every file becomes a plain 8-bit RGB image, or is refused in one sentence.

The choices, all in one place:

* The header is checked before anything is decoded (pixels, and the memory that decoding takes: `images.memory`), so a
  decompression bomb costs nothing. Pillow's own guard (twice `PIL.Image.MAX_IMAGE_PIXELS`) still applies, whatever
  limits are given.
* Only raster formats are tried: Pillow would run Ghostscript for EPS.
* Animations and multi-page files give their first frame. EXIF rotation is applied. Colours: `images.rgb`.
* A caller that needs no more than N pixels a side says so (`at_least`): a picture of more than `exact_up_to` pixels is
  then halved, quartered or divided by eight while it is decoded, JPEGs by their decoder, the others strip by strip.
  Smaller pictures are read as ever, pixel for pixel. How little it changes: `tests/unit/images/test_rgb.py`.
  A training view needs a crop only, so it chooses the factor itself (`divisor`).
"""

from __future__ import annotations

import functools
import io
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import IcoImagePlugin, Image, JpegImagePlugin

from seed_multimodal.errors import ImageError, first_line
from seed_multimodal.images.memory import decoding_bytes, reduction, scans
from seed_multimodal.images.rgb import to_rgb as to_rgb  # part of this module's interface

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000", "PCX", "TGA")
_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED = [_ORIENTATIONS[number] for number in (5, 6, 7, 8)]  # width and height change places
# What Pillow's decoders raise on damaged bytes; anything else is a programming error and is not caught.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError,
                  AttributeError, RuntimeError, MemoryError, struct.error, zlib.error)
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
Drawing = Callable[[], np.ndarray]  # makes a picture's pixels, uint8 [H, W, 3], when it is opened
ImageSource = (str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | np.ndarray
               | Drawing)
Divisor = Callable[[tuple[int, int]], int]
EXACT_UP_TO = 12_500_000  # what phones and cameras call 12 megapixels
# A picture reduced to three times what is then resized cannot be told from one resized directly.
DETAIL = 3
JPEG_BYTES = 8  # that decoding a pixel of a baseline JPEG takes
MOST_SCANS = 200  # of a progressive JPEG; programs write about ten, and each costs as much time as a whole picture


@dataclass(frozen=True)
class ImageLimits:
    """Limits checked before decoding: pixels (width × height), bytes of the file, length of one side in pixels, and
    bytes of memory that decoding takes."""

    max_pixels: int = 100_000_000
    max_bytes: int = 200 << 20
    max_side: int = 30_000
    max_memory: int = 512 << 20

    def check_size(self, size: tuple[int, int], name: str) -> None:
        """Raise ImageError for a picture of `size` (width, height) outside the limits."""
        width, height = size
        if width < 1 or height < 1:
            raise ImageError(f"{name}: the picture has no pixels ({width}x{height}).")
        if width * height > self.max_pixels or max(width, height) > self.max_side:
            raise ImageError(f"{name}: refused unread, because its header claims {width}x{height} pixels "
                             f"(limit: {self.max_pixels} pixels, {self.max_side} a side).")

    def check_memory(self, count: int, name: str, pixels: int) -> None:
        """Raise ImageError for a picture of so many pixels whose decoding takes too much memory."""
        if count > self.max_memory:
            raise ImageError(f"{name}: refused unread, because decoding it takes about {count / 1e6:,.0f} MB of memory "
                             f"(limit: {self.max_memory / 1e6:,.0f} MB); make it smaller"
                             f"{', or store it as a baseline JPEG' if JPEG_BYTES * pixels <= self.max_memory else ''}.")

    def check_bytes(self, count: int, name: str) -> None:
        """Raise ImageError for an empty or too long file."""
        if count == 0:
            raise ImageError(f"{name}: the file is empty (0 bytes).")
        if count > self.max_bytes:
            raise ImageError(f"{name}: refused unread, because it has {count} bytes (limit: {self.max_bytes}).")


DEFAULT_LIMITS = ImageLimits()


@dataclass(frozen=True)
class Header:
    """What a picture's header says: its size (width, height), and the bytes of memory that decoding takes."""

    size: tuple[int, int]
    memory: int


def open_image(
    source: ImageSource, *, name: str | None = None, limits: ImageLimits = DEFAULT_LIMITS, at_least: int | None = None,
    exact_up_to: int = EXACT_UP_TO, divisor: Divisor | None = None,
) -> Image.Image:
    """Read one picture.

    Args:
        source: a path, the bytes of a file, an open file (read from its beginning), a PIL image (which gets the same
            conversions), an array uint8 [H, W], [H, W, 3] or [H, W, 4], or a function that gives one.
        name: for error sentences; default: the file's name, or "image".
        at_least: the picture may be reduced while it is decoded to no fewer than this many pixels a side; None: never.
        exact_up_to: pictures of up to this many pixels (width × height) are not reduced.
        divisor: in place of these two, for JPEGs: called once with the upright size (width, height), before anything is
            decoded; what it answers (8, 4, 2 or 1) divides both sides, rounded up.

    Returns:
        An RGB image, 8 bits a channel, upright, without metadata.

    Raises:
        ImageError: missing, a folder, empty, not a picture, damaged, or outside `limits`.
    """
    image, shown = _open(source, name, limits)
    try:
        if divisor is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
            limits.check_size(image.size, shown)
            factor = divisor(_upright_size(image))
        else:
            factor = reduction(image.size, at_least, exact_up_to)
        _header(image, factor, shown, limits)
        plain = _decode(image, shown, limits, factor)
        turned = _orientation(image)
    finally:
        if image is not source:
            image.close()  # frees its pixels before a turned copy is made
    return plain if turned is None else plain.transpose(turned)


def image_header(
    source: ImageSource, *, name: str | None = None, limits: ImageLimits = DEFAULT_LIMITS, at_least: int | None = None,
    exact_up_to: int = EXACT_UP_TO,
) -> Header:
    """What `open_image` would read, and need for it; nothing is decoded.

    Raises:
        ImageError: as `open_image`, but for damaged contents.
    """
    image, shown = _open(source, name, limits)
    try:
        return _header(image, reduction(image.size, at_least, exact_up_to), shown, limits)
    finally:
        if image is not source:
            image.close()


def _open(source: ImageSource, name: str | None, limits: ImageLimits) -> tuple[Image.Image, str]:
    """The picture, not yet decoded, and its name."""
    if callable(source):
        source = source()
    if isinstance(source, Image.Image):
        return source, name or "image"
    if isinstance(source, np.ndarray):
        return _from_array(source, name or "image"), name or "image"
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        shown = name or path.name or str(path)
        data = _read(path, shown, limits)
    else:
        shown = name or "image"
        data = _bytes(source, shown, limits)
        limits.check_bytes(len(data), shown)
    try:
        return Image.open(io.BytesIO(data), formats=_formats()), shown
    except _BOMBS as error:
        raise ImageError(f"{shown}: refused unread, because its header claims too many pixels ({error}).") from error
    except _DECODE_ERRORS as error:
        raise ImageError(f"{shown}: not a picture in a known format, or its header is damaged.") from error


def _from_array(pixels: np.ndarray, name: str) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (1,), (3,), (4,)):
        raise ImageError(f"{name}: an array of {pixels.dtype} {list(pixels.shape)} is no picture; give uint8 values, "
                         f"[height, width], [height, width, 3] or [height, width, 4].")
    if not pixels.size:
        raise ImageError(f"{name}: the picture has no pixels ({list(pixels.shape)}).")
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels))


def _bytes(source: Any, name: str, limits: ImageLimits) -> bytes:
    """The bytes of a picture's file, from memory or an open file."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if not is_file(source):
        raise ImageError(f"{name}: a value of type {type(source).__name__} is no picture; give a file, its bytes, a "
                         f"PIL image or an array.")
    try:
        if source.seekable():
            source.seek(0)  # a conversation reads its pictures anew at each turn
        data = source.read(limits.max_bytes + 1)
    except (OSError, ValueError) as error:  # closed, or not open for reading
        raise ImageError(f"{name}: cannot be read ({first_line(error)}).") from error
    if not isinstance(data, bytes):
        raise ImageError(f"{name}: the file is open as text; open it in binary mode ('rb').")
    return data


def is_file(value: object) -> bool:
    """Whether `value` is an open file (or something like it)."""
    return hasattr(value, "read") and hasattr(value, "seekable")


def _header(image: Image.Image, factor: int, name: str, limits: ImageLimits) -> Header:
    limits.check_size(image.size, name)
    frame = _inner_frame(image, name)
    limits.check_size(frame.size, name)
    try:
        memory = max(decoding_bytes(frame, factor), decoding_bytes(image, factor))
    except _DECODE_ERRORS as error:  # tags of a TIFF
        raise ImageError(f"{name}: not a picture in a known format, or its header is damaged.") from error
    limits.check_memory(memory, name, frame.width * frame.height)
    if isinstance(image, JpegImagePlugin.JpegImageFile) and scans(image, MOST_SCANS) > MOST_SCANS:
        raise ImageError(f"{name}: refused unread, because it is a JPEG of more than {MOST_SCANS} scans.")
    return Header(frame.size, memory)


def _inner_frame(image: Image.Image, name: str) -> Image.Image:
    """The picture inside an icon, which may be larger than the icon's header says; other pictures as they are."""
    if not isinstance(image, IcoImagePlugin.IcoImageFile):
        return image
    try:
        return image.ico.frame(image.ico.getentryindex(image.size))
    except _BOMBS as error:
        raise ImageError(f"{name}: refused, because a part of it claims too many pixels ({error}).") from error
    except _DECODE_ERRORS as error:
        raise ImageError(f"{name}: the picture is truncated or damaged ({first_line(error)}).") from error


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


def _decode(image: Image.Image, name: str, limits: ImageLimits, factor: int) -> Image.Image:
    if factor > 1 and isinstance(image, JpegImagePlugin.JpegImageFile):
        whole = image.size
        image.draft(None, (whole[0] // factor, whole[1] // factor))
        factor = factor if image.size == whole else 1
    try:
        image.load()
    except _BOMBS as error:
        raise ImageError(f"{name}: refused, because a part of it claims too many pixels ({error}).") from error
    except _DECODE_ERRORS as error:
        raise ImageError(f"{name}: the picture is truncated or damaged ({first_line(error)}).") from error
    limits.check_size(image.size, name)
    try:
        return to_rgb(image, factor)
    except ValueError as error:  # Pillow has no conversion from this mode
        raise ImageError(f"{name}: pictures of mode {image.mode} cannot be turned into RGB ({error}).") from error


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if _orientation(image) in _TURNED else (width, height)


def _orientation(image: Image.Image) -> Image.Transpose | None:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except _DECODE_ERRORS:  # damaged metadata must not make the picture unreadable
        return None
    return _ORIENTATIONS.get(orientation) if isinstance(orientation, int) else None
