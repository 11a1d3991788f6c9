"""HTTP contract, routes x fields: each field is followed (the library answers the same with that
setting), harmless (the answer does not change) or refused by its name.

A new field or route is tested by its row in a table.
"""

import base64
import io
import json
import random
import re
import time

import numpy as np
import pytest
from PIL import Image
from random_images import noise
from served import CHAT, PROMPTS, chat, events, figures, read, user

from seed_multimodal.images.io import image_to_base64, image_to_bytes
from seed_multimodal.language.messages import Message, newest_turns, without_oldest_rounds
from seed_multimodal.serving.schema import POSTED

DRAW = "/v1/images/generations"
EDIT = "/v1/images/edits"
TOKENS = "/v1/images/tokens"
GENERATE = "/generate"
RESPONSES = "/v1/responses"
ASK = [{"role": "user", "content": "Tell me about the cat."}]
CODES = [*range(16)] * 2
# A valid body of each route, to which the rows of the tables add or change fields.
BODIES = {
    GENERATE: {
        "text": PROMPTS["seed_llama"].format(ASK[0]["content"]),
        "images": [],
        "max_new_tokens": 4,
        "temperature": 0,
    },
    CHAT: {"messages": ASK, "max_tokens": 4, "temperature": 0},
    RESPONSES: {"input": ASK[0]["content"], "max_output_tokens": 4, "temperature": 0},
    DRAW: {"prompt": "a fish", "seed": 3},
    EDIT: {"prompt": "Make it green.", "seed": 3, "image": [image_to_bytes(noise(0))]},
    TOKENS: {"codes": [CODES]},
}
JSON_ROUTES = [GENERATE, CHAT, RESPONSES, DRAW, TOKENS]


def post(client, route: str, **fields):
    """Send the route's body with other fields; an edit is a form, its `image` a list of files."""
    body = {**BODIES[route], **fields}
    if route != EDIT:
        return client.post(route, json=body)
    form = {}
    for name, value in body.items():
        # Files are bytes, with or without a name; None is absent.
        values = value if isinstance(value, list) else [value]
        form[name] = [
            (io.BytesIO(item), "a.png" if item else "") if isinstance(item, bytes) else item
            for item in values
            if item is not None
        ]
    return client.post(route, data=form, content_type="multipart/form-data")


def answer_of(response):
    """An answer without what differs between two calls."""
    assert response.status_code == 200, response.json
    changing = ("id", "created", "created_at", "output")
    answer = {name: value for name, value in response.json.items() if name not in changing}
    items = response.json.get("output", ())  # of a response, with an id each
    return {**answer, "output": [{**item, "id": None} for item in items]}


def refusal(response, status: int = 400) -> str:
    """The sentence of a refused request, in the form of its route."""
    assert response.status_code == status, response.json
    error = response.json["error"]
    if isinstance(error, dict):
        assert error["type"] == "invalid_request_error"
        sentence = error["message"]
        # Clients mark the field.
        assert not error["param"] or sentence.startswith(f"{error['param']}: ")
    else:  # the original's clients read these fields of every answer
        assert (response.json["error_msg"], response.json["images"]) == ([error], [])
        sentence = error
    assert sentence.endswith(".") and "\n" not in sentence and len(sentence) < 600
    return sentence


# ---- followed

