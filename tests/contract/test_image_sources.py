"""Images, sources × doors: one image is read as the same pixels in each of its forms, by Python,
the command line, HTTP and the page; what cannot be read is named at each door.

A new form is tested by its row, a new door by its test.
"""

import base64
import io
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from urllib.parse import quote

import numpy as np
import pytest
import torch
from PIL import Image
from repository import ROOT
from systems import load

from seed_multimodal.cli.main import main
from seed_multimodal.errors import ImageError
from seed_multimodal.images.io import image_to_bytes, open_image

FILE = ROOT / "images" / "fox_and_snowman.png"
PNG = FILE.read_bytes()
PICTURE = Image.open(FILE).convert("RGB")
PIXELS = np.asarray(PICTURE)
TENSOR = torch.tensor(PIXELS).permute(2, 0, 1)  # as torch's data sets have it
# With "+", "/" and padding in its base64 text.
SMALL = image_to_bytes(PICTURE.crop((0, 0, 31, 40)))


@pytest.fixture(scope="module")
def client(nano):
    from seed_multimodal.serving.app import create_app

    return create_app(nano).test_client()


def unseekable(data: bytes):
    """As `sys.stdin.buffer` of a pipe."""
    reader, writer = os.pipe()
    threading.Thread(target=lambda: open(writer, "wb").write(data), daemon=True).start()
    return open(reader, "rb", buffering=0)


# ---- forms of an image

OBJECTS: dict = {
    "path": FILE,
    "name": str(FILE),
    "file URL": f" FILE://localhost{str(FILE).replace('o', '%6f')}",
    "bytes": PNG,
    "bytearray": bytearray(PNG),
    "memoryview": memoryview(PNG),
    "open file": open(FILE, "rb"),  # noqa: SIM115
    "unseekable file": unseekable(PNG),
    "PIL": PICTURE,
    "PIL, not yet decoded": Image.open(FILE),
    "function": lambda: PIXELS,
    "array": PIXELS,
    "array of a batch": PIXELS[None],
    "array of a list": PIXELS.astype(np.int64),
    "array of 16 bits": PIXELS.astype(np.uint16) * 257,
    "array of floats to 1": PIXELS / 255,
    "array of floats to 255": PIXELS.astype(np.float32),
    "tensor": TENSOR,
    "tensor of a batch": TENSOR[None],
    "tensor of floats": (TENSOR / 255).requires_grad_(),
}
GREY = np.array([[0.0, 0.5, 1.0, np.nan, 0.0]])
LEVELS = np.array([[[0] * 3, [128] * 3, [255] * 3, [0] * 3, [0] * 3]])
DEPTHS: dict = {
    "floats to 1": GREY,
    "floats to 255": GREY * 255,
    "half floats": GREY.astype(np.float16),
    "bfloat16": torch.tensor(GREY, dtype=torch.bfloat16),
    "a resampled image": GREY + [[-0.4, 0, 1, 0, 0]],
    "resampled integers": np.array([[-9, 128, 300, 0, 0]], np.int16),
    "one channel": GREY[..., None],
    "one channel first": torch.tensor(GREY)[None],
    "infinite": np.array([[-np.inf, 0.5, np.inf, np.nan, 0]]),
    "a float image": Image.fromarray(GREY.astype(np.float32)),
    "16 bits": np.array([[0, 32768, 65535, 0, 0]], np.uint16),
    "32 bits": np.array([[0, 2**31, 2**32 - 1, 0, 0]], np.uint32),
    "an image of 16 bits": Image.fromarray(np.array([[0, 32896, 65535, 0, 0]], np.uint16)),
    "premultiplied grey": Image.fromarray(LEVELS[..., 0].astype(np.uint8))
    .convert("LA")
    .convert("La"),
    "an image of integers": Image.fromarray(LEVELS[..., 0].astype(np.int32)),
}
BASE64 = base64.b64encode(SMALL).decode()
assert {"+", "/", "="} <= {*BASE64}
TEXTS = {
    "base64": BASE64,
    "base64 without padding": BASE64.rstrip("="),
    "base64 for URLs": base64.urlsafe_b64encode(SMALL).decode(),
    "base64 in lines": f"  {base64.encodebytes(SMALL).decode()}",
    "data URL": f"data:image/png;base64,{BASE64}",
    "capitals": f"DATA:IMAGE/PNG;BASE64,{BASE64}",
    "no type": f"data:;base64,{BASE64}",
    "half a type": f"data:image;base64,{BASE64}",
    "another type": f"data:application/octet-stream;base64,{BASE64}",
    "parameters": f"data:image/png;charset=utf-8;name=my%20photo(1).png;base64,{BASE64}",
    "blanks": f" data:image/png; base64, {BASE64}\n",
    "data URL without padding": f"data:image/png;base64,{BASE64.rstrip('=')}",
    "data URL for URLs": f"data:image/png;base64,{base64.urlsafe_b64encode(SMALL).decode()}",
    "percents": f"data:image/png;base64,{quote(BASE64, safe='')}",
    "no base64": f"data:image/png,{quote(SMALL)}",
}
TABLES = [(OBJECTS, PIXELS), (DEPTHS, LEVELS), (TEXTS, PIXELS[:40, :31])]
FORMS = {name: (source, pixels) for forms, pixels in TABLES for name, source in forms.items()}


