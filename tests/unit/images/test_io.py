"""Image files and base64 text: pixels of valid ones, error messages of damaged ones."""

from __future__ import annotations

import base64
import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from seed_multimodal.errors import ImageError
from seed_multimodal.images import io as io_module
from seed_multimodal.images.io import (
    ImageLimits,
    chat_image,
    crop_to_aspect,
    fit_longer_side,
    image_from_base64,
    image_size,
    image_to_base64,
    image_to_bytes,
    open_image,
    request_image,
)
from seed_multimodal.images.transforms import get_transform


def gradient(width: int = 12, height: int = 8) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 20, y * 30, (x + y) * 10], axis=-1).astype(np.uint8))


def bomb_png(width: int, height: int) -> bytes:
    """A PNG header of width x height pixels, followed by almost no data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


def error_of(source: object, **kwargs: object) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(source, **kwargs)  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    return message


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "ppm"])
def test_open_image_keeps_pixels_of_lossless_formats(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    gradient().save(path, **({"lossless": True} if suffix == "webp" else {}))
    opened = open_image(path)
    assert opened.mode == "RGB" and opened.info == {}
    assert np.array_equal(np.asarray(opened), np.asarray(gradient()))


@pytest.mark.parametrize(
    "content",
    [
        b"hello, I am text",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"\xff\xd8\xff\xe0",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ],
)
def test_open_image_of_other_files(tmp_path, content):
    path = tmp_path / "cat.jpg"
    path.write_bytes(content)
    assert error_of(path).startswith("cat.jpg: ")


def test_open_image_of_empty_and_missing_files(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    assert error_of(tmp_path / "empty.png") == "empty.png: the file is empty (0 bytes)."
    assert (
        error_of(tmp_path / "nowhere.png") == f"nowhere.png: no such file ({tmp_path}/nowhere.png)."
    )
    assert error_of("nowhere.png") == "nowhere.png: no such file."
    assert "is a folder" in error_of(tmp_path)


def test_open_image_of_float_values():
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    assert (
        np.asarray(open_image(Image.fromarray(values)))[..., 0].tolist()
        == np.rint(values * 255).tolist()
    )
    assert open_image(Image.fromarray(values * 255)).getpixel((7, 7)) == (255, 255, 255)


def test_open_image_refuses_bombs_by_their_header(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(
        bomb_png(12_000, 12_000)
    )  # 144 million pixels in 150 bytes, below Pillow's own guard
    tracemalloc.start()
    message = error_of(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message.startswith("bomb.png: rejected") and "12000x12000" in message
    assert peak < 5_000_000
    assert "claims too many pixels" in error_of(bomb_png(2_000_000, 2_000_000))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_open_image_of_animations(tmp_path, suffix):
    path = tmp_path / f"moving.{suffix}"
    frames = [
        Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))
    ]
    frames[0].save(
        path,
        save_all=True,
        append_images=frames[1:],
        duration=50,
        **({"lossless": True} if suffix == "webp" else {}),
    )
    with Image.open(path) as stored:
        assert stored.n_frames == 3
    assert open_image(path).getpixel((4, 4)) == (250, 0, 0)


def test_open_image_scales_16_bit_grey(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for suffix in ("png", "tiff"):
        path = tmp_path / f"deep.{suffix}"
        Image.fromarray(values).save(path)
        assert np.asarray(open_image(path))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("suffix", ["jpg", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_open_image_applies_exif_rotation(tmp_path, suffix, orientation):
    upright = Image.new("RGB", (32, 16), (255, 255, 255))
    upright.paste((255, 0, 0), (0, 0, 16, 8))  # red corner: top left when upright
    turn = (
        None,
        None,
        "FLIP_LEFT_RIGHT",
        "ROTATE_180",
        "FLIP_TOP_BOTTOM",
        "TRANSPOSE",
        "ROTATE_90",
        "TRANSVERSE",
        "ROTATE_270",
    )[orientation]
    stored = upright if turn is None else upright.transpose(Image.Transpose[turn])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    stored.save(path, exif=exif)
    opened = open_image(path)
    assert opened.size == (32, 16)
    red, green, _ = opened.getpixel((4, 3))
    assert red > 200 and green < 60
    assert min(opened.getpixel((28, 13))) > 200
    assert opened.getexif() == {}


def test_open_image_with_damaged_exif(tmp_path):
    path = tmp_path / "odd.jpg"
    gradient(32, 32).save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert open_image(path).size == (32, 32)


def test_open_image_of_damaged_bytes_raises_image_errors_only():
    rng = np.random.default_rng(0)
    files = []
    for name in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"):
        full = io.BytesIO()
        gradient(24, 20).save(full, name)
        files.append(full.getvalue())
    outcomes = {"opened": 0, "damaged": 0}
    for _ in range(400):
        data = bytearray(files[rng.integers(len(files))])
        for index in rng.integers(0, len(data), rng.integers(1, 12)):
            data[index] = rng.integers(256)
        try:
            assert open_image(bytes(data)).mode == "RGB"
            outcomes["opened"] += 1
        except ImageError as error:
            assert "\n" not in str(error)
            outcomes["damaged"] += 1
    assert min(outcomes.values()) > 20


def test_open_image_of_every_source(tmp_path):
    path = tmp_path / "image.png"
    gradient().save(path)
    with open(path, "rb") as file:
        for source in (
            path,
            str(path),
            path.read_bytes(),
            file,
            gradient(),
            lambda: np.asarray(gradient()),
        ):
            assert open_image(source).tobytes() == gradient().tobytes()
    assert image_size(path) == (12, 8)
    with pytest.raises(ImageError, match="12x8"):
        image_size(path, limits=ImageLimits(max_pixels=95))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.new("L", (4, 4), 77), (77, 77, 77)),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 51)), (204, 204, 204)),
        (Image.new("LA", (4, 4), (0, 0)), (255, 255, 255)),
        (Image.new("RGB", (1, 9000), (5, 6, 7)), (5, 6, 7)),
    ],
)
def test_open_image_of_other_modes(image, expected):
    assert open_image(image).getpixel((0, 0)) == expected


def test_open_image_of_transparent_colours(tmp_path):
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 200, 100, 50])
    assert open_image(image_to_bytes(palette)).getpixel((0, 0)) == (200, 100, 50)
    for image, colour in ((palette, 1), (Image.new("RGB", (4, 4), (1, 2, 3)), (1, 2, 3))):
        assert open_image(image_to_bytes(image, transparency=colour)).getpixel((0, 0)) == (
            255,
            255,
            255,
        )


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_open_image_reduces_large_images(kind, orientation, monkeypatch):
    monkeypatch.setattr(io_module, "MAX_EXACT_PIXELS", 100_000)
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise = np.random.default_rng(5).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    data = image_to_bytes(Image.fromarray(noise).resize((840, 600)), kind, exif=exif)
    reduced = open_image(data, at_least=140)
    full = open_image(data)
    assert sorted(reduced.size) == [150, 210] and sorted(full.size) == [600, 840]
    resize = get_transform(keep_ratio=False, image_size=64).resize
    levels = [np.asarray(resize(image)).astype(float) for image in (reduced, full)]
    assert np.abs(levels[0] - levels[1]).mean() < 1.5


def test_image_to_base64_and_back():
    text = image_to_base64(gradient())
    assert base64.b64decode(text).startswith(b"\x89PNG")
    wrapped = "data:image/png;base64," + "\n".join(
        text[i : i + 40] for i in range(0, len(text), 40)
    )
    for version in (text, wrapped, f"  {text}\n"):
        assert image_from_base64(version).tobytes() == gradient().tobytes()
    for wrong in ("", "not base64!", "aGVsbG8="):
        with pytest.raises(ImageError, match=r"^images\[2\]: .*\.$"):
            image_from_base64(wrong, name="images[2]")
    with pytest.raises(ImageError, match="bytes"):
        image_from_base64("A" * 4000, limits=ImageLimits(max_bytes=2000))


def test_chat_image_and_request_image_sizes():
    assert fit_longer_side(Image.new("RGB", (10_000, 3))).size == (512, 1)
    assert crop_to_aspect(Image.new("RGB", (640, 480)), 1.3).size == (624, 480)
    assert chat_image(Image.new("RGBA", (40, 30))).size == (499, 384)
    assert request_image(Image.new("RGB", (499, 384))).size == (256, 256)
