"""Whatever a client sends, the server answers it or refuses it with 4xx and one sentence: fields x values."""

from __future__ import annotations

import json
from typing import Any

import pytest

from seed_multimodal.serving.flask_app import create_app

NUMBERS = ["null", "true", "-1", "0", "1", "2.0", "1.5", "-0.0", "1e-38", "1e-45", "5e-324", "1e38", "1e308", "1e400",
           "NaN", "Infinity", "-Infinity", "1" + "0" * 40, "1" + "0" * 400, "1" + "0" * 5000, '"1"', '""', "[]", "[1]",
           "{}", '"\\ud800"']
TEXTS = ['"\\ud800"', '"a\\udcff b"', '"\\ud83d\\ude00"', '"\\u0000"', '""', '"  "', "null", "1", "[]", "{}", '["x"]',
         "true", "NaN", '"</s><img>"', '"<image>"', '"' + "x" * 40_000 + '"', '"\\udc80<image>\\ud800"']
PICTURES = ["null", "1", '"x"', "[null]", "[1]", '[""]', '["\\ud800"]', '["\\ud83d\\ude00"]', "[[null]]",
            "[[1.0]]", "[[NaN]]", "[[" + ",".join(["9" * 4000] * 32) + "]]", "[{}]", "[[[1]]]", '["QUJD"]', "[true]",
            '["data:image/png;base64,"]']
DEEP = [part * 100_000 + rest for part, rest in (("[", ""), ('{"a":', ""), ("[", "]" * 100_000))]


def post(client: Any, body: str | bytes, kind: str = "application/json") -> int:
    """Status of a request; a refusal must be 4xx, and one sentence of bounded length."""
    answer = client.post("/generate", data=body, content_type=kind)
    what = body[:80]
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, (what, answer.status_code, answer.get_json())
    if answer.status_code != 200:
        said = answer.get_json()["error"]
        assert said.strip() and "\n" not in said and said.endswith(".") and len(said) < 600, (what, said)
    return int(answer.status_code)


@pytest.fixture(scope="module")
def client(tiny):
    return create_app(tiny).test_client()


@pytest.mark.parametrize("field", ["temperature", "top_p", "num_beams", "max_new_tokens", "force_boi", "seed", "other"])
def test_numbers(client, field: str) -> None:
    usual = {"text": '"USER: hi\\nASSISTANT:"', "images": "[]", "max_new_tokens": "3"}
    bodies = {value: {**usual, field: value} for value in NUMBERS}
    told = {value: post(client, "{" + ", ".join(f'"{key}": {one}' for key, one in body.items()) + "}")
            for value, body in bodies.items()}
    assert field == "other" or {told["{}"], told['"\\ud800"'], told["1" + "0" * 400], told["1" + "0" * 5000]} == {400}
    if field == "temperature":
        assert told["1e-45"] == told["1e-38"] == told["-0.0"] == 200


def test_texts_and_pictures(client) -> None:
    for text in TEXTS:
        status = post(client, f'{{"text": {text}, "images": [], "max_new_tokens": 2}}')
        assert status == (200 if text in ('"\\ud83d\\ude00"', '"\\u0000"', '""', '"  "', '"</s><img>"') else 400), text
        post(client, f'{{"text": {text}, "images": [], "force_boi": true, "max_new_tokens": 33}}')
    for picture in PICTURES:
        assert post(client, f'{{"text": "<image>", "images": {picture}}}') == 400, picture
    left_out = client.post("/generate", json={"text": "<image>", "images": [[]], "max_new_tokens": 2})
    assert left_out.status_code == 200 and "images[0] broke off after 0 of" in str(left_out.get_json())
    said = client.post("/generate", json={"text": "ab\ud800", "images": []}).get_json()["error"]
    assert said == "'text' must be plain Unicode text."


def test_bodies(client) -> None:
    whole = json.dumps({"text": "hi", "images": [], "max_new_tokens": 2})
    inside = [f'{{"text": "x", "images": {deep}}}' for deep in DEEP]
    for body in (*DEEP, *inside, "", "null", "[]", '"x"', "1" * 5000, "{",
                 whole.encode("utf-16"), b"\xff\xfe", b'{"text": "\xff", "images": []}', b"\x00",
                 b'{"text": "\xed\xa0\x80", "images": []}', whole + whole, '{"text": "a", "text": 1, "images": []}'):
        assert post(client, body) == 400, body[:40]
    assert post(client, whole, "text/plain") == 415 and post(client, b"\xef\xbb\xbf" + whole.encode()) in (200, 400)