@pytest.mark.parametrize("source, pixels", FORMS.values(), ids=FORMS)
def test_open_image_of_every_form(source, pixels):
    # A wrong range is a black or white image. A conversation reads its images again at each turn.
    for _ in range(2):
        assert np.array_equal(open_image(source).image, pixels)


def test_open_image_of_a_reader_without_weak_references():
    # As open files of libraries in C.
    class Reader:
        __slots__ = ("read",)

        def __init__(self):
            self.read = io.BytesIO(PNG).read

    assert np.array_equal(open_image(Reader()).image, PIXELS)


@pytest.mark.slow
def test_systems_read_forms(nano):
    contents = ([FILE, unseekable(PNG), TENSOR[None]], [PICTURE] * 3)
    codes, expected = map(nano.tokenize, contents)
    assert torch.equal(codes, expected)
    answers = [nano.chat([{"role": "user", "content": content}]).ids for content in contents]
    assert answers[0] == answers[1]
    # What `tokenize` returns goes into `reconstruct`, also as smaller numbers.
    images = nano.reconstruct(codes, num_inference_steps=2)
    for rows in (codes.int(), codes.numpy().astype(">u2"), codes.tolist()):
        assert nano.reconstruct(rows, num_inference_steps=2) == images


def test_open_image_in_any_byte_order():
    dark = PIXELS // 2
    assert open_image(dark.astype(">u2")).image == open_image(dark.astype("<u2")).image


@pytest.mark.parametrize("name", ["fox", "whale", "banana", "castle", "two_crabs"])
def test_open_image_of_enlarged_floats(name):
    # Bicubic values lie outside of the range; a single one must not make a black image.
    levels = np.array(Image.open(ROOT / "images" / f"{name}.png").convert("RGB"))
    pixels = torch.tensor(levels / 255).permute(2, 0, 1)[None]
    for size in (48, 100, 224, 333):
        (enlarged,) = torch.nn.functional.interpolate(pixels, size=size, mode="bicubic")
        assert open_image(enlarged).image == open_image(enlarged.clamp(0, 1)).image


class SlowFile(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        time.sleep(0)  # other threads go on
        return super().read(min(size or 0, 5000))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_open_image_of_a_source_that_threads_share(kind):
    # Half-decoded images give other codes without an error.
    data = image_to_bytes(PICTURE.resize((800, 500)), kind)
    for shared in (Image.open(io.BytesIO(data)), SlowFile(data)):
        with ThreadPoolExecutor(12) as pool:
            images = [*pool.map(open_image, [shared] * 12)]
        assert images == [open_image(data)] * 12


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "BMP"])
def test_open_image_of_a_closed_image(kind):
    for close in ("close", "__exit__"):
        image = Image.open(io.BytesIO(image_to_bytes(PICTURE, kind)))
        getattr(image, close)()
        with pytest.raises(ImageError, match="closed before it was read"):
            open_image(image)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_images_of_the_caller_stay_as_they_are(kind):
    # Who saves his large photo after `describe` must not save a thumbnail.
    data = image_to_bytes(Image.new("RGB", (4400, 3000), "red"), kind)
    photo = Image.open(io.BytesIO(data))
    opened = open_image(photo, at_least=64)
    assert opened.image.size == (550, 375) and opened.size == photo.size == (4400, 3000)


