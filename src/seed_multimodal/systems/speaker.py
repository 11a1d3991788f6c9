"""The language half of a system: prompt ids in, the ids (or events) of one answer out.

An answer ends at `</s>`, at the token budget, or where the model begins a user's turn (`marker`). A forced answer opens
with fixed words and `<img>`; they count as part of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from seed_multimodal.errors import ConfigError
from seed_multimodal.language.generation import GenerationSettings, generate_ids
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.systems.stream import (
    AnswerReader,
    Event,
    ReadingStreamer,
    StopGeneration,
    tokens_from_thread,
)


class Speaker:
    """A LLaMA and its tokenizer, answering one prompt at a time."""

    def __init__(self, llm: Any, tokenizer: MultimodalTokenizer, marker: str = "") -> None:
        self.llm = llm
        self.tokenizer = tokenizer
        self.marker = marker

    def answer(self, prompt: Sequence[int], settings: GenerationSettings, opening: str = "") -> list[int]:
        """The ids of one answer; `opening`: fixed first words of it."""
        prompt, fixed = self._open(prompt, opening, settings)
        reader = AnswerReader(self.tokenizer, self.marker)
        if settings.num_beams > 1:  # beams cannot be watched: read the best one afterwards
            best = generate_ids(self.llm, [prompt], settings, self.tokenizer)[0]
            return reader.read_all([*fixed, *best[int(settings.force_image):]])
        for token in fixed:
            reader.read(token)

        def take(token: int) -> bool:
            reader.read(token)
            return not reader.finished

        with contextlib.suppress(StopGeneration):
            generate_ids(self.llm, [prompt], settings, self.tokenizer, streamer=ReadingStreamer(take))
        return reader.read_all(())

    def events(self, prompt: Sequence[int], settings: GenerationSettings, opening: str = "") -> Iterator[Event]:
        """The same answer as events while it is made (pictures as codes); the last one is `{"type": "end", "ids": …}`.

        Raises:
            ConfigError: beam search, whose tokens are known only at the end.
        """
        if settings.num_beams > 1:
            raise ConfigError("An answer cannot be streamed with num_beams above 1.")
        prompt, fixed = self._open(prompt, opening, settings)
        return self._events(prompt, fixed, settings)

    def _events(self, prompt: list[int], fixed: list[int], settings: GenerationSettings) -> Iterator[Event]:
        reader = AnswerReader(self.tokenizer, self.marker)
        for token in fixed:
            yield from reader.read(token)
        tokens = tokens_from_thread(
            lambda streamer: generate_ids(self.llm, [prompt], settings, self.tokenizer, streamer=streamer))
        with contextlib.closing(tokens):  # type: ignore[type-var]  # leaving early ends the thread
            for token in tokens:
                yield from reader.read(token)
                if reader.finished:
                    break
        yield from reader.close()
        yield {"type": "end", "ids": reader.ids}

    def _open(self, prompt: Sequence[int], opening: str, settings: GenerationSettings) -> tuple[list[int], list[int]]:
        """The prompt with the words of a forced answer, and the tokens of the answer that are fixed already."""
        words = self.tokenizer.encode_parts([opening]) if opening else []
        forced = [self.tokenizer.vocabulary.boi_id] if settings.force_image else []
        return [*prompt, *words], words + forced
