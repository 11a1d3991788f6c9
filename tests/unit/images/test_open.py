"""Opening pictures: every odd but valid file comes out right, every bad one is refused in a sentence with its name."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seed_multimodal.errors import ImageError
from seed_multimodal.images.open import ImageLimits, open_image


def gradient(width: int = 12, height: int = 8) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 20, y * 30, (x + y) * 10], axis=-1).astype(np.uint8))


def bomb_png(width: int, height: int) -> bytes:
    """A true PNG header that claims width x height pixels, followed by almost no data."""
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100))
            + chunk(b"IEND", b""))


def refusal(source: object, **kwargs: object) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(source, **kwargs)  # type: ignore[arg-type]
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence
    return sentence


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "ppm"])
def test_lossless_formats_keep_their_pixels(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture.{suffix}"
    gradient().save(path, **({"lossless": True} if suffix == "webp" else {}))
    opened = open_image(path)
    assert opened.mode == "RGB" and opened.info == {}
    assert np.array_equal(np.asarray(opened), np.asarray(gradient()))


def test_bytes_path_string_and_pil_agree(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    gradient().save(path)
    images = [open_image(source) for source in (path, str(path), path.read_bytes(), gradient())]
    assert all(image.tobytes() == gradient().tobytes() for image in images)


@pytest.mark.parametrize("content", [b"hello, I am text", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0",
                                     b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_not_a_picture(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cat.jpg"
    path.write_bytes(content)
    assert refusal(path).startswith("cat.jpg: ")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp", "tiff"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_truncated(tmp_path: Path, suffix: str, share: float) -> None:
    whole = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole, format={"jpg": "JPEG"}.get(suffix, suffix.upper()))
    path = tmp_path / f"half.{suffix}"
    path.write_bytes(whole.getvalue()[:int(len(whole.getvalue()) * share)])
    assert refusal(path).startswith(f"half.{suffix}: ")


def test_empty_missing_folder_and_odd_paths(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    assert refusal(tmp_path / "empty.png") == "empty.png: the file is empty (0 bytes)."
    assert refusal(b"", name="upload 1") == "upload 1: the file is empty (0 bytes)."
    assert refusal(tmp_path / "nowhere.png") == f"nowhere.png: there is no such file ({tmp_path}/nowhere.png)."
    assert refusal("nowhere.png") == "nowhere.png: there is no such file."
    assert refusal("a/b.png", name="list.json: item 1: a/b.png") == "list.json: item 1: a/b.png: there is no such file."
    assert "this is a folder" in refusal(tmp_path)
    assert refusal("with a null\0byte.png")


def test_bomb_is_refused_from_its_header(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb_png(12_000, 12_000))  # 144 million pixels in 150 bytes, below Pillow's own guard
    tracemalloc.start()
    sentence = refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sentence.startswith("bomb.png: refused unread") and "12000x12000" in sentence
    assert peak < 5_000_000
    assert refusal(bomb_png(2_000_000, 2_000_000), name="huge").startswith("huge: refused unread")
    assert "12000x12000" in refusal(Image.new("1", (12_000, 12_000)))


def test_limits_are_adjustable(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    gradient(40, 10).save(path)
    assert "400 pixels" not in refusal(path, limits=ImageLimits(max_pixels=399))
    assert open_image(path, limits=ImageLimits(max_pixels=400)).size == (40, 10)
    assert "40x10" in refusal(path, limits=ImageLimits(max_side=39))
    size = path.stat().st_size
    assert f"{size} bytes" in refusal(path, limits=ImageLimits(max_bytes=size - 1))
    assert open_image(path, limits=ImageLimits(max_bytes=size)).size == (40, 10)


def test_a_frame_larger_than_the_header_says_is_checked_again() -> None:
    inner = io.BytesIO()
    Image.new("RGB", (300, 300)).save(inner, "PNG")
    body = inner.getvalue()
    ico = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(body), 22) + body
    assert "300x300" in refusal(ico, name="icon.ico", limits=ImageLimits(max_pixels=256))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_animation_gives_its_first_frame(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"moving.{suffix}"
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50,
                   **({"lossless": True} if suffix == "webp" else {}))
    with Image.open(path) as stored:
        assert stored.n_frames == 3
    assert open_image(path).getpixel((4, 4)) == (250, 0, 0)


def test_cmyk(tmp_path: Path) -> None:
    path = tmp_path / "print.jpg"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path, quality=100)
    red, green, blue = open_image(path).getpixel((8, 8))
    assert red > 240 and green < 15 and blue < 15


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for suffix in ("png", "tiff"):
        path = tmp_path / f"deep.{suffix}"
        Image.fromarray(values).save(path)
        assert np.asarray(open_image(path))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_integer_and_float_images() -> None:
    wide = Image.fromarray(np.array([[-100, 0, 100_000]], dtype=np.int32))
    assert np.asarray(open_image(wide))[0, [0, 2], 1].tolist() == [0, 255]
    unit = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert np.asarray(open_image(unit))[0, :, 2].tolist() == [0, 128, 255]
    odd = Image.fromarray(np.array([[np.nan, -2.0, 2.0]], dtype=np.float32))
    assert np.asarray(open_image(odd))[0, :, 0].tolist() == [128, 0, 255]


def test_palette_bilevel_and_grey(tmp_path: Path) -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.save(tmp_path / "palette.gif")
    assert open_image(tmp_path / "palette.gif").getpixel((0, 0)) == (200, 100, 50)
    Image.new("1", (4, 4), 1).save(tmp_path / "bilevel.png")
    assert open_image(tmp_path / "bilevel.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("L", (4, 4), 77).save(tmp_path / "grey.png")
    assert open_image(tmp_path / "grey.png").getpixel((0, 0)) == (77, 77, 77)


def test_alpha_lies_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("RGBA", (4, 4), (0, 0, 0, 51)).save(tmp_path / "faint.png")
    assert open_image(tmp_path / "faint.png").getpixel((0, 0)) == (204, 204, 204)
    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "la.png")
    assert open_image(tmp_path / "la.png").getpixel((0, 0)) == (255, 255, 255)


def test_transparent_colour_of_a_palette_or_rgb_file(tmp_path: Path) -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 200, 100, 50])
    palette.save(tmp_path / "see_through.png", transparency=1)
    assert open_image(tmp_path / "see_through.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "keyed.png", transparency=(1, 2, 3))
    assert open_image(tmp_path / "keyed.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path: Path, suffix: str, orientation: int) -> None:
    upright = Image.new("RGB", (32, 16), (255, 255, 255))
    upright.paste((255, 0, 0), (0, 0, 16, 8))  # red corner: top left when seen the right way up
    turns = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
             4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
             7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}
    stored = upright if turns[orientation] is None else upright.transpose(turns[orientation])
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


def test_damaged_exif_does_not_cost_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "odd.jpg"
    gradient(32, 32).save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert open_image(path).size == (32, 32)


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (1, 1), (1, 30_000)])
def test_one_pixel_wide(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "strip.png"
    Image.new("RGB", size, (5, 6, 7)).save(path)
    assert open_image(path).size == size


def test_a_broken_lazy_pil_image_is_refused(tmp_path: Path) -> None:
    whole = io.BytesIO()
    gradient(64, 64).save(whole, "PNG")
    lazy = Image.open(io.BytesIO(whole.getvalue()[:-60]))
    assert refusal(lazy, name="lazy").startswith("lazy: ")


def test_damaged_bytes_never_raise_anything_else() -> None:
    rng = np.random.default_rng(0)
    files = []
    for name in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"):
        whole = io.BytesIO()
        gradient(24, 20).save(whole, name)
        files.append(whole.getvalue())
    outcomes = {"opened": 0, "refused": 0}
    for _ in range(400):
        data = bytearray(files[rng.integers(len(files))])
        for place in rng.integers(0, len(data), rng.integers(1, 12)):
            data[place] = rng.integers(256)
        try:
            assert open_image(bytes(data)).mode == "RGB"
            outcomes["opened"] += 1
        except ImageError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20


def test_a_picture_that_is_drawn_when_it_is_opened() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert np.array_equal(open_image(lambda: pixels), pixels)
    with pytest.raises(ImageError, match="it: an array of float64"):
        open_image(lambda: pixels / 2, name="it")
