"""Images of random pixels, and comparing images."""

import numpy as np
from PIL import Image


def noise(seed, size: tuple[int, int] = (48, 30)) -> Image.Image:
    """An image of random pixels."""
    width, height = size
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def same(image, other: Image.Image, levels: int = 1) -> bool:
    """Equal within one grey level, or `levels`."""
    return (
        image.size == other.size
        and np.abs(np.asarray(image, int) - np.asarray(other, int)).max() <= levels
    )
