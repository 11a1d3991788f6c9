"""A small picture, as PIL and as PNG bytes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image


@pytest.fixture()
def picture() -> Image.Image:
    """Stripes, 40 x 30."""
    pixels = np.zeros((30, 40, 3), dtype=np.uint8)
    pixels[:, ::4] = (250, 40, 60)
    pixels[::5] = (20, 90, 200)
    return Image.fromarray(pixels)


@pytest.fixture()
def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
