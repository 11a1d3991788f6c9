"""A conversation of the page while a tab shows it: turns, the answer that is being made, and what
the browser gets of them.

All changes are made in the page's event loop, each without waiting in between.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import os
import random
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr

from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import RequestError
from seed_multimodal.models.registry import Example, ModelCard
from seed_multimodal.serving.client import ModelClient
from seed_multimodal.serving.turns import Picture, Turn, stored_turns

IMAGES = Path(__file__).resolve().parents[3] / "images"  # of the examples
RETRY_TEMPERATURE = 0.7  # of a second answer where the first was the likeliest one
TOO_LONG = "Error: History exceeds maximum rounds, please clear history and restart."
# Of the changes of all chats: also of a program that was started again, the newest is the largest.
REVISIONS = itertools.count(time.time_ns() // 1000)
CHATBOT = gr.Chatbot(render=False)  # which knows the form of its messages


@dataclass
class Chat:
    """A conversation.

    Attributes:
        model: which answers.
        id: which events name; a tab's own, under whatever name its browser keeps the conversation.
        turns: the conversation; while it is answered, the last turn is the answer so far.
        replaces: id of the conversation in whose place this one is shown at first.
        before: the turns before those that are answered; None: nothing is answered.
        work: the task that makes the answer. changed: set at each change of the answer.
        returned: messages without answer, as values of Gradio's message box, to which the browser
            returns each once; `id`: the revision then; `turn`: for its storage.
        revision: of the last change, of one in no other chat or tab. Browsers drop what is older
            than they know, and know a stored conversation by it.
    """

    model: ModelClient
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    turns: list[Turn] = field(default_factory=list)
    replaces: str = ""
    before: list[Turn] | None = None
    work: asyncio.Task[None] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    returned: list[JsonObject] = field(default_factory=list)
    revision: int = field(default_factory=lambda: next(REVISIONS))

    # ---- changes

    def change(self) -> None:
        self.revision = max(self.revision + 1, next(REVISIONS))  # the clock may have been set back
        self.changed.set()

    def begin(self, turns: Sequence[Turn]) -> Turn:
        """An empty answer to `turns`. Raises RequestError: another one is being made."""
        if self.before is not None:
            raise RequestError("An answer is being made: try again when it is complete.")
        answer = Turn("assistant")
        self.before = self.turns
        self.turns = [*turns, answer]
        self.changed = asyncio.Event()
        self.change()
        return answer

    def end(self) -> None:
        """Nothing is answered any more."""
        self.work = None
        self.before = None
        self.change()

    def cancel(self) -> None:
        """End the work on an answer, of which the turns have what stays."""
        if self.work:
            self.work.cancel()
        self.end()

    def stop(self) -> None:
        """End an answer that failed or was stopped; without any part of it the conversation is as
        before, and a new message returns to its box."""
        if self.before is not None:
            self.turns, messages = self.stopped()
            self.give_back(messages)
            self.cancel()

    def stopped(self) -> tuple[list[Turn], list[Turn]]:
        """What *Stop* leaves of a running answer: the conversation, and a message that returns."""
        *messages, answer = self.turns
        before = self.before or []
        if not answer.sent_parts:
            new = [turn for turn in messages[-1:] if all(turn is not other for other in before)]
            return before, new
        answer = copy.copy(answer)
        answer.parts = answer.sent_parts
        answer.notes = [*answer.notes, "Stopped."]
        return [*messages, answer], []

    def undo(self) -> None:
        """Take back the last message, which returns to its box, and its answer."""
        self.give_back(self.turns[-2:-1])
        self.turns = self.turns[:-2]
        self.cancel()

    def give_back(self, messages: Sequence[Turn]) -> None:
        """Return a message, if there is one, to its box."""
        for turn in messages:
            paths = [picture.path for picture in turn.pictures if picture.path]
            files = [gr.FileData(path=path, mime_type="image/png").model_dump() for path in paths]
            self.change()
            stored = stored_turns([turn])[0]
            message = {"id": self.revision, "text": turn.text, "files": files, "turn": stored}
            self.returned = [*self.returned, message]

    # ---- what the browser gets

    def snapshot(self) -> JsonObject:
        """The conversation, as the browser keeps it and as it is shown.

        What is kept of an answer that is being made is what a reload would leave of it; a message
        without any answer yet is its last turn.
        """
        kept = self.turns
        if self.before is not None:
            conversation, messages = self.stopped()
            kept = [*conversation, *messages]
        return {
            "id": self.id,
            "model": self.model.name,
            "turns": stored_turns(kept),
            "replaces": self.replaces,
            "revision": self.revision,
            "messages": CHATBOT.postprocess(self.displayed()).model_dump(),
            "is_busy": self.before is not None,
            "returned": self.returned,
        }

    def displayed(self) -> list[JsonObject]:
        """The conversation as messages of Gradio's Chatbot; the last offers what may follow."""
        messages = [message for turn in self.turns for message in turn.displayed()]
        if self.before is None and (texts := self.follow_ups()):
            messages[-1]["options"] = [{"value": text} for text in texts]
        return messages

    def follow_ups(self) -> list[str]:
        """What follows in an example whose messages the conversation has."""
        texts = [turn.text for turn in self.turns if turn.role == "user"]
        for example in installed_examples(self.model.card):
            script = [example.text, *example.then]
            if texts and texts == script[: len(texts)]:
                return script[len(texts) :][:1]
        return []

    def is_shown(self, sent: JsonObject | None) -> bool:
        """Whether an event is of the newest state; the second click of a double one is not."""
        return not isinstance(sent, dict) or sent.get("revision", 0) == self.revision

    def may_be_named(self, sent: JsonObject | None) -> bool:
        """Whether an event can name its messages: an answer that grows is newer than what any
        browser shows, and changes none before it."""
        return self.before is not None or self.is_shown(sent)

    def turn_index(self, event: gr.EventData, sent: JsonObject | None) -> int:
        """The turn of a displayed message; reasoning and notes are messages of their own.

        Raises RequestError: the browser shows another state of the conversation.
        """
        index = event.index
        position = int(index[0] if isinstance(index, list | tuple) else index)
        turns = [turn for turn, items in enumerate(self.turns) for _ in items.displayed()]
        if not (self.may_be_named(sent) and 0 <= position < len(turns)):
            raise RequestError("This message is no longer in the chat.")
        return turns[position]

    # ---- what its model gets

    def request(
        self,
        turns: Sequence[Turn],
        force_image: bool,
        ratio: str | None,
        beams: float,
        max_new_tokens: float,
        temperature: float,
        top_p: float,
        max_rounds: float,
    ) -> JsonObject:
        """The body of a chat request, with a new seed. A retry is sampled even at temperature 0.

        max_rounds: 0: any number; the backend drops the oldest turns that are too many for it.
        """
        # 1. The conversation, or the last message in the model's template.
        is_retry = self.before is not None and [*turns] == self.before[:-1]
        card = self.model.card
        if card.single_turn_template is not None:
            opening, closing = card.single_turn_template
            turns = [Turn("user", [opening, *turns[-1].parts, closing])]
        if max_rounds and len(turns) > 2 * max_rounds:
            raise RequestError(TOO_LONG)

        # 2. Its settings.
        body = {
            "messages": [turn.message(is_new=turn is turns[-1]) for turn in turns],
            "force_image": bool(force_image),
            "seed": random.randrange(2**31),
        }
        if card.ratios:  # the model's own settings
            if force_image:
                body["ratio"] = ratio
            return body
        if is_retry and not temperature:
            temperature = RETRY_TEMPERATURE
        return {
            **body,
            "num_beams": int(beams),
            "max_tokens": int(max_new_tokens),
            "top_p": top_p,
            "temperature": temperature,
        }


def unread(path: str) -> Picture:
    """An uploaded image that is shown before it is read."""
    picture = Picture()
    picture.path = path
    return picture


def installed_examples(card: ModelCard) -> list[Example]:
    """Those whose images are installed: a wheel has none."""
    return [
        example for example in card.examples if all(map(os.path.isfile, example_files(example)))
    ]


def example_files(example: Example) -> list[str]:
    return [str(IMAGES / name) for name in example.images]


def chatbot_examples(card: ModelCard) -> list[JsonObject]:
    """Examples in the form of Gradio's Chatbot."""
    displayed = []
    for example in installed_examples(card):
        label = example.text or "Describe it"
        if example.then:
            label += " …"
        displayed.append(
            {"text": example.text, "display_text": label, "files": example_files(example)}
        )
    return displayed
