"""SVG to a small square picture: white background, cropped to its content, fitted in with a margin.

Drawn at four times the size and reduced once, so thin lines survive; the crop follows the drawing's own
alpha, so white artwork is not lost; `dpi=96` lets sizes given in mm or pt render.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from seed_multimodal.errors import DataError

OVERSAMPLE = 4

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "gray", "white")


def render_svg(svg: str, size: int, name: str) -> np.ndarray | None:
    """Draw one SVG as uint8 [size, size, 3] RGB over white; None when nothing visible is drawn.

    Raises:
        DataError: naming the drawing, when the SVG cannot be rendered.
    """
    import resvg_py

    if size < 8:
        raise DataError(f"size {size} is too small for a picture; use 8 or more.")
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size * OVERSAMPLE, dpi=96, skip_system_fonts=True)
    except ValueError as error:
        raise DataError(f"{name}: its SVG cannot be rendered ({error}).") from None
    drawn = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    box = drawn.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    if box is None:
        return None
    drawn = drawn.crop(box)
    flat = Image.new("RGB", drawn.size, (255, 255, 255))
    flat.paste(drawn, mask=drawn.getchannel("A"))
    inner = size - 2 * max(1, size // 32)
    scale = inner / max(flat.size)
    fitted = flat.resize(
        (max(1, round(flat.width * scale)), max(1, round(flat.height * scale))), Image.Resampling.BOX, reducing_gap=None
    )
    square = Image.new("RGB", (size, size), (255, 255, 255))
    square.paste(fitted, ((size - fitted.width) // 2, (size - fitted.height) // 2))
    pixels = np.asarray(square)
    return None if int(pixels.min()) > 247 else pixels


def main_colour(pixels: np.ndarray) -> tuple[str, float]:
    """Name of the commonest colour among pixels that are not background white, and its share of them (0..1).

    Args:
        pixels: uint8 [H, W, 3] RGB on white.
    """
    rgb = pixels.reshape(-1, 3).astype(np.float32) / 255
    value, low = rgb.max(1), rgb.min(1)
    drawn = low < 0.94
    if int(drawn.sum()) < 0.01 * len(rgb):
        return "white", 1.0
    rgb, value, low = rgb[drawn], value[drawn], low[drawn]
    chroma = value - low
    saturation = chroma / np.maximum(value, 1e-6)
    safe = np.maximum(chroma, 1e-6)
    r, g, b = rgb.T
    hue = np.where(value == r, ((g - b) / safe) % 6, np.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4)) * 60
    names = np.full(len(rgb), COLOURS.index("gray"))
    # Hue borders in degrees; red lies on both sides of 0.
    for start, stop, colour in (
        (0, 15, "red"), (15, 36.5, "orange"), (36.5, 61, "yellow"), (61, 170, "green"),
        (170, 250, "blue"), (250, 300, "purple"), (300, 342, "pink"), (342, 361, "red"),
    ):
        names[(hue >= start) & (hue < stop)] = COLOURS.index(colour)
    reddish = (names == COLOURS.index("red")) | ((hue < 16) & (saturation < 0.45))
    names[reddish & (saturation < 0.55) & (value > 0.8)] = COLOURS.index("pink")
    # Brown is dark orange, and dark red only when it is dull.
    dark_orange = (hue >= 8) & (hue < 45) & (value < 0.8) & (saturation > 0.2)
    dull_red = (hue < 20) & (value < 0.8) & (saturation > 0.2) & (saturation < 0.68)
    names[dark_orange | dull_red] = COLOURS.index("brown")
    grey = saturation < 0.14
    names[grey] = COLOURS.index("gray")
    names[(saturation < 0.06) & (value > 0.8)] = COLOURS.index("white")
    names[(value < 0.25) | (grey & (value < 0.35))] = COLOURS.index("black")
    counts = np.bincount(names, minlength=len(COLOURS))
    best = int(counts.argmax())
    return COLOURS[best], float(counts[best] / counts.sum())
