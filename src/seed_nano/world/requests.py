"""Requests in the wordings that nano's records use; the first of several is the one that systems send."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from seed_multimodal.language.tasks import DESCRIBE_PROMPT, DRAW_PROMPT

DESCRIBE_REQUESTS = (
    DESCRIBE_PROMPT, "Describe the picture.", "What do you see?", "What is this a picture of?",
    "Describe this picture.", "Describe the image.", "Describe this image.", "Describe this image briefly.",
    "What can you see?", "What does the picture show?", "Tell me what you see.", "Please describe it.")
DRAW_REQUESTS = (DRAW_PROMPT, "Draw {caption}.", "Show me {caption}.", "Make a picture of {caption}.")
CONTINUE_REQUESTS = ("Please go on.", "Continue.", "What comes next?")
STORY_LENGTHS = {3: " in three pictures", 4: " in four pictures"}
Picture = TypeVar("Picture")


def examples_request(pictures: Sequence[Picture]) -> list[str | Picture]:
    """Two examples of a change (before, after, before, after) and a fifth image, as the content of a message."""
    first, second, third, fourth, fifth = pictures
    return [first, "becomes", second, "and", third, "becomes", fourth, "Do the same with this one:", fifth]


def story_request(somebody: str, friend: str, frames: int = 0) -> str:
    """`Tell a story about a dog and a cat in three pictures.`; `frames` 0 leaves the number open."""
    return f"Tell a story about {somebody} and {friend}{STORY_LENGTHS.get(frames, '')}."
