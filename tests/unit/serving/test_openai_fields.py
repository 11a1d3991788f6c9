"""OpenAI's fields of `/v1/chat/completions` and `/v1/models`: what is followed, capped, ignored or
refused.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from random_images import noise

from seed_multimodal.errors import RequestError
from seed_multimodal.images.io import image_to_base64
from seed_multimodal.models.seed.pipeline import SeedLlama
from seed_multimodal.serving.app import create_app

ROUTE = "/v1/chat/completions"
HI = [{"role": "user", "content": "Tell me about the cat."}]
IMAGE = {
    "type": "image_url",
    "image_url": {"url": f"data:image/png;base64,{image_to_base64(noise(0))}"},
}


@pytest.fixture(scope="module")
def client(tiny: SeedLlama) -> Any:
    """Of a system with random weights, whose answers are cut off."""
    return create_app(tiny).test_client()


@pytest.fixture(scope="module")
def nano() -> SeedLlama:
    return SeedLlama.from_pretrained("nano", device="cpu", log=None, load_decoder=False)


def complete(client: Any, messages: Any = HI, **fields: Any) -> dict[str, Any]:
    """The answer: its message, finish_reason and usage; the same of a stream."""
    body = {"messages": messages, "temperature": 0, **fields}
    response = client.post(ROUTE, json=body)
    assert response.status_code == 200, response.json
    choice = response.json["choices"][0]
    answer = {
        **choice["message"],
        "finish_reason": choice["finish_reason"],
        "usage": response.json["usage"],
    }

    chunks = stream(client, **body)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == answer["content"]
    assert [image for delta in deltas for image in delta.get("images", ())] == answer["images"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (
        len(chunks) - 1
    )
    assert chunks[-1]["choices"][0]["finish_reason"] == answer["finish_reason"]
    assert chunks[-1]["usage"] == answer["usage"]
    return answer


def stream(client: Any, **body: Any) -> list[dict[str, Any]]:
    lines = client.post(ROUTE, json={**body, "stream": True}).get_data(as_text=True).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def refusal(client: Any, **fields: Any) -> str:
    """The sentence of a refused request."""
    response = client.post(ROUTE, json={"messages": HI, **fields})
    assert response.status_code == 400
    assert response.json["error"]["type"] == "invalid_request_error"
    return response.json["error"]["message"]


# ---- finish_reason


def test_finish_reason_at_a_limit_is_length(client, tiny: SeedLlama):
    assert complete(client, max_tokens=5)["usage"]["completion_tokens"] == 5
    assert complete(client, max_tokens=5)["finish_reason"] == "length"
    assert complete(client, max_tokens=5, num_beams=2)["finish_reason"] == "length"
    default_answer = complete(client)
    assert default_answer["usage"]["completion_tokens"] == tiny.config.generation["max_new_tokens"]
    assert default_answer["finish_reason"] == "length"


def test_finish_reason_at_the_end_of_the_context_is_length(client, tiny: SeedLlama):
    """Whatever the request's limit is, also one above the context."""
    long = [{"role": "user", "content": "the cat " * 160}]
    for max_tokens in (500, 4096):
        answer = complete(client, long, max_tokens=max_tokens)
        assert answer["usage"]["total_tokens"] == tiny.engine.context
        assert 0 < answer["usage"]["completion_tokens"] < 200
        assert answer["finish_reason"] == "length"


def test_a_note_says_that_no_image_fits_into_max_tokens(client):
    """Below an image's tokens the model cannot start one."""
    for max_tokens, notes in (
        (20, ["The answer was cut off after 20 tokens; an image needs 34."]),
        (40, []),
    ):
        assert complete(client, max_tokens=max_tokens)["notes"] == notes


def test_finish_reason_at_an_end_is_stop(nano: SeedLlama):
    """At the end token, at the template's next turn, and at a text of the request."""
    client = create_app(nano).test_client()
    question = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "codes": [1] * 32},
                {"type": "text", "text": nano.tasks.question("What is on the left?")},
            ],
        }
    ]
    unlimited = complete(client, question)
    assert unlimited["finish_reason"] == "stop"
    assert complete(client, question, max_tokens=4096) == unlimited
    stopped = complete(client, question, stop=[unlimited["content"][-3:]])
    assert stopped["finish_reason"] == "stop"
    assert len(stopped["content"]) == len(unlimited["content"]) - 3


