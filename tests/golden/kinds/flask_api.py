"""`POST /generate` answers as the released server does, request by request.

The recorded stubs (language model, image encoder, image decoder) are plugged into our server as its backend; everything
between HTTP and the stubs is ours. Two servers are driven with every request:

* `exact_original=True` must reproduce the recorded JSON, prompt ids, generation settings, and every picture (decoded
  pixels, the PNG encoder may differ), also where the released server breaks its own rules (`<img> </img>` left in the
  text, code lists of any length).
* the default server must keep the promise that the text holds one `<image>` per picture, agree with the recording on
  codes, end an answer at its first end token, leave out pictures that broke off, and refuse code lists that are no
  picture.

Left out: recorded HTTP 500 pages of failed assertions. Ours are 4xx with one sentence of JSON, which is what is checked
there; the bodies of 400, 404 and 415 pages are not compared either. `prompt_text` (what the server printed) is left
out: our server prints nothing.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from runner import DEFAULT_DIR, assert_same, read_json

from seed_multimodal.serving.codes_backend import CodesBackend

KIND = "flask_api"


class RecordedBackend(CodesBackend):
    """The stub models of the recording: see the fixture's README for their formulas."""

    def __init__(self, tokenizer: Any, new_ids: list[int]) -> None:
        from seed_multimodal.images.transforms import get_transform

        self.tokenizer = tokenizer
        self.new_ids = new_ids
        self.transform = get_transform("clip", keep_ratio=False, image_size=224)
        self.encoded: list[list[int]] = []
        self.decoded: list[list[list[int]]] = []
        self.call: dict[str, Any] | None = None

    def encode(self, pixels: Any) -> list[list[int]]:
        self.encoded.append(list(pixels.shape))
        vocabulary = self.tokenizer.vocabulary
        return [[(7 * k + 11 * i + 5) % vocabulary.n_codes for k in range(vocabulary.tokens_per_image)]
                for i in range(len(pixels))]

    def generate(self, asked: Any, request: Any) -> list[int]:
        self.call = {"input_ids": [list(asked.prompt)], "generation_config": {
            "temperature": request.temperature, "num_beams": request.num_beams,
            "max_new_tokens": request.max_new_tokens, "top_p": request.top_p, "do_sample": request.do_sample}}
        return [*asked.opening, *self.new_ids]

    def decode(self, codes: list[int], request: Any = None) -> Image.Image:
        self.decoded.append([list(codes)])
        return Image.new("RGB", (4, 4), (codes[0] % 256, codes[1] % 256, len(codes) % 256))


def check(folder: Path) -> None:
    files = sorted(folder.glob("cases*.json"))
    assert files, f"{folder}: the fixture lacks its cases*.json."
    tokenizer = _tokenizer(folder)
    for file in files:
        for case in read_json(file):
            what = f"{file.name}, case {case['name']!r}"
            if "request" in case:
                _check_exact(case, tokenizer, what)
                _check_default(case, tokenizer, what)
            else:
                _check_page(case, tokenizer, what)


def _tokenizer(folder: Path) -> Any:
    from seed_multimodal.language.tokenizer import MultimodalTokenizer

    for parent in (folder.parent, DEFAULT_DIR):
        place = parent / "llm_sequences" / "tokenizer"
        if place.is_dir():
            return MultimodalTokenizer.from_pretrained(place)
    raise AssertionError(f"{folder}: its tokenizer is missing: llm_sequences/tokenizer beside it.")


def _client(backend: RecordedBackend, exact: bool) -> Any:
    from seed_multimodal.serving.flask_app import create_app

    return create_app(backend, exact_original=exact).test_client()


def _send(client: Any, case: dict[str, Any]) -> Any:
    return client.open("/generate", method=case["method"], json=case["request"])


