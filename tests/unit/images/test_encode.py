"""Pictures as base64 text, and the sizes of the chat demo."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from PIL import Image

from seed_multimodal.errors import ImageError
from seed_multimodal.images.encode import (
    chat_image,
    crop_to_aspect,
    fit_longer_side,
    image_from_base64,
    image_to_base64,
    request_image,
)
from seed_multimodal.images.open import ImageLimits

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))


def test_there_and_back() -> None:
    text = image_to_base64(PICTURE)
    assert base64.b64decode(text).startswith(b"\x89PNG")
    wrapped = "data:image/png;base64," + "\n".join(text[i:i + 40] for i in range(0, len(text), 40))
    for version in (text, wrapped, f"  {text}\n"):
        assert image_from_base64(version).tobytes() == PICTURE.tobytes()
    assert image_to_base64(PICTURE, "JPEG").startswith("/9j/")


@pytest.mark.parametrize("text", ["", "not base64!", "aGVsbG8=", "data:image/png;base64,", "a", "ééé"])
def test_refusals_carry_the_name(text: str) -> None:
    with pytest.raises(ImageError, match=r"^images\[2\]: .*\.$"):
        image_from_base64(text, name="images[2]")


def test_limits_hold_before_decoding() -> None:
    with pytest.raises(ImageError, match="bytes"):
        image_from_base64("A" * 4000, limits=ImageLimits(max_bytes=2000))
    with pytest.raises(ImageError, match="9x6"):
        image_from_base64(image_to_base64(PICTURE), limits=ImageLimits(max_pixels=53))


def test_chat_sizes() -> None:
    assert fit_longer_side(Image.new("RGB", (640, 480))).size == (512, 384)
    assert fit_longer_side(Image.new("RGB", (10_000, 3))).size == (512, 1)
    assert crop_to_aspect(Image.new("RGB", (640, 480)), 1.3).size == (624, 480)
    assert chat_image(Image.new("RGBA", (40, 30))).size == (499, 384)
    assert request_image(Image.new("RGB", (499, 384))).size == (256, 256)


def test_the_crop_is_centred() -> None:
    strip = Image.new("RGB", (30, 10))
    strip.paste((255, 0, 0), (10, 0, 20, 10))
    assert set(crop_to_aspect(strip, 1.0).get_flattened_data() if hasattr(strip, "get_flattened_data")
               else crop_to_aspect(strip, 1.0).getdata()) == {(255, 0, 0)}
