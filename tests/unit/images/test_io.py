"""Modes, orientations, reduction and bombs; `contract/test_image_sources.py` has the sources."""

import array
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from seed_multimodal.errors import ImageError
from seed_multimodal.images import io as io_module
from seed_multimodal.images.io import code_row, image_to_bytes, open_image
from seed_multimodal.images.transforms import get_transform


def palette() -> Image.Image:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([9, 9, 9, 200, 100, 50])
    return image


def saved(image, kind: str = "PNG", **options) -> bytes:
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


# ---- codes or pixels

ROWS = [[3, 1, 2], [0, 5, 4]]


@pytest.mark.parametrize("name", "int8 int16 int32 int64 uint16 uint32 uint64".split())
def test_integers_are_codes(name):
    # Another type of numbers must not make a black picture of codes.
    tensor = torch.tensor(ROWS, dtype=getattr(torch, name))
    numbers = np.array(ROWS, np.dtype(name).newbyteorder())
    scalars = [[*row] for row in tensor]
    for rows in (tensor, numbers, scalars, [array.array("h", row) for row in ROWS]):
        assert [code_row(row) for row in rows] == ROWS
        assert not io_module.is_image(rows) and code_row(rows) is None
    assert not io_module.is_image(tensor[None])


PICTURES = {
    "uint8": np.zeros((4, 32), np.uint8),
    "16 bits": np.zeros((4, 640), np.uint16),
    "floats": torch.zeros(4, 32),
    "colours": torch.zeros(3, 32, 32, dtype=torch.int64),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pixels_are_no_codes(name):
    assert io_module.is_image(PICTURES[name]) and code_row(PICTURES[name]) is None


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
    reduced, stored_size = open_image(data, at_least=140)
    full = open_image(data).image
    assert (reduced.size, stored_size, full.size) == ((150, 210), (600, 840), (600, 840))
    resize = get_transform(keep_ratio=False, image_size=64).resize
    levels = [np.asarray(resize(image)).astype(float) for image in (reduced, full)]
    assert np.abs(levels[0] - levels[1]).mean() < 1.5


# ---- errors


def png_header(width, height) -> bytes:
    """A PNG of width x height pixels, with almost no data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [12_000, 2_000_000])
def test_open_image_decodes_no_bomb(side):
    # Below Pillow's own guard, and above it: up to terabytes of pixels in 150 bytes.
    content = png_header(side, side)
    tracemalloc.start()
    with pytest.raises(ImageError, match="pixels"):
        open_image(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000
