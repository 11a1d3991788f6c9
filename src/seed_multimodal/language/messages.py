"""Messages of a conversation, and answers.

A message is `{"role": "user" | "assistant" | "system", "content": …}`. Content is one text, or a
list of texts (`str`), images (all but `str` that `images.io` reads) and codes (integers), in any
order and number; an assistant's may be the `Answer` of an earlier call. A bare `str` is always
text: pass file names as `Path`, or in the format of transformers and OpenAI: `{"type": "text",
"text": …}`, `{"type": "image", "image": "cat.png"}`, `{"type": "image_url", "image_url": {"url":
"data:image/png;base64,…"}}`. Nothing is downloaded.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from seed_multimodal.errors import RequestError, short_name
from seed_multimodal.images.io import ImageSource, code_row, is_image, read_string
from seed_multimodal.language.answer import Answer, BrokenImagePart, ImagePart
from seed_multimodal.language.vocabulary import BLANK

ROLES = ("system", "user", "assistant")
IMAGE_PART_TYPES = ("image", "image_url")
IMAGE_KEYS = ("image", "image_url", "url", "bytes", "path", "base64")  # also in each other
MISSING_IMAGE = Image.new("RGB", (1, 1))  # of {"type": "image"}
# A picture that is there; `a picture`, `the picture of a dog` ask for one.
_SHOWN_IMAGE = re.compile(
    r"\b(?:this|that|the|my|given)\s++(?:picture|image|photo|photograph|drawing)\b(?!\s+of\b)", re.I
)
Codes: TypeAlias = Sequence[int] | np.ndarray | Tensor
ContentPart: TypeAlias = str | ImageSource | Codes | ImagePart  # of a message
# Images of requests: one, a list with one for each request, or nested lists of several for each;
# codes in place of an image, and file names as `str`.
Images: TypeAlias = (
    ImageSource | Codes | Sequence["ImageSource | Codes | Sequence[ImageSource | Codes]"]
)


@dataclass(frozen=True)
class Message:
    """A role, and texts, images, codes and `ImagePart`s of earlier answers in order.

    A single message with the role "raw" is continued without a template.
    """

    role: str
    content: tuple[ContentPart, ...]

    @property
    def text(self) -> str:
        return " ".join(item for item in self.content if isinstance(item, str))

    @property
    def is_text(self) -> bool:
        """Whether it has neither images nor codes."""
        return all(isinstance(item, str) for item in self.content)

    @property
    def images(self) -> list[ImageSource]:
        """The input images."""
        return [item for item in self.content if is_image(item)]


def read_messages(
    messages: Sequence[object], images_first: bool = False, placeholders: bool = False
) -> list[Message]:
    """Parse the messages of a conversation. Raises RequestError: invalid messages.

    images_first: a user's images are read before the question, see `images_before_question`;
    content of `Message`s stays in order.
    placeholders: parts of images may lack the image itself, which then is `MISSING_IMAGE`.
    """
    conversation = [_read_message(message, index) for index, message in enumerate(messages)]
    for index, message in enumerate(conversation):
        if images_first and message.role == "user" and not isinstance(messages[index], Message):
            conversation[index] = Message("user", images_before_question(message.content))
        if any(item is MISSING_IMAGE for item in message.content) and not placeholders:
            raise RequestError(
                f"Message {index}: the image itself is missing; write {{'type': 'image', 'image': "
                "IMAGE}. In transformers give images= to the processor, with the text of "
                "tokenize=False; its pipeline drops images= next to a chat."
            )
        if message.role == "system" and not message.is_text:
            raise RequestError(
                f"Message {index}: a system message is text; show images in the user's message."
            )
    if not conversation or conversation[-1].role not in ("user", "raw"):
        raise RequestError(
            "A conversation is a list of messages; the last one must be the user's: it gets the "
            "answer."
        )
    return conversation


def images_before_question(content: Sequence[Any]) -> tuple[Any, ...]:
    """A user's content with its last images in front of the text that they follow.

    Tuned models have learned questions that end with text; behind an image they draw.
    """
    # 1. The images at the end, and the texts before them.
    end = len(content)
    while end and not (isinstance(content[end - 1], str) and content[end - 1].strip(BLANK)):
        end -= 1
    start = end
    while start and isinstance(content[start - 1], str):
        start -= 1

    # 2. The images change places with the texts.
    if all(isinstance(item, str) for item in content[end:]):
        return tuple(content)
    return (*content[:start], *content[end:], *content[start:end])


def user_message(content: Sequence[object], index: int = 0) -> list[Message]:
    """A conversation of one message; `index`: its number in errors, of several requests."""
    return [_new_message("user", content, index)]


def without_oldest_rounds(conversation: Sequence[Message], count: int) -> list[Message]:
    """A conversation without its first rounds, of a user's message and its answers each; system
    messages at its beginning and the last round stay."""
    users = [index for index, message in enumerate(conversation) if message.role == "user"]
    count = min(count, len(users) - 1)
    if count <= 0:
        return list(conversation)
    roles = [message.role for message in conversation]
    n_system = next(index for index, role in enumerate(roles) if role != "system")
    return [*conversation[:n_system], *conversation[users[count] :]]


def newest_turns(
    turns: Sequence[Message], max_messages: int, max_images: int, max_characters: int
) -> Sequence[Message]:
    """A conversation without as many of its oldest rounds as are above one of the limits."""
    # The messages that stay anyway, then the newest ones.
    system = [*itertools.takewhile(lambda turn: turn.role == "system", turns)]
    n_images = n_characters = n_rounds = 0
    for index, turn in enumerate([*system, *reversed(turns[len(system) :])]):
        texts = [part for part in turn.content if isinstance(part, str)]
        n_images += len(turn.content) - len(texts)
        n_characters += sum(map(len, texts))
        if index == max_messages or n_images > max_images or n_characters > max_characters:
            n_users = sum(turn.role == "user" for turn in turns)
            return without_oldest_rounds(turns, max(n_users - n_rounds, 1))
        n_rounds += turn.role == "user"
    return turns


def speaks_of_missing_image(conversation: Sequence[Message]) -> bool:
    """Whether the last message speaks of an image, but no message has one."""
    if not all(message.is_text for message in conversation):
        return False
    return _SHOWN_IMAGE.search(conversation[-1].text) is not None


def is_single(content: object) -> bool:
    """Whether `content` is a single text, file name, image or row of codes, not a list of them."""
    is_number = getattr(content, "ndim", None) == 0  # which looks iterable
    is_list = isinstance(content, Iterable) and not isinstance(content, (str, Mapping))
    return is_number or not is_list or is_image(content) or bool(code_row(content))


def request_texts(texts: str | Sequence[str], allow_blank: bool = False) -> list[str]:
    """The texts of requests, given one or a list. Raises RequestError: something else, or blank."""
    items: list[Any] = [texts] if is_single(texts) else list(texts)
    for index, text in enumerate(items):
        label = f"Text {index}" if len(items) > 1 else "The text"
        if not isinstance(text, str):
            raise RequestError(f"{label} is no text, but {short_name(repr(text))}.")
        if not text.strip(BLANK) and not allow_blank:
            raise RequestError(f"{label} is empty.")
    return items


def input_images(images: Any) -> list[Any]:
    """The images of one request, given one or a list; strings are paths, data URLs or base64."""
    items = [images] if is_single(images) else images
    return [read_string(item) if isinstance(item, str) else item for item in items]


def flatten_images(images: Images) -> list[Any]:
    """The images of all requests. Raises RequestError: a request without any, or something else."""
    conversations, _ = image_conversations(images, "")
    return [item for (message,) in conversations for item in message.content]


def image_conversations(
    images: Images, texts: str | Sequence[str], as_request: Callable[[str], str] = str
) -> tuple[list[list[Message]], bool]:
    """A conversation about each image (or nested list of images), and whether it is a single one.

    texts: one for all images, or one each. as_request: a text → the request that is sent.
    """
    # 1. The images and the text of each request.
    single = is_single(images)
    requests: Any = [images] if single else images
    groups = [input_images(group) for group in requests]
    texts = [texts] * len(groups) if isinstance(texts, str) else request_texts(texts, True)
    if not all(groups):
        raise RequestError(f"Request {groups.index([])} has neither an image nor codes.")
    if len(texts) != len(groups):
        raise RequestError(f"{len(groups)} images were given with {len(texts)} texts.")

    # 2. A conversation of one message for each.
    conversations: list[list[Message]] = []
    for index, (group, text) in enumerate(zip(groups, texts, strict=True)):
        request = as_request(text)
        content = [*group, request] if request else group
        conversations.append([_new_message("user", content, index)])
    return conversations, single


def _read_message(message: object, index: int) -> Message:
    """One message of a conversation: a mapping with `role` and `content`, or a `Message`."""
    if isinstance(message, Message):
        return _new_message(message.role, message.content, index)
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise RequestError(f"Message {index} must be a mapping with 'role' and 'content'.")
    role = message["role"]
    content = message["content"]
    if role not in ROLES:
        raise RequestError(
            f"Message {index} has the unknown role {role!r}; use {', '.join(ROLES)}."
        )

    # An earlier answer, or what the caller wrote.
    if isinstance(content, Answer):
        content = [part for part in content.written if not isinstance(part, BrokenImagePart)]
    return _new_message(role, content, index)


def _new_message(role: str, content: Any, index: int) -> Message:
    """A checked message. Raises RequestError: a user's that is empty, or holds codes as text; other
    content."""
    # 1. Its parts, also in the format of transformers or OpenAI.
    parts: list[ContentPart] = []
    for item in [content] if is_single(content) else content:
        part = _chat_part(item, index) if isinstance(item, Mapping) else item
        if not (isinstance(part, (str, ImagePart)) or is_image(part) or code_row(part)):
            raise RequestError(
                f"Message {index} holds {str(part)[:80]}; content is text, images (PIL, Path, "
                "bytes, array), codes (a list of whole numbers), or parts of a chat message with "
                "the type text or image ({'type': 'image', 'image': IMAGE})."
            )
        parts.append(part)
    message = Message(role, tuple(parts))

    # 2. What a user may not send.
    is_blank = all(isinstance(item, str) and not item.strip(BLANK) for item in message.content)
    if role in ("user", "raw") and is_blank:
        raise RequestError(f"Message {index} is empty.")
    token = re.search(r"<img_\d+>", message.text) if role == "user" else None
    if token:
        raise RequestError(
            f"Message {index} holds {token[0]} as text; send an image as codes, a list of numbers."
        )
    return message


def _chat_part(part: Mapping[str, object], index: int) -> object:
    """The text, image or codes of a part in the format of transformers or OpenAI, else the part."""
    if "codes" in part:  # of an image of an earlier answer
        return part["codes"]
    if part.get("type") == "text":
        text = part.get("text")
        return text if isinstance(text, str) else part

    # {"image": …}, {"url": …}, {"path": …} or {"image_url": {"url": …}}
    if part.get("type") not in IMAGE_PART_TYPES:
        return part
    image: object = part
    for key in IMAGE_KEYS:
        if isinstance(image, Mapping) and image.get(key) is not None:
            image = image[key]
    if image is part:
        return MISSING_IMAGE
    return read_string(image, f"The image of message {index}") if isinstance(image, str) else image
