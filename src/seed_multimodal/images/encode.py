"""Pictures as text: base64 in and out, as the HTTP routes carry them."""

from __future__ import annotations

import base64
import binascii
import io
import re

from PIL import Image

from seed_multimodal.errors import ImageError
from seed_multimodal.images.open import DEFAULT_LIMITS, ImageLimits, open_image

_DATA_URL = re.compile(r"\s*data:[\w.+-]+/[\w.+-]+(?:;[\w=.+-]+)*;base64,", re.ASCII)


def image_to_bytes(image: Image.Image, format: str = "PNG") -> bytes:
    """The bytes of an image file in `format` (PNG by default)."""
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return buffer.getvalue()


def image_to_base64(image: Image.Image, format: str = "PNG") -> str:
    """An image file in `format`, as base64 text."""
    return base64.b64encode(image_to_bytes(image, format)).decode("ascii")


def image_from_base64(text: str, name: str = "image", limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Read a picture from base64 text (a `data:image/…;base64,` prefix and line breaks are allowed).

    Raises:
        ImageError: not base64, or what `open_image` refuses.
    """
    prefix = _DATA_URL.match(text)
    body = re.sub(r"\s+", "", text[prefix.end():] if prefix else text)
    limits.check_bytes(len(body) * 3 // 4, name)  # before the decoded copy is made
    try:
        data = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"{name}: this is not base64 text ({error}).") from error
    return open_image(data, name=name, limits=limits)
