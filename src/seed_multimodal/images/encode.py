"""Pictures as the HTTP routes carry them: base64 in and out, and the chat demo's resizing before they are sent."""

from __future__ import annotations

import base64
import binascii
import io
import re
from typing import Any

from PIL import Image

from seed_multimodal.errors import ImageError
from seed_multimodal.images.open import DEFAULT_LIMITS, ImageLimits, open_image

_DATA_URL = re.compile(rb"\s*data:[\w.+-]+/[\w.+-]+(?:;[\w=.+-]+)*;base64,", re.ASCII)


def image_to_bytes(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file in `format` (PNG by default); `options` as of Pillow's `save`."""
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def image_to_base64(image: Image.Image, format: str = "PNG") -> str:
    """An image file in `format`, as base64 text."""
    return base64.b64encode(image_to_bytes(image, format)).decode("ascii")


def image_from_base64(text: str | bytes, name: str = "image", limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Read a picture from base64 text (see `bytes_from_base64`).

    Raises:
        ImageError: not base64, or what `open_image` refuses.
    """
    return open_image(bytes_from_base64(text, name, limits), name=name, limits=limits)


def bytes_from_base64(text: str | bytes, name: str = "image", limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """A picture's file from base64 text (a `data:image/…;base64,` prefix and line breaks are allowed).

    Raises:
        ImageError: not base64, or longer than the limit.
    """
    try:
        body = text.encode("ascii") if isinstance(text, str) else text
        body = body[prefix.end():] if (prefix := _DATA_URL.match(body)) else body
        body = body.translate(None, b" \t\r\n\f\v")
        limits.check_bytes(len(body) * 3 // 4, name)  # before the decoded copy is made
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"{name}: this is not base64 text ({error}).") from error


def fit_longer_side(image: Image.Image, length: int = 512) -> Image.Image:
    """Resize (up or down) so that the longer side has `length` pixels; the other keeps the ratio, rounded down."""
    width, height = image.size
    longer = max(width, height)
    return image.resize((max(1, width * length // longer), max(1, height * length // longer)),
                        Image.Resampling.BICUBIC)


def crop_to_aspect(image: Image.Image, max_aspect: float = 1.3) -> Image.Image:
    """Cut the longer side, centred, so that it is at most `max_aspect` times the shorter one."""
    width, height = image.size
    new_width = min(width, int(height * max_aspect))
    new_height = min(height, int(width * max_aspect))
    left, top = (width - new_width) // 2, (height - new_height) // 2
    return image.crop((left, top, left + new_width, top + new_height))


def chat_image(image: Image.Image) -> Image.Image:
    """A user's picture as the chat demo stores it: RGB, longer side 512, at most 1.3 times as long as wide."""
    return crop_to_aspect(fit_longer_side(image.convert("RGB"), 512), 1.3)


def request_image(image: Image.Image, size: int = 256) -> Image.Image:
    """A stored picture as the chat demo sends it: squashed to `size` x `size`."""
    return image.resize((size, size), Image.Resampling.BICUBIC)
