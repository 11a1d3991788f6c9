"""JPEGs of all kinds, whole and damaged: the pixels, or the refusal, of Pillow's own decoder."""

import io
import random
import warnings

import pytest
from PIL import ExifTags, Image

from seed_multimodal.errors import ImageError, first_line
from seed_multimodal.images.io import StoredImage, open_image

TURNS = (
    "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
).split()  # by EXIF orientation, from 2 on
MAX_PIXELS = 10_000_000  # damaged headers may claim more, which takes seconds to decode
PROFILE = bytes(range(256)) * 3
SOF = (b"\xff\xc0", b"\xff\xc1", b"\xff\xc2")


# ---- files


def saved(rng: random.Random, max_side: int) -> bytes:
    """A JPEG of random size, colours and encoding; a small one more often than a large one."""
    mode = rng.choice(["RGB", "RGB", "RGB", "L", "CMYK"])
    width, height = (max(1, round(max_side ** rng.random())) for _ in range(2))
    noise = rng.randbytes(5 * 7 * len(mode))
    image = Image.frombytes(mode, (5, 7), noise)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    options = {
        "quality": rng.randint(1, 100),
        "progressive": rng.random() < 0.3,
        "optimize": rng.random() < 0.3,
        "restart_marker_blocks": rng.choice([0, 0, 1, 5]),
        "comment": rng.choice([b"", b"a comment", rng.randbytes(900)]),
    }
    if mode != "L":
        options["subsampling"] = rng.choice(["4:4:4", "4:2:2", "4:2:0"])
    if mode == "RGB" and rng.random() < 0.1:
        options |= {"keep_rgb": True, "subsampling": "4:4:4"}
    if rng.random() < 0.4:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = rng.randint(1, 8)
        options["exif"] = exif
    if rng.random() < 0.2:
        options["icc_profile"] = PROFILE
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def header(data: bytes) -> int:
    """Where the frame header begins."""
    return next((data.find(start) for start in SOF if start in data), 0)


def with_byte(data: bytes, position: int, value: int) -> bytes:
    return data[:position] + bytes([value]) + data[position + 1 :]


def inserted(data: bytes, marker: int, body: bytes) -> bytes:
    """With another segment at its beginning."""
    segment = bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body
    return data[:2] + segment + data[2:]


def adobe(transform: int) -> bytes:
    return b"Adobe\0\x64\0\0\0\0" + bytes([transform])


def without_adobe(data: bytes, rng: random.Random) -> bytes:
    start = data.find(b"\xff\xee\0\x0eAdobe")
    return data if start < 0 else data[:start] + data[start + 16 :]


def flipped(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice([1, 3, 20])):
        position = rng.randrange(len(data))
        data = with_byte(data, position, data[position] ^ 1 << rng.randrange(8))
    return data


def resampled(data: bytes, rng: random.Random) -> bytes:
    """4:2:2 as 4:4:0 and 4:2:0 as 4:1:1, which have as many blocks: another valid picture."""
    position = header(data) + 11
    return with_byte(data, position, {0x21: 0x12, 0x22: 0x41}.get(data[position], 0x11))


