"""Kind `conversation`: prompts of the chat demo, and what its page posts.

Compared: `templates.json` (every prompt), `helpers.json` (sizes) and of all `flows_*.json` what the
original page posted for its recorded conversation (text, codes, images as pixels), the model's
input ids and the final prompt; a message with a typed `<image>`, at which the original crashed, is
an error here. Not compared: how the original's page stores and displays the conversation (its
recorded messages are the inputs of this check); request headers and addresses; the server's answers
and settings (kind `flask_api`); the prompt of no turns.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from PIL import Image
from runner import assert_close, assert_same

from seed_multimodal.errors import RequestError
from seed_multimodal.images.io import (
    chat_image,
    crop_to_aspect,
    fit_longer_side,
    image_to_base64,
    open_image,
    request_image,
)
from seed_multimodal.language.prompts import get_template
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import BOI, EOI, PLACEHOLDER
from seed_multimodal.models.registry import ModelCard
from seed_multimodal.serving.chat import TOO_LONG, Chat
from seed_multimodal.serving.client import ModelClient
from seed_multimodal.serving.schema import ChatRequest, ImageUrl
from seed_multimodal.serving.turns import Picture, Turn, user_turn

STYLES = {"flows_8b.json": "vicuna", "flows_14b.json": "llama2"}
AFTER_AN_ANSWER = {"vicuna": "\nASSISTANT:", "llama2": "\n"}
ROLES = ("user", "assistant")


def check(recording):
    for name, check_cases in (("templates.json", check_templates), ("helpers.json", check_helpers)):
        if (recording.folder / name).is_file():
            check_cases(recording.json(name))
    tokenizer = MultimodalTokenizer.from_pretrained(recording.tokenizer_folder)
    for file in recording.files("flows_*.json"):
        for flow in recording.json(file.name):
            name = f"{file.stem} / {flow['name']}"
            check_flow(flow, STYLES[file.name], tokenizer, name)


def check_templates(cases: list[dict]):
    for case in cases:
        if not case["turns"]:  # no prompt without a question
            continue
        style = "llama2" if case["template"] == "conv_seed_llama2" else "vicuna"
        texts = [[turn["message"]["text"]] for turn in case["turns"]]
        prompt = render(style, texts, case["system"])
        assert_same(prompt, case["prompt"]["text"], f"prompt of {case['template']}")


def check_helpers(cases):
    for size, expected in cases["resize_image"]:
        resized = fit_longer_side(Image.new("RGB", tuple(size)))
        assert_same(list(resized.size), expected, f"resize_image {size}")
    for size, ratio, expected in cases["center_crop_image"]:
        cropped = crop_to_aspect(Image.new("RGB", tuple(size)), ratio)
        assert_same(list(cropped.size), expected, f"center_crop_image {size}")


def check_flow(flow, style: str, tokenizer, name):
    """Each conversation that the original page posted, in the messages of this page."""
    images = {}  # recorded file → the data of its image in our requests
    turns = []
    posts = iter(zip(flow["http"], flow["model_calls"], strict=True))
    for step in flow["steps"]:
        # The original crashed: here the page shows an error.
        if step["error"] is not None:
            with pytest.raises(RequestError):
                user_turn(step["argument"], [])
            return
        # An added image, in the size in which the page posts it.
        if step["step"] == "image" and step["argument"] is not None:
            size, colour = step["argument"]
            image = chat_image(Image.new("RGB", tuple(size), tuple(colour)))
            images[step["messages"][-1]["message"]["images"][-1]] = image_to_base64(
                request_image(image)
            )

        # A longer conversation after "bot" was posted, or the original displayed an error.
        messages = step["messages"]
        if step["step"] == "bot" and len(messages) > len(turns):
            answer = messages[-1]["message"]
            if answer["text"] == TOO_LONG:
                with pytest.raises(RequestError):
                    page_body(turns, flow, flow["max_turns"])
            else:
                post, call = next(posts)
                check_post(posted(turns, flow, style), post["payload"], name)
                check_prompt(post, call, tokenizer, name)
                images |= zip(answer["images"], post["response"]["images"], strict=True)
        turns = [
            page_turn(ROLES[index % 2], entry["message"], images)
            for index, entry in enumerate(messages)
        ]
    assert next(posts, None) is None, f"{name}: not all requests were compared"
    assert_same(posted(turns, flow, style), flow["prompt_at_end"], f"{name}: prompt at the end")


def page_turn(role: str, recorded, images: Mapping[str, str]) -> Turn:
    """A recorded message in the page's form: texts, and images with their codes if known."""
    # The text is cut at its placeholders.
    first, *texts = recorded["text"].split(PLACEHOLDER)
    parts = [first]
    files = zip(recorded["images"], recorded["images_ids"], texts, strict=True)
    for file, codes, text in files:
        parts += [Picture(codes=codes, url=f"data:image/png;base64,{images[file]}"), text]
    return Turn(role, parts)


