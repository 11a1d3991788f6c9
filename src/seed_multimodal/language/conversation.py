"""The chat demo's conversations: stored messages, the prompt text made from them, and the codes filled in afterwards.

A message is `{"role": …, "message": {"text": …, "images": [path, …], "images_ids": [codes or None, …]}}`, its text
holding one `<image>` per picture. This is the wire format of the released front-end, kept as it is; prompts for the
library's own use are built by `prompts.PromptTemplate`, which needs no placeholder and no blank after "ASSISTANT:".
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import PurePath
from typing import Any

from seed_multimodal.errors import ConfigError, RequestError
from seed_multimodal.language.vocabulary import PLACEHOLDER

Message = dict[str, Any]
ERROR_RULE = "\n-------------\nSome errors occurred during response, please clear history and restart.\n"
CORRUPT = "<corrupt_image>"


class SeparatorStyle(Enum):
    """How messages are written down; the two styles the released models use."""

    SINGLE = "single"
    LLAMA_2 = "llama_2"


@dataclass
class Conversation:
    """Messages of one conversation and the template they are written in."""

    system: str
    roles: tuple[str, str]
    style: SeparatorStyle
    separator: str = "\n"
    messages: list[Message] = field(default_factory=list)
    offset: int = 0

    def copy(self) -> Conversation:
        """An independent conversation with the same messages."""
        return copy.deepcopy(self)

    def append(self, role: str, message: Message) -> None:
        """Add `{"text", "images", "images_ids"}` said by `role` (one of `roles`)."""
        if role not in self.roles:
            raise RequestError(f"Unknown role {role!r}: use {' or '.join(self.roles)}.")
        self.messages.append({"role": role, "message": copy.deepcopy(message)})

    def prompt_text(self) -> str:
        """The prompt without `<s>`, one `<image>` per picture."""
        if self.style is SeparatorStyle.SINGLE:
            text = self.system + self.separator if self.system else ""
            for entry in self.messages:
                text += f"{entry['role']}: {entry['message']['text']}{self.separator}"
            return text + f"{self.roles[1]}:"
        text = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n" if self.system else ""
        for number, entry in enumerate(self.messages):
            said = entry["message"]["text"]
            text += (f"[INST] {said} [/INST]" if number % 2 == 0 else said) + self.separator
        return text

    def get_prompt(self, encode_image: Callable[[str], Any]) -> dict[str, Any]:
        """`{"text", "images"}`: for every picture its codes, or `encode_image(path)` where none are known yet."""
        images = []
        for entry in self.messages:
            message = entry["message"]
            for path, codes in zip(message["images"], message["images_ids"], strict=True):
                images.append(encode_image(path) if codes is None else codes)
        return {"text": self.prompt_text(), "images": images}

    def update_image_ids(self, images_ids: Sequence[Sequence[int]]) -> None:
        """Fill in the codes of all pictures, in order; known ones are kept.

        Raises:
            RequestError: another number of code lists than pictures.
        """
        slots = [(entry["message"]["images_ids"], place) for entry in self.messages
                 for place in range(len(entry["message"]["images_ids"]))]
        if len(slots) != len(images_ids):
            raise RequestError(f"The answer holds codes of {len(images_ids)} pictures, "
                               f"but the conversation has {len(slots)}.")
        for (codes, place), new in zip(slots, images_ids, strict=True):
            if codes[place] is None:
                codes[place] = list(new)

    def to_pairs(self) -> list[list[str | None]]:
        """Pairs of [user's text, assistant's text or None], pictures as Markdown, for showing.

        Raises:
            RequestError: a text without one `<image>` per picture.
        """
        pairs: list[list[str | None]] = []
        for number, entry in enumerate(self.messages):
            text = markdown(entry["message"])
            if number % 2 == 0:
                pairs.append([text, None])
            else:
                pairs[-1][1] = text
        return pairs

    def to_log(self) -> dict[str, Any]:
        """The conversation as logged: pictures by file name only."""
        messages = copy.deepcopy(self.messages)
        for entry in messages:
            entry["message"]["images"] = [PurePath(path).name for path in entry["message"]["images"]]
        return {"system": self.system, "roles": list(self.roles), "messages": messages, "offset": self.offset,
                "sep": self.separator, "sep2": None}


def markdown(message: Message) -> str:
    """A message's text with each `<image>` replaced by a Markdown picture (`<corrupt_image>` where none was drawn).

    Raises:
        RequestError: not one `<image>` per picture, for example because somebody typed the placeholder.
    """
    pieces = message["text"].split(PLACEHOLDER)
    if len(pieces) != len(message["images"]) + 1:
        raise RequestError(f"The text holds {len(pieces) - 1} {PLACEHOLDER} placeholders for "
                           f"{len(message['images'])} pictures.")
    text = pieces[0]
    for path, piece in zip(message["images"], pieces[1:], strict=True):
        text += (f"![](file={path})" if path else CORRUPT) + piece
    return text


def with_errors(pairs: list[list[str | None]], errors: Sequence[str]) -> list[list[str | None]]:
    """The pairs with error messages under the last answer (unchanged without errors)."""
    shown = copy.deepcopy(pairs)
    if errors and shown:
        shown[-1][1] = (shown[-1][1] or "") + ERROR_RULE + "\n".join(errors)
    return shown


_VICUNA_SYSTEM = "A chat between a curious user and an artificial intelligence assistant. "
_TEMPLATES = {
    "conv_seed_vicuna": Conversation("", ("USER", "ASSISTANT"), SeparatorStyle.SINGLE),
    "conv_seed_vicuna_system": Conversation(_VICUNA_SYSTEM, ("USER", "ASSISTANT"), SeparatorStyle.SINGLE),
    "conv_seed_llama2": Conversation("", ("[INST]", "[/INST]"), SeparatorStyle.LLAMA_2),
}


def new_conversation(name: str) -> Conversation:
    """An empty conversation of a released template.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in _TEMPLATES:
        raise ConfigError(f"Unknown conversation template {name!r}: use {', '.join(_TEMPLATES)}.")
    return _TEMPLATES[name].copy()
