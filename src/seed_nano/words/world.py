"""`SmallWorld`: the `pipelines.world.World` of a file of known words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from seed_multimodal.language.messages import ContentPart, Message
from seed_multimodal.pipelines.world import PREFACE, World
from seed_nano.words.known_words import read_known_words
from seed_nano.words.read_back import asks_about_picture, note_of, picture_to_change


class SmallWorld(World):
    """What a system that learned few things reads and says."""

    def __init__(self, file: Path) -> None:
        self.known = read_known_words(file)
        self.listed = self.known.listed

    def read(self, conversation: Sequence[Message]) -> Sequence[Message]:
        # The newest first: of many words only so many are corrected.
        tried: set[str] = set()
        turns: list[Message] = []
        for message in reversed(conversation):
            parts: Sequence[Any] = message.content
            if message.role == "user":
                parts = [
                    self.known.read(part, tried) if type(part) is str else part for part in parts
                ]
            elif message.role == "assistant":
                parts = [
                    part.removeprefix(PREFACE) if type(part) is str else part for part in parts
                ]
            turns.append(replace(message, content=tuple(parts)))
        return turns[::-1]

    def notes(self, message: Message, ignored: Sequence[str], drawing: bool) -> list[str]:
        text = message.text.lower()
        for phrase in ignored:
            text = text.replace(phrase, " ")
        changed: dict[str, str] = {}
        for part in message.content:
            changed |= getattr(part, "changed", {})
        return self.known.notes(text, changed, drawing)

    def asks_about_picture(self, conversation: Sequence[Message]) -> bool:
        return asks_about_picture(conversation)

    def picture_to_change(
        self, conversation: Sequence[Message], reads_codes: bool
    ) -> ContentPart | None:
        return picture_to_change(conversation, reads_codes)

    def note(
        self,
        which: str,
        conversation: Sequence[Message],
        claim: str,
        before: str | None,
        after: str,
    ) -> str:
        request = conversation[-1].text
        return note_of(self.known.compared, which, request, claim, before, after)
