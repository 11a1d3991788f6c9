"""The chat page's conversations, without any user interface.

A message is `{"role": …, "message": {"text": …, "images": [path, …], "images_ids": [codes or None, …]}}`, its text
holding one `<image>` per image: the form of the original front-end. Texts and images gather in one pending user
message; `request` gives the body to post, `receive` takes the server's answer. A history that is too long is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from seed_multimodal.errors import ConfigError, RequestError
from seed_multimodal.language.vocabulary import PLACEHOLDER

Message = dict[str, Any]
TOO_LONG = "Error: History exceeds maximum rounds, please clear history and restart."


@dataclass
class Conversation:
    """Messages of one conversation, and how they are written as a prompt: "llama2", "roles" (USER: …), or "alone" (the
    last message only)."""

    roles: tuple[str, str]
    style: Literal["roles", "llama2", "alone"]
    system: str = ""
    messages: list[Message] = field(default_factory=list)

    def append(self, role: str, message: Message) -> None:
        """Add `{"text", "images", "images_ids"}` of one of `roles`."""
        self.messages.append({"role": role, "message": copy.deepcopy(message)})

    @property
    def asked(self) -> list[Message]:
        """The messages that are sent: all, or the user's last one and what came after it."""
        if self.style != "alone":
            return self.messages
        last = max((place for place, entry in enumerate(self.messages) if entry["role"] == self.roles[0]), default=0)
        return self.messages[last:]

    def prompt_text(self) -> str:
        """The prompt without `<s>`, one `<image>` per image."""
        if self.style == "alone":
            return "\n".join(str(entry["message"]["text"]) for entry in self.asked)
        if self.style == "roles":
            text = f"{self.system}\n" if self.system else ""
            for entry in self.messages:
                text += f"{entry['role']}: {entry['message']['text']}\n"
            return text + f"{self.roles[1]}:"
        text = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n" if self.system else ""
        for number, entry in enumerate(self.messages):
            said = entry["message"]["text"]
            text += (f"[INST] {said} [/INST]" if number % 2 == 0 else said) + "\n"
        return text

    def get_prompt(self, encode_image: Callable[[str], Any]) -> dict[str, Any]:
        """`{"text", "images"}`: for every image its codes, or `encode_image(path)` where none are known yet."""
        images = []
        for entry in self.asked:
            message = entry["message"]
            for path, codes in zip(message["images"], message["images_ids"], strict=True):
                images.append(encode_image(path) if codes is None else codes)
        return {"text": self.prompt_text(), "images": images}

    def update_image_ids(self, images_ids: Sequence[Sequence[int] | None]) -> None:
        """Fill in the codes of all images, in order; known ones are kept, and None stays unknown.

        Raises:
            RequestError: another number of code lists than images.
        """
        places = [(entry["message"]["images_ids"], place) for entry in self.asked
                  for place in range(len(entry["message"]["images_ids"]))]
        if len(places) != len(images_ids):
            raise RequestError(f"The answer holds codes of {len(images_ids)} images, but the conversation has "
                               f"{len(places)}.")
        for (codes, place), new in zip(places, images_ids, strict=True):
            if codes[place] is None and new is not None:
                codes[place] = list(new)


_TEMPLATES = {
    "conv_seed_vicuna": Conversation(("USER", "ASSISTANT"), "roles"),
    "conv_seed_vicuna_system": Conversation(
        ("USER", "ASSISTANT"), "roles", "A chat between a curious user and an artificial intelligence assistant. "),
    "conv_seed_llama2": Conversation(("[INST]", "[/INST]"), "llama2"),
    "conv_lavit": Conversation(("USER", "ASSISTANT"), "alone"),
    "conv_seed_x": Conversation(("Question", "Answer"), "roles"),  # of the base model
}


def new_conversation(name: str) -> Conversation:
    """An empty conversation of a template.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in _TEMPLATES:
        raise ConfigError(f"Unknown conversation template {name!r}: use {', '.join(_TEMPLATES)}.")
    return copy.deepcopy(_TEMPLATES[name])


def _empty() -> Message:
    return {"images": [], "text": "", "images_ids": []}


@dataclass
class Dialogue:
    """One user's chat: the conversation, the pending message, and what to show.

    Attributes:
        asking: the conversation whose answer is awaited; nothing is added to it meanwhile.
    """

    template: str = "conv_seed_vicuna"
    max_turns: int = 3
    conversation: Conversation = field(init=False)
    pending: Message = field(default_factory=_empty)
    errors: list[str] = field(default_factory=list)
    asking: Conversation | None = None

    def __post_init__(self) -> None:
        self.conversation = new_conversation(self.template)

    def add_text(self, text: str) -> None:
        """Put text into the pending message.

        Raises:
            RequestError: the text holds the placeholder of images.
        """
        if PLACEHOLDER in text:
            raise RequestError(f"Please do not type {PLACEHOLDER}: it stands for images.")
        if text:
            self._add(text)

    def add_image(self, path: str) -> None:
        """Put a stored image into the pending message."""
        self.pending["images"].append(path)
        self.pending["images_ids"].append(None)
        self._add(PLACEHOLDER)

    def _add(self, text: str) -> None:
        self.pending["text"] += text
        messages, user = self.conversation.messages, self.conversation.roles[0]
        if messages and messages[-1]["role"] == user:
            messages.pop()
        self.conversation.append(user, self.pending)
        self.errors = []

    def waits(self) -> bool:
        """Whether there is a user message worth answering."""
        messages = self.conversation.messages
        return (bool(messages) and messages[-1]["role"] == self.conversation.roles[0]
                and bool(messages[-1]["message"]["text"].strip(" ?.;!/")))

    def too_long(self) -> bool:
        """Whether the conversation has more rounds than are answered."""
        return len(self.conversation.messages) > 2 * self.max_turns and self.conversation.style != "alone"

    def refuse(self) -> None:
        """Answer a history that is too long with the fixed sentence."""
        self.conversation.append(self.conversation.roles[1], {**_empty(), "text": TOO_LONG})
        self.pending, self.errors = _empty(), []

    def request(self, encode_image: Callable[[str], Any], **settings: Any) -> dict[str, Any]:
        """The body to post: prompt, images and `settings`."""
        return {**self.conversation.get_prompt(encode_image), **settings}

    def receive(self, response: Mapping[str, Any], save_image: Callable[[str], str]) -> None:
        """Take the server's answer.

        Args:
            response: `text`, `images` (base64, "" for a broken one), `images_ids` (of all images), `error_msg`.
            save_image: stores a base64 image and returns its path.

        Raises:
            RequestError: an answer whose parts do not fit together (the conversation is left as it was).
        """
        images = [save_image(image) if image else "" for image in response["images"]]
        if response["text"].count(PLACEHOLDER) != len(images):
            raise RequestError(f"The answer's text holds {response['text'].count(PLACEHOLDER)} {PLACEHOLDER} "
                               f"placeholders for {len(images)} images.")
        grown = copy.deepcopy(self.conversation)
        grown.append(grown.roles[1], {"images": images, "text": response["text"], "images_ids": [None] * len(images)})
        grown.update_image_ids(response["images_ids"])
        self.conversation = grown
        self.pending, self.errors = _empty(), list(response["error_msg"])

    def regenerate(self) -> None:
        """Drop the last answer, so that the same message waits again."""
        messages = self.conversation.messages
        if messages and messages[-1]["role"] == self.conversation.roles[1]:
            messages.pop()
        self.pending, self.errors = _empty(), []

    def clear(self) -> None:
        """Start over."""
        self.conversation, self.asking = new_conversation(self.template), None
        self.pending, self.errors = _empty(), []