# What the library is called with, and below it requests with each field as its route names it.
FOLLOWED = """
library {}
/v1/chat/completions {}
/v1/responses {}
/v1/chat/completions {"modalities": ["text", "image"]}
# As LM Studio's and llama.cpp's clients say "no limit".
/v1/chat/completions {"max_tokens": -1}
/v1/responses {"max_output_tokens": -1}
# Greedy.
/v1/chat/completions {"temperature": 5, "top_p": 0}
/v1/responses {"temperature": 1e-45}

library {"max_new_tokens": 5}
/generate {"max_new_tokens": 5}
/generate {"max_new_tokens": 5, "temperature": 5, "top_p": 0}
/v1/chat/completions {"max_tokens": 5}
/v1/chat/completions {"max_completion_tokens": 5}
/v1/chat/completions {"max_completion_tokens": 5, "max_tokens": 5}
# As Open WebUI's back end sends it.
/v1/chat/completions {"model": "nano", "stream_options": {"include_usage": true}, "max_tokens": 5,
                      "frequency_penalty": 0, "top_p": 0.9, "seed": 1}
/v1/responses {"max_output_tokens": 5}

# Defaults of the original, whose page sends only what a user has changed.
library {"temperature": 0.7, "num_beams": 1, "max_new_tokens": 256, "top_p": 0.5, "seed": 1}
/generate {"temperature": null, "max_new_tokens": null, "seed": 1}

# Above the context.
library {"max_new_tokens": 4096}
/generate {"max_new_tokens": 4096}
/v1/chat/completions {"max_tokens": 4096}
/v1/responses {"max_output_tokens": 4096}

library {"num_beams": 2, "max_new_tokens": 5}
/generate {"num_beams": 2, "max_new_tokens": 5}
/v1/chat/completions {"num_beams": 2, "max_tokens": 5}
/v1/responses {"num_beams": 2, "max_output_tokens": 5}

library {"temperature": 5, "top_p": 1, "seed": 9223372036854775807, "max_new_tokens": 5}
/generate {"temperature": 5, "top_p": 1, "seed": 9223372036854775807, "max_new_tokens": 5}

library {"temperature": 5, "top_p": 1, "seed": -7}
/v1/chat/completions {"temperature": 5, "top_p": 1, "seed": -7}
/v1/responses {"temperature": 5, "top_p": 1, "seed": -7}

library {"stop": ["e"]}
/v1/chat/completions {"stop": "e"}
/v1/chat/completions {"stop": ["never", "e"]}
/v1/responses {"stop": "e"}

# Without an image, which a sampled answer would have.
library {"temperature": 5, "seed": 1, "max_new_tokens": 99, "images": "never"}
/v1/chat/completions {"temperature": 5, "seed": 1, "max_tokens": 99, "modalities": ["text"]}
/v1/responses {"temperature": 5, "seed": 1, "max_output_tokens": 99, "tool_choice": "none"}

# A text, an image, and a text behind it.
library {"force_image": true, "max_new_tokens": 60}
/generate {"force_boi": true, "max_new_tokens": 60, "seed": 0}
/v1/chat/completions {"force_image": true, "max_tokens": 60}
/v1/chat/completions {"modalities": ["image"], "max_tokens": 60}
/v1/responses {"tool_choice": "required", "max_output_tokens": 60}
/v1/responses {"tool_choice": {"type": "image_generation"}, "max_output_tokens": 60}

library {"messages": [{"role": "system", "content": "Short!"}, {"role": "user", "content": "Hi"}]}
/v1/responses {"instructions": "Short!", "input": "Hi"}
"""
LIBRARY_AND_ROUTES = []
for name, fields in re.findall(r"^(\S+) (\{.*?\})$", FOLLOWED, re.MULTILINE | re.DOTALL):
    if name == "library":
        library = fields
    else:
        LIBRARY_AND_ROUTES.append((library, name, fields))


def answered(client, route: str, fields) -> tuple[str, list]:
    """The text of an answer, and its images with their codes."""
    if route == CHAT:
        answer = chat(client, ASK, **fields)
        images = [(image["codes"], image["image_url"]["url"]) for image in answer["images"]]
        return answer["content"], images
    body = {**BODIES[route], "max_output_tokens": None, **fields}
    answer = answer_of(client.post(route, json=body))
    if route == GENERATE:
        images = [*zip(answer["images_ids"], answer["images"], strict=True)]
        return answer["text"].replace("<image>", " "), images
    items = answer["output"]
    text = "".join(item["content"][0]["text"] for item in items if "content" in item)
    return text, [(item["codes"], item["result"]) for item in items if "result" in item]


@pytest.mark.parametrize("library, route, fields", LIBRARY_AND_ROUTES)
def test_answers_follow(client, tiny, library, route, fields):
    text, images = answered(client, route, json.loads(fields))
    expected = tiny.chat(**{"messages": ASK, "temperature": 0.0, **json.loads(library)})
    assert text.split() == expected.text.split()
    for (codes, image), part in zip(images, expected.parts[1::2], strict=True):
        assert codes == part.codes and np.array_equal(read(image), part.image)


