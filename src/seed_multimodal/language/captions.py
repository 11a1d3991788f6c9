"""Caption and question texts as tokenizer training reads them (LAVIS calls them blip_caption and blip_question).

Order matters and is kept: the trailing newline is dropped before the blanks, and only runs of two or more white-space
characters collapse, so a single tab or newline inside a caption survives.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from seed_multimodal.settings import check_settings, setting

_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
_RUNS = re.compile(r"\s{2,}")


def caption_text(caption: str, prompt: str = "", max_words: int = 50) -> str:
    """Lower case, punctuation turned into blanks, runs of white space collapsed, the first `max_words` words."""
    text = _PUNCTUATION.sub(" ", caption.lower())
    text = _RUNS.sub(" ", text).rstrip("\n").strip(" ")
    return prompt + _first_words(text, max_words)


@dataclass(frozen=True)
class BlipCaption:
    """`caption_text` with its settings, as LAVIS's processor `blip_caption`. Raises ConfigError for other types."""

    prompt: str = ""
    max_words: int = setting(50, least=1)

    def __post_init__(self) -> None:
        check_settings(self, "caption")

    def __call__(self, caption: str) -> str:
        return caption_text(caption, prompt=self.prompt, max_words=self.max_words)


def question_text(question: str, max_words: int = 50) -> str:
    """Lower case, punctuation removed, white space kept but for trailing blanks, the first `max_words` words."""
    return _first_words(_PUNCTUATION.sub("", question.lower()).rstrip(" "), max_words)


def _first_words(text: str, most: int) -> str:
    """Words are what single blanks separate, so two blanks enclose an empty word, which counts."""
    words = text.split(" ")
    return " ".join(words[:most]) if len(words) > most else text
