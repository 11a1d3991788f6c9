"""What decoding a picture costs in memory, known from its header, and how far it can be reduced on the way.

Bytes per pixel were measured with Pillow 12 (`VmHWM` of a process that decodes one picture), rounded up. Besides its
own bytes a picture needs those of its decoder: WebP, AVIF and JPEG 2000 keep several copies of the whole picture, a
JPEG in several scans (progressive ones above all) all its coefficients.
"""

from __future__ import annotations

import re
from typing import Any

from PIL import Image, JpegImagePlugin, TiffImagePlugin

FACTORS = (8, 4, 2)  # what a JPEG decoder can divide by
_STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}  # every other mode: 4
_DECODER = {"WEBP": 18, "AVIF": 24, "JPEG2000": 24, "PPM": 4}  # beside the picture itself
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")  # in a JPEG's data, where any other FF is a number or a pause
_END, _SCAN = 0xD9, 0xDA
_TIFF = {"bits": 258, "rows": 278, "width": 322, "height": 323}


def reduction(size: tuple[int, int], at_least: int | None, exact_up_to: int) -> int:
    """By what both sides of a picture are divided: 1 up to `exact_up_to` pixels, then as far as the shorter side keeps
    `at_least` pixels."""
    if at_least is None or size[0] * size[1] <= exact_up_to:
        return 1
    return next((factor for factor in FACTORS if min(size) // factor >= at_least), 1)


def decoding_bytes(image: Image.Image, factor: int = 1) -> int:
    """Most bytes that decoding an opened, not yet loaded picture to RGB takes, divided by `factor` on the way."""
    pixels = image.width * image.height
    reduced = -(-image.width // factor) * -(-image.height // factor)
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        return reduced * (_stored(image) + 4) + (2 * _coefficients(image) if several_scans(image) else 0)
    decoder = _tiff_block(image) if isinstance(image, TiffImagePlugin.TiffImageFile) else (
        pixels * _DECODER.get(image.format or "", 0))
    return pixels * _stored(image) + decoder + reduced * 4


def _stored(image: Image.Image) -> int:
    return _STORED.get(image.mode, 4)


def _coefficients(image: Any) -> int:
    """DCT coefficients of a JPEG, two bytes each: one per pixel of each component in its own resolution."""
    wide, high = (max(component[i] for component in image.layer) for i in (1, 2))
    return sum(image.width * image.height * component[1] * component[2] // (wide * high) for component in image.layer)


def several_scans(image: Any) -> bool:
    """Whether a JPEG's components come in several scans: its first scan's header, just read, does not name them all."""
    if image.fp is None or image.fp.closed:  # decoded already
        return False
    end = image.fp.tell()
    length = 6 + 2 * image.layers
    image.fp.seek(max(0, end - length))
    header = image.fp.read(3)
    image.fp.seek(end)
    whole = header == length.to_bytes(2, "big") + bytes([image.layers])
    return bool(image.info.get("progressive")) or not whole


def _tiff_block(image: Any) -> int:
    """Bytes of the largest strip or tile, decoded in one piece; tiles can be larger than the picture."""
    tags = {name: image.tag_v2.get(number) for name, number in _TIFF.items()}
    bits = tags["bits"] or (1,)
    width = tags["width"] or image.width
    rows = tags["height"] or min(tags["rows"] or image.height, image.height)
    return int(width) * int(rows) * max(8, sum(int(one) for one in bits)) // 8


def scans(image: Any, most: int) -> int:
    """Scans of an opened JPEG, counted up to one more than `most`: each is a pass over the whole picture."""
    if not several_scans(image):
        return 1
    at, count = image.fp.tell(), 1
    data = image.fp.read()
    image.fp.seek(at)
    place = 0
    while count <= most and (found := _MARKER.search(data, place)) and found[1][0] != _END:
        count += found[1][0] == _SCAN
        place = found.end() + int.from_bytes(data[found.end():found.end() + 2], "big")
    return count