# Route, fields, the same images by the library.
IMAGE_FIELDS = {
    "n": (DRAW, {"n": 2}, lambda system: system.draw(["a fish"], 3, num_images=2)),
    "edit": (
        EDIT,
        {"n": 2},
        lambda system: system.edit([noise(0)], ["Make it green."], 3, num_images=2),
    ),
    "several files": (
        EDIT,
        {"image": [image_to_bytes(noise(0)), image_to_bytes(noise(1))]},
        lambda system: system.edit([[noise(0), noise(1)]], ["Make it green."], 3),
    ),
    "codes": (
        TOKENS,
        {"codes": [CODES, CODES[::-1]], "seed": 5},
        lambda system: system.reconstruct([CODES, CODES[::-1]], 5),
    ),
    "first": (TOKENS, {"first": 8}, lambda system: system.reconstruct([CODES], 0, codes=8)),
}


@pytest.mark.parametrize("route, fields, library", IMAGE_FIELDS.values(), ids=IMAGE_FIELDS)
def test_images_follow(client, tiny, route, fields, library):
    data = answer_of(post(client, route, **fields))["data"]
    for item, image in zip(data, library(tiny), strict=True):
        assert np.array_equal(read(item["b64_json"]), image)


@pytest.mark.parametrize("route", [DRAW, EDIT])
def test_streams_of_images_are_the_images(client, route):
    # OpenAI's client waits for events, and otherwise ends without an image or an error.
    form = {"size": "64x64", "output_format": "webp", "partial_images": 2, "n": 2}
    streamed = events(post(client, route, stream=True, **form))
    kind = {DRAW: "image_generation", EDIT: "image_edit"}[route]
    names = ["partial_image", "partial_image", "completed"]
    expected = [(f"{kind}.{name}", index) for name in names for index in range(2)]
    assert [(event["type"], event["index"]) for event in streamed] == expected
    assert [event["partial_image_index"] for event in streamed[:4]] == [0, 0, 1, 1]
    # What only a stream shows is refused without one.
    assert "partial_images" in post(client, route, **form).get_data(as_text=True)
    del form["partial_images"]
    complete = answer_of(post(client, route, **form))
    for name in ("size", "output_format", "quality", "background"):
        assert complete[name] == streamed[-1][name]
    drawn = complete["data"]
    for item, event in zip(drawn, streamed[4:], strict=True):
        # Alone and in a batch, pixels may be rounded differently.
        difference = np.int16(read(event["b64_json"])) - np.int16(read(item["b64_json"]))
        assert difference.shape == (64, 64, 3) and abs(difference).max() <= 1
        assert base64.b64decode(event["b64_json"])[8:12] == b"WEBP"
        assert event["usage"]["output_tokens"] >= 32


# As clients write images in messages: OpenAI's two routes, a string, transformers.
@pytest.mark.parametrize(
    "part",
    [
        '{"type": "image_url", "image_url": {"url": "URL", "detail": "high"}}',
        '{"type": "image_url", "image_url": "URL"}',
        '{"type": "input_image", "image_url": "URL", "detail": "auto"}',
        '{"type": "image", "image": "URL"}',
    ],
)
@pytest.mark.parametrize("route, name", [(CHAT, "messages"), (RESPONSES, "input")])
def test_images_in_messages_are_read(client, route, name, part):
    url = f"data:image/png;base64,{image_to_base64(noise(0))}"
    content = [json.loads(part.replace("URL", url)), {"type": "text", "text": "What is it?"}]
    answers = [
        answer_of(post(client, route, **{name: [message]}))
        for message in ({"role": "user", "content": content}, user(noise(0), "What is it?"))
    ]
    assert answers[0] == answers[1] and answers[0]["usage"]["total_tokens"] > 32


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize(
    "form",
    [
        "![image]( %s )",
        "![a [b] c](\n<%s>\n'a (b)')",
        f"![{'long ' * 999}](%s)",
        '<IMG width=9\nsrc = "%s" alt="a"/>',
        "<%s>",
        "%s",
    ],
)
def test_images_in_texts_are_read_in_order(client, role, form):
    # Clients keep drawings in a text, of which the base64 would be read as words.
    images = [noise(0), noise(1)]
    url, other = (f"data:image/png;base64,{image_to_base64(image)}" for image in images)
    other = re.sub(".{76}", r"\g<0>\r\n", other)  # as in e-mails
    text = f'A {form % url} and ![]({other} "title"), ![no](http://127.0.0.1/a.png).'
    parts = user("A ", images[0], " and ", images[1], ", ![no](http://127.0.0.1/a.png).")["content"]
    answers = [
        chat(client, [user("Hi"), {"role": role, "content": content}, *ASK], max_tokens=4)
        for content in (text, parts)
    ]
    assert answers[0] == answers[1] and answers[0]["usage"]["prompt_tokens"] > 64


