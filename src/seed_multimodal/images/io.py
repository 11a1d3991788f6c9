"""The reader of images: what a caller, command line, request or page gives → 8-bit RGB.

* The header is checked before decoding; Pillow's guard against decompression bombs applies.
* Only raster formats are tried: Pillow would run Ghostscript for EPS.
* Animations and multi-page files give their first frame. EXIF rotation is applied.
* Transparency is laid over white. Other depths are scaled to 8 bits (`to_8_bits`). Colour profiles
  are not applied.
* With `at_least`, images of more than `MAX_EXACT_PIXELS` pixels are reduced by 2, 4 or 8 while
  decoding; smaller ones are decoded in full.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import importlib
import io
import os
import re
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, TypeAlias, TypeGuard
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin

from seed_multimodal.disk import atomic_open, read_patiently, writing
from seed_multimodal.errors import ImageError, SeedError, first_line, name_bytes, short_name

# HEIF is read where the plug-in pillow-heif is installed.
FORMATS = tuple("PNG JPEG GIF WEBP BMP DIB TIFF PPM ICO AVIF JPEG2000 PCX TGA HEIF".split())


class Array(Protocol):
    """NumPy's arrays, torch's tensors and others that NumPy reads."""

    def __array__(self) -> Any: ...


# Returns an image's pixels, in one of the other forms.
ImageFunction = Callable[[], Any]
ImageSource: TypeAlias = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | IO[bytes]
    | Image.Image
    | Array
    | ImageFunction
)
MAX_EXACT_PIXELS = 12_500_000  # 12 megapixels
MIN_OVERSAMPLING = 3  # reduction to three times the final size is visually lossless
PIECE = 1 << 20  # bytes read at a time
MAX_PATH = 4096  # a longer string is no path
MAX_CODES = 256  # of an image at most, where its type alone does not tell codes from pixels
# How image files begin.
_IMAGE_START = re.compile(
    rb"\x89PNG|\xff\xd8\xff|GIF8|BM|II\*\0|MM\0\*|RIFF....WEBP|....ftyp|\0\0\0\x0cJXL |\xff\x0a",
    re.DOTALL,
)
_DATA_URL = re.compile(r"\A\s*+data:", re.IGNORECASE)
_URL = re.compile(r"\A\s*+\w{2,}+:/")  # more letters than a drive of Windows
_FILE_URL = re.compile(r"\A\s*+file:(//(localhost)?)?(?=/)", re.IGNORECASE)
# What unseekable files held: conversations read their images again at each turn.
_read_before: weakref.WeakKeyDictionary[Any, bytes] = weakref.WeakKeyDictionary()
# Of images and open files that are being read, by their ids.
_locks: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_locks_lock = threading.Lock()


@dataclass(frozen=True)
class ImageLimits:
    """Limits checked before decoding."""

    max_pixels: int = 100_000_000  # width × height
    max_bytes: int = 200 << 20  # of the file
    max_side: int = 30_000  # pixels

    def check_size(self, size: tuple[int, int], name: object) -> None:
        """Raise ImageError for an image of another `size` (width, height)."""
        width, height = size
        if not 0 < width * height <= self.max_pixels or max(size) > self.max_side:
            raise ImageError(
                f"{name}: rejected, because it has {width}x{height} pixels (limit: "
                f"{self.max_pixels} pixels, {self.max_side} a side)."
            )

    def check_bytes(self, count: int, name: object) -> None:
        """Raise ImageError for a file of so many bytes."""
        if count == 0:
            raise ImageError(f"{name}: is empty (0 bytes).")
        if count > self.max_bytes:
            raise ImageError(f"{name}: rejected, because it has over {self.max_bytes} bytes.")


DEFAULT_LIMITS = ImageLimits()


class Opened(NamedTuple):
    """An image as it was opened.

    image: RGB, 8 bits a channel, upright, without metadata; a large one may be reduced.
    size: (width, height) of the stored image, upright.
    """

    image: Image.Image
    size: tuple[int, int]


class StoredImage:
    """An image whose header was read.

    size: (width, height) as stored.

    Raises ImageError: missing, empty, not an image, or outside `limits`.
    """

    def __init__(
        self, source: ImageSource, name: str | None = None, limits: ImageLimits = DEFAULT_LIMITS
    ) -> None:
        self._name = name
        self._source = source
        self.limits = limits
        try:
            if callable(source):
                source = source()
            # Threads use a caller's image or open file one after the other.
            is_shared = isinstance(source, Image.Image) or hasattr(source, "read")
            with _locks_lock:
                key = id(source if is_shared else self)
                self._lock = _locks.setdefault(key, threading.RLock())
            with self._lock:
                self.image = self._read(source)
            self.size = self.image.size
        except SeedError:
            raise
        except Exception as error:  # of the caller's file, array or function
            raise ImageError(f"{self}: cannot be read ({first_line(error)}).") from error
        limits.check_size(self.size, self)
        # A caller's own image is not changed, as the decoder's reduction would.
        self._is_own = self.image is not source
        self.is_jpeg = self._is_own and isinstance(self.image, JpegImagePlugin.JpegImageFile)

    def __str__(self) -> str:
        """In error messages: as the caller says, or the name of a path or open file."""
        if self._name:
            return self._name
        path = getattr(self._source, "name", self._source)
        if isinstance(path, str | os.PathLike) and not _DATA_URL.match(str(path)):
            return short_name(Path(path).name or "image")
        return "image"

    def _read(self, source: Any) -> Image.Image:
        """The image of which only the header is decoded, if it is a file."""
        # 1. Pixels.
        if isinstance(source, Image.Image):
            return source
        if hasattr(source, "__array__"):
            return _array_image(source, str(self))

        # 2. The bytes of a file.
        if isinstance(source, str):
            source = read_string(source, str(self), self.limits)
        if isinstance(source, os.PathLike):
            path = Path(source)
            try:
                data = read_patiently(path, functools.partial(_read_all, path, self.limits))
            except OSError as error:
                reason = str(error.strerror).lower()
                if path.is_dir():
                    reason += "; name its files, such as FOLDER/*"
                full_path = "" if str(self) == str(path) else f" ({short_name(str(path), 200)})"
                raise ImageError(f"{self}: {reason}{full_path}.") from error
        elif hasattr(source, "read"):
            data = _stream_bytes(source, str(self), self.limits)
        elif isinstance(source, bytes | bytearray | memoryview):
            data = bytes(source)
        else:
            raise ImageError(f"{self}: {type(source).__name__} is no image.")
        self.limits.check_bytes(len(data), self)

        # 3. Its header.
        _register_plugins()
        formats = [format for format in FORMATS if format in Image.OPEN]
        try:
            return Image.open(io.BytesIO(data), formats=formats)
        except Image.DecompressionBombError as error:
            raise ImageError(f"{self}: rejected, because it has too many pixels.") from error
        except Exception as error:
            # What the file is instead, by its first bytes.
            reason = name_bytes(data[:2000])
            if not reason and _IMAGE_START.match(data):
                reason = "an image whose header is damaged"
            reason = reason or f"no image in a known format ({', '.join(formats)})"
            raise ImageError(f"{self}: is {reason}.") from error

    def orientation(self) -> int:
        """EXIF orientation, 1 for upright or damaged metadata."""
        try:
            with self._lock:
                return int(self.image.getexif().get(ExifTags.Base.Orientation) or 1)
        except Exception:  # noqa: BLE001
            return 1

    def open(self, at_least: int | None = None) -> Opened:
        """The image, decoded. Arguments and errors are those of `open_image`."""
        width, height = self.size
        factor = 1
        if at_least is not None and width * height > MAX_EXACT_PIXELS:
            factor = reduction_factor(self.size, at_least)
        image = self.decode(factor)
        # Decoding corrects the sizes of some headers; a JPEG's is the reduced one then.
        size = self.size if self.is_jpeg else self.image.size
        return Opened(image, self.upright(size))

    def upright(self, size: tuple[int, int]) -> tuple[int, int]:
        """A stored (width, height) as the orientation turns it."""
        return size[::-1] if self.orientation() in range(5, 9) else size

    def decode(self, factor: int = 1) -> Image.Image:
        """The image as RGB, upright, without metadata; once, since the pixels become the caller's.

        factor: 1, 2, 4 or 8, by which both sides are divided (rounded up).

        Raises ImageError: damaged contents, or the caller has closed the image.
        """
        try:
            with self._lock:
                if factor > 1 and self.is_jpeg:
                    # The JPEG decoder itself reduces, if it can (then the image's size changes).
                    width, height = self.size
                    self.image.draft(None, (width // factor, height // factor))
                    if self.image.size != self.size:
                        factor = 1
                self.image.load()
                plain = self.image
                # Without a second copy of a large image, if means of its levels are colours.
                is_plain = plain.mode in ("L", "RGB", "RGBA") and "transparency" not in plain.info
                if factor > 1 and is_plain:
                    plain = to_rgb(plain.reduce(factor))
                elif self._is_own and is_plain and plain.mode == "RGB":
                    # Its pixels are not copied: a second large image takes longer than decoding.
                    plain = plain._new(plain.im)
                    plain.info = {}
                else:
                    plain = to_rgb(plain)
                    plain = plain.reduce(factor) if factor > 1 else plain
        except Exception as error:
            reason = f"is truncated or damaged ({first_line(error)})"
            # A closed image has parts to decode, but no file.
            has_file = getattr(self.image, "fp", None) or not getattr(self.image, "tile", None)
            if not has_file or "closed" in str(error):
                reason = "was closed before it was read"
            raise ImageError(f"{self}: the image {reason}.") from error
        # An icon may be larger than in its header.
        self.limits.check_size(plain.size, self)
        # The orientation is read after decoding, because Pillow rotates TIFFs itself.
        plain.getexif()[ExifTags.Base.Orientation] = self.orientation()
        ImageOps.exif_transpose(plain, in_place=True)
        plain.getexif().clear()
        return plain


def open_image(
    source: ImageSource,
    *,
    name: str | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
    at_least: int | None = None,
) -> Opened:
    """Read one image.

    Args:
        source: a path (also of a pipe), a `file:` or data URL or base64 text, the bytes of a file,
            an open file, a PIL image, an array or tensor of [H, W], [H, W, C] or [C, H, W] with
            C = 1 to 4, or a function that returns one of these.
        name: for error messages; default: the file's name, or "image".
        at_least: a large image may be reduced to no fewer than this many pixels a side; None:
            never.

    Raises:
        ImageError: missing, empty, not an image, damaged, or outside `limits`.
    """
    return StoredImage(source, name, limits).open(at_least)


def reduction_factor(size: tuple[int, int], min_side: int) -> int:
    """Reduction factor (1, 2, 4 or 8) with which the shorter side keeps `min_side` pixels."""
    for factor in (8, 4, 2):
        if min(size) // factor >= min_side:
            return factor
    return 1


# ---- what is an image, and what are codes


def is_image(value: object) -> TypeGuard[ImageSource]:
    """Whether `open_image` takes `value`, which is no `str`: that may be any text.

    Integers of one axis are codes. Of two they are a row of codes for each image, but uint8 is a
    picture, and so is uint16 with rows too long for codes.
    """
    if hasattr(value, "__array__"):
        *batch, width = getattr(value, "shape", None) or [0]
        dtype = getattr(value, "dtype", "int")
        type_name = getattr(dtype, "name", str(dtype))  # without a byte order
        is_grey = "uint8" in type_name or ("uint16" in type_name and width > MAX_CODES)
        is_colour = sum(length > 1 for length in batch) > 1
        return len(batch) > 0 and ("int" not in type_name or is_grey or is_colour)
    kinds = (os.PathLike, bytes, bytearray, memoryview, Image.Image)
    return isinstance(value, kinds) or hasattr(value, "read") or callable(value)


def code_row(value: Any) -> list[int] | None:
    """The codes of one image, whole numbers in any sequence, array or tensor of one axis; None:
    `value` is something else, such as bools."""
    is_file = isinstance(value, str | bytes | bytearray | memoryview)
    items = value.tolist() if getattr(value, "ndim", 0) == 1 and not is_file else value
    if not isinstance(items, Sequence) or is_file:
        return None
    codes = [item.item() if getattr(item, "ndim", None) == 0 else item for item in items]
    return codes if {*map(type, codes)} == {int} else None


# ---- the bytes of a file


def read_string(
    text: str, name: str = "image", limits: ImageLimits = DEFAULT_LIMITS
) -> Path | bytes:
    """The path (also of a `file:` URL), or the bytes of a data URL or base64 text.

    For the local user's strings; others' are only given to `decode_text`.

    Raises ImageError: an address of the internet, or damaged base64.
    """
    file_url = _FILE_URL.match(text)
    if file_url:
        return Path(unquote(text[file_url.end() :].rstrip()))
    is_text = not text or len(text) > MAX_PATH or bool(_DATA_URL.match(text) or _URL.match(text))
    if not is_text and not os.path.exists(text):
        # A path may look like base64 text, but not like that of an image.
        with contextlib.suppress(ImageError):
            is_text = bool(_IMAGE_START.match(decode_text(text, name, limits)))
    return decode_text(text, name, limits) if is_text else Path(text)


def decode_text(text: str, name: str = "image", limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """The bytes in a data URL (RFC 2397), or in base64 text of either alphabet, with or without
    padding and line breaks.

    Raises ImageError: other text, or a longer one than the limit.
    """
    # 1. The body of a data URL, of which "=", "+" and "/" may be percent-encoded.
    body = text
    if _DATA_URL.match(text):
        head, _, body = text.partition(",")
        content = unquote_to_bytes(body)
        if not re.search(r";\s*+base64\s*+$", head, re.IGNORECASE):
            return content
        body = content.decode("latin-1")
    elif _URL.match(text):
        raise ImageError(
            f"{name}: {short_name(text)} is an address, and nothing is downloaded; give the image."
        )

    # 2. Four characters are three bytes; the limit is checked before decoding.
    body = "".join(body.split()).rstrip("=")
    limits.check_bytes(len(body) * 3 // 4, name)
    padding = "=" * (-len(body) % 4)
    try:
        standard = body.replace("-", "+").replace("_", "/")
        return base64.b64decode(standard + padding, validate=True)
    except ValueError as error:
        raise ImageError(
            f"{name}: neither base64 text nor a data URL: {short_name(text)!r}."
        ) from error


def _stream_bytes(file: IO[bytes], name: str, limits: ImageLimits) -> bytes:
    """All bytes of an open file, from its start; what cannot be read again is kept."""
    if isinstance(file, io.TextIOBase):
        raise ImageError(f'{name}: is opened as text; open it with mode "rb".')
    if hasattr(file, "seekable") and file.seekable():
        file.seek(0)
        return _read_all(file, limits)
    if file in _read_before:
        return _read_before[file]
    data = _read_all(file, limits)
    with contextlib.suppress(TypeError):  # of an object without weak references
        _read_before[file] = data
    return data


def _read_all(source: Path | IO[bytes], limits: ImageLimits) -> bytes:
    """The bytes of a file, or more than the limit; a pipe gives fewer than were asked for."""
    data = bytearray()
    with open(source, "rb") if isinstance(source, Path) else contextlib.nullcontext(source) as file:
        while len(data) <= limits.max_bytes and (piece := file.read(PIECE)):
            data += piece
    return bytes(data)


@functools.cache
def _register_plugins() -> None:
    """Load Pillow's own formats, and that of a package which does not register itself."""
    Image.init()
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()