def test_finish_reason_at_a_stop_text_is_stop(client):
    unlimited = complete(client, max_tokens=30)["content"]
    stop = unlimited[len(unlimited) // 2 :][:3]
    stopped = complete(client, max_tokens=30, stop=stop)
    assert stopped["finish_reason"] == "stop"
    assert unlimited.startswith(stopped["content"])
    assert stop not in stopped["content"]


# ---- fields


def test_null_fields_are_absent(client):
    nulls = {
        "max_completion_tokens": None,
        "stream": None,
        "seed": None,
        "stop": None,
        "tools": None,
        "response_format": None,
        "modalities": None,
        "n": None,
        "top_p": None,
    }
    body = {"messages": HI, "temperature": 0, "max_tokens": 5, **nulls}
    answer = client.post(ROUTE, json=body)
    assert answer.status_code == 200
    assert answer.json["usage"]["completion_tokens"] == 5
    parts = [{"type": "text", "text": "hi", "image_url": None, "codes": None}]
    message = {"role": "user", "content": parts, "images": None, "name": None}
    plain = [{"role": "user", "content": "hi"}]
    assert complete(client, [message], max_tokens=4) == complete(client, plain, max_tokens=4)


@pytest.mark.parametrize("seed", [2**40, 2**63 - 1, -7])
def test_seeds_have_64_bits(client, tiny: SeedLlama, seed):
    answer = complete(client, temperature=1, seed=seed, max_tokens=6)
    expected = tiny.chat(HI, temperature=1.0, seed=seed, max_new_tokens=6)
    assert answer["content"].strip() == expected.text.strip()
    drawing = client.post("/v1/images/generations", json={"prompt": "a fish", "seed": seed, "n": 1})
    assert drawing.status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"functions": [{"name": "f"}]},
        {"logprobs": True},
        {"top_logprobs": 2},
        {"logit_bias": {"5": 1}},
        {"audio": {"voice": "alloy", "format": "wav"}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
    ],
)
def test_fields_that_cannot_be_followed_are_refused(client, fields):
    (name,) = fields
    sentence = refusal(client, **fields)
    assert sentence.startswith(name)
    assert sentence.endswith("is not supported by this server.")


def test_fields_that_ask_for_nothing_pass(client):
    unused = {
        "response_format": {"type": "text"},
        "logprobs": False,
        "top_logprobs": 0,
        "tools": [],
        "functions": [],
        "logit_bias": {},
        "tool_choice": "none",
        "user": "u",
        "store": False,
    }
    assert complete(client, max_tokens=4, **unused) == complete(client, max_tokens=4)


def test_other_numbers_of_answers_and_roles_are_refused(client):
    assert refusal(client, n=2) == "n: Input should be 1."
    called = [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "tool_call_id": "1", "content": "12"},
        *HI,
    ]
    roles = "'system', 'developer', 'user' or 'assistant'"
    assert refusal(client, messages=called) == f"messages.1.role: Input should be {roles}."


def test_refusal_of_an_assistant_is_read_as_text(client):
    parts = [{"type": "refusal", "refusal": "I cannot."}]
    answers = [
        complete(client, [*HI, {"role": "assistant", "content": content}, *HI], max_tokens=6)
        for content in (parts, "I cannot.")
    ]
    assert answers[0] == answers[1]


def test_model_by_name(client):
    (listed,) = client.get("/v1/models").json["data"]
    assert client.get(f"/v1/models/{listed['id']}").json == listed
    for name in ("gpt-4o", "AILab-CVC/SEED"):
        missing = client.get(f"/v1/models/{name}")
        assert missing.status_code == 404
        assert missing.json["error"]["type"] == "invalid_request_error"
        sentence = f"There is no model {name!r} here; this server has {listed['id']!r}."
        assert missing.json["error"]["message"] == sentence
    assert "/v1/models/{name}" in client.get("/openapi.json").json["paths"]


# ---- images


def test_texts_around_an_image_stay_apart(client, tiny: SeedLlama):
    """`content` is the library's text, and an image's `offset` is the end of the text before it."""
    opening = str(tiny.tasks.draw_response)
    settings = {"max_tokens": 60, "force_image": True}
    answer = complete(client, **settings)
    expected = tiny.chat(HI, force_image=True, max_new_tokens=60, temperature=0.0)
    before, *others = (part for part in expected.parts if isinstance(part, str))
    assert before.strip() == opening.strip()
    assert others, "the answer has text behind its image"
    assert answer["content"].split() == expected.text.split()
    first = answer["images"][0]["offset"]
    assert answer["content"][:first] == opening.strip()
    assert answer["content"][first].isspace()

    # The prompt, the opening and `<img>` that were given, and 60 tokens.
    assert answer["usage"]["prompt_tokens"] == complete(client)["usage"]["prompt_tokens"]
    n_prompt = len(tiny.tokenizer.encode(opening)) + 1
    assert answer["usage"]["completion_tokens"] == n_prompt + 60


def test_answer_with_texts_around_an_image_is_sent_again(client, tiny: SeedLlama):
    """In the next turn the model reads what it wrote."""
    drawing = client.post(
        ROUTE, json={"messages": HI, "temperature": 0, "max_tokens": 60, "force_image": True}
    ).json
    expected = tiny.chat(HI, force_image=True, max_new_tokens=60, temperature=0.0)
    again = complete(client, [*HI, drawing["choices"][0]["message"], *HI], max_tokens=6)
    answer = tiny.chat(
        [*HI, {"role": "assistant", "content": expected}, *HI], max_new_tokens=6, temperature=0.0
    )
    assert again["content"].strip() == answer.text.strip()
    assert again["usage"]["prompt_tokens"] == answer.prompt_tokens


def test_image_of_a_system_message_is_refused(client, tiny: SeedLlama, tiny_x):
    sentence = "Message 0: a system message is text; show images in the user's message."
    for role in ("system", "developer"):
        assert refusal(client, messages=[{"role": role, "content": [IMAGE]}, *HI]) == sentence
    for system in (tiny, tiny_x):
        for image in (noise(0), [1] * 32):
            with pytest.raises(RequestError) as refused:
                system.chat([{"role": "system", "content": [image]}, *HI])
            assert str(refused.value) == sentence
    instructed = complete(
        client, [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *HI]
    )
    assert instructed["usage"]["prompt_tokens"] > complete(client)["usage"]["prompt_tokens"]