def test_markdown_without_an_end_is_read_at_once(client):
    # Each beginning would otherwise be searched to the end of the text.
    for text in ("![[] ", "![](data:image/", '![](data:image/a,A "', "<img src=data:image/a,A "):
        refusal(post(client, RESPONSES, input=text * 200_000))


@pytest.mark.parametrize("route", [CHAT, RESPONSES, DRAW, EDIT])
def test_other_models_are_noted(client, tiny, route):
    # Clients of OpenAI must name a model, and some always name the same one.
    notes = []
    for model in ("gpt-4o", tiny.config.name.rpartition("/")[2], ""):
        answer = answer_of(post(client, route, model=model))
        message = answer["choices"][0]["message"] if route == CHAT else answer
        notes.append("the request named 'gpt-4o'" in " ".join(message["notes"]))
    assert notes == [True, False, False]


@pytest.mark.parametrize("route", [GENERATE, CHAT, RESPONSES, DRAW, EDIT])
def test_seed_minus_one_is_random(client, route):
    # As of llama.cpp and Stable Diffusion's servers.
    settings = {} if route in (DRAW, EDIT) else {"temperature": 5}
    answers = [answer_of(post(client, route, seed=-1, **settings)) for _ in range(3)]
    assert answers[0] != answers[1] or answers[1] != answers[2]


def test_streams_have_no_usage_unless_it_is_asked_for(client):
    # With it: `chat`.
    for options in ({}, {"stream_options": {"include_usage": False}}):
        for chunk in events(post(client, CHAT, stream=True, **options)):
            assert chunk["choices"] and "usage" not in chunk


IMAGE = image_to_bytes(noise(0))


@pytest.mark.parametrize(
    "fields",
    [
        {"mask": b""},
        {"image": [IMAGE, b""]},
        {"image": b"", "image[]": IMAGE},
        {"image": None, "image[0]": IMAGE},
        {"n": "", "size": "", "mask": ""},
    ],
)
def test_empty_fields_of_forms_are_absent(client, fields):
    # As browsers send what was not filled in.
    assert answer_of(post(client, EDIT, **fields)) == answer_of(post(client, EDIT))


def test_chat_notes_what_does_not_fit(client):
    # Below an image's tokens the model cannot start one, where it might.
    text = {"modalities": ["text"], "max_tokens": 20}
    fields = [{"max_tokens": 20}, {"max_tokens": 40}, text]
    notes = [chat(client, ASK, **of_answer)["notes"] for of_answer in fields]
    assert [len(of_answer) for of_answer in notes] == [1, 0, 0]
    assert "34" in notes[0][0]  # tokens of an image


# ---- harmless


@pytest.mark.parametrize("route", BODIES)
def test_ignored_fields_do_not_change_the_answer(client, route):
    table = POSTED[route].ignored()
    ignored = {name: "x" if values == "any" else values[0] for name, values in table.items()}
    absent = {} if route == EDIT else {"unknown": None}  # forms have no null
    fields = {**ignored, **absent, **BODIES[route]}
    assert answer_of(post(client, route, **fields)) == answer_of(post(client, route))


# ---- refused


