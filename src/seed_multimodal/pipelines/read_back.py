"""Read-back: a system's own description of its drawings, and what in it contradicts the request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from seed_multimodal.language.known_words import read_known_words
from seed_multimodal.language.phrases import Phrases
from seed_multimodal.language.prompts import without_verdict

if TYPE_CHECKING:  # the command line imports this module before torch
    from seed_multimodal.images.io import ImageSource
    from seed_multimodal.language.messages import Message
    from seed_multimodal.language.prompts import TaskPrompts

DESCRIPTION = "description"  # in `Image.info`
NOTE = "note"


def claims_of(conversation: Sequence[Message], answer_text: str, answer_after: str) -> list[str]:
    """Texts that may say what an image shows: its answer's before it, without a verdict about an
    earlier image (see `without_verdict`), and a request that has no image to change."""
    answer_text = without_verdict(answer_text, answer_after)
    is_text = all(message.is_text for message in conversation)
    return [answer_text, conversation[-1].text] if is_text else [answer_text]


def edited_images(conversation: Sequence[Message]) -> list[ImageSource]:
    """The image that the last message asks to change: its only one, or none."""
    images = conversation[-1].images
    return images if len(images) == 1 else []


def add_descriptions(
    images: Sequence[Image.Image],
    descriptions: Sequence[str],
    conversations: Sequence[Sequence[Message]],
    answer_texts: Sequence[str],
    tasks: TaskPrompts,
    known_words: Path | None,
) -> None:
    """Set `info["description"]` of drawings, and `info["note"]`, empty if nothing contradicts.

    descriptions: of the drawings, then of the `edited_images` of all conversations.
    answer_texts: texts before the drawings, see `claims_of`; the first text that names a known
    thing counts.
    """
    phrases = read_known_words(known_words).compared if known_words else Phrases({})
    before = iter(descriptions[len(images) :])
    for index, image in enumerate(images):
        conversation = conversations[index]
        description = descriptions[index]
        claims = claims_of(conversation, answer_texts[index], tasks.answer_after)
        differences = phrases.contradictions(claims, description)
        if edited_images(conversation):
            request = conversation[-1].text
            differences += phrases.unasked_changes(next(before), request, description)
        note = ""
        if differences:
            which = f"Image {index}" if len(images) > 1 else "The image"
            named = "; ".join(dict.fromkeys(differences))
            note = f"{which} may not show what was asked for ({named})."
        image.info |= {DESCRIPTION: description, NOTE: note}
