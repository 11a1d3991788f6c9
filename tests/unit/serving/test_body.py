"""A request's body as JSON: what `json` gives, whatever strings and pieces it comes in, in bounded memory."""

from __future__ import annotations

import base64
import io
import json
import time
import tracemalloc

import numpy as np
import pytest

from seed_multimodal.errors import RequestError
from seed_multimodal.serving import body
from seed_multimodal.serving.body import read_body
from seed_multimodal.serving.schema import Limits, parse_request

LIMITS = Limits()


def read(data: bytes | str, limits: Limits = LIMITS) -> object:
    return read_body(io.BytesIO(data.encode() if isinstance(data, str) else data), limits)


@pytest.mark.parametrize("piece", [1, 3, 1 << 16])
def test_it_is_what_json_gives(monkeypatch, piece) -> None:
    monkeypatch.setattr(body, "PIECE", piece)
    monkeypatch.setattr(body, "LONG", 6)
    rng = np.random.default_rng(piece)
    letters = ['"', "\\", "/", "a", "é", "😀", "\n", "{", "]", ","]
    for ascii_only in (True, False):
        for _ in range(60):
            word = ["".join(rng.choice(letters, rng.integers(0, 12))) for _ in range(4)]
            value = {"text": word[0], "images": [word[1], word[2], [1, 2]], word[3]: {"deeper": [None, True, 1.5]}}
            assert read(json.dumps(value, ensure_ascii=ascii_only)) == value


@pytest.mark.parametrize(("data", "words"), [
    (b"", "not valid JSON"), (b"{", "not valid JSON"), (b'"abc', "not valid JSON"), (b'{"text": "\xff"}', "not valid"),
    (b"[" * 100_000, "nested too deep"), (b'{"a":' * 50_000, "nested too deep"), (b"[" + b"1," * 200_000, "256 KiB"),
    (b'"' * 400_000, "256 KiB"), (b'["' + b'\\"' * 70_000, "quotation marks"),
    (b'["' + b"a" * 5000 + b'"' + (b',"' + b"a" * 5000 + b'"') * 30 + b"]", "over 24 long texts"),
    (b'{"images": ["' + b"A" * (31 << 20) + b'"]}', "over 30 MiB"), (b"1" * 5000, "not valid JSON"),
])
def test_what_cannot_be_a_request_is_refused(data, words) -> None:
    with pytest.raises(RequestError, match=words):
        read(data)


def test_base64_with_the_escapes_of_other_languages() -> None:
    """PHP writes \\/ and .NET \\u002B; lines may be broken."""
    file = np.random.default_rng(0).integers(0, 255, 600_000, dtype=np.uint8).tobytes()
    text = base64.b64encode(file).decode()
    for written in (text, text.replace("/", "\\/"), text.replace("+", "\\u002B"), text.replace("Q", "Q\\r\\n")):
        request = parse_request(read('{"text": "<image> 😀", "images": ["' + written + '"]}'), LIMITS)
        assert isinstance(request.images[0], bytes)
        assert base64.b64decode(request.images[0]) == file


def test_long_texts_and_lists_are_refused_by_their_fields() -> None:
    with pytest.raises(RequestError, match="^'text' has more than the 32000 characters"):
        parse_request(read(json.dumps({"text": "a" * 500_000, "images": []})), LIMITS)
    with pytest.raises(RequestError, match=r"^images\[0\] has 32769 codes; at most 32768"):
        parse_request({"text": "<image>", "images": [[0] * 32_769]}, LIMITS)


def test_a_long_list_is_refused_at_once_and_in_little_memory() -> None:
    """63 MiB of codes: 15 s and 1.6 GB by way of `json` and a list."""
    data = io.BytesIO(b'{"text": "<image>", "images": [[' + b"1," * (63 << 19) + b"1]]}")
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(RequestError, match="256 KiB"):
        read_body(data, LIMITS)
    seconds, peak = time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 1 and peak < 4 << 20


def test_a_picture_beside_an_emoji_takes_its_own_size() -> None:
    """Python keeps a text with one emoji at four bytes a letter: eight times the body for `json.loads`."""
    picture = b"A" * (20 << 20)
    data = io.BytesIO(b'{"images": ["' + picture + b'"], "text": "' + "😀<image>".encode() + b'"}')
    tracemalloc.start()
    value = read_body(data, LIMITS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert value == {"images": [picture], "text": "😀<image>"} and peak < 48 << 20