# Requests -> what the refusal names: the field, the image or the limit.
REFUSED = r"""
# Missing fields and wrong types.
/generate {"text": 3} -> text:
/generate {"text": "<image>", "images": [["a"]]} -> images.0.0:
/v1/chat/completions {"messages": []} -> must be the user's
/v1/images/tokens {"codes": []} -> 'codes'
/v1/images/tokens {"images": ["aGk="]} -> 'images'
/v1/images/edits {"image": []} -> image:
/v1/images/edits {"prompt": ""} -> prompt:
/v1/images/edits {"prompt": ["a fish", "a cat"]} -> prompt:
/v1/images/edits {"seed": ["", 3, 4]} -> seed:
/v1/images/edits {"image": "aGk="} -> image:
/v1/images/edits {"image[]": "aGk="} -> image[]:
# Values out of range.
/generate {"temperature": -1} -> temperature:
/generate {"temperature": 5.5} -> temperature:
/generate {"top_p": 1.5} -> top_p:
/generate {"num_beams": 9} -> num_beams:
/generate {"max_new_tokens": 0} -> max_new_tokens:
/generate {"seed": 9223372036854775808} -> seed:
/v1/chat/completions {"stop": ["a", "b", "c", "d", "e"]} -> stop
/v1/chat/completions {"stop": ""} -> stop
/v1/chat/completions {"modalities": []} -> modalities:
/v1/chat/completions {"n": true} -> n:
/v1/chat/completions {"frequency_penalty": false} -> frequency_penalty:
/v1/responses {"top_logprobs": false} -> top_logprobs:
/v1/images/generations {"prompt": " "} -> prompt:
/v1/images/generations {"prompt": "\u200b \u200d"} -> empty
/v1/chat/completions {"messages": [{"role": "user", "content": "\ufeff"}]} -> Message 0
/v1/images/generations {"n": 99} -> n:
/v1/images/generations {"ratio": "3:2"} -> ratio:
/v1/images/generations {"ratio": "1:1"} -> ratio:
/v1/images/generations {"size": "big"} -> size: It must be WIDTHxHEIGHT
/v1/responses {"tools": [{"type": "image_generation", "size": 64}]} -> size: It must be WIDTHxHEIGHT
/v1/images/generations {"response_format": "url"} -> response_format
/v1/images/tokens {"first": 0} -> first:
/v1/images/tokens {"first": 99} -> first:
# Fields that contradict each other.
/v1/chat/completions {"modalities": ["text"], "force_image": true} -> force_image:
/v1/images/generations {"size": "64x64", "ratio": "3:2"} -> ratio:
/v1/images/tokens {"codes": null, "images": ["aGk="], "first": 3} -> first:
/v1/images/tokens {"codes": [[], [1, 2]]} -> Request 0
# Messages.
/generate {"text": ""} -> Message 0
/generate {"text": "USER: .\nASSISTANT:"} -> Message 0
/generate {"text": "<image>"} -> <image>
/v1/responses {"input": ""} -> Message 0
/v1/chat/completions {"messages": [{"role": "user", "content": " ."}]} -> Message 0
/v1/chat/completions {"messages": [{"role": "tool", "content": "12"}]} -> messages.0.role
# Images and codes.
/generate {"text": "<image>", "images": ["@@@"]} -> image 0
/generate {"text": "<image>", "images": ["bm8gaW1hZ2U="]} -> image 0
/generate {"text": "<image>", "images": [[-1]]} -> images.0
/generate {"text": "<image>", "images": [[100000000000000000000000000000]]} -> images.0
/generate {"text": "USER: <image>?\nASSISTANT:", "images": [[]]} -> 32 codes
/v1/images/tokens {"codes": [[1, 2]]} -> 32 codes
/generate {"text": "<image>", "images": [[0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]]} -> 32 codes
/generate {"text": "<image>", "images": [[
    16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16,
    16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16]]} -> 0 to 15
/v1/chat/completions {"messages": [{"role": "system", "content": [{"type": "image_url", "codes": [
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]}]}]} -> Message 0
/v1/chat/completions {"messages": [{"role": "user", "content":
    [{"type": "image_url", "codes": [0, 1, 2]}, {"type": "text", "text": "What is it?"}]}]}
    -> 32 codes
/v1/responses {"input": [{"role": "user", "content":
    [{"type": "image_url", "codes": [0, 1, 2]}, {"type": "text", "text": "What is it?"}]}]}
    -> 32 codes
/v1/responses {"input": [{"role": "user", "content": [{"type": "text", "codes": [0, 1]}]}]}
    -> codes:
/v1/chat/completions {"messages": [{"role": "user", "content": [{"type": "image", "text": "a"}]}]}
    -> text:
/v1/chat/completions {"messages": [{"role": "user", "content":
    [{"type": "text", "text": "<img><img_00001></img>?"}]}]} -> <img_00001>
/v1/chat/completions {"messages": [{"role": "assistant", "reasoning_content": 3}]}
    -> messages.0.reasoning_content:
/v1/chat/completions {"messages":
    [{"role": "assistant", "reasoning": "a", "reasoning_content": "b"}]} -> reasoning:
/v1/images/tokens {"codes": [], "images": ["http://127.0.0.1:1/a.png"]} -> image 0
/v1/chat/completions {"max_tokens": true} -> max_tokens:
/v1/chat/completions {"seed": true} -> seed:
/v1/chat/completions {"temperature": false} -> temperature:
/generate {"max_new_tokens": true} -> max_new_tokens:
/v1/images/generations {"n": true} -> n:
/v1/images/tokens {"codes": [[true, false]]} -> true and false
/v1/chat/completions {"messages": null} -> messages:
/v1/images/generations {"prompt": null} -> prompt:
/v1/chat/completions {"force_image": true, "modalities": ["text", "text"]} -> modalities
# What OpenAI's server would do otherwise.
/v1/chat/completions {"tools": [{"type": "function", "function": {"name": "f"}}]} -> tools
/v1/chat/completions {"audio": {"voice": "alloy"}} -> audio
# Names of other routes.
/generate {"max_tokens": 9} -> max_new_tokens
/v1/responses {"max_tokens": 9} -> max_output_tokens
/v1/chat/completions {"max_output_tokens": 9} -> max_completion_tokens
/v1/responses {"tools": [{"type": "web_search"}]} -> tools.0
/v1/responses {"previous_response_id": "resp_1"} -> previous_response_id
/v1/responses {"input": []} -> must be the user's
/v1/images/generations {"output_format": "gif"} -> output_format
/v1/images/generations {"size": "1536x1024"} -> size:
/v1/responses {"tool_choice": {"type": "image_generation", "size": "100x3000"}} -> size:
/v1/images/generations {"size": "4096x4096"} -> size
# Names as they were sent, at any depth, and the nearest known ones.
/v1/chat/completions {"Temperature": 1} -> (did you mean 'temperature'?)
/v1/chat/completions {"maxTokens": 1} -> (did you mean 'max_tokens'?)
/v1/images/edits {"Prompt": "a"} -> (did you mean 'prompt'?)
/v1/chat/completions {"image[0]": 1} -> image[0]:
/v1/chat/completions {"a.b": 1} -> a.b:
/v1/chat/completions {"ImageUrl": 1} -> ImageUrl:
/v1/chat/completions {"messages": [{"content": "a"}]} -> messages.0.role:
/v1/chat/completions {"messages": [{"role": "user", "content": "a", "Name": "b"}]}
    -> messages.0.Name:
/v1/responses {"input": [{"role": "user", "content": [{"type": "text", "Text": "a"}]}]}
    -> input.0.content.0.Text:
/v1/responses {"tools": [{"type": "image_generation", "Size": "1x1"}]} -> tools.0.Size:
/v1/chat/completions {"stream_options": {"include_usages": true}} -> stream_options.include_usages:
/v1/chat/completions {"stream_options": true} -> stream_options:
/v1/chat/completions {"max_tokens": 3, "max_completion_tokens": 4} -> max_tokens:
/v1/responses {"model": 4} -> model:
"""


