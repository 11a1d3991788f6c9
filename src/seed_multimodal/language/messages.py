"""Messages of a conversation, and answers.

A message is `{"role": "user" | "assistant" | "system", "content": …}`. Content is one text, or a list of texts (`str`),
images (PIL, `Path`, bytes, an array) and codes (a list of ints), in any order and number; an assistant's may be the
`Answer` of an earlier call. A bare `str` is always text: pass file names as `Path`, or in the format of transformers
and OpenAI: `{"type": "text", "text": …}`, `{"type": "image", "image": "cat.png"}`, `{"type": "image_url", "image_url":
{"url": "data:image/png;base64,…"}}`. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.errors import RequestError
from seed_multimodal.images.io import image_from_base64, is_open_file
from seed_multimodal.language.answer import AnswerPart, BrokenImagePart, ImagePart
from seed_multimodal.language.prompts import without_verdict
from seed_multimodal.language.vocabulary import PLACEHOLDER

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """A role, and texts, images, codes and `ImagePart`s of earlier answers in order. A single message with the role
    "raw" is continued without a template."""

    role: str
    content: tuple[Any, ...]

    @property
    def text(self) -> str:
        return " ".join(item for item in self.content if isinstance(item, str))

    @property
    def images(self) -> list[Any]:
        """The input images."""
        return [item for item in self.content if is_image(item)]


@dataclass(frozen=True)
class Answer:
    """One answer of the model: texts, `ImagePart`s and `BrokenImagePart`s in order, and views of them."""

    parts: Sequence[AnswerPart]
    ids: Sequence[int] = ()  # the generated tokens
    note: str = ""  # note about unknown words or dropped turns
    answer_after: str = ""  # of `TaskPrompts`; a leading verdict stays in `parts`, not in texts
    prompt_tokens: int = field(default=0, compare=False)  # of `chat`
    finish_reason: str = field(
        default="stop", compare=False
    )  # "length": no end within the tokens; "cancelled"

    @property
    def text(self) -> str:
        """All text, without images."""
        return " ".join(self._texts())

    @property
    def images(self) -> list[Image.Image]:
        """All images that were drawn."""
        return [
            part.image
            for part in self.parts
            if isinstance(part, ImagePart) and part.image is not None
        ]

    @property
    def codes(self) -> list[list[int]]:
        """The codes of every complete image."""
        return [list(part.codes) for part in self.parts if isinstance(part, ImagePart)]

    @property
    def problems(self) -> list[str]:
        """A message for each broken image."""
        return [part.reason for part in self.parts if isinstance(part, BrokenImagePart)]

    def __str__(self) -> str:
        """The text with `<image>` in place of images."""
        return " ".join(self._texts(PLACEHOLDER))

    def _texts(self, *image: str) -> list[str]:
        return [
            text
            for part in self.parts
            for text in (
                [without_verdict(part.strip(), self.answer_after)]
                if isinstance(part, str)
                else image
            )
        ]


def read_messages(messages: Sequence[Any]) -> list[Message]:
    """Parse the messages of a conversation. Raises RequestError: invalid messages."""
    read = [_message(message, number) for number, message in enumerate(messages)]
    for number, message in enumerate(read):
        if message.role == "system" and not all(isinstance(item, str) for item in message.content):
            raise RequestError(
                f"Message {number}: a system message is text; show images in the user's message."
            )
    if not read or read[-1].role not in ("user", "raw"):
        raise RequestError(
            "A conversation is a list of messages; the last one must be the user's: it gets the answer."
        )
    return read


def user_message(content: Sequence[Any]) -> list[Message]:
    """A conversation of one message."""
    return read_messages([{"role": "user", "content": list(content)}])


def without_oldest_turn(conversation: Sequence[Message]) -> list[Message]:
    """A conversation without its first turn; unchanged if there is only one."""
    users = [place for place, message in enumerate(conversation) if message.role == "user"]
    start = next(place for place, message in enumerate(conversation) if message.role != "system")
    return [*conversation[:start], *conversation[users[1] if len(users) > 1 else start :]]


def is_image(value: object) -> bool:
    """Whether `value` is an image; a `str` is text, not a file name."""
    return (
        isinstance(value, (Image.Image, Path, bytes))
        or is_open_file(value)
        or (isinstance(value, np.ndarray) and not is_codes(value))
    )


def is_codes(value: object) -> bool:
    """Whether `value` is a row of image codes: an integer tensor or array, or a list of ints."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim == 1 and not torch.as_tensor(value).is_floating_point()
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(type(code) is int for code in value)
    )


def is_single(content: object) -> bool:
    """Whether `content` is a single text, file name, image or row of codes."""
    return isinstance(content, (str, Mapping)) or is_image(content) or is_codes(content)


def input_images(image: Any) -> list[Any]:
    """The images of one request: one or a list; strings are file names."""
    return [
        Path(item) if isinstance(item, str) else item
        for item in ([image] if is_single(image) else image)
    ]


def flatten_images(images: Any) -> list[Any]:
    """The images of all requests."""
    return [
        item for one in ([images] if is_single(images) else images) for item in input_images(one)
    ]


def image_conversations(
    images: Any, texts: str | Sequence[str], request: Callable[[str], str] = str
) -> tuple[list[list[Message]], bool]:
    """A conversation about each image, and whether it is one alone (a list is a batch, a nested list one request);
    `texts`: one for all images, or one each; `request`: the sentence of a text."""
    single = is_single(images)
    groups = [input_images(one) for one in ([images] if single else images)]
    said = [texts] * len(groups) if isinstance(texts, str) else texts
    if len(said) != len(groups) or not all(groups):
        raise RequestError(
            f"{len(groups)} images were given with {len(said)} texts."
            if all(groups)
            else f"Request {groups.index([])} has no image."
        )
    said = [request(text) for text in said]
    return [
        user_message([*group, *filter(None, [text])])
        for group, text in zip(groups, said, strict=True)
    ], single


def _message(message: Any, number: int) -> Message:
    if isinstance(message, Message):
        return message
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise RequestError(f"Message {number} must be a mapping with 'role' and 'content'.")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise RequestError(
            f"Message {number} has the unknown role {role!r}; use {', '.join(ROLES)}."
        )
    if isinstance(content, Answer):
        content = [part for part in content.parts if not isinstance(part, BrokenImagePart)]
    items = tuple(_item(item, number) for item in ([content] if is_single(content) else content))
    if role == "user" and not any(
        item.strip(". \t\r\n") if isinstance(item, str) else True for item in items
    ):
        raise RequestError(f"Message {number} is empty.")
    return Message(role, items)


def _item(item: Any, number: int) -> Any:
    """The text, image or codes of a message's item, also in the format of transformers or OpenAI."""
    if isinstance(item, Mapping):
        if item.get("type") == "text" and isinstance(item.get("text"), str):
            return item["text"]
        if item.get("type") in ("image", "image_url"):
            item = next((item[key] for key in ("image", "url", "image_url") if key in item), item)
        item = item.get("url", item) if isinstance(item, Mapping) else item
        if isinstance(item, str):
            if item.startswith("data:"):
                return image_from_base64(item, name=f"The image of message {number}")
            if "://" in item:
                raise RequestError(
                    f"Message {number}: {item[:80]} is an address, and nothing is downloaded; give the "
                    f"file."
                )
            return Path(item)
    if isinstance(item, (str, ImagePart)) or is_image(item) or is_codes(item):
        return item
    raise RequestError(
        f"Message {number} holds {str(item)[:80]}; content is text, images (PIL, Path, bytes, array), "
        f"codes (a list of whole numbers), or parts of a chat message with the type text or image."
    )
