"""Images of random pixels."""

from __future__ import annotations

import numpy as np
from PIL import Image


def noise(seed: int, size: tuple[int, int] = (48, 30)) -> Image.Image:
    """An image of random pixels."""
    width, height = size
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )
