"""Turn handling of the chat demo, without any user interface: the effect of each button on the conversation.

Additions of texts and pictures gather in one pending user message; `request` gives the body to post when there is
something to answer, `receive` takes the server's answer. Nothing is ever dropped from a long history: it is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from seed_multimodal.errors import RequestError
from seed_multimodal.language.conversation import Conversation, Message, new_conversation, with_errors
from seed_multimodal.language.vocabulary import PLACEHOLDER

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

    def __post_init__(self) -> None:
        self.conversation = new_conversation(self.template)

    def view(self) -> list[list[str | None]]:
        """[user, assistant] pairs to show, the last answer's errors included."""
        return with_errors(self.conversation.to_pairs(), self.errors)

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
        return len(self.conversation.messages) > 2 * self.max_turns

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
        self.conversation = new_conversation(self.template)
        self.pending, self.errors = _empty(), []
        return ALL_OFF

    def state(self) -> tuple[list[Message], Message]:
        """Copies of the stored messages and of the pending one."""
        return copy.deepcopy(self.conversation.messages), copy.deepcopy(self.pending)
