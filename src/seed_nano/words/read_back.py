"""Read-back: a system's own description of its drawings, and what in it contradicts the request."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line imports this module before torch
    from seed_multimodal.language.messages import ContentPart, Message
    from seed_nano.words.phrases import Phrases

NO_CHANGE = "Nothing has changed."

# Requests that change the picture of an earlier message, those that ask for a new one, what shows
# that they speak of the old one, and questions.
_CHANGES = re.compile(
    r"^\W*+(?:and|also)\b(?! now)|\b(?:add|remove|delete|erase|put|place|move|shift|make|turn|"
    r"change|replace|swap|exchange|take|get rid|without|another|more|less|fewer|bigger|larger|"
    r"smaller|it|them|its|their)\b",
    re.I,
)
_DRAWS = re.compile(
    r"\b(?:draw|paint|sketch|generate|create|make me|(?:picture|image|drawing) of)\b", re.I
)
_SPEAKS_OF_IT = re.compile(r"\b(?:it|them|its|their)\b", re.I)
_ASKS = re.compile(r"^(?!.*\b(?:can|could|would|will) you\b).*\?\s*+$", re.I | re.S)
_ABOUT_PICTURE = re.compile(
    r"^\W*+(?:(?:ok|okay|so|and|well|hey|hi|hello|now|please|great|thanks|sorry)\W++)*+(?:"
    r"(?:what|how)(?! about\b)|where|which|who|why|is|isn't|are(?! you)|does|did|"
    r"do you (?:see|find)|can you see|count|name|list|describe)\b",
    re.I,
)


def asks_about_picture(conversation: Sequence[Message]) -> bool:
    """Whether the last message is a question about a picture, which no picture answers."""
    text = conversation[-1].text
    has_picture = not all(message.is_text for message in conversation)
    return has_picture and bool(_ABOUT_PICTURE.search(text)) and not _DRAWS.search(text)


def picture_to_change(conversation: Sequence[Message], reads_codes: bool) -> ContentPart | None:
    """The picture that the last message asks to change: its only one, or the last one before it,
    given or drawn; None: it asks for a new picture.

    reads_codes: whether the system can describe codes, as servers have them.
    """
    *earlier, last = conversation
    pictures = _pictures(last, reads_codes)
    if pictures or not last.is_text:
        return pictures[0] if len(pictures) == 1 else None
    is_new = _DRAWS.search(last.text) and not _SPEAKS_OF_IT.search(last.text)
    if is_new or _ASKS.search(last.text) or not _CHANGES.search(last.text):
        return None
    for message in reversed(earlier):
        pictures = _pictures(message, reads_codes)
        if pictures:
            return pictures[-1]
    return None


def _pictures(message: Message, reads_codes: bool) -> list[ContentPart]:
    """The pictures of a message in a form that the system can describe."""
    if reads_codes:
        return [part for part in message.content if not isinstance(part, str)]
    drawn: list[ContentPart] = []
    for part in message.content:
        image = getattr(part, "image", None)
        if image is not None:
            drawn.append(image)
    return [*message.images] or drawn


def note_of(
    phrases: Phrases, which: str, request: str, claim: str, before: str | None, after: str
) -> str:
    """A note about a drawing that does not show what was asked for, or empty.

    which: the drawing, as "The image". claim: what the model said before it.
    before, after: descriptions of the picture that had to be changed, if any, and of the drawing.
    """
    # 1. Of a new picture, the first text that names a known thing says what it shows.
    claims = [claim, request] if before is None else [claim]
    differences = phrases.contradictions(claims, after)

    # 2. A change.
    note = ""
    if before is not None:
        differences += phrases.unasked_changes(before, request, after)
        things, facts = phrases.read(after)
        says_same = bool(things) and (things, facts) == phrases.read(before)
        if says_same and not _ASKS.search(request):
            note = NO_CHANGE if which == "The image" else f"{which}: {NO_CHANGE}"
    if not differences:
        return note
    named = "; ".join(dict.fromkeys(differences))
    return f"{which} may not show what was asked for ({named}). {note}".rstrip()
