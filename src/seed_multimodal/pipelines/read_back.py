"""Read-back: a system's own description of its drawings, and what in it contradicts the request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from seed_multimodal.language.known_words import read_known_words
from seed_multimodal.language.phrases import Phrases
from seed_multimodal.language.prompts import without_verdict

if TYPE_CHECKING:  # the command line imports this module before torch
    from seed_multimodal.language.messages import ContentPart, Message
    from seed_multimodal.language.prompts import TaskPrompts

DESCRIPTION = "description"  # in `Image.info`
NOTE = "note"


def claims_of(conversation: Sequence[Message], answer_text: str, answer_after: str) -> list[str]:
    """Texts that may say what an image shows: its answer's before it, without a verdict about an
    earlier image (see `without_verdict`), and a request that has no image to change."""
    answer_text = without_verdict(answer_text, answer_after)
    is_text = all(message.is_text for message in conversation)
    return [answer_text, conversation[-1].text] if is_text else [answer_text]


def edited_image(message: Message, reads_codes: bool) -> ContentPart | None:
    """The image that a message asks to change: its only one.

    reads_codes: whether the system can describe codes, as servers have them.
    """
    if not reads_codes:
        images: Sequence[ContentPart] = message.images
    else:
        images = [part for part in message.content if not isinstance(part, str)]
    return images[0] if len(images) == 1 else None


def add_descriptions(
    images: Sequence[Image.Image],
    descriptions: Sequence[str],
    before: Mapping[int, str],
    conversations: Sequence[Sequence[Message]],
    answer_texts: Sequence[str],
    tasks: TaskPrompts,
    known_words: Path | None,
) -> None:
    """Set `info["description"]` of drawings, and `info["note"]`, empty if nothing contradicts.

    before: of drawings that are edits, the description of the image before.
    answer_texts: texts before the drawings, see `claims_of`; the first text that names a known
    thing counts.
    """
    phrases = read_known_words(known_words).compared if known_words else Phrases({})
    for index, image in enumerate(images):
        conversation = conversations[index]
        description = descriptions[index]
        claims = claims_of(conversation, answer_texts[index], tasks.answer_after)
        differences = phrases.contradictions(claims, description)
        if index in before:
            request = conversation[-1].text
            differences += phrases.unasked_changes(before[index], request, description)
        note = ""
        if differences:
            which = f"Image {index}" if len(images) > 1 else "The image"
            named = "; ".join(dict.fromkeys(differences))
            note = f"{which} may not show what was asked for ({named})."
        image.info |= {DESCRIPTION: description, NOTE: note}
