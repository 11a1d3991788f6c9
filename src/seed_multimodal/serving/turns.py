"""Turns of the page's conversations: texts and images in order, and their forms for the backend,
the page, the browser's storage and the log.

What a browser sends back is a stranger's, so turns are a schema that pydantic checks.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from PIL import Image
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import RequestError
from seed_multimodal.images.io import image_to_base64, open_image
from seed_multimodal.images.sheet import draw_boxes
from seed_multimodal.language.vocabulary import BLANK, BOX_WORDS, PLACEHOLDER
from seed_multimodal.serving.schema import Codes, Fields, read_request

# The original's page refuses more than its server.
BLANK_INPUT = BLANK + "?!;/"
# Of the browser's storage: its characters. Of an image there: the codes, the longer side, and the
# lengths of a `data:` URL that is kept as it is and of all of them.
MAX_CHARACTERS = 5_000_000
MAX_CODES = 4096
STORED_SIDE = 512
SHORT_URL = 20_000
STORED_CHARACTERS = 1_000_000
ZERO_WIDTH = "\u200b"
DROPPED = "(an image too many for the browser's storage)"

# A limit makes pydantic refuse halves of surrogate pairs, too, which have no JSON.
CHECKED = ConfigDict(extra="forbid", validate_assignment=True, str_max_length=MAX_CHARACTERS)
DataUrl = Annotated[str, Field(pattern="^(data:image/|$)")]


@dataclass(config=CHECKED)
class Picture:
    """An image of a turn.

    Attributes:
        codes: sent and stored instead of the image, where a model has them.
        url: `data:…`, sent without codes. An image that has neither, as a preview, is only shown.
        description: what its model says that it shows, of one that it drew.
        stored_url: of an image without codes in the browser's storage.
        path: of the file that the page shows, never a browser's; "": without a file, as restored.
    """

    codes: Annotated[Codes, Field(max_length=MAX_CODES)] | None = None
    url: DataUrl = ""
    description: str = ""
    stored_url: DataUrl = ""
    path: str = field(default="", init=False)

    @property
    def is_read(self) -> bool:
        return bool(self.codes or self.url or self.stored_url)

    def make_small(self) -> None:
        """Make `stored_url`, of a smaller image if `url` is long; in a thread: it takes long."""
        self.stored_url = self.url
        if not 0 < len(self.url) <= SHORT_URL:
            image = open_image(Path(self.path)).image
            image.thumbnail((STORED_SIDE, STORED_SIDE))
            self.stored_url = f"data:image/webp;base64,{image_to_base64(image, 'WEBP')}"

    def stored(self) -> JsonObject:
        """For the browser's storage: its codes, else a small image."""
        if self.codes:
            return {"codes": self.codes, "description": self.description}
        key = "url" if self.url else "stored_url"
        return {key: self.stored_url or self.url, "description": self.description}

    def sent(self, is_new: bool = False) -> JsonObject:
        """As a part of OpenAI's message; of a new one the image itself, about which notes are."""
        if self.codes and not (is_new and self.url):
            return {"type": "image_url", "codes": self.codes}
        return {"type": "image_url", "image_url": {"url": self.url}}