@pytest.mark.parametrize("route", BODIES)
def test_unknown_fields_and_other_values_are_refused(client, route):
    assert "promptText" in refusal(post(client, route, promptText="a"))
    table = POSTED[route].ignored()
    absent = dict.fromkeys(BODIES[route].keys() & table.keys())  # other names of the same field
    for name, values in table.items():
        if values != "any":
            assert name in refusal(post(client, route, **{**absent, name: "other"}))


TOOL = {"type": "image_generation"}
URL = f"data:image/png;base64,{image_to_base64(noise(0))}"
# Route, fields, what the refusal names.
REQUESTS = {
    "characters": (GENERATE, {"text": "x" * 40_000}, "characters"),
    "context": (GENERATE, {"text": "word " * 3000}, "context"),
    "images": (GENERATE, {"text": "<image>" * 17, "images": [CODES] * 17}, "images"),
    "codes": (GENERATE, {"text": "<image>", "images": [[0] * 2000]}, "32 codes"),
    "characters of messages": (CHAT, {"messages": [user("x" * 33_000)]}, "characters"),
    "images of an edit": (EDIT, {"image": [b"no image"] * 17}, "17 images"),
    "no image of an edit": (EDIT, {"image": [b"no image"]}, "image 0"),
    "a mask": (EDIT, {"mask": [b"a file"]}, "mask:"),
    "markup": (EDIT, {"markup": [b"a file"]}, "markup:"),
    "a long name": (EDIT, {"n" * 1000: "a"}, f"{'n' * 40}…{'n' * 40}:"),
    "a long name twice": (EDIT, {"n" * 1000: ["a", "b"]}, f"{'n' * 40}…{'n' * 40}:"),
    "many names": (CHAT, {f"k{index}": 1 for index in range(190_000)}, "100 fields"),
    "a long prompt": (EDIT, {"prompt": "x" * 600_000}, "prompt:"),
    "a prompt's file": (EDIT, {"prompt": [b"a fish"]}, "prompt:"),
    "a picture of the system": (RESPONSES, {"instructions": f"![]({URL})"}, "Message 0"),
    "pictures in Markdown": (CHAT, {"messages": [user(f"![a]({URL})" * 17)]}, "17 images"),
    "codes to draw": (TOKENS, {"codes": [[1]] * 17}, "at most 16"),
    "size beside tools": (
        RESPONSES,
        {"tools": [TOOL], "tool_choice": {**TOOL, "size": "100x3000"}},
        "size:",
    ),
    "images of messages": (CHAT, {"messages": [user(*[CODES] * 17)]}, "17 images"),
}
for route, sent, named in re.findall(r"^(/\S+) ([\s\S]+?)\s+-> (.+)$", REFUSED, re.MULTILINE):
    REQUESTS[f"{route} {sent}"] = (route, json.loads(sent), named)