# ---- pixels


def _array_image(source: Any, name: str) -> Image.Image:
    """The image in an array or tensor, of [H, W], [H, W, C] or [C, H, W] and any usual type."""
    # 1. A NumPy array, which knows no bfloat16.
    if hasattr(source, "detach"):
        source = source.detach().cpu()
        source = source.float() if source.is_floating_point() else source
    array = np.asarray(source)
    shape = list(array.shape)
    dtype = array.dtype

    # 2. [H, W] or [H, W, C]: without a batch of one, channels last.
    while array.ndim > 3 and len(array) == 1:
        array = array[0]
    n_channels = range(1, 5)
    if array.ndim == 3 and array.shape[0] in n_channels and array.shape[2] not in n_channels:
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]

    # 3. Eight bits.
    try:
        if array.ndim not in (2, 3):
            raise ValueError(f"{array.ndim} axes")
        return Image.fromarray(to_8_bits(array))
    except (TypeError, ValueError) as error:
        raise ImageError(
            f"{name}: an array of shape {shape} and type {dtype} is no image "
            f"({first_line(error)}); give [H, W], [H, W, C] or [C, H, W] with 1 to 4 channels, "
            "or a list of images."
        ) from error


def to_8_bits(levels: np.ndarray) -> np.ndarray:
    """Numbers of any type → uint8; NaN is 0, and infinite ones are black and white.

    uint16 has 16 bits. Other types have the range in which their largest value is: floats of 0…1 or
    0…255, integers of 0…255, 0…65535 or 0…2³²-1. What is outside of it, as in an enlarged image, is
    clipped: up to twice the range, and as far below zero as half of the largest value.

    Raises ValueError: other types or values, as those that were normalised for a model.
    """
    if levels.dtype == np.uint8:
        return levels
    if levels.dtype.kind not in "buif":
        raise ValueError("no numbers")

    # 1. The range.
    values = levels.astype(np.float32)
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        raise ValueError("no finite value")
    low = finite.min(initial=0)
    high = finite.max(initial=0)
    whites = [255, 65535, 2**32 - 1]
    if levels.dtype.kind in "bf":
        whites = [1, 255]
    elif levels.dtype.name == "uint16":  # in any byte order
        whites = [65535]
    white = next((white for white in whites if high <= 2 * white), None)
    # A few outliers do not choose a range in which all else is black.
    is_outlier = white is not None and white > whites[0] and (finite > whites[0]).mean() < 0.01
    is_normalised = 2 < high < 3  # for a model, if there are negative values
    if white is None or is_outlier or low < (0 if is_normalised else -high / 2):
        raise ValueError(f"values from {low:g} to {high:g}")

    # 2. Eight bits.
    scaled = np.nan_to_num(values / white * 255, nan=0.0)
    return np.rint(scaled.clip(0, 255)).astype(np.uint8)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode → a new RGB image without metadata.

    Raises `ValueError` for a mode that Pillow cannot convert.
    """
    # 1. Eight bits a channel.
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(to_8_bits(np.asarray(image)))

    # 2. Transparency over white.
    if image.mode == "La":  # Pillow converts it to LA only
        image = image.convert("LA")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, layer)
    plain = image.convert("RGB")
    plain.info = {}
    return plain


# ---- writing


def image_to_bytes(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file; `options` as of Pillow's `save`."""
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def image_to_base64(image: Image.Image, format: str = "PNG", **options: Any) -> str:
    """`image_to_bytes` as base64 text."""
    return base64.b64encode(image_to_bytes(image, format, **options)).decode("ascii")


def save_image(image: Image.Image, path: Path, kind: type[SeedError] = ImageError) -> Path:
    """Write an image in the format of the suffix, making its folder; a failed write leaves no
    partial file. Raises `kind`: it cannot be written."""
    with writing(path, kind):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_open(path) as file:
            image.save(file, Image.registered_extensions()[path.suffix.lower()])
    return path


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


def request_image(image: Image.Image) -> Image.Image:
    """A stored image as the original chat demo sends it: squashed to 256 x 256."""
    return image.resize((256, 256), Image.Resampling.BICUBIC)
