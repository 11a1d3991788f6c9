"""`POST /generate` over the tiny SEED-LLaMA, through Flask's test client."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from repository import ROOT

from seed_multimodal.images.io import image_to_base64
from seed_multimodal.language.messages import Message
from seed_multimodal.language.prompts import get_template
from seed_multimodal.models.seed.pipeline import SeedLlama
from seed_multimodal.serving.app import create_app
from seed_multimodal.serving.backend import read_turns
from seed_multimodal.serving.schema import Limits

ASK = "USER: <image>What is it?\nASSISTANT:"
KEYS = {"text", "images", "images_ids", "error_msg"}


@pytest.fixture(scope="module")
def client(tiny):
    return create_app(tiny).test_client()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def ask(client: Any, **body: Any) -> tuple[int, dict[str, Any]]:
    response = client.post("/generate", json=body)
    return response.status_code, response.get_json()


# ---- answers


def test_generate_answers_a_question_about_an_image(client, tiny, png, stripes):
    status, answer = ask(client, text=ASK, images=[b64(png)], max_new_tokens=8, temperature=0)
    expected = tiny.chat([{"role": "user", "content": [stripes, "What is it?"]}], max_new_tokens=8)
    assert status == 200 and set(answer) == KEYS and answer["text"] == str(expected)
    assert answer["images_ids"] == tiny.tokenize(stripes).tolist() and answer["images"] == []
    again = ask(client, text=ASK, images=answer["images_ids"], max_new_tokens=8, temperature=0)[1]
    assert again["text"] == answer["text"]  # codes say the same as the image


def test_generate_reports_unknown_words(tiny):
    config = replace(tiny.config, known_words=ROOT / "pretrained/nano/known_words.json")
    nano = create_app(SeedLlama(config, tiny.tokenizer, tiny.llm, tiny.images)).test_client()
    notes = [
        ask(
            nano,
            text=f"USER: Is there {what}?\nASSISTANT:",
            images=[],
            max_new_tokens=2,
            temperature=0,
        )[1]
        for what in ("a zebra", "a panda")
    ]
    assert "'zebra'" in notes[0]["error_msg"][0] and notes[1]["error_msg"] == []


def test_generate_draws_a_forced_image(client, tiny, png):
    status, answer = ask(
        client,
        text="USER: Please draw a fish.\nASSISTANT:",
        images=[],
        force_boi=True,
        max_new_tokens=1,
        seed=1,
    )
    assert (
        status == 200
        and answer["text"] == "Here is the picture. <image>"
        and answer["error_msg"] == []
    )
    image = Image.open(io.BytesIO(base64.b64decode(answer["images"][0])))
    assert image.format == "PNG" and image.size == (16, 16)
    assert np.array_equal(image, tiny.reconstruct(answer["images_ids"], seed=1)[0])
    assert not np.array_equal(image, tiny.reconstruct(answer["images_ids"], seed=0)[0])
    edited = ask(
        client,
        text="USER: <image>Make it green.\nASSISTANT:",
        images=[b64(png)],
        force_boi=True,
        max_new_tokens=33,
    )[1]
    assert edited["text"] == "Here it is. <image>" and len(edited["images_ids"]) == 2


def test_generate_encodes_a_repeated_image_once(client, tiny, png):
    passes: list[int] = []
    hook = tiny.images.model.visual_encoder.register_forward_hook(lambda *_: passes.append(1))
    green = image_to_base64(Image.new("RGB", (33, 44), (9, 200, 77)))
    body = {"text": f"{ASK} a cat.\n{ASK}", "images": [green, b64(png)], "max_new_tokens": 3}
    try:
        first = ask(client, **body)[1]
        passes.clear()
        assert ask(client, **body)[1]["images_ids"][:2] == first["images_ids"][:2] and not passes
    finally:
        hook.remove()


def test_generate_continues_a_text_without_template(client, tiny):
    _, answer = ask(client, text="a red", images=[], max_new_tokens=5, temperature=0)
    expected = tiny.generate_answers(
        [[Message("raw", ("a red",))]], "chat", tiny.settings(max_new_tokens=5)
    )[0].answer
    assert answer["text"] == str(expected)


def test_generate_leaves_out_an_image_that_broke_off(client):
    codes = list(range(16)) * 2
    status, answer = ask(
        client, text="<image><image> and <image> What is it?", images=[codes, codes[:23], []]
    )
    assert status == 200 and answer["images_ids"][:3] == [codes, codes[:23], []]
    assert [note for note in answer["error_msg"] if "left out" in note] == [
        f"An image broke off after {count} of 32 codes and was left out." for count in (23, 0)
    ]


def test_generate_is_greedy_at_zero_temperature_or_top_p(client):
    bodies = [
        {"temperature": 0},
        {"top_p": 0, "temperature": 1.0},
        {"temperature": 0, "seed": 9},
        {"temperature": 1e-45},
    ]
    request = {"text": "USER: hi\nASSISTANT:", "images": [], "max_new_tokens": 10}
    assert len({ask(client, **request, **body)[1]["text"] for body in bodies}) == 1


def test_generate_repeats_an_answer_with_its_seed(client):
    body = {
        "text": "USER: hi\nASSISTANT:",
        "images": [],
        "max_new_tokens": 30,
        "temperature": 5.0,
        "top_p": 1.0,
    }
    answers = [ask(client, seed=seed, **body)[1] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_generate_drops_the_oldest_turns_of_a_long_conversation(client):
    text = (
        "".join(f"USER: {'word ' * 40}\nASSISTANT: yes\n" for _ in range(20))
        + "USER: And?\nASSISTANT:"
    )
    status, answer = ask(client, text=text, images=[], max_new_tokens=3)
    assert status == 200 and "messages were left out" in answer["error_msg"][0]
    status, answer = ask(client, text="word " * 3000, images=[])
    assert status == 400 and "context" in answer["error"]


@pytest.mark.parametrize("template", ["vicuna", "llama2"])
def test_read_turns_gives_the_turns_of_a_rendered_conversation(template):
    turns = [
        ("user", "<image>What is it?"),
        ("assistant", "a cat."),
        ("user", "Draw it."),
        ("assistant", "Here it is. <image>"),
        ("user", "Thanks"),
    ]
    rules = get_template(template)
    text = "".join(rules.render(turns))
    assert read_turns(text, rules) == turns
    assert read_turns(text + "Well", rules) == read_turns("What is it?", rules) == []


# ---- refusals


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"images": []}, "text: Field required."),
        ({"text": 3, "images": []}, "text: Input should be a valid string."),
        ({"text": "x", "images": [4]}, "images.0"),
        ({"text": "<image>", "images": [[0] * 2000]}, "at most 1024 items"),
        (
            {"text": "<image>", "images": []},
            "'text' holds 1 <image> placeholders, but 'images' has 0 entries",
        ),
        ({"text": "<image>", "images": [[0] * 33]}, "must be a row of 32 codes"),
        ({"text": "<image>", "images": [[16] * 32]}, "a code outside 0 to 15."),
        ({"text": "<image>", "images": [[-1] * 32]}, "greater than or equal to 0"),
        ({"text": "<image>", "images": [[10**30] * 32]}, "less than"),
        ({"text": "<image>", "images": ["@@@"]}, "image 0: not base64"),
        ({"text": "<image>", "images": [""]}, "image 0: the file is empty"),
        (
            {"text": "<image>", "images": [b64(b"no image at all")]},
            "image 0: not an image in a known format",
        ),
        (
            {"text": "x", "images": [], "temperature": -1},
            "temperature: Input should be greater than or equal to 0.",
        ),
        (
            {"text": "x", "images": [], "max_new_tokens": 0},
            "max_new_tokens: Input should be greater than or equal to 1",
        ),
        (
            {"text": "x" * 40_000, "images": []},
            "text: String should have at most 32000 characters.",
        ),
        (
            {"text": "<image>" * 17, "images": [[0] * 32] * 17},
            "images: List should have at most 16 items",
        ),
        ([1], "Input should be an object"),
    ],
)
def test_generate_refuses_with_one_sentence(client, body, sentence):
    response = client.post("/generate", json=body)
    answer = response.get_json()
    assert response.status_code == 400 and sentence in answer["error"], answer
    assert answer["error_msg"] == [answer["error"]] and answer["images"] == []
    assert (
        "\n" not in answer["error"] and answer["error"].endswith(".") and len(answer["error"]) < 600
    )


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"text": "\xed\xa0\x80", "images": []}',
        b'{"text": "x", "images": [], "seed": 1' + b"0" * 5000 + b"}",
        b'{"text": "ab\\ud800", "images": []}',
        b'{"text": "x", "images": [], "temperature": NaN}',
        b'{"text": "x", "images": [], "top_p": 1e400}',
    ],
)
def test_generate_refuses_a_body_that_is_no_request(client, body):
    response = client.post("/generate", data=body, content_type="application/json")
    assert response.status_code == 400 and len(response.get_json()["error"]) < 200


@pytest.mark.parametrize(
    "text", ["", "  ", "\u0000", "\U0001f600", "</s><img>", "USER: \nASSISTANT:"]
)
@pytest.mark.parametrize("force", [False, True])
def test_generate_answers_any_text(client, text, force):
    assert ask(client, text=text, images=[], max_new_tokens=2, force_boi=force)[0] == 200


def test_app_names_wrong_addresses_and_types(client):
    assert client.post("/generate", data="x").status_code == 415
    missing = client.get("/elsewhere")
    assert missing.status_code == 404 and "/openapi.json" in missing.json["error"]
    for method in ("GET", "HEAD", "PUT"):
        assert client.open("/generate", method=method).status_code == 405
    assert client.get("/").json["routes"] == "/openapi.json"
    paths = client.get("/openapi.json").json["paths"]
    for path, methods in paths.items():
        wrong = client.delete(path) if "get" in methods else client.get(path)
        assert wrong.status_code == 405 and wrong.headers["Allow"], path


def test_generate_refuses_a_body_that_is_too_large(tiny):
    client = create_app(tiny, limits=Limits(max_body_bytes=1 << 20)).test_client()
    response = client.post("/generate", json={"text": "x" * (2 << 20), "images": []})
    assert response.status_code == 413 and "may have 1 MiB" in response.get_json()["error"]


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (
            [Image.new("1", (700, 700))] * 3,
            "The images up to image 2 have 1.5 megapixels; a request may have 1.",
        ),
        ([Image.new("1", (1100, 1000))], "image 0: rejected, because its header claims 1100x1000"),
    ],
)
def test_generate_refuses_too_many_pixels_unread(tiny, monkeypatch, images, sentence):
    from seed_multimodal.serving import backend

    monkeypatch.setattr(backend, "open_image", lambda *_, **__: pytest.fail("an image was decoded"))
    client = create_app(tiny, limits=Limits(max_pixels=1_000_000)).test_client()
    status, answer = ask(
        client, text="<image>" * len(images), images=[image_to_base64(image) for image in images]
    )
    assert status == 400 and answer["error"].startswith(sentence)


@pytest.mark.parametrize(
    ("error", "expected_status", "sentence"),
    [
        (
            RuntimeError("secret path /home/me"),
            500,
            "The server failed inside; its log has the details.",
        ),
        (
            MemoryError("secret path /home/me"),
            503,
            "The server ran out of memory; try again later, or ask for less at once.",
        ),
    ],
)
def test_generate_hides_the_details_of_a_fault(
    tiny, caplog, error: Exception, expected_status: int, sentence: str
):
    """Also in a stream, as the last event."""

    def fail(*_: Any) -> None:
        raise error

    client = create_app(tiny).test_client()
    hook = tiny.images.decoder.vae.decoder.register_forward_hook(fail)
    try:
        status, answer = ask(client, text="USER: Draw.\nASSISTANT:", images=[], force_boi=True)
        streamed = client.post(
            "/v1/chat/completions",
            json={
                "messages": [{"role": "user", "content": "Draw."}],
                "force_image": True,
                "stream": True,
            },
        )
        *_, last, end = streamed.get_data(as_text=True).removesuffix("\n\n").split("\n\n")
    finally:
        hook.remove()
    assert (
        (status, answer["error"]) == (expected_status, sentence)
        and streamed.status_code == 200
        and end == "data: [DONE]"
    )
    assert (
        json.loads(last.removeprefix("data: "))["error"]["message"] == sentence
        and "secret path" in caplog.text
    )