def page_body(turns: list[Turn], flow, rounds: int = 10**6) -> dict:
    """The body that the page posts; raises RequestError for more rounds."""
    chat = Chat(ModelClient("", ModelCard("")))
    return chat.request(turns, flow["force_image_gen"], None, 1, 512, 1.0, 0.5, rounds)


def posted(turns: list[Turn], flow, style: str) -> dict:
    """The text for the model and the images in that body, as the server reads them."""
    # As the server takes the body apart: content is a text, or a list of parts.
    messages = ChatRequest.model_validate(page_body(turns, flow)).messages
    contents = [
        [part.value for part in message.content]
        if isinstance(message.content, list)
        else message.parts
        for message in messages
    ]
    texts = [
        [part if isinstance(part, str) else PLACEHOLDER for part in parts] for parts in contents
    ]
    images = [
        part.url.partition(",")[2] if isinstance(part, ImageUrl) else part
        for parts in contents
        for part in parts
        if not isinstance(part, str)
    ]
    return {"text": render(style, texts), "images": images}


def check_post(body: dict, payload: dict, name):
    """Images by their pixels, within one level: resizing depends on library versions."""
    assert_same(body["text"], payload["text"], f"{name}: the posted text")
    for image, recorded in zip(body["images"], payload["images"], strict=True):
        if isinstance(recorded, str):
            pixels, wanted = (np.array(open_image(text).image) for text in (image, recorded))
            assert_close(pixels, wanted, 1, what=f"{name}: the posted image")
        else:
            assert_same(image, recorded, f"{name}: codes in the request")


def check_prompt(post: dict, call: dict, tokenizer, name):
    """The ids of the posted text, with the codes that the server returned for its images."""
    payload = post["payload"]
    # A placeholder of the text stands for the codes of its image.
    text, *spans = payload["text"].split(PLACEHOLDER)
    codes = post["response"]["images_ids"][: len(payload["images"])]
    for row, span in zip(codes, spans, strict=True):
        tokens = tokenizer.tokens(tokenizer.vocabulary.code_to_id(row))
        text += BOI + "".join(tokens) + EOI + span
    if payload["force_boi"]:
        text += BOI
    ids = [tokenizer.encode(text, add_bos=True)]
    assert_same(ids, call["input_ids"], f"{name}: the model's input ids")


def render(style: str, turns: Sequence[Sequence[str]], system: str = "") -> str:
    """The original's prompt from the template. Its blank after "ASSISTANT:" is added when encoding;
    its end after an answer has no use here."""
    blank = " " if style == "vicuna" else ""
    messages = [
        (ROLES[index % 2], (blank if index % 2 else "") + "".join(parts))
        for index, parts in enumerate(turns)
    ]
    end = AFTER_AN_ANSWER[style] if len(turns) % 2 == 0 else ""
    return "".join(str(segment) for segment in get_template(style).render(messages, system)) + end


KINDS = {"conversation": check}