@pytest.mark.slow
def test_boxes_are_in_pixels_of_the_file(tmp_path):
    # Of a phone's photo the model sees a small copy.
    system = load("nano-x")
    shares = []
    for side in (1000, 4000):
        PICTURE.resize((side, side)).save(tmp_path / "large.png")
        found = system.detect(str(tmp_path / "large.png"), "the fox")
        assert found.image.size == found.drawn().size == (side, side)
        shares.append([round(edge / side, 1) for edge in found.boxes[0]])
    assert shares[0] == shares[1]


# ---- doors of texts


def tokens(client, *texts: str):
    return client.post("/v1/images/tokens", json={"images": texts})


def ask(client, *urls: str):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    body = {"messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 8}
    return client.post("/v1/chat/completions", json=body)


def edit(client, file: bytes):
    body = {"prompt": "Put it at night.", "seed": 1, "image": (io.BytesIO(file), "a.png")}
    return client.post("/v1/images/edits", data=body)


@pytest.mark.slow
def test_http_reads_text(nano, client):
    (codes,) = nano.tokenize(SMALL).tolist()
    assert tokens(client, *TEXTS.values()).json["data"] == [{"codes": codes}] * len(TEXTS)
    urls = [*TEXTS.values()][::4]
    answers = [ask(client, *texts).json["choices"] for texts in (urls, [TEXTS["data URL"]] * 4)]
    assert answers[0][0]["message"] == answers[1][0]["message"]


def test_the_command_line_reads_text_pipes_and_standard_input(nano, tmp_path, monkeypatch, capsys):
    # `curl … | seed tokenize -`; a bad image ends neither the batch nor what a pipe has.
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(unseekable(SMALL)))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_bytes, args=(SMALL,), daemon=True).start()
    good = ["-", str(pipe), *TEXTS.values()]
    bad = ["nowhere.png", "data:image/png;base64," + "A" * 5000]
    assert main(["tokenize", "--json", *good[:2], *bad, *good[2:]]) == 1
    output = capsys.readouterr()
    records = [json.loads(line) for line in output.out.splitlines()]
    assert [record["image"] for record in records] == good
    (codes,) = nano.tokenize(SMALL).tolist()
    assert all(record["codes"] == codes for record in records)
    # Errors name a file, and do not repeat a text of megabytes.
    assert "nowhere.png" in output.err and "A" * 100 not in output.err


# ---- files, at every door

QUANTISED = PICTURE.quantize(64).convert("RGB")
FORMATS = "PNG GIF BMP TIFF WEBP JPEG PPM AVIF".split()


def upload(file) -> Image.Image:
    """What the page sends of an uploaded file."""
    from seed_multimodal.serving.chat_session import ChatSession

    model = SimpleNamespace(card=SimpleNamespace(keeps_aspect=True))
    picture = ChatSession([model], model).store_upload(model, str(file))
    return open_image(picture.url).image


