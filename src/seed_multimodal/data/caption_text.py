"""`blip_caption`, the caption processor of tokenizer training, as an object with settings.

The rules for the text are `language.captions`. Defaults are the released ones: no prompt, the first 50 words.
"""

from __future__ import annotations

from dataclasses import dataclass

from seed_multimodal.errors import ConfigError
from seed_multimodal.language.captions import caption_text


@dataclass(frozen=True)
class BlipCaption:
    """A caption -> `prompt` + the caption in lower case, punctuation as spaces, at most `max_words` words."""

    prompt: str = ""
    max_words: int = 50

    def __post_init__(self) -> None:
        if isinstance(self.max_words, bool) or not isinstance(self.max_words, int) or self.max_words < 1:
            raise ConfigError(f"max_words must be a positive number of words, not {self.max_words!r}.")
        if not isinstance(self.prompt, str):
            raise ConfigError(f"prompt must be a text, not {self.prompt!r}.")

    def __call__(self, caption: str) -> str:
        return caption_text(caption, prompt=self.prompt, max_words=self.max_words)