def _check_exact(case: dict[str, Any], tokenizer: Any, what: str) -> None:
    backend = RecordedBackend(tokenizer, case["stub_generated_ids"])
    response = _send(_client(backend, exact=True), case)
    if case["status"] == 500:
        _assert_refused(response, what)
        assert backend.call is None, f"{what}: the model ran for a request that is refused"
        return
    assert_same(response.status_code, case["status"], f"{what}, status")
    assert_same(response.content_type, case["content_type"], f"{what}, content type")
    assert_same(backend.call, case["model_call"], f"{what}, call of the language model")
    assert_same(backend.encoded, case["encode_image_shapes"], f"{what}, shapes given to the image encoder")
    assert_same(backend.decoded, case["decode_image_ids"], f"{what}, codes given to the image decoder")
    got, want = dict(response.get_json()), dict(case["response"])
    _assert_same_pictures(got.pop("images"), want.pop("images"), what)
    assert_same(got, want, f"{what}, response")


def _check_default(case: dict[str, Any], tokenizer: Any, what: str) -> None:
    what = f"{what} (default server)"
    backend = RecordedBackend(tokenizer, case["stub_generated_ids"])
    response = _send(_client(backend, exact=False), case)
    vocabulary = tokenizer.vocabulary
    lists = [item for item in case["request"].get("images", []) if isinstance(item, list)]
    whole = vocabulary.tokens_per_image
    wrong_codes = any(len(row) > whole or not all(0 <= c < vocabulary.n_codes for c in row) for row in lists)
    broken = [row for row in lists if len(row) < whole]
    if wrong_codes or (case["status"] == 500 and not broken):
        _assert_refused(response, what)
        return
    if broken:
        assert_same(response.status_code, 200, f"{what}, status")
        told = [said for said in response.get_json()["error_msg"] if said.endswith("was left out.")]
        assert_same(len(told), len(broken), f"{what}, pictures left out")
        return
    assert_same(response.status_code, 200, f"{what}, status")
    got = response.get_json()
    given = len(case["request"]["images"])
    assert_same(got["text"].count("<image>"), len(got["images"]), f"{what}, <image> flags per picture")
    assert_same(len(got["images_ids"]), given + len(got["images"]), f"{what}, code lists per picture")
    assert_same(got["images_ids"][:given], case["response"]["images_ids"][:given], f"{what}, codes of the request")
    if tokenizer.eos_id in case["stub_generated_ids"][:-1]:  # ours ends an answer at its first end token
        assert case["response"]["text"].split()[0].startswith(got["text"].split()[0]), f"{what}: {got['text']!r}"
    elif not case["response"]["error_msg"]:  # well-formed answers: same pictures, same words up to blanks
        assert_same(got["images_ids"], case["response"]["images_ids"], f"{what}, codes")
        _assert_same_pictures(got["images"], case["response"]["images"], what)
        words = case["response"]["text"].replace("<img> </img>", "<image>").replace("<image>", " <image> ")
        assert_same(got["text"].replace("<image>", " <image> ").split(), words.split(), f"{what}, words")
    else:
        assert got["error_msg"], f"{what}: the broken picture is not reported"


def _check_page(case: dict[str, Any], tokenizer: Any, what: str) -> None:
    client = _client(RecordedBackend(tokenizer, []), exact=True)
    sent = {"invalid json": lambda: client.post("/generate", data="{not json", content_type="application/json"),
            "wrong content type": lambda: client.post("/generate", data="text", content_type="text/plain"),
            "unknown path": lambda: client.get("/no/such/path")}
    assert case["name"] in sent, f"{what}: a case without a request that this check does not know"
    response = sent[case["name"]]()
    assert_same(response.status_code, case["status"], f"{what}, status")
    _assert_refused(response, what)


def _assert_refused(response: Any, what: str) -> None:
    assert 400 <= response.status_code < 500, f"{what}: status {response.status_code}, expected a 4xx refusal"
    body = response.get_json()
    assert body["error"] and body["error_msg"] == [body["error"]], f"{what}: refused without a sentence: {body}"


def _assert_same_pictures(got: list[str], want: list[str], what: str) -> None:
    assert_same([bool(text) for text in got], [bool(text) for text in want], f"{what}, which pictures were drawn")
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        if b:
            first, second = _pixels(a), _pixels(b)
            assert first.shape == second.shape and (first == second).all(), f"{what}: picture {number} differs"


def _pixels(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))