@pytest.mark.parametrize("route, fields, named", REQUESTS.values(), ids=REQUESTS)
def test_refused_fields_are_named(client, route, fields, named):
    response = post(client, route, **fields)
    assert named in refusal(response)
    if named.endswith(":") and route != GENERATE:
        assert response.json["error"]["param"] == named.removesuffix(":")
    # A stream is refused with a status, too, not with an event.
    if route == CHAT:
        assert named in refusal(post(client, route, stream=True, **fields))


NO_REQUESTS = [
    b"",
    b"null",
    b"[1]",
    b"{",
    b"{}",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"text": "\xed\xa0\x80", "images": []}',
    b'{"text": "ab\\ud800", "images": []}',
    b'{"text": "x", "images": [], "seed": 1' + b"0" * 5000 + b"}",
    b'{"text": "x", "images": [], "temperature": NaN}',
    b'{"text": "x", "images": [], "top_p": 1e400}',
    b'{"codes": [' + b"0," * 300_000 + b"0]}",
]


@pytest.mark.parametrize("route", JSON_ROUTES)
@pytest.mark.parametrize("body", NO_REQUESTS, ids=lambda body: body[:20].decode("latin-1"))
def test_bodies_that_are_no_requests_are_refused(client, route, body):
    refusal(client.post(route, data=body, content_type="application/json"))


@pytest.mark.parametrize(
    "body, named",
    [
        ("{}".encode("utf-16"), "UTF-16"),
        ("{}".encode("utf-32-be"), "UTF-32"),
        (b'{"messages": "\\ud800"}', "surrogate"),
        (b'{"messages": [1,]}', "column 17"),
        (b'{"messages": [' + b'{"a": 1},' * 190_000 + b"1]}", "messages.0.a"),
        (b'{"' + b"a" * (8 << 20) + b'": 1}', "aaa…aaa"),
    ],
    ids=["UTF-16", "UTF-32", "surrogate", "comma", "many errors", "8 MiB"],
)
def test_refusing_a_body_names_its_fault_at_once(client, body, named):
    before = time.process_time()
    assert named in refusal(client.post(CHAT, data=body, content_type="application/json"))
    assert time.process_time() - before < 2


def test_bodies_with_a_byte_order_mark_are_read(client):
    body = json.dumps(BODIES[CHAT]).encode("utf-8-sig")
    answer_of(client.post(CHAT, data=body, content_type="application/json"))


PART = b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\na\r\n'
FORM = (PART % b"prompt") + (PART % b'image"; filename="').replace(b"\na\r", b"\n%b\r" % IMAGE)


