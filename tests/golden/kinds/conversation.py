"""Kind `conversation`: templates and turns of the chat demo, step by step.

Compared: `templates.json` (every prompt), `helpers.json` (sizes) and all
`flows_*.json`: stored messages, pending message, posted bodies (images as pixels), the model's
input ids, the final prompt. Not compared: the original's view and log record, which are its page's
forms of the same messages; request headers and addresses;
md5 names of image files (they depend on the PNG encoder: compared by order); the state of the
original's buttons; the server's answers and settings (kind `flask_api`); the prompt of no turns;
codes of shown images, which the page leaves to the server (filled in here); the steps after the
original crashed on a typed `<image>`: here that text is an error, and the flow ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runner import Recording, assert_close, assert_same

from seed_multimodal.errors import RequestError
from seed_multimodal.images.io import (
    chat_image,
    crop_to_aspect,
    fit_longer_side,
    image_from_base64,
    image_to_base64,
    request_image,
)
from seed_multimodal.language.prompts import get_template
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import BOI, EOI, PLACEHOLDER
from seed_multimodal.models.registry import ModelCard
from seed_multimodal.serving.chat_session import (
    TOO_LONG,
    ChatSession,
    Message,
    add_change,
    user_message,
)
from seed_multimodal.serving.client import ModelClient
from seed_multimodal.serving.schema import ChatRequest, ImageUrl

SEPARATOR = "\n"
STYLES = {"flows_8b.json": "vicuna", "flows_14b.json": "llama2"}
ROLES = {"vicuna": ["USER", "ASSISTANT"], "llama2": ["[INST]", "[/INST]"]}
AFTER_AN_ANSWER = {"vicuna": "\nASSISTANT:", "llama2": "\n"}


def message(role: str, *content: Message) -> Message:
    return {"role": role, "content": [*content], "below": []}


def text(content: str) -> Message:
    return {"type": "text", "text": content}


def check(recording: Recording) -> None:
    for name, check_cases in (("templates.json", check_templates), ("helpers.json", check_helpers)):
        if (recording.folder / name).is_file():
            check_cases(recording.json(name))
    tokenizer = MultimodalTokenizer.from_pretrained(recording.tokenizer_folder)
    for file in recording.files("flows_*.json"):
        for flow in recording.json(file.name):
            Replay(flow, STYLES[file.name], f"{file.stem} / {flow['name']}").run(tokenizer)


def check_templates(cases: list[dict[str, Any]]) -> None:
    assert cases
    for case in cases:
        if not case["turns"]:
            continue
        style = "llama2" if case["template"] == "conv_seed_llama2" else "vicuna"
        assert_same((ROLES[style], SEPARATOR), (case["roles"], case["sep"]), case["template"])
        turns = [turn["message"] for turn in case["turns"]]
        rendered = render(style, [[turn["text"]] for turn in turns], case["system"])
        prompt = {
            "text": rendered,
            "images": [codes for turn in turns for codes in turn["images_ids"]],
        }
        assert_same(prompt, case["prompt"], f"prompt of {case['template']}")


def check_helpers(cases: dict[str, Any]) -> None:
    for size, expected in cases["resize_image"]:
        assert_same(list(fit_longer_side(plain_image(size)).size), expected, f"resize_image {size}")
    for size, ratio, expected in cases["center_crop_image"]:
        assert_same(
            list(crop_to_aspect(plain_image(size), ratio).size),
            expected,
            f"center_crop_image {size}",
        )


def plain_image(size: list[int], colour: Sequence[int] = (0, 0, 0)) -> Image.Image:
    return Image.new("RGB", (size[0], size[1]), tuple(colour))


class Replay:
    """Repeats a recorded flow with the page's messages; images are in memory under numbered names.

    `pending`: the text and images added since the last answer.
    """

    def __init__(self, flow: dict[str, Any], style: str, name: str) -> None:
        self.flow = flow
        self.style = style
        self.name = name
        self.turns: list[Message] = []
        self.pending = message("user")
        self.images: dict[str, Image.Image] = {}
        self.posted = 0

    def run(self, tokenizer: MultimodalTokenizer) -> None:
        for index, step in enumerate(self.flow["steps"]):
            location = f"{self.name}, step {index} ({step['step']})"
            if step["error"] is not None:
                with pytest.raises(RequestError):
                    self.do(step, tokenizer)
                return
            self.do(step, tokenizer)
            actual = {
                "messages": self.messages(),
                "next_input_state": entry(self.pending),
            }
            assert_same(_numbered(actual), _numbered({key: step[key] for key in actual}), location)
        assert_same(self.posted, len(self.flow["http"]), f"{self.name}: number of requests")
        assert_same(self.request(), self.flow["prompt_at_end"], f"{self.name}: prompt at the end")

    def do(self, step: dict[str, Any], tokenizer: MultimodalTokenizer) -> None:
        kind = step["step"]
        argument = step["argument"]
        if kind == "text" and argument:
            self._add(user_message(argument, [{}])["content"][-1])  # raises for the placeholder
        elif kind == "image" and argument is not None:
            self._add(self._store(chat_image(plain_image(*argument))))
        elif kind in ("regenerate", "clear"):
            self.turns = self.turns[: -1 if kind == "regenerate" else 0]
            self.pending = message("user")
        elif kind == "bot" and self.turns and text_of(self.turns[-1]).strip(" ?.;!/"):
            try:
                self.body(self.flow["max_turns"])
            except RequestError:
                self.turns.append(
                    message("assistant", text(TOO_LONG))
                )  # the page shows it as an error
                self.pending = message("user")
                return
            self._bot(tokenizer)

    def _add(self, part: Message) -> None:
        self.pending["content"].append(part)
        self.turns = [*self.turns[: len(self.turns) // 2 * 2], self.pending]

    def _bot(self, tokenizer: MultimodalTokenizer) -> None:
        assert self.posted < len(self.flow["http"]), (
            f"{self.name}: a request the original did not send"
        )
        recorded = self.flow["http"][self.posted]
        settings = {
            key: value
            for key, value in recorded["payload"].items()
            if key not in ("text", "images")
        }
        assert_same(settings["force_boi"], self.flow["force_image_gen"], f"{self.name}: force_boi")
        check_body({**self.request(), **settings}, recorded["payload"], self.name)
        self.check_prompt(recorded, tokenizer)
        self.posted += 1
        self.turns = [*self.turns, self.receive(recorded["response"])]
        self.pending = message("user")

    def body(self, rounds: int = 10**6) -> dict[str, Any]:
        """The body that the page posts; raises RequestError for more rounds."""
        session = ChatSession([model := ModelClient("", ModelCard(""))], model)
        return session.request(
            self.turns, self.flow["force_image_gen"], None, 1, 512, 1.0, 0.5, rounds
        )

    def request(self) -> dict[str, Any]:
        """The text for the model and the images in the body that the page posts.

        Of an uploaded image its codes if they are known, as the original posts it; the server reads
        the image itself.
        """
        turns = [
            [part.value for part in turn.content] if isinstance(turn.content, list) else turn.parts
            for turn in ChatRequest.model_validate(self.body()).messages
        ]
        texts = [
            [part if isinstance(part, str) else PLACEHOLDER for part in parts] for parts in turns
        ]
        return {
            "text": render(self.style, texts),
            "images": [
                part.url.partition(",")[2] if isinstance(part, ImageUrl) else part
                for parts in turns
                for part in parts
                if not isinstance(part, str)
            ],
        }

    def receive(self, answer: dict[str, Any]) -> Message:
        """The recorded answer as a stream sends it; the codes of the posted images are stored as in
        the original."""
        posted = images_of(self.turns)
        for image, codes in zip(posted, answer["images_ids"], strict=False):
            image["codes"] = image.get("codes") or codes
        first, *pieces = answer["text"].split(PLACEHOLDER)
        turn = message("assistant", *([text(first)] if first else []))
        for data, codes, piece in zip(
            answer["images"], answer["images_ids"][len(posted) :], pieces, strict=True
        ):
            image = (
                self._store(image_from_base64(data)) if data else {"type": "image_url", "path": ""}
            )
            add_change(turn, {"images": [{**image, "codes": codes}], "content": piece})
        return turn

    def messages(self) -> list[dict[str, Any]]:
        return [
            {"role": ROLES[self.style][index % 2], "message": entry(turn)}
            for index, turn in enumerate(self.turns)
        ]

    def check_prompt(self, recorded: dict[str, Any], tokenizer: MultimodalTokenizer) -> None:
        """The ids of the posted text, with the codes that the server returned for its images."""
        payload = recorded["payload"]
        spans = payload["text"].split(PLACEHOLDER)
        codes = recorded["response"]["images_ids"][: len(payload["images"])]
        tokens = [tokenizer.tokens(tokenizer.vocabulary.code_to_id(row)) for row in codes]
        text = spans[0] + "".join(
            f"{BOI}{''.join(row)}{EOI}{span}" for row, span in zip(tokens, spans[1:], strict=True)
        )
        assert_same(
            [tokenizer.encode(text + (BOI if payload["force_boi"] else ""), add_bos=True)],
            self.flow["model_calls"][self.posted]["input_ids"],
            f"{self.name}: the model's input ids",
        )

    def _store(self, image: Image.Image) -> Message:
        """An image as a part of a message; equal images get the same name, as with the original's
        md5 names."""
        new = f"log/images/{len(self.images):032x}.png"
        path = next(
            (
                path
                for path, stored in self.images.items()
                if stored.size == image.size and stored.tobytes() == image.tobytes()
            ),
            new,
        )
        self.images[path] = image
        data = f"data:image/png;base64,{image_to_base64(request_image(image))}"
        return {"type": "image_url", "path": path, "image_url": {"url": data}}


def check_body(body: dict[str, Any], payload: dict[str, Any], name: str) -> None:
    """Same keys and values; images by their pixels (within one level: resizing depends on library
    versions)."""
    assert_same(
        {**body, "images": len(body["images"])}, {**payload, "images": len(payload["images"])}, name
    )
    for image, recorded in zip(body["images"], payload["images"], strict=True):
        if isinstance(recorded, str):
            pixels, wanted = (np.array(image_from_base64(text)) for text in (image, recorded))
            assert_close(pixels, wanted, 1, what=f"{name}: the posted image")
        else:
            assert_same(image, recorded, f"{name}: codes in the request")


def images_of(turns: Sequence[Message]) -> list[Message]:
    return [part for turn in turns for part in turn["content"] if "path" in part]


def entry(turn: Message) -> dict[str, Any]:
    """A message in the form of the original front-end."""
    return {
        "text": text_of(turn),
        "images": [image["path"] for image in images_of([turn])],
        "images_ids": [image.get("codes") for image in images_of([turn])],
    }


def text_of(turn: Message) -> str:
    return "".join(part.get("text", PLACEHOLDER) for part in turn["content"])


def render(style: str, turns: Sequence[Sequence[str]], system: str = "") -> str:
    """The original's prompt from the template, with the blank after "ASSISTANT:", which is added
    when encoding."""
    blank = " " if style == "vicuna" else ""
    messages = [
        (("user", "assistant")[index % 2], (blank if index % 2 else "") + "".join(parts))
        for index, parts in enumerate(turns)
    ]
    end = AFTER_AN_ANSWER[style] if len(turns) % 2 == 0 else ""
    return "".join(str(segment) for segment in get_template(style).render(messages, system)) + end


def _numbered(value: Any) -> Any:
    """The value with the names of image files replaced by numbers in order of appearance."""
    names: dict[str, str] = {}
    text = re.sub(
        r"[0-9a-f]{32}\.png",
        lambda m: names.setdefault(m[0], f"image{len(names)}"),
        json.dumps(value, sort_keys=True),
    )
    return json.loads(text)


KINDS = {"conversation": check}
