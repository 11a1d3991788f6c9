"""The chat demo's conversations, without any user interface: what is stored, and what each button does to it.

A message is `{"role": …, "message": {"text": …, "images": [path, …], "images_ids": [codes or None, …]}}`, its text
holding one `<image>` per picture. This is the wire format of the released front-end, kept as it is; prompts for the
library's own use are built by `prompts.PromptTemplate`, which needs no placeholder and no blank after "ASSISTANT:".

Additions of texts and pictures gather in one pending user message; `request` gives the body to post when there is
something to answer, `receive` takes the server's answer. Nothing is ever dropped from a long history: it is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from seed_multimodal.errors import ConfigError, RequestError
from seed_multimodal.language.vocabulary import PLACEHOLDER

Message = dict[str, Any]
CORRUPT = "<corrupt_image>"


class SeparatorStyle(Enum):
    """How messages are written down: the two styles of the released chat models, and the last message alone, for models
    that do not converse."""

    SINGLE = "single"
    LLAMA_2 = "llama_2"
    ALONE = "alone"


@dataclass
class Conversation:
    """Messages of one conversation and the template they are written in."""

    system: str
    roles: tuple[str, str]
    style: SeparatorStyle
    separator: str = "\n"
    messages: list[Message] = field(default_factory=list)

    def copy(self) -> Conversation:
        """An independent conversation with the same messages."""
        return copy.deepcopy(self)

    def append(self, role: str, message: Message) -> None:
        """Add `{"text", "images", "images_ids"}` said by `role` (one of `roles`)."""
        if role not in self.roles:
            raise RequestError(f"Unknown role {role!r}: use {' or '.join(self.roles)}.")
        self.messages.append({"role": role, "message": copy.deepcopy(message)})

    @property
    def asked(self) -> list[Message]:
        """The messages that the model is told: all, or the user's last one and what came after it."""
        if self.style is not SeparatorStyle.ALONE:
            return self.messages
        last = max((place for place, entry in enumerate(self.messages) if entry["role"] == self.roles[0]), default=0)
        return self.messages[last:]

    def prompt_text(self) -> str:
        """The prompt without `<s>`, one `<image>` per picture."""
        if self.style is SeparatorStyle.ALONE:
            return self.separator.join(str(entry["message"]["text"]) for entry in self.asked)
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
        for entry in self.asked:
            message = entry["message"]
            for path, codes in zip(message["images"], message["images_ids"], strict=True):
                images.append(encode_image(path) if codes is None else codes)
        return {"text": self.prompt_text(), "images": images}

    def update_image_ids(self, images_ids: Sequence[Sequence[int] | None]) -> None:
        """Fill in the codes of all pictures, in order; known ones are kept, and None stays unknown.

        Raises:
            RequestError: another number of code lists than pictures.
        """
        slots = [(entry["message"]["images_ids"], place) for entry in self.asked
                 for place in range(len(entry["message"]["images_ids"]))]
        if len(slots) != len(images_ids):
            raise RequestError(f"The answer holds codes of {len(images_ids)} pictures, "
                               f"but the conversation has {len(slots)}.")
        for (codes, place), new in zip(slots, images_ids, strict=True):
            if codes[place] is None and new is not None:
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


_VICUNA_SYSTEM = "A chat between a curious user and an artificial intelligence assistant. "
_TEMPLATES = {
    "conv_seed_vicuna": Conversation("", ("USER", "ASSISTANT"), SeparatorStyle.SINGLE),
    "conv_seed_vicuna_system": Conversation(_VICUNA_SYSTEM, ("USER", "ASSISTANT"), SeparatorStyle.SINGLE),
    "conv_seed_llama2": Conversation("", ("[INST]", "[/INST]"), SeparatorStyle.LLAMA_2),
    "conv_lavit": Conversation("", ("USER", "ASSISTANT"), SeparatorStyle.ALONE),
    "conv_seed_x": Conversation("", ("Question", "Answer"), SeparatorStyle.SINGLE),  # of the model that is not tuned
}


