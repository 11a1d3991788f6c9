"""Pictures become RGB strip by strip and are reduced while they are decoded: the same pixels, little memory."""

from __future__ import annotations

import functools
import io
import re
import struct
import subprocess
import time

import numpy as np
import pytest
import warm_python
from PIL import Image

from seed_multimodal.errors import ImageError
from seed_multimodal.images import rgb
from seed_multimodal.images.open import ImageLimits, image_header, open_image
from seed_multimodal.images.transforms import get_transform

RNG = np.random.default_rng(5)


def stored(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@functools.cache
def photo(width: int, height: int) -> Image.Image:
    """A picture with detail at several scales."""
    canvas = Image.new("RGB", (width, height))
    for size in (8, 32, 128):
        noise = Image.fromarray(RNG.integers(0, 255, (size, size, 3), dtype=np.uint8)).resize((width, height))
        canvas = Image.blend(canvas, noise, 0.5)
    return canvas


def of_every_mode() -> list[Image.Image]:
    grey = RNG.integers(0, 255, (37, 23), dtype=np.uint8)
    colour = Image.fromarray(RNG.integers(0, 255, (37, 23, 4), dtype=np.uint8))
    keyed = colour.convert("RGB")
    keyed.info["transparency"] = keyed.getpixel((3, 30))
    palette = colour.convert("RGB").quantize(16)
    palette.info["transparency"] = 3
    deep = RNG.integers(0, 65535, (37, 23), dtype=np.uint16)
    plain = [colour.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "RGBa")]
    return [*plain, keyed, palette, keyed.convert("HSV"), colour.convert("P").convert("PA"), Image.fromarray(grey),
            Image.fromarray(deep), Image.fromarray(deep.astype(np.int32) * 3 - 70_000),
            Image.fromarray(deep.astype(np.float32) - 9)]


