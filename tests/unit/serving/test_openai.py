"""Routes below `/v1`, by the official client and curl against a real server on loopback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image
from random_images import noise
from real_processes import run_process
from served import Running, read

from seed_multimodal.images.io import image_to_base64, image_to_bytes
from seed_multimodal.language.answer import ImagePart
from seed_multimodal.serving.app import create_app
from seed_multimodal.serving.schema import Limits

TOKEN = "a secret of nobody"
pytestmark = pytest.mark.process  # the client asks the system what it runs on


@pytest.fixture(scope="module")
def running(tiny) -> Running:
    return Running(tiny, token=TOKEN)


@pytest.fixture(scope="module")
def openai(running: Running) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=f"{running.root}/v1", api_key=TOKEN, max_retries=0)


def part(image: Image.Image) -> dict[str, Any]:
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{image_to_base64(image)}"},
    }


def decoded(url: str) -> Image.Image:
    return read(url.partition("base64,")[2])


def test_models_lists_the_system(openai, tiny):
    assert [model.id for model in openai.models.list().data] == [Path(tiny.config.name).name]


def test_chat_answers_as_the_library(openai, tiny, stripes):
    """Text and images in; the same text whole and streamed, with its usage."""
    request: Any = {
        "model": "any",
        "max_tokens": 8,
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "What is it?"}, part(stripes)]}
        ],
    }
    expected = tiny.chat([{"role": "user", "content": ["What is it?", stripes]}], max_new_tokens=8)
    answer = openai.chat.completions.create(**request)
    assert answer.choices[0].message.content.strip() == expected.text.strip()
    assert answer.usage.prompt_tokens == expected.prompt_tokens > 32
    assert answer.usage.completion_tokens == len(expected.ids) and answer.choices[
        0
    ].finish_reason in ("stop", "length")
    chunks = [*openai.chat.completions.create(**request, stream=True)]
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == answer.usage
    texts = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert texts == answer.choices[0].message.content


def test_chat_ends_at_a_stop(openai, tiny):
    request: Any = {
        "model": "any",
        "max_tokens": 30,
        "temperature": 0,
        "messages": [{"role": "user", "content": "Tell me about the cat."}],
    }
    completion = openai.chat.completions.create(**request)
    text = completion.choices[0].message.content
    stop = text[len(text) // 2 :][:3]
    for stops in (stop, ["never said", stop]):
        answer = openai.chat.completions.create(**request, stop=stops)
        texts = answer.choices[0].message.content
        assert (
            stop not in texts
            and text.startswith(texts)
            and answer.choices[0].finish_reason == "stop"
        )
        assert answer.usage.completion_tokens < completion.usage.completion_tokens
        chunks = openai.chat.completions.create(**request, stop=stops, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == texts


def test_chat_sends_images_and_previews(openai, tiny):
    """The second turn sends the first answer back as it came: codes where its text had them."""
    messages: Any = [{"role": "user", "content": "Please draw a fish."}]
    request: Any = {"model": "", "max_tokens": 33, "temperature": 0, "seed": 1}
    answer = (
        openai.chat.completions.create(**request, messages=messages, modalities=["image"])
        .choices[0]
        .message
    )
    expected = tiny.chat(messages, force_image=True, max_new_tokens=33, temperature=0.0, seed=1)
    (image,) = answer.model_extra["images"]
    assert np.array_equal(decoded(image["image_url"]["url"]), expected.images[0])
    assert [image["codes"]] == expected.codes and image["offset"] == len(
        "Here is the picture."
    ) == len(answer.content)

    chunks = openai.chat.completions.create(
        **request,
        messages=messages,
        stream=True,
        extra_body={"force_image": True, "previews": True},
    )
    deltas = [
        item
        for chunk in chunks
        for item in (chunk.choices[0].delta.model_extra or {}).get("images", [])
    ]
    assert [(len(item["codes"]), item["preview"]) for item in deltas] == [
        (8, True),
        (16, True),
        (32, False),
    ]
    assert deltas[-1]["image_url"] == image["image_url"]

    messages += [answer.model_dump(exclude_none=True), {"role": "user", "content": "What is it?"}]
    again = (
        openai.chat.completions.create(model="", max_tokens=6, messages=messages)
        .choices[0]
        .message.content
    )
    wanted = tiny.chat(
        [
            {"role": "user", "content": "Please draw a fish."},
            {"role": "assistant", "content": ["Here is the picture.", expected.codes[0]]},
            {"role": "user", "content": "What is it?"},
        ],
        max_new_tokens=6,
    )
    assert again.strip() == wanted.text.strip()
    by_codes = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "codes": expected.codes[0]},
                {"type": "text", "text": "What is it?"},
            ],
        }
    ]
    assert (
        openai.chat.completions.create(model="", max_tokens=6, messages=by_codes)
        .choices[0]
        .message.content
    )


def test_images_are_drawn_and_edited(openai, tiny, stripes):
    drawings = openai.images.generate(
        prompt="a fish", n=2, response_format="b64_json", extra_body={"seed": 3}
    ).data
    expected = tiny.draw(["a fish"], 3, num_images=2)
    assert all(
        np.array_equal(read(item.b64_json), image)
        for item, image in zip(drawings, expected, strict=True)
    )
    edited = openai.images.edit(
        image=("a.png", image_to_bytes(stripes), "image/png"),
        prompt="Make it green.",
        extra_body={"seed": 3},
    ).data
    assert np.array_equal(read(edited[0].b64_json), tiny.edit([stripes], ["Make it green."], 3)[0])
    two = openai.images.edit(
        image=[image_to_bytes(stripes), image_to_bytes(noise(1))], prompt="Mix them."
    ).data
    assert read(two[0].b64_json).size == (16, 16)


def test_tokens_become_codes_and_images_by_curl(running: Running, tiny, stripes):
    def curl(body: dict[str, Any]) -> list[dict[str, Any]]:
        headers = ("-H", f"Authorization: Bearer {TOKEN}", "-H", "Content-Type: application/json")
        done = run_process(
            ["curl", "-sS", f"{running.root}/v1/images/tokens", *headers, "-d", "@-"],
            input=json.dumps(body),
            check=True,
        )
        return json.loads(done.stdout)["data"]

    codes = [
        item["codes"]
        for item in curl({"images": [image_to_base64(stripes), part(noise(1))["image_url"]["url"]]})
    ]
    assert codes == tiny.tokenize([stripes, noise(1)]).tolist()
    drawings = curl({"codes": codes, "seed": 5})
    assert all(
        np.array_equal(read(item["b64_json"]), image)
        for item, image in zip(drawings, tiny.reconstruct(codes, seed=5), strict=True)
    )


@pytest.mark.parametrize(
    ("route", "body", "sentence"),
    [
        ("chat/completions", {}, "messages: Field required."),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": " ."}]},
            "The last message is empty.",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages.0.role: Input should be",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "x" * 33_000}]},
            "characters",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "codes": [1]}] * 17}]},
            "17 images",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "image 0: the file is",
        ),
        (
            "chat/completions",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "codes": [99] * 32}]}
                ]
            },
            "a code outside 0 to 15",
        ),
        ("images/generations", {"prompt": " "}, "prompt: String should have at least 1 character."),
        (
            "images/generations",
            {"prompt": "x", "n": 99},
            "n: Input should be less than or equal to 8",
        ),
        ("images/generations", {"prompt": "x", "ratio": "3:2"}, "Unknown option 'ratio'"),
        ("images/tokens", {}, "Send either 'images' or 'codes'."),
        ("images/tokens", {"codes": [[1, 2]]}, "must be a row of 32 codes"),
        ("images/tokens", {"images": ["http://127.0.0.1:1/a.png"]}, "nothing is fetched"),
    ],
)
def test_v1_refuses_in_the_form_of_openai(running: Running, route, body, sentence):
    answer = requests.post(
        f"{running.root}/v1/{route}", json=body, timeout=60, headers=running.headers
    )
    error = answer.json()["error"]
    assert (
        answer.status_code == 400
        and sentence in error["message"]
        and error["type"] == "invalid_request_error"
    )


def test_every_route_but_health_needs_the_token(running: Running, openai):
    from openai import AuthenticationError, OpenAI

    with pytest.raises(AuthenticationError):
        OpenAI(base_url=f"{running.root}/v1", api_key="wrong").models.list()
    for path in ("generate", "ready", "metrics", "openapi.json", "v1/models", "elsewhere"):
        refused = requests.get(f"{running.root}/{path}", timeout=10)
        assert refused.status_code == 401 and refused.headers["WWW-Authenticate"] == "Bearer"
    assert requests.get(f"{running.root}/health", timeout=10).status_code == 200
    assert requests.get(f"{running.root}/ready", timeout=10, headers=running.headers).json() == {
        "ready": True
    }


def test_metrics_count_what_was_done(running: Running, openai):
    def figures() -> dict[str, float]:
        text = requests.get(f"{running.root}/metrics", timeout=10, headers=running.headers).text
        return {
            name: float(value)
            for name, _, value in (
                line.rpartition(" ") for line in text.splitlines() if line[0] != "#"
            )
        }

    before = figures()
    openai.images.generate(prompt="a fish", n=2)
    openai.chat.completions.create(
        model="", max_tokens=3, messages=[{"role": "user", "content": "hi"}]
    )
    after = figures()
    changed = {name: value - before.get(name, 0) for name, value in after.items()}
    assert (
        changed['seed_images_total{kind="drawn"}'] == 2
        and changed['seed_tokens_total{kind="completion"}'] == 3
    )
    assert changed['seed_request_seconds_count{route="/v1/chat/completions"}'] == 1
    assert (
        changed['seed_requests_total{route="/v1/chat/completions",status="200"}'] == 1
        and after["seed_running"] == 0
    )


def test_a_late_answer_is_cut_off(tiny):
    client = create_app(tiny, limits=Limits(seconds=1e-5)).test_client()
    request = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 2048,
        "temperature": 5,
        "top_p": 1,
    }
    answer = client.post("/v1/chat/completions", json=request).json["choices"][0]
    assert (
        answer["finish_reason"] == "length"
        and "cut off after 1e-05 seconds" in answer["message"]["notes"][0]
    )
    for route, body in (("generations", {"prompt": "a fish"}), ("tokens", {"codes": [[0] * 32]})):
        drawing = client.post(f"/v1/images/{route}", json=body)
        assert (
            drawing.status_code == 503
            and "more than 1e-05 seconds" in drawing.json["error"]["message"]
        )


def test_chat_of_seed_x_and_lavit(tiny_x, tiny_lavit):
    """An image of an answer is sent again as the model wrote it.

    LaVIT answers the last message alone.
    """
    client = create_app(tiny_x).test_client()
    request = {"max_tokens": 12, "temperature": 0, "seed": 1}
    drawings = client.post(
        "/v1/chat/completions",
        json={
            **request,
            "force_image": True,
            "messages": [
                {
                    "role": "user",
                    "content": [part(noise(0)), {"type": "text", "text": "Make it red."}],
                }
            ],
        },
    ).json
    message = drawings["choices"][0]["message"]
    expected = tiny_x.chat(
        [{"role": "user", "content": [noise(0), "Make it red."]}],
        force_image=True,
        max_new_tokens=12,
        seed=1,
        temperature=0.0,
    )
    assert np.array_equal(decoded(message["images"][0]["image_url"]["url"]), expected.images[0])
    turns = [{"role": "user", "content": "Draw."}, message, {"role": "user", "content": "And now?"}]
    again = client.post("/v1/chat/completions", json={**request, "messages": turns})
    all_codes = [*range(tiny_x.tokenizer.vocabulary.tokens_per_image)]
    offset = message["images"][0]["offset"]
    texts = [
        message["content"][:offset],
        ImagePart(all_codes, image=expected.images[0]),
        message["content"][offset:],
    ]
    wanted = tiny_x.chat(
        [turns[0], {"role": "assistant", "content": [*filter(None, texts)]}, turns[-1]],
        max_new_tokens=12,
        temperature=0.0,
    )
    assert again.json["choices"][0]["message"]["content"].strip() == wanted.text.strip()
    assert (
        "no codes"
        in client.post("/v1/images/tokens", json={"codes": [[0]]}).json["error"]["message"]
    )

    client = create_app(tiny_lavit).test_client()
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "a fish"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": [{**part(noise(1)), "codes": [1, 2]}]},
    ]
    texts = client.post("/v1/chat/completions", json={"messages": turns, "seed": 3}).json[
        "choices"
    ][0]["message"]
    assert (
        texts["content"]
        == tiny_lavit.chat([{"role": "user", "content": [noise(1)]}], num_beams=1, seed=3).text
    )
    drawings = client.post(
        "/v1/images/generations", json={"prompt": "a fish", "seed": 3, "ratio": "2:3"}
    ).json["data"]
    assert np.array_equal(
        read(drawings[0]["b64_json"]), tiny_lavit.draw("a fish", seed=3, ratio="2:3")
    )
    codes = client.post("/v1/images/tokens", json={"images": [image_to_base64(noise(1))]}).json[
        "data"
    ][0]["codes"]
    assert codes == tiny_lavit.tokenize(noise(1))[0].tolist()