@dataclass(config=CHECKED)
class Turn:
    """A message of the user or an answer.

    Attributes:
        notes: sentences about an answer. reasoning: what its model wrote before it.
        settings: of its request.
    """

    role: Literal["user", "assistant"]
    parts: list[str | Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reasoning: str = ""
    settings: JsonObject = field(default_factory=dict, init=False)

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def pictures(self) -> list[Picture]:
        return [part for part in self.parts if isinstance(part, Picture)]

    @property
    def sent_parts(self) -> list[str | Picture]:
        """Without images that are only shown."""
        return [part for part in self.parts if isinstance(part, str) or part.codes or part.url]

    def add_text(self, text: str) -> None:
        """Continue the last text."""
        last = self.parts[-1] if self.parts else None
        if isinstance(last, str):
            self.parts[-1] = last + text
        else:
            self.parts = [*self.parts, text]

    # ---- forms

    def message(self, is_new: bool = False) -> JsonObject:
        """As OpenAI's message."""
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else part.sent(is_new and self.role == "user")
            for part in self.sent_parts
        ]
        return {"role": self.role, "content": content, "reasoning_content": self.reasoning}

    def displayed(self) -> list[JsonObject]:
        """As messages of Gradio's Chatbot, which shows them in one bubble: the reasoning, folded,
        the texts and images, what is read in the images, folded, and the notes."""
        content: list[JsonObject] = []
        for part in self.parts:
            if isinstance(part, str):
                content += [text_part(part)] if without_boxes(part) else []
            elif part.path:
                content.append({"path": part.path, "alt_text": part.description or "image"})
        if self.role == "user" and self.pictures and self.text:
            # Gradio edits the first part of a message, and offers it where the last one is a text.
            content.sort(key=lambda part: "path" in part)
            content.append(text_part(ZERO_WIDTH))
        messages: list[JsonObject] = [{"role": self.role, "content": content or [text_part("…")]}]
        if self.reasoning:
            messages.insert(0, self._folded("Reasoning", self.reasoning))
        descriptions = [picture.description for picture in self.pictures if picture.description]
        if descriptions:
            messages.append(self._folded("Read back", "\n".join(descriptions)))
        if self.notes:
            # The style sheet knows it by its missing status.
            note = {"title": escaped(" ".join(self.notes))}
            messages.append({"role": self.role, "content": [text_part("")], "metadata": note})
        return messages

    def _folded(self, title: str, text: str) -> JsonObject:
        """A message of which the page shows the title, and the text after a click."""
        metadata = {"title": title, "status": "done"}
        return {"role": self.role, "content": [text_part(text)], "metadata": metadata}


def escaped(text: str) -> str:
    """A text for components that show HTML: the only way of texts of others into the page."""
    return html.escape(text, quote=False)


def text_part(text: str) -> JsonObject:
    """A text of a message of Gradio's Chatbot."""
    return {"type": "text", "text": escaped(without_boxes(text))}


def without_boxes(text: str) -> str:
    """Without words for boxes."""
    return BOX_WORDS.sub(" ", text).strip()


def stored_turns(turns: Sequence[Turn]) -> list[JsonObject]:
    """For the browser's storage: texts, and codes of images or small images.

    Of more than `STORED_CHARACTERS` of small images the oldest are replaced by a text.
    """
    stored: list[JsonObject] = []
    n_characters = 0
    for turn in reversed(turns):
        parts: list[str | JsonObject] = []
        for part in reversed(turn.parts):
            if isinstance(part, str):
                parts.append(part)
                continue
            n_characters += 0 if part.codes else len(part.stored_url or part.url)
            if part.is_read:
                parts.append(part.stored() if n_characters <= STORED_CHARACTERS else DROPPED)
        texts = {"notes": turn.notes, "reasoning": turn.reasoning}
        stored.append({"role": turn.role, "parts": parts[::-1], **texts})
    return stored[::-1]


def image_with_boxes(turns: Sequence[Turn], boxes: Sequence[JsonObject]) -> Image.Image:
    """The last image of turns with the boxes of their answer, which are shares of its sides."""
    pictures = [picture for turn in turns for picture in turn.pictures]
    # Shares of the sides → pixels.
    image = open_image(Path(pictures[-1].path)).image
    sides = image.size * 2
    corners = [
        [int(share * side) for share, side in zip(box["box"], sides, strict=True)] for box in boxes
    ]
    return draw_boxes(image, corners)


class Conversation(Fields):
    """What the browser's storage holds."""

    groups = ()

    id: Annotated[str, Field(pattern="^[0-9a-z]{1,40}$")]
    model: str
    turns: list[Turn]
    revision: int = 0


def restored(stored: JsonObject) -> Conversation:
    """A conversation from the browser's storage, whose images have no file yet.

    Raises RequestError: it is no such conversation.
    """
    try:
        if len(json.dumps(stored, ensure_ascii=False)) > MAX_CHARACTERS:
            raise RequestError("it is longer than a browser's storage.")
        return read_request(Conversation, stored)
    except RequestError as error:
        raise RequestError(f"The browser's copy of the chat cannot be read: {error}") from None


def user_turn(text: str, pictures: Sequence[Picture]) -> Turn:
    """The user's input. Raises RequestError: as of `check_input`."""
    turn = Turn("user", [*pictures, text])
    check_input(turn)
    return turn


def check_input(turn: Turn) -> None:
    """Raise RequestError: a message that is empty, or contains the image placeholder."""
    if PLACEHOLDER in turn.text:
        raise RequestError(f"Please do not type {PLACEHOLDER}: it stands for images.")
    if not turn.pictures and not turn.text.strip(BLANK_INPUT):
        raise RequestError("Write a message or choose an image first.")
