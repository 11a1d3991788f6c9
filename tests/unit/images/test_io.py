"""Image files and base64 text: the pixels of valid ones, errors that name damaged ones."""

from __future__ import annotations

import base64
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from seed_multimodal.errors import ImageError
from seed_multimodal.images import io as io_module
from seed_multimodal.images.io import (
    ImageLimits,
    image_to_base64,
    image_to_bytes,
    open_image,
)
from seed_multimodal.images.transforms import get_transform


def gradient(width: int = 12, height: int = 8) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 20, y * 30, (x + y) * 10], axis=-1).astype(np.uint8))


def grey(values: list[float], dtype: type) -> Image.Image:
    return Image.fromarray(np.array([values], dtype=dtype))


def palette() -> Image.Image:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([9, 9, 9, 200, 100, 50])
    return image


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    return image_to_bytes(image, kind, **options)


# ---- pixels

WHITE = (255, 255, 255)
# What is opened → its first pixel.
PIXELS = {
    "CMYK": (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), (255, 0, 0)),
    "transparent black on white": (Image.new("RGBA", (4, 4), (0, 0, 0, 51)), (204, 204, 204)),
    "transparent grey": (Image.new("LA", (4, 4), (0, 0)), WHITE),
    "a palette": (saved(palette()), (200, 100, 50)),
    "a transparent colour of a palette": (saved(palette(), transparency=1), WHITE),
    "a transparent colour": (
        saved(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3)),
        WHITE,
    ),
    "16 bits, PNG": (saved(grey([32896], np.uint16)), (128, 128, 128)),
    "floats of 0 to 1": (grey([0.2, 1.0], np.float32), (51, 51, 51)),
    "damaged EXIF data": (
        saved(Image.new("L", (8, 8), 9), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"),
        (9, 9, 9),
    ),
}


@pytest.mark.parametrize("name", PIXELS)
def test_open_image_of_other_modes(name):
    # Transparent pixels are white, as on a page; a grey of 16 bits is not cut to 8.
    source, expected = PIXELS[name]
    opened = open_image(source).image
    assert opened.mode == "RGB" and opened.getpixel((0, 0)) == expected


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp"])
def test_open_image_keeps_pixels_of_lossless_formats(tmp_path, suffix):
    # Another pixel is another code.
    path = tmp_path / f"image.{suffix}"
    gradient().save(path, **({"lossless": True} if suffix == "webp" else {}))
    opened = open_image(path).image
    assert opened.mode == "RGB" and opened.info == {}
    assert np.array_equal(np.asarray(opened), np.asarray(gradient()))


# Pillow's operation that stores an upright image so that an EXIF orientation restores it.
TURNS = {
    3: "ROTATE_180",
    5: "TRANSPOSE",
    6: "ROTATE_90",
}


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_open_image_applies_exif_rotation(kind, orientation):
    # Phones store portraits lying on their side.
    upright = Image.new("RGB", (32, 16), WHITE)
    upright.paste((255, 0, 0), (0, 0, 16, 8))  # red corner: top left when upright
    stored = upright.transpose(Image.Transpose[TURNS[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_image(saved(stored, kind, exif=exif)).image
    assert opened.size == (32, 16)
    red, green, _ = opened.getpixel((4, 3))
    assert red > 200 and green < 60
    assert min(opened.getpixel((28, 13))) > 200
    assert opened.getexif() == {}  # so that nobody turns it again


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_open_image_reduces_large_images(kind, monkeypatch):
    # What a large photo takes in memory; the view is the same but for rounding.
    monkeypatch.setattr(io_module, "MAX_EXACT_PIXELS", 100_000)
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = np.random.default_rng(5).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise).resize((840, 600)), kind, exif=exif)
    reduced = open_image(data, at_least=140).image
    full = open_image(data).image
    assert (reduced.size, full.size) == ((150, 210), (600, 840))
    resize = get_transform(keep_ratio=False, image_size=64).resize
    levels = [np.asarray(resize(image)).astype(float) for image in (reduced, full)]
    assert np.abs(levels[0] - levels[1]).mean() < 1.5


# ---- errors


def png_header(width: int, height: int) -> bytes:
    """A PNG of width x height pixels, with almost no data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"hello, I am text",
        b"\x89PNG\r\n\x1a\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        # 144 million pixels in 150 bytes, below Pillow's own guard, and above it.
        png_header(12_000, 12_000),
        png_header(2_000_000, 2_000_000),
    ],
    ids=["missing", "empty", "text", "PNG", "PostScript", "bomb", "larger bomb"],
)
def test_open_image_names_the_file_it_refuses(tmp_path, content):
    path = tmp_path / "cat.jpg"
    if content is not None:
        path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ImageError, match=r"cat\.jpg"):
        open_image(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000  # no pixel of a bomb is decoded
    with pytest.raises(ImageError, match=tmp_path.name):
        open_image(tmp_path)


# ---- base64, and sizes


def test_image_to_base64_and_back():
    # As browsers and scripts send them: with a prefix, in lines, with spaces around.
    text = image_to_base64(gradient())
    assert base64.b64decode(text).startswith(b"\x89PNG")
    lines = "\n".join(text[start : start + 40] for start in range(0, len(text), 40))
    for version in (text, f"data:image/png;base64,{lines}", f"  {text}\n"):
        assert open_image(version).image.tobytes() == gradient().tobytes()
    for wrong in ("", "not base64!", "aGVsbG8="):
        with pytest.raises(ImageError, match=r"images\[2\]"):
            open_image(wrong, name="images[2]")
    with pytest.raises(ImageError):
        open_image("A" * 4000, limits=ImageLimits(max_bytes=2000))