@pytest.mark.parametrize(
    "body, boundary, status, named",
    [
        (FORM + b"--b--", "; boundary=b", 200, ""),  # a file without a name
        (FORM[:-9], "; boundary=b", 400, "breaks off"),
        (FORM + b"--b--", "", 400, "boundary"),
        (FORM.replace(b' name="image";', b"") + b"--b--", "; boundary=b", 400, "name of a part"),
        (PART % b"a" * 20_000 + b"--b--", "; boundary=b", 413, "1,000"),
    ],
    ids=["empty file name", "breaks off", "no boundary", "no name", "parts"],
)
def test_forms_that_cannot_be_read_say_why(client, body, boundary, status, named):
    answer = client.post(EDIT, data=body, content_type=f"multipart/form-data{boundary}")
    assert answer.status_code == status
    assert status == 200 or named in refusal(answer, status)


# ---- routes


@pytest.mark.parametrize("route", JSON_ROUTES)
def test_bodies_of_another_type_are_refused(client, route):
    refusal(client.post(route, data="x"), status=415)
    refusal(client.post(EDIT, json={"prompt": "x"}), status=415)
    encoded = client.post(route, json=BODIES[route], headers={"Content-Encoding": "gzip"})
    assert "gzip" in refusal(encoded, status=415)


def test_wrong_routes_and_methods_are_named(client):
    assert "/openapi.json" in refusal(client.get("/elsewhere"), status=404)
    paths = client.get("/openapi.json").json["paths"]
    assert BODIES.keys() < paths.keys()
    for path, methods in paths.items():
        wrong = client.delete(path) if "get" in methods else client.get(path)
        assert wrong.status_code == 405 and wrong.headers["Allow"], path


def test_models_lists_the_system_by_its_name(client, tiny):
    # Clients ask for the name before their first request.
    (listed,) = client.get("/v1/models").json["data"]
    assert client.get(f"/v1/models/{listed['id']}").json == listed
    assert tiny.config.name.endswith(listed["id"])
    refusal(client.get(f"/v1/models/{'x' * 1000}"), status=404)
    for name in ("gpt-4o", "AILab-CVC/SEED"):
        sentence = refusal(client.get(f"/v1/models/{name}"), status=404)
        assert name in sentence and listed["id"] in sentence


# ---- limits


def test_long_conversations_lose_as_few_rounds_as_possible():
    def fits(turns) -> bool:
        n_images = sum(not turn.is_text for turn in turns)
        return n_images <= 4 and sum(len(turn.text) for turn in turns) <= 30

    rng = random.Random(0)
    for _ in range(500):
        turns = []
        for role in rng.choices("user assistant system".split(), k=rng.randrange(30)):
            turns.append(Message(role, (rng.choice(["", "a", "a text", [1]]),)))
        shorter = [without_oldest_rounds(turns, n_rounds) for n_rounds in range(30)]
        assert [*newest_turns(turns, 30, 4, 30)] == next(filter(fits, shorter), shorter[-1])


@pytest.mark.slow
def test_40_000_messages_are_cut_at_once(client):
    # Cut by trying, they kept a processor busy for a minute, whatever the time limit.
    messages = [user("a"), {"role": "assistant", "content": "b"}] * 20_000
    before = time.process_time()
    answer = chat(client, [*messages, user("Hi")], max_tokens=4)
    assert "left out" in answer["notes"][0] and time.process_time() - before < 12


@pytest.mark.parametrize("route", BODIES)
def test_bodies_that_are_too_large_are_refused(client_of, tiny, route):
    client = client_of(tiny, max_body_bytes=1 << 20)
    assert "1 MiB" in refusal(post(client, route, padding="x" * (2 << 20)), status=413)


@pytest.mark.parametrize("route", [GENERATE, CHAT, EDIT, TOKENS])
def test_images_with_too_many_pixels_are_refused_unread(client_of, tiny, route):
    # A file of 1 kB may claim pixels that fill the memory.
    client = client_of(tiny, max_pixels=1_000_000)
    for images, named in (
        ([Image.new("1", (700, 700))] * 3, "image 2"),
        ([Image.new("1", (1100, 1000))], "image 0"),
    ):
        texts = [image_to_base64(image) for image in images]
        fields = {
            GENERATE: {"text": "<image>" * len(images), "images": texts},
            CHAT: {"messages": [user(*images)]},
            EDIT: {"image": [image_to_bytes(image) for image in images]},
            TOKENS: {"codes": None, "images": texts},
        }
        assert named in refusal(post(client, route, **fields[route]))
    assert 'seed_images_total{kind="read"}' not in figures(client)
