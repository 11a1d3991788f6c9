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
    from seed_multimodal.language.messages import Message

DESCRIPTION = "description"  # in `Image.info`
NOTE = "note"


def claims_of(conversation: Sequence[Message], answer_text: str, answer_after: str) -> list[str]:
    """Texts that may say what an image shows: its answer's before it, without a verdict about an
    earlier image (see `without_verdict`), and a request that has no image to change."""
    answer_text = without_verdict(answer_text, answer_after)
    is_text = all(message.is_text for message in conversation)
    return [answer_text, conversation[-1].text] if is_text else [answer_text]


def add_descriptions(
    images: Sequence[Image.Image],
    descriptions: Sequence[str],
    claims: Sequence[Sequence[str]],
    known_words: Path | None,
) -> None:
    """Set `info["description"]` of drawings, and `info["note"]`, empty if nothing contradicts.

    claims: of each drawing, see `claims_of`; the first text that names a known thing counts.
    """
    phrases = read_known_words(known_words).compared if known_words else Phrases({})
    for index, image in enumerate(images):
        differences = phrases.contradictions(claims[index], descriptions[index])
        note = ""
        if differences:
            which = f"Image {index}" if len(images) > 1 else "The image"
            note = f"{which} may not show what was asked for ({'; '.join(differences)})."
        image.info |= {DESCRIPTION: descriptions[index], NOTE: note}
