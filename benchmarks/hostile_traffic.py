"""Generated hostile requests for `hostile.py`: name -> the bytes to send. Bounded: files of a few MB at most.

    texts()    JSON of wrong types, odd numbers, deep nesting, invalid letters
    pictures() decompression bombs and odd files of every format, in a request each
    wire()     broken and unusual HTTP
"""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

QUESTION = "USER: <image>What is it?\nASSISTANT:"
Case = tuple[str, bytes]


def post(body: bytes, *headers: str, path: str = "/generate", method: str = "POST") -> bytes:
    """An HTTP request with this body."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json",
             f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def ask(text: Any = "USER: hi\nASSISTANT:", images: Any = (), **settings: Any) -> bytes:
    """A request as the server documents it, whatever its values are."""
    return post(json.dumps({"text": text, "images": list(images) if isinstance(images, tuple) else images,
                            "max_new_tokens": 4, **settings}).encode())


def texts(rng: np.random.Generator) -> Iterator[Case]:
    """Requests whose JSON is odd."""
    numbers = [0, -1, 1.5, 1e-45, 1e-38, 1e308, 10**400, 2**31, 2**63, 2**64, True, None, "1", [], {}]
    for field in ("temperature", "top_p", "num_beams", "max_new_tokens", "seed", "force_boi"):
        for value in numbers:
            yield f"{field}={value!r:.30}", ask(**{field: value})
        for word in (b"NaN", b"Infinity", b"-Infinity", b"1e400", b"1" * 5000):
            yield f"{field}={word[:9]!r}", post(b'{"text": "x", "images": [], "%s": %s}' % (field.encode(), word))
    for value in (None, 3, [], {}, True, "", " ", "\0", "<image>", "<image>" * 17, "</s><img_00001>", "<img>" * 300,
                  "\ud800", "\udcff text", "é" * 31_999, "😀" * 31_999, " " * 31_999, "a" * 32_001, "1" * 31_999,
                  "USER: " * 5000, "\u202e\u0000\uffff", "[INST]" * 50):
        yield f"text={value!r:.30}", ask(value)
    for value in (None, 3, "x", {}, [3], [None], [[]], [[0] * 31], [[0.5] * 32], [["0"] * 32], [[True] * 32],
                  [[-1] * 32], [[10**30] * 32], [[0] * 32, "x"], [[[0] * 32]], [[0] * 40_000], ["@@@"], [""], ["é"],
                  ["\ud800"], ["data:image/png;base64,"], ["data:text/html,hi"], [" " * 5_000_000], ["A" * 29_000_000]):
        yield f"images={str(value)[:30]}", ask("<image>" * (len(value) if isinstance(value, list) else 1), value)
    for body in (b"", b"{", b"null", b"[]", b'"x"', b"3", b"\xff\xfe", b'{"text": "\xff", "images": []}',
                 "{}".encode("utf-16"), b"[" * 100_000, b'{"a":' * 100_000, b'{"text":' + b"[" * 60_000,
                 b'{"text": "x", "images": [[' + b"1," * 4_000_000 + b"1]]}", b'"' * 500_000, b'["' + b'\\"' * 200_000,
                 b'{"text": "' + b"\\\\" * 3_000_000 + b'"}', b'{"text": "' + rng.bytes(9999) + b'"}',
                 b'{"' + b"k" * 3_000_000 + b'": 1, "text": "x", "images": []}',
                 b'{"text": "' + b"a" * 6_000_000 + b'", "images": []}'):
        yield f"body {body[:20]!r} of {len(body)}", post(body)


def stored(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def show(*files: bytes) -> bytes:
    """A request that shows these files."""
    return ask("USER: " + "<image>" * len(files) + "What is it?\nASSISTANT:",
               [base64.b64encode(file).decode() for file in files])


def pictures(rng: np.random.Generator, side: int) -> Iterator[Case]:
    """Requests whose pictures are bombs, odd or damaged.

    Args:
        side: of the square that is just within the limit, such as 5600 for 32 megapixels.
    """
    square = (side, side)
    bomb = stored(Image.new("1", square))  # 31 megapixels in 4 kB
    yield "16 one-bit bombs", show(*[bomb] * 16)
    yield "one-bit bomb", show(bomb)
    yield "one-bit bomb, three times too large", show(stored(Image.new("1", (side, 3 * side))))
    for mode in ("L", "LA", "P", "RGB", "RGBA"):
        yield f"PNG {mode} at the limit", show(stored(Image.new(mode, square)))
    yield "PNG of 16 bits", show(stored(Image.fromarray(np.full(square, 999, np.uint16))))
    yield "PNG that claims 2 million squared", show(png(2_000_000, 2_000_000))
    yield "PNG that claims more than it holds", show(png(*square))
    for kind in (b"iTXt", b"zTXt", b"iCCP"):
        yield f"PNG with {kind.decode()} bombs", show(png(8, 8, *[(kind, comment(kind))] * 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = Image.fromarray(rng.integers(0, 255, (256, 256, 3), dtype=np.uint8)).resize(square)
    for name, options in {"turned": {"exif": exif}, "progressive": {"progressive": True},
                          "progressive 4:4:4": {"progressive": True, "subsampling": 0}}.items():
        yield f"JPEG at the limit, {name}", show(stored(noise, "JPEG", quality=30, **options))
    dense = np.zeros((side, side, 3), np.uint8)
    dense[:min(side, 1000)] = rng.integers(0, 255, dense[:min(side, 1000)].shape, dtype=np.uint8)
    large = stored(Image.fromarray(dense), compress_level=1)  # 16 MB for 31 megapixels
    yield "PNG of many pixels and many bytes, and another", show(large, small_picture_in_a_large_file(rng))
    yield "JPEG CMYK", show(stored(noise.convert("CMYK"), "JPEG", quality=30))
    small = stored(noise.resize((900, 900)), "JPEG", progressive=True)
    scan = small.rindex(b"\xff\xda")
    yield "JPEG of 100,000 scans", show(small[:scan] + small[scan:-2][:40] * 100_000)
    frames = [Image.new("P", (side // 2, side // 2), n) for n in range(3)]
    for kind in ("GIF", "WEBP", "TIFF"):
        many = stored(frames[0], kind, save_all=True, append_images=frames[1:])
        yield f"{kind} of several pictures", show(many)
    for kind, longest in {"WEBP": 5600, "AVIF": 1500, "JPEG2000": 3000, "TIFF": 5600}.items():
        for part in (4, 2, 1):
            faint = Image.new("RGBA", (min(longest, side // part), side // part), (9, 99, 199, 99))
            options = {"compression": "tiff_lzw"} if kind == "TIFF" else {}
            if kind in Image.SAVE:
                yield f"{kind} of {faint.width} x {faint.height}", show(stored(faint, kind, **options))
    yield "TIFF in one huge tile", show(tiled_tiff())
    yield "ICO with a bomb inside", show(icon(bomb))
    yield "PPM in letters", show(b"P3 1500 1500 255\n" + b"1 2 3\n" * (1500 * 1500))
    yield "BMP, TGA", show(stored(Image.new("RGB", (900, 900)), "BMP"), stored(Image.new("RGB", (900, 900)), "TGA"))
    yield "thin strips", show(*[stored(Image.new("RGBA", size)) for size in ((1, 30_000), (30_000, 1), (30_000, 900))])
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        whole = bytearray(stored(noise.resize((200, 200)), kind))
        yield f"half a {kind}", show(bytes(whole[:len(whole) // 2]))
        for place in rng.integers(0, len(whole), 20):
            whole[place] = rng.integers(256)
        yield f"damaged {kind}", show(bytes(whole))


def small_picture_in_a_large_file(rng: np.random.Generator) -> bytes:
    """18 MB of which 1.7 MB are the picture."""
    noise = Image.fromarray(rng.integers(0, 255, (800, 700, 3), dtype=np.uint8))
    return stored(noise, "TIFF") + bytes(18 << 20)


def png(width: int, height: int, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG with this header, these chunks and hardly any pixels."""
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *extra,
              (b"IDAT", zlib.compress(b"\0" * 200)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, body) for kind, body in chunks)


