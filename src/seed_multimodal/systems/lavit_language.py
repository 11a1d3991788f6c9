"""The language half of LaVIT: rows of pictures and words to words, words and codes to codes.

One instance may be used from several threads: the language model writes for one of them at a time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.errors import ConfigError
from seed_multimodal.language.lavit import LavitTokenizer, Side, several, understand_inputs
from seed_multimodal.language.lavit_generation import (
    ANSWERS,
    CAPTIONS,
    CodeSettings,
    WritingSettings,
    WrittenPicture,
    generate_codes,
    generate_text,
)
from seed_multimodal.progress import Progress
from seed_multimodal.settings import check_keys, nearest, read_settings
from seed_multimodal.systems.picture_half import one_seed_each
from seed_multimodal.systems.speaker import tokens_from_thread
from seed_multimodal.systems.talking import Log

# Of the released programs.
DEFAULTS: dict[str, WritingSettings] = {
    "describe": CAPTIONS, "ask": ANSWERS, "draw": CodeSettings(), "compose": CodeSettings(guidance=5.0)}
Seeds = list[int] | None  # None: torch's global generator
Inputs = tuple[Tensor, Tensor]
Resident = Callable[[], contextlib.AbstractContextManager[None]]
Watch = Callable[[], None] | None


class LavitLanguage:
    """A LLaMA and its tokenizer.

    Args:
        own: settings of tasks over `DEFAULTS`; `source`: where they stand. resident: inside it, the model is where it
            computes. elsewhere: names of options that belong to others, which a misspelt one may mean.
    """

    def __init__(self, tokenizer: LavitTokenizer, llm: Any, own: Mapping[str, Mapping[str, Any]] | None = None,
                 source: str = "system.json", resident: Resident = contextlib.nullcontext,
                 elsewhere: Sequence[str] = ()) -> None:
        self.tokenizer, self.llm, self.words = tokenizer, llm, tokenizer.vocabulary
        self.resident, self._own, self._elsewhere = resident, own or {}, elsewhere
        self._lock = threading.RLock()
        check_keys(self._own, DEFAULTS, f"{source}: generation")
        for task in DEFAULTS:
            self.settings(task)  # wrong ones are reported now

    def settings(self, task: str, **options: Any) -> WritingSettings:
        """A task's defaults with `options` over them.

        A temperature, top_p or top_k switches drawing of words on, without beams, unless `do_sample` or `num_beams` is
        given too.

        Raises:
            ConfigError: an unknown option (names the nearest), or a value out of range.
        """
        usual = DEFAULTS[task]
        known = [entry.name for entry in fields(usual)]
        for name in options:
            if name not in known:
                raise ConfigError(f"Unknown option {name!r}{nearest(name, [*known, *self._elsewhere])}.")
        if "do_sample" not in options and any(key in options for key in ("temperature", "top_p", "top_k")):
            options = {"do_sample": True, "num_beams": 1, **options}
        return read_settings(type(usual), {**vars(usual), **self._own.get(task, {}), **options}, "Generation setting")

    def asked(self, task: str, prompts: Sequence[Any], options: Mapping[str, Any]) -> tuple[WritingSettings, Seeds]:
        """Settings, and a seed for each of `prompts` (`seed`: one for all, one each, or None); `RequestError`: no list.
        """
        rest, count = dict(options), len(several(prompts, "What is asked for together"))
        seed = rest.pop("seed", 0)
        return self.settings(task, **rest), None if seed is None else one_seed_each(seed, count)

    @torch.inference_mode()
    def inputs(self, groups: Sequence[Sequence[Tensor]], prompts: str | Sequence[str] | None, side: Side) -> Inputs:
        """What the model reads, one row for each of `groups`, which are rows `[n, D]` of one picture or several.

        Raises:
            RequestError: another number of prompts than groups.
        """
        with self._lock:
            embed = self.llm.get_input_embeddings()
            between = embed(torch.tensor([self.words.eoi_id, self.words.boi_id], device=embed.weight.device))
            joined = [torch.cat([part for row in group for part in (between, row.to(between))][1:]) for group in groups]
            return understand_inputs(self.llm, self.tokenizer, joined, prompts, side)

    def say(self, inputs: Inputs, settings: WritingSettings, seeds: Seeds, streamer: Any = None,
            watch: Watch = None) -> list[str]:
        """`number` texts for each row of `inputs`, as the model wrote them; `watch` is called before each word."""
        with self._lock, self.resident():
            device = self.llm.get_input_embeddings().weight.device
            embeds, mask = (part.to(device) for part in inputs)
            return generate_text(self.llm, self.tokenizer, embeds, mask, settings, seeds=seeds, streamer=streamer,
                                 watch=watch)

    def stream(self, inputs: Inputs, settings: WritingSettings, seeds: Seeds,
               watch: Watch = None) -> Generator[str, None, None]:
        """The text so far, each time it has grown; with beams once, at the end."""
        if settings.num_beams > 1:
            yield self.say(inputs, settings, seeds, watch=watch)[0]
            return
        ids: list[int] = []
        tokens = tokens_from_thread(lambda streamer: self.say(inputs, settings, seeds, streamer, watch))
        with contextlib.closing(tokens):  # type: ignore[type-var]  # leaving early ends the thread
            for token in tokens:
                ids.append(token)
                text = self.tokenizer.decode(ids)
                if not text.endswith("\ufffd"):  # half a character
                    yield text

    def write(self, prompts: Sequence[Sequence[str | Sequence[int]]], settings: CodeSettings, seeds: Seeds,
              negative: str | Sequence[int] | None = None, log: Log = None,
              watch: Watch = None) -> list[WrittenPicture]:
        """`number` pictures for each prompt of texts and codes.

        Args:
            negative: words, or ids without the picture's start, to steer away from.
            log: shows how many codes there are, where it takes long.
            watch: called before each code; what it raises ends the generation.

        Raises:
            CodesError: codes that are none. GenerationError: a prompt too long.
        """
        rows = [self.tokenizer.drawing_ids(prompt) for prompt in prompts]
        against = None
        if negative is not None:
            words = self.tokenizer
            ids = words.text_ids(negative) if isinstance(negative, str) else words.checked_ids(
                several(negative, "The negative words"))
            against = [[*ids, self.words.boi_id]]
        return self.write_ids(rows, settings, seeds, against, log, watch)

    def write_ids(self, rows: Sequence[Sequence[int]], settings: CodeSettings, seeds: Seeds,
                  negative: Sequence[Sequence[int]] | None = None, log: Log = None,
                  watch: Watch = None) -> list[WrittenPicture]:
        """As `write`, of prompts as ids, and of negative ones as `generate_codes` takes them. Of a model whose pictures
        have fewer codes than `min_new_tokens`, as the released 20, any picture is long enough."""
        most = self.words.tokens_per_image  # the decoder has places for so many
        least = settings.min_new_tokens if settings.min_new_tokens <= most else 1
        settings = replace(settings, max_new_tokens=min(settings.max_new_tokens, most + 1), min_new_tokens=least)
        rows = [self.tokenizer.checked_ids(row) for row in several(rows, "The prompts")]
        if negative is not None:
            negative = [self.tokenizer.checked_ids(row) for row in several(negative, "The negative prompts")]
        with Progress("codes", settings.max_new_tokens, "code", log=log) as bar, self._lock, self.resident():
            def each() -> None:
                bar.update()
                if watch is not None:
                    watch()

            written = generate_codes(self.llm, self.words, rows, settings, negative=negative, seeds=seeds, watch=each,
                                     pad_id=self.tokenizer.pad_id)
        return [replace(one, codes=one.codes[:most]) for one in written]