# What is done to a file; each is a kind of JPEG that some decoder reads otherwise.
CHANGES = {
    "none": lambda data, rng: data,
    "truncated": lambda data, rng: data[: rng.randrange(len(data))],
    "a few bytes short": lambda data, rng: data[: -rng.randint(1, 9)],
    "flipped bits": flipped,
    "piece removed": lambda data, rng: data[: len(data) // 2] + data[len(data) // 2 + 7 :],
    "4:4:0 and 4:1:1": resampled,
    "no Adobe marker": without_adobe,
    "Adobe marker": lambda data, rng: inserted(data, 0xEE, adobe(rng.randrange(4))),
    "12 bits": lambda data, rng: with_byte(data, header(data) + 4, 12),
    "arithmetic coding": lambda data, rng: with_byte(data, header(data) + 1, 0xC9),
    "lossless": lambda data, rng: with_byte(data, header(data) + 1, 0xC3),
    "components": lambda data, rng: with_byte(data, header(data) + 9, rng.randint(0, 5)),
    "height of zero": lambda data, rng: (
        data[: header(data) + 5] + b"\0\0" + data[header(data) + 7 :]
    ),
    "two frame headers": lambda data, rng: inserted(data, 0xC0, b"\x08\0\x08\0\x08\x01\x01\x11\0"),
    "garbage at the end": lambda data, rng: data + rng.randbytes(rng.randint(1, 3000)),
    "two images": lambda data, rng: data + saved(rng, 20),
    "thumbnail": lambda data, rng: inserted(data, 0xE1, b"Exif\0\0" + saved(rng, 20)),
    "fill bytes": lambda data, rng: data[:2] + b"\xff" * rng.randint(1, 5) + data[2:],
    "zeros after a segment": lambda data, rng: inserted(data, 0xFE, b"x")[:7] + b"\0\0" + data[2:],
}


def jpeg(rng: random.Random, change: str, max_side: int) -> bytes:
    data = CHANGES[change](saved(rng, max_side), rng)
    try:
        width, height = Image.open(io.BytesIO(data)).size
    except Exception:  # noqa: BLE001
        return data
    return data if width * height <= MAX_PIXELS else b"\xff\xd8\xff\xd9"


# ---- the property


def by_pillow(data: bytes) -> tuple[tuple[int, int], bytes] | str:
    """Size and pixels, or why there are none."""
    try:
        image = Image.open(io.BytesIO(data))
    except Exception:  # noqa: BLE001
        return "damaged header"
    try:
        image.load()
    except Exception as error:  # noqa: BLE001
        return f"image: the image is truncated or damaged ({first_line(error)})."
    try:
        orientation = int(image.getexif().get(ExifTags.Base.Orientation) or 1)
    except Exception:  # noqa: BLE001
        orientation = 1
    plain = image.convert("RGB")
    if orientation in range(2, 9):
        plain = plain.transpose(Image.Transpose[TURNS[orientation - 2]])
    return plain.size, plain.tobytes()


def by_us(data: bytes) -> tuple[tuple[int, int], bytes] | str:
    try:
        stored = StoredImage(data)
    except ImageError:
        return "damaged header"
    try:
        image = stored.decode()
    except ImageError as error:
        return str(error)
    assert type(image) is Image.Image and image.mode == "RGB"
    assert not image.info and not image.getexif()
    return image.size, image.tobytes()


NIGHTLY = pytest.mark.nightly, pytest.mark.timeout(900)


@pytest.mark.parametrize("count, max_side", [(228, 400), pytest.param(2014, 3000, marks=NIGHTLY)])
def test_open_image_of_jpegs_as_pillow(count, max_side):
    # A faster decoder must not change the codes of a single image, nor accept a damaged one.
    changes = sorted(CHANGES)
    refused = 0
    for case in range(count):
        change = changes[case % len(changes)]
        data = jpeg(random.Random(case), change, max_side)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata
            expected = by_pillow(data)
            assert by_us(data) == expected, f"case {case}: {change}"
        refused += isinstance(expected, str)
    assert count // 8 < refused < count // 2


@pytest.mark.parametrize("orientation", [1, 6])
def test_opened_image_may_be_changed(orientation):
    # A caller that draws on an image changes neither its source nor what is opened next.
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    Image.new("RGB", (16, 8), (200, 10, 10)).save(file, "JPEG", exif=exif)
    sources = file.getvalue(), file, Image.open(file), Image.new("RGB", (4, 4))
    for source in sources:
        first = open_image(source).image
        pixels = first.tobytes()
        first.paste((0, 0, 255), (0, 0, 4, 4))
        first.load()[0, 0] = (0, 255, 0)
        assert first.tobytes() != pixels
        assert open_image(source).image.tobytes() == pixels
