"""Fixtures of the server's tests: an image and its file."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def stripes() -> Image.Image:
    """An image of 40 x 30 pixels."""
    pixels = np.zeros((30, 40, 3), dtype=np.uint8)
    pixels[:, ::4] = (250, 40, 60)
    pixels[::5] = (20, 90, 200)
    return Image.fromarray(pixels)


@pytest.fixture
def png(stripes: Image.Image) -> bytes:
    buffer = io.BytesIO()
    stripes.save(buffer, format="PNG")
    return buffer.getvalue()
