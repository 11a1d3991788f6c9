"""`World`: what a system of a few learned things knows about requests, by another package.

[project.entry-points."seed_multimodal.worlds"]
known_words = "my_package:open_world"    # the file of the key in `system.json` → a `World`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from seed_multimodal.plugins import import_entry, registered
from seed_multimodal.settings import find_entry

if TYPE_CHECKING:
    from seed_multimodal.language.messages import ContentPart, Message

# In `Image.info` of a drawing that was read back.
DESCRIPTION = "description"
NOTE = "note"


class World:
    """Base, and the world of all systems that learned anything: it knows of no limits.

    listed: what users may name, by kind.
    """

    listed: Mapping[str, Sequence[str]] = {}

    def read(self, conversation: Sequence[Message]) -> Sequence[Message]:
        """A conversation in the words that the system learned; what was read stays."""
        return conversation

    def notes(self, message: Message, ignored: Sequence[str], drawing: bool) -> list[str]:
        """Sentences about words of a message that were read otherwise, or are unknown.

        ignored: texts of the prompt template, in lower case, which a user may write himself.
        drawing: words count that the system can say, but not draw.
        """
        return []

    def asks_about_picture(self, conversation: Sequence[Message]) -> bool:
        """Whether the last message is a question that no picture answers."""
        return False

    def picture_to_change(
        self, conversation: Sequence[Message], reads_codes: bool
    ) -> ContentPart | None:
        """The picture that the last message asks to change.

        reads_codes: whether the system can describe codes, as servers have them.
        """
        return None

    def note(
        self,
        which: str,
        conversation: Sequence[Message],
        claim: str,
        before: str | None,
        after: str,
    ) -> str:
        """What of a drawing contradicts its request; "": nothing.

        which: the drawing, as "The image". claim: what the model said before it.
        before, after: descriptions of the picture that had to be changed, if any, and of the
            drawing.
        """
        return ""


def open_world(file: Path | None) -> World:
    """The world of a system's `known_words`. Raises ConfigError: no package reads them."""
    if file is None:
        return World()
    entry = find_entry(registered("worlds"), "known_words", "world")
    return import_entry(entry)(file)  # type: ignore[no-any-return]