def new_conversation(name: str) -> Conversation:
    """An empty conversation of a released template.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in _TEMPLATES:
        raise ConfigError(f"Unknown conversation template {name!r}: use {', '.join(_TEMPLATES)}.")
    return _TEMPLATES[name].copy()


TOO_LONG = "Error: History exceeds maximum rounds, please clear history and restart."
# Which of the four buttons (up-vote, down-vote, regenerate, clear) can be pressed; None leaves them as they are.
Buttons = tuple[bool, bool, bool, bool] | None
ALL_OFF, ALL_ON, CLEAR_ONLY = (False,) * 4, (True,) * 4, (False, False, False, True)


def _empty() -> Message:
    return {"images": [], "text": "", "images_ids": []}


@dataclass
class Dialogue:
    """One user's chat: the conversation, the pending message, and what to show."""

    template: str = "conv_seed_vicuna"
    max_turns: int = 3
    conversation: Conversation = field(init=False)
    pending: Message = field(default_factory=_empty)
    errors: list[str] = field(default_factory=list)
    asking: Conversation | None = None  # whose answer is awaited; whatever joined it now would seem to be answered

    def __post_init__(self) -> None:
        self.conversation = new_conversation(self.template)

    def add_text(self, text: str) -> Buttons:
        """Put text into the pending message.

        Raises:
            RequestError: the text holds the placeholder of pictures, which would stand for one that is not there.
        """
        if not text:
            return None
        if PLACEHOLDER in text:
            raise RequestError(f"Please do not type {PLACEHOLDER}: it stands for pictures.")
        return self._add(text, None)

    def add_image(self, path: str | None) -> Buttons:
        """Put a stored picture into the pending message (None: nothing was chosen)."""
        return None if path is None else self._add(PLACEHOLDER, path)

    def _add(self, text: str, path: str | None) -> Buttons:
        self.pending["text"] += text
        if path is not None:
            self.pending["images"].append(path)
            self.pending["images_ids"].append(None)
        messages, user = self.conversation.messages, self.conversation.roles[0]
        if messages and messages[-1]["role"] == user:
            messages.pop()
        self.conversation.append(user, self.pending)
        self.errors = []
        return ALL_OFF

    def waits(self) -> bool:
        """Whether there is a user message worth answering."""
        messages = self.conversation.messages
        return (bool(messages) and messages[-1]["role"] == self.conversation.roles[0]
                and bool(messages[-1]["message"]["text"].strip(" ?.;!/")))

    def request(self, encode_image: Callable[[str], Any], **settings: Any) -> dict[str, Any] | None:
        """The body to post: prompt, pictures and `settings`; None when nothing waits or the history is too long."""
        if not self.waits() or self.too_long():
            return None
        return {**self.conversation.get_prompt(encode_image), **settings}

    def too_long(self) -> bool:
        """Whether the conversation has more rounds than are answered."""
        alone = self.conversation.style is SeparatorStyle.ALONE
        return len(self.conversation.messages) > 2 * self.max_turns and not alone

    def refuse(self) -> Buttons:
        """Answer a too long history with the fixed sentence; afterwards only clearing is possible."""
        self.conversation.append(self.conversation.roles[1], {**_empty(), "text": TOO_LONG})
        self.pending, self.errors = _empty(), []
        return CLEAR_ONLY

    def receive(self, response: Mapping[str, Any], save_image: Callable[[str], str]) -> Buttons:
        """Take the server's answer.

        Args:
            response: `text`, `images` (base64, "" for a broken one), `images_ids` (of all pictures), `error_msg`.
            save_image: stores a base64 picture and returns its path.

        Raises:
            RequestError: an answer whose parts do not fit together (the conversation is left as it was).
        """
        images = [save_image(image) if image else "" for image in response["images"]]
        answer = {"images": images, "text": response["text"], "images_ids": [None] * len(images)}
        grown = self.conversation.copy()
        grown.append(grown.roles[1], answer)
        grown.update_image_ids(response["images_ids"])
        grown.to_pairs()  # refuses an answer that cannot be shown
        self.conversation = grown
        self.pending, self.errors = _empty(), list(response["error_msg"])
        return ALL_ON

    def regenerate(self) -> Buttons:
        """Drop the last answer, so that the same message waits again."""
        messages = self.conversation.messages
        if messages and messages[-1]["role"] == self.conversation.roles[1]:
            messages.pop()
        self.pending, self.errors = _empty(), []
        return ALL_OFF

    def clear(self) -> Buttons:
        """Start over."""
        self.conversation, self.asking = new_conversation(self.template), None
        self.pending, self.errors = _empty(), []
        return ALL_OFF