def comment(kind: bytes) -> bytes:
    """A megabyte of letters, compressed."""
    start = {b"iTXt": b"k\0\1\0\0\0", b"zTXt": b"k\0\0", b"iCCP": b"k\0\0"}[kind]
    return start + zlib.compress(("a" * 1_000_000 + "😀").encode() if kind == b"iTXt" else b"a" * 1_000_000)


def tiled_tiff() -> bytes:
    """16 x 16 pixels in one tile of 20,000 x 20,000."""
    tile = zlib.compress(bytes(20_000 * 20_000))
    entries = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, 20_000), (323, 20_000), (324, 200),
               (325, len(tile))]
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    head = struct.pack("<2sHI", b"II", 42, 8) + struct.pack("<H", len(entries)) + body + struct.pack("<I", 0)
    return head.ljust(200, b"\0") + tile


def icon(inner: bytes) -> bytes:
    """An icon of 16 x 16 by its header, with another picture inside."""
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22) + inner


def wire(rng: np.random.Generator) -> Iterator[Case]:
    """Requests that are odd HTTP."""
    good = ask()
    body = good.partition(b"\r\n\r\n")[2]
    chunked = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
    yield "chunked", chunked + b"Connection: close\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    megabyte = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
    yield "chunked, over the limit", chunked + b"\r\n" + megabyte * 70 + b"0\r\n\r\n"
    yield "chunked, wrong size", chunked + b"\r\nzz\r\n{}\r\n0\r\n\r\n"
    yield "chunked, negative size", chunked + b"\r\n-1\r\n{}\r\n0\r\n\r\n"
    yield "chunked and a length", chunked + b"Content-Length: 5\r\nConnection: close\r\n\r\n0\r\n\r\n"
    yield "over the limit", post(b" " * (66 << 20))
    for value in ("-1", "1e9", "abc", "99999999999999999999", "5, 6"):
        yield f"length {value}", b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %s\r\n\r\n{}" % value.encode()
    yield "gzip", chunked.replace(b"chunked", b"gzip") + b"\r\n"
    yield "no length", b"POST /generate HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    yield "long header", post(b"{}", "X-Long: " + "x" * 300_000)
    yield "many headers", post(b"{}", *[f"X-{n}: x" for n in range(5000)])
    yield "not HTTP", rng.bytes(3000).replace(b"\r\n", b"") + b"\r\n\r\n"
    yield "TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.bytes(500) + b"\r\n\r\n"
    yield "lower case", b"get / http/1.1\r\n\r\n"
    yield "two requests at once", good.replace(b"Connection: close", b"Connection: keep-alive") + good
    yield "expects", post(body, "Expect: 100-continue")
    yield "not JSON by its type", good.replace(b"application/json", b"text/plain")
    for method in ("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "CONNECT", "BREW"):
        yield method, post(body, method=method)
    for path in ("/", "/health", "/generate/", "/generate/../etc/passwd", "//", "/%00", "/generate?x=" + "y" * 9000,
                 "*", "http://elsewhere/generate"):
        yield f"path {path[:20]}", post(body, path=path)


def cases(seed: int, side: int) -> list[Case]:
    """All requests, in an order of the seed's."""
    rng = np.random.default_rng(seed)
    found = [*texts(rng), *pictures(rng, side), *wire(rng)]
    return [found[number] for number in rng.permutation(len(found))]