@pytest.mark.slow
def test_every_door_reads_files(nano, client, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    files = [tmp_path / kind for kind in FORMATS]
    for file in files:
        # An animation gives its first frame.
        is_animation = file.name in ("GIF", "WEBP")
        options = {"save_all": is_animation, "append_images": [PICTURE], "lossless": True}
        QUANTISED.save(file, file.name, **options)
        image = open_image(file).image
        assert image == QUANTISED or file.name in ("JPEG", "AVIF"), file
        assert upload(file) == image, file
    codes = [{"codes": row} for row in nano.tokenize(files).tolist()]
    texts = [base64.b64encode(file.read_bytes()).decode() for file in files]
    assert tokens(client, *texts).json["data"] == codes
    png, *others = [edit(client, file.read_bytes()).json["data"] for file in files[:3]]
    assert others == [png] * 2


# ---- what cannot be read

# Content of a file → what an error names besides the file.
NO_IMAGES = {
    "empty": (b"", "0 bytes"),
    "text": (b"hello", "hello"),
    "an error": (b'{"error": "not found"}', "not found"),
    "an HTML page": (b"\n<!DOCTYPE html><html>", "HTML"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 99, "HEIC"),
    "SVG": (b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- x -->\n<svg xmlns=''/>", "SVG"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3", "PDF"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
    "JPEG XL": (b"\xff\x0a\xfa\x1f\x01", "JPEG XL"),
    "a video": (b"\0\0\0\x18ftypisom\0\0\2\0", "video"),
    "zeros": (bytes(5000), "zeros"),
    "a torn image": (PNG[:3000], "truncated"),
    "a torn header": (PNG[:8], "header"),
    "noise": (bytes(range(250, 100, -1)), "PNG"),
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_every_door_names_what_is_no_image(nano, client, name, tmp_path, monkeypatch):
    content, named = NO_IMAGES[name]
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    file = tmp_path / "cat.jpg"
    file.write_bytes(content)
    for read in (upload, lambda file: nano.describe([FILE, file])):
        with pytest.raises(ImageError, match=named) as raised:
            read(file)
        assert "cat.jpg" in str(raised.value)
    url = f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
    for response in (ask(client, url), edit(client, content)):
        assert response.status_code == 400 and named in response.json["error"]["message"]


WRONG: dict = {
    "nothing": None,
    "a number": 5,
    "no name": "",
    "an address": "https://host/a.png",
    "a missing file": "no/such/file.png",
    "a damaged data URL": "data:image/png;base64,ab!c",
    "a null byte": "a\0b",
    "a text": io.StringIO("text"),
    "a file opened as text": io.TextIOWrapper(io.BytesIO(PNG)),
    "one axis": np.zeros(5),
    "five channels": np.zeros((6, 6, 5)),
    "a batch": np.zeros((2, 4, 4, 3), np.uint8),
    "no pixels": np.zeros((0, 4, 3), np.uint8),
    "letters": np.full((4, 4), "x"),
    "normalised to -1…1": np.array([[-1.0, 1.0]]),
    "normalised for CLIP": np.array([[-0.3, 2.15]]),
    "codes as floats": np.array([[3.0, 8000.0]]),
    "no finite number": np.array([[np.nan, np.inf]]),
    "an outlier of floats": np.append(np.linspace(0, 1, 200), 2.5)[None],
    "an outlier of integers": np.append(np.arange(200), 511)[None],
    "a file of another machine": "file://host/a.png",
    "a folder": str(ROOT),
    "a broken array": SimpleNamespace(__array__=5),
    "a broken file": SimpleNamespace(read=5),
    "a broken function": lambda: 1 / 0,
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_image_is_an_image_error(name):
    # One bad item must not end the others with a traceback.
    with pytest.raises(ImageError) as raised:
        open_image(WRONG[name])
    if name == "five channels":
        assert "[6, 6, 5]" in str(raised.value) and "float64" in str(raised.value)
    if name == "no name":
        assert "empty" in str(raised.value)  # not the current directory


def test_heif_is_read_where_a_plugin_is_registered(monkeypatch):
    # As `pillow_heif.register_heif_opener()` does.
    content, _ = NO_IMAGES["HEIC"]

    def accept(prefix):
        return prefix[4:12] == b"ftypheic"

    monkeypatch.setitem(Image.OPEN, "HEIF", (lambda file, name: PICTURE.copy(), accept))
    monkeypatch.setattr(Image, "ID", [*Image.ID, "HEIF"])
    assert open_image(content).image == PICTURE
