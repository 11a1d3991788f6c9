"""What goes into a conversation and what comes out: messages -> turns for a prompt template, and answers.

A message is `{"role": "user" | "assistant", "content": …}`. Content is one text, or a list of texts (`str`), pictures
(PIL, `Path`, bytes, an open file, an array) and codes (a list of ints), in any order and number. An assistant's content
may be the `Answer` that an earlier call returned. A bare `str` is always text: give file names as `Path`, or as
transformers' chat messages do: `{"type": "image", "image": "cat.png"}` (also "path", "url" with `file:` or `data:`, and
"base64"), beside `{"type": "text", "text": …}`. Nothing is downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from PIL import Image
from torch import Tensor

from seed_multimodal.errors import RequestError
from seed_multimodal.images.io import image_from_base64
from seed_multimodal.language.answer import AnswerPart, BrokenImagePart, ImagePart, TextPart
from seed_multimodal.language.prompts import ROLES, Turn
from seed_multimodal.language.tasks import answer_in
from seed_multimodal.language.tokenizer import plain_text
from seed_multimodal.language.vocabulary import PLACEHOLDER
from seed_multimodal.systems.pictures import is_codes, is_picture

PICTURE_KEYS = ("image", "path", "url", "base64")
_URL = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)  # two letters at least: a drive of Windows is no address


@dataclass(frozen=True)
class DrawnPart(ImagePart):
    """A picture of the answer: its codes, and the picture itself unless the system has no de-tokenizer."""

    image: Image.Image | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Answer:
    """One answer of the model.

    `parts` holds `TextPart`, `DrawnPart` and `BrokenImagePart` (image words that are no picture, with the reason) in
    order; the properties are views of it. `ids` are the generated tokens. `note`: what the system says of words and
    pictures in the request that are unlike those of its training, no part of the answer. `answer_after`: of the
    system's `TaskPrompts`; `parts` keep a verdict that the model wrote first, the texts do not.
    """

    parts: Sequence[AnswerPart]
    ids: Sequence[int] = ()
    note: str = ""
    answer_after: str = ""

    @property
    def text(self) -> str:
        """All text, without the pictures' places."""
        return " ".join(answer_in(part.text.strip(), self.answer_after)
                        for part in self.parts if isinstance(part, TextPart))

    @property
    def images(self) -> list[Image.Image]:
        """All pictures that were drawn."""
        return [part.image for part in self.parts if isinstance(part, DrawnPart) and part.image is not None]

    @property
    def codes(self) -> list[list[int]]:
        """The codes of every whole picture."""
        return [list(part.codes) for part in self.parts if isinstance(part, ImagePart)]

    @property
    def problems(self) -> list[str]:
        """One sentence for each broken picture."""
        return [part.reason for part in self.parts if isinstance(part, BrokenImagePart)]

    def as_content(self) -> list[str | list[int]]:
        """This answer as the content of an assistant's message: texts and codes."""
        return [part.text if isinstance(part, TextPart) else list(part.codes) for part in self.parts
                if isinstance(part, (TextPart, ImagePart))]

    def __str__(self) -> str:
        """The text with `<image>` where pictures stand."""
        return " ".join(answer_in(part.text.strip(), self.answer_after) if isinstance(part, TextPart) else PLACEHOLDER
                        for part in self.parts)


Tokenize = Callable[[list[Any]], Tensor]
Content = tuple[str, list[Any]]  # a role, and texts, pictures, codes and parts of answers in order


def read_messages(messages: Sequence[Any]) -> list[Content]:
    """The messages of a conversation, the last one the user's.

    Raises:
        RequestError: no messages, a message of another shape, or an empty one.
    """
    if not isinstance(messages, Iterable):
        raise RequestError(f"A conversation is a list of messages, not {type(messages).__name__}.")
    contents = [_content(message, number) for number, message in enumerate(messages)]
    if not contents:
        raise RequestError("A conversation needs at least one message.")
    if contents[-1][0] != "user":
        raise RequestError("The last message must be the user's: it is the one that gets an answer.")
    return contents