@pytest.mark.parametrize("number", range(len(of_every_mode())))
def test_strips_change_nothing(monkeypatch, number) -> None:
    image = of_every_mode()[number]
    whole = rgb.to_rgb(image)
    monkeypatch.setattr(rgb, "STRIP_PIXELS", 60)  # two rows a strip
    assert np.array_equal(np.asarray(rgb.to_rgb(image)), np.asarray(whole)) and whole.info == {}
    halved = np.asarray(rgb.to_rgb(image, 4))
    assert halved.shape == (10, 6, 3) and np.array_equal(halved, np.asarray(whole.reduce(4)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_ordinary_pictures_are_never_reduced(kind) -> None:
    data = stored(photo(600, 500), kind)
    assert open_image(data, at_least=100).tobytes() == open_image(data).tobytes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_large_pictures_are_reduced_and_still_show_the_same(kind, orientation) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = stored(photo(1600, 1200), kind, exif=exif)
    reduced = open_image(data, at_least=400, exact_up_to=1_000_000)
    assert sorted(reduced.size) == [600, 800]
    transform = get_transform(keep_ratio=False)
    levels = [np.asarray(transform.resize(one)).astype(float) for one in (reduced, open_image(data))]
    difference = np.abs(levels[0] - levels[1])
    assert difference.mean() < 1.5 and difference.max() <= 16  # of 255; the picture is half noise


PEAK = """
import io, re, sys
from PIL import Image
from seed_multimodal.images.open import open_image
def kb(key): return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
data = open(sys.argv[1], "rb").read()
open_image(open(sys.argv[2], "rb").read())
open("/proc/self/clear_refs", "w").write("5")
before = kb("VmRSS")
size = open_image(data, at_least=672).size
print(kb("VmHWM") - before, *size)
"""


@pytest.mark.process
def test_a_large_picture_in_a_small_file_takes_little_memory(tmp_path) -> None:
    """96 megapixels in 11 kB: one byte a pixel while it is decoded; 690 MB before."""
    Image.new("1", (9600, 10_000)).save(tmp_path / "bomb.png")
    Image.new("1", (8, 8)).save(tmp_path / "small.png")
    assert (tmp_path / "bomb.png").stat().st_size < 13_000
    said = subprocess.run([warm_python.PYTHON, "-c", PEAK, str(tmp_path / "bomb.png"), str(tmp_path / "small.png")],
                          capture_output=True, text=True, timeout=120, check=True).stdout
    kilobytes, *size = map(int, said.split())
    assert size == [1200, 1250] and kilobytes < 130_000


def test_the_memory_of_decoding_is_known_from_the_header() -> None:
    picture = Image.new("RGB", (600, 500))
    small = {kind: image_header(stored(picture, kind)).memory / 300_000 for kind in ("PNG", "JPEG", "WEBP", "TIFF")}
    assert small["PNG"] == small["JPEG"] == 8 and small["TIFF"] <= 12 and small["WEBP"] > 20
    assert image_header(stored(picture, "JPEG", progressive=True)).memory / 300_000 == 11
    assert image_header(stored(picture, "JPEG", progressive=True, subsampling=0)).memory / 300_000 == 14
    assert image_header(stored(picture.convert("1"))).memory / 300_000 == 5
    with pytest.raises(ImageError) as caught:
        open_image(stored(picture), name="big", limits=ImageLimits(max_memory=1_000_000))
    assert "big: refused unread" in str(caught.value) and "about 2 MB of memory (limit: 1 MB)" in str(caught.value)


@pytest.mark.parametrize(("kind", "advice"), [
    ("JPEG", "; make it smaller."), ("PNG", "; make it smaller."),
    ("WEBP", "; make it smaller, or store it as a baseline JPEG.")])
def test_open_image_advice_for_too_much_memory(kind: str, advice: str) -> None:
    pixels = 600 * 500
    limit = pixels * (10 if kind == "WEBP" else 7)  # a JPEG takes 8 bytes a pixel
    with pytest.raises(ImageError) as caught:
        open_image(stored(Image.new("RGB", (600, 500)), kind), limits=ImageLimits(max_memory=limit))
    assert str(caught.value).endswith(advice)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_picture_opened_by_pillow_is_read_as_its_file(loaded) -> None:
    for kind, options in (("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {})):
        data = stored(photo(600, 500), kind, **options)
        opened = Image.open(io.BytesIO(data))
        if loaded:
            opened.load()
        assert open_image(opened).tobytes() == open_image(data).tobytes()


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded() -> None:
    """Each scan costs a pass over the picture: 100,000 of 40 bytes took 10 s at 0.8 megapixels."""
    whole = stored(photo(600, 500), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    began = time.perf_counter()
    with pytest.raises(ImageError, match="^many: refused unread, because it is a JPEG of more than 200 scans"):
        open_image(whole[:last] + whole[last:-2][:40] * 100_000, name="many")
    assert time.perf_counter() - began < 1
    assert open_image(whole + b"\xff\xda" * 1000).size == (600, 500)  # what stands behind the end is no scan


def test_a_tile_larger_than_its_picture_is_counted() -> None:
    """A TIFF of 16 x 16 pixels in one tile of 20,000 x 20,000: a decoder's buffer of 400 MB."""
    entries = [(256, 3, 16), (257, 3, 16), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1), (322, 3, 20_000),
               (323, 3, 20_000), (324, 4, 8), (325, 4, 4)]
    body = b"".join(struct.pack("<HHIHH" if kind == 3 else "<HHII", tag, kind, 1, value, *([0] if kind == 3 else []))
                    for tag, kind, value in entries)
    data = struct.pack("<2sHI", b"II", 42, 8) + struct.pack("<H", len(entries)) + body + struct.pack("<I", 0)
    assert image_header(data).memory > 400_000_000


def test_a_large_frame_in_an_icon_is_refused_before_it_is_decoded() -> None:
    inner = stored(Image.new("1", (4000, 4000)))
    icon = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22) + inner
    with pytest.raises(ImageError, match=re.escape("icon: refused unread, because its header claims 4000x4000")):
        image_header(icon, name="icon", limits=ImageLimits(max_pixels=1_000_000))
