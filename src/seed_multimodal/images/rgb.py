"""Any picture as plain 8-bit RGB, strip by strip, so that no second copy of its size is made on the way.

* Transparency is laid over white.
* 16-bit grey is scaled to 8 bits (value / 257). 32-bit integers above 16 bits and floats outside [0, 1] have no
  natural white, so their own range is stretched.
* CMYK and the other colour spaces go through Pillow's plain conversion; embedded colour profiles are not applied,
  as in the released preprocessing.

Every conversion is one of single pixels, so the strips change nothing (`tests/unit/images/test_rgb.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

STRIP_PIXELS = 1 << 17


def to_rgb(image: Image.Image, factor: int = 1) -> Image.Image:
    """Any PIL mode -> a new RGB image without metadata; transparent pixels are laid over white.

    Args:
        factor: both sides are divided by it (rounded up), each pixel the mean of `factor` x `factor` ones.

    Raises:
        ValueError: a mode that Pillow cannot convert.
    """
    width, height = image.size
    levels = _levels(image)
    canvas = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    for top, strip in _strips(image, factor):
        plain = _plain(strip, levels)
        canvas.paste(plain if factor == 1 else plain.reduce(factor), (0, top // factor))
    return canvas


def _strips(image: Image.Image, factor: int = 1) -> Iterator[tuple[int, Image.Image]]:
    """(first row, the rows from there on) of about `STRIP_PIXELS`, a multiple of `factor` rows each."""
    width, height = image.size
    rows = max(1, STRIP_PIXELS // width // factor) * factor
    if rows >= height:
        yield 0, image
        return
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(height, top + rows)))


def _plain(image: Image.Image, levels: tuple[float, float] | None) -> Image.Image:
    if levels is not None:
        image = _to_8_bit(image, *levels)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layered = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layered.size, (255, 255, 255, 255)), layered)
    return image.convert("RGB")


def _levels(image: Image.Image) -> tuple[float, float] | None:
    """The smallest and the largest value of a picture with more than 8 bits; None for the others."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return None
    ends = [(float(values.min()), float(values.max())) for values in (_values(part) for _, part in _strips(image))]
    return min(low for low, _ in ends), max(high for _, high in ends)


def _values(image: Image.Image) -> np.ndarray:
    return np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0, neginf=0.0)


def _to_8_bit(image: Image.Image, low: float, high: float) -> Image.Image:
    values = _values(image)
    if image.mode == "F" and 0 <= low and high <= 1:
        values = values * 255
    elif image.mode != "F" and 0 <= low and high <= 65535:
        values = values / 257
    else:
        values = (values - low) * (255 / max(high - low, 1e-12))
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