def to_turns(contents: Sequence[Content], tokenize: Tokenize, check_codes: Callable[[Any], Tensor]) -> list[Turn]:
    """Turns of a conversation as codes; all its pictures are tokenized in one batch.

    Args:
        tokenize: pictures -> codes [B, 32].
        check_codes: codes -> [1, 32], refusing what is no picture.

    Raises:
        ImageError, CodesError: a picture that cannot be read.
    """
    pictures = [item for _, content in contents for item in content if is_picture(item)]
    rows = iter(tokenize(pictures).tolist() if pictures else ())
    turns = []
    for role, content in contents:
        spans = [item if isinstance(item, str) else
                 list(item.codes) if isinstance(item, ImagePart) else
                 next(rows) if is_picture(item) else
                 check_codes(item)[0].tolist() for item in content]
        turns.append(Turn(role, tuple(spans)))
    return turns


def as_parts(content: Any, what: str) -> list[Any]:
    """One text, picture or row of codes, or a sequence of them -> a list of them.

    Raises:
        RequestError: something else; the sentence begins with `what`.
    """
    if isinstance(content, (str, Mapping)) or is_picture(content) or is_codes(content):
        return [content]
    if not isinstance(content, Iterable):
        raise RequestError(f"{what} is {type(content).__name__}; it must be text, a picture (PIL, Path, bytes, an open "
                           f"file, an array) or codes (a list of whole numbers), or a list of them.")
    return list(content)


def as_text(value: Any, what: str) -> str:
    """A text that says something.

    Raises:
        RequestError: not a text, or an empty one; the sentence begins with `what`.
    """
    if not plain_text(value, what).strip(". \t\r\n"):
        raise RequestError(f"{what} is empty.")
    return value


def _content(message: Any, number: int) -> Content:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise RequestError(f"Message {number} must be a mapping with 'role' and 'content'.")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise RequestError(f"Message {number} has the unknown role {role!r}; use {' or '.join(ROLES)}.")
    if isinstance(content, Answer):
        content = content.parts
        return role, [_item(part, number) for part in content if not isinstance(part, BrokenImagePart)]
    items = [_item(item, number) for item in as_parts(content, f"The content of message {number}")]
    if role == "user" and not any(item.strip() if isinstance(item, str) else True for item in items):
        raise RequestError(f"Message {number} is empty.")
    return role, items


def _item(item: Any, number: int) -> Any:
    if isinstance(item, Mapping):
        item = _named_item(item, number)
    if isinstance(item, TextPart):
        return item.text
    if isinstance(item, (str, ImagePart)) or is_picture(item) or is_codes(item):
        return item
    raise RequestError(f"Message {number} holds a {type(item).__name__}; content is text, pictures (PIL, Path, bytes, "
                       f"an open file, an array) or codes (a list of whole numbers).")


def _named_item(item: Mapping[str, Any], number: int) -> Any:
    """The text, picture or codes in one item of a transformers chat message."""
    kind = item.get("type")
    if kind == "text" and isinstance(item.get("text"), str):
        return item["text"]
    key = next((key for key in PICTURE_KEYS if key in item), None) if kind == "image" else None
    if key is None:
        raise RequestError(f"Message {number} holds a mapping that is neither {{'type': 'text', 'text': …}} nor "
                           f"{{'type': 'image', {' or '.join(map(repr, PICTURE_KEYS))}: …}}.")
    value = item[key]
    if not isinstance(value, str):
        return value
    if key == "base64" or value.lstrip().startswith("data:"):
        return image_from_base64(value, name=f"The picture of message {number}")
    if key == "path" or _is_there(value) or not (address := _URL.match(value)):
        return Path(value)
    if address[0].lower() == "file:":
        try:
            return Path(url2pathname(urlsplit(value).path))
        except ValueError as error:
            raise RequestError(f"Message {number}: {value[:80]} is no address ({error}).") from error
    raise RequestError(f"Message {number}: {value[:80]} is an address, and nothing is downloaded; give the file.")


def _is_there(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a name too long; a null byte
        return False
