"""Captions, answers and image codes from LaVIT's language model, a stock `LlamaForCausalLM`.

Pictures are drawn with guidance: each next word's scores are u + g · (c - u), where c are the log-probabilities behind
the prompt and u those behind the negative words, which by default are the picture's start alone:

    prompt, start, code, code, …  ─► c ─┐
    start,         code, code, …  ─► u ─┴► guided scores ─► least length ─► no text ─► the next code

The second stream has a cache of its own. It finds its rows from the words that were chosen, so it follows beams (the
released programs' does not) and any number of pictures a prompt.

Different from the released programs: prompts of pictures and text do not cut the picture's length
(`CodeSettings.legacy_max_length` does); `top_k` and `top_p` hold for captions and answers too; words beyond the
codebook are never written; tokens are drawn from generators of the request (`sampling`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seed_multimodal.errors import ConfigError, GenerationError, RequestError
from seed_multimodal.language.generation import COLDEST, HOTTEST, Watched, check_ids, room_for_answer, until_end
from seed_multimodal.language.lavit import LavitTokenizer, LavitWords
from seed_multimodal.language.padding import padded_left
from seed_multimodal.language.sampling import DrawnBeams, DrawnTokens, Draws, FiniteScores, own_seed
from seed_multimodal.settings import SEEDS, check_settings, setting

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

FIRST_PIECE = 3  # <unk>, <s> and </s> stay possible inside a picture, and are left out of it


@dataclass(frozen=True)
class WritingSettings:
    """How to write; `number` answers to each prompt (with beams the best ones). The defaults are LaVIT's captions.

    `temperature` 0 and `top_p` 0 mean the likeliest word each time. Answer n of a prompt is drawn with `seed` + n; None
    takes one number from torch's global generator.
    """

    number: int = setting(1, least=1, most=1000)
    max_new_tokens: int = setting(36, least=1)
    min_new_tokens: int = setting(8, least=0)
    do_sample: bool = False
    temperature: float = setting(1.0, least=0, most=HOTTEST)
    top_k: int = setting(50, least=0)  # 0: off
    top_p: float = setting(1.0, least=0, most=1)
    num_beams: int = setting(2, least=1, most=1000)
    length_penalty: float = 1.0
    early_stopping: bool = False
    repetition_penalty: float = setting(1.0, above=0)
    seed: int | None = setting(None, **SEEDS)

    def __post_init__(self) -> None:
        check_settings(self, "Generation setting")
        if self.number > 1 and self.num_beams > 1 and self.number > self.num_beams:
            raise ConfigError(f"{self.num_beams} beams give at most as many answers, not {self.number}.")
        if self.number > 1 and self.num_beams == 1 and not self.samples:
            raise ConfigError(f"Without drawing and beams all {self.number} answers would be the same.")

    @property
    def samples(self) -> bool:
        """Whether words are drawn."""
        return self.do_sample and self.temperature >= COLDEST and self.top_p > 0

    def row_seeds(self, prompts: int, seeds: Sequence[int] | None, number: int) -> list[int]:
        """A seed for each of `number` answers to each prompt, from one each (`seeds`) or the setting."""
        if seeds is not None and len(seeds) != prompts:
            raise RequestError(f"There are {prompts} prompts, but {len(seeds)} seeds.")
        first = seeds or [own_seed() if self.seed is None else self.seed for _ in range(prompts)]
        return [(int(seed) + place) % 2**64 for seed in first for place in range(number)]


@dataclass(frozen=True)
class CodeSettings(WritingSettings):
    """How to write pictures; the defaults are the released ones for drawing (`compose`: guidance 5).

    Attributes:
        max_new_tokens, min_new_tokens: codes of a picture, its end included.
        guidance: 1 is off.
        legacy_max_length: as many new words as the longest prompt has, whatever `max_new_tokens` says, as the released
            program did for prompts of pictures and text.
    """

    max_new_tokens: int = setting(200, least=1)
    min_new_tokens: int = setting(20, least=0)
    do_sample: bool = True
    num_beams: int = setting(1, least=1, most=1000)
    guidance: float = setting(4.0, least=0, most=1000)
    legacy_max_length: bool = False


CAPTIONS = WritingSettings()
ANSWERS = WritingSettings(num_beams=5, max_new_tokens=10, min_new_tokens=2, length_penalty=0.0, early_stopping=True)


@dataclass(frozen=True)
class WrittenPicture:
    """The codes of one picture that the model wrote.

    Attributes:
        codes: int64 [n], on the CPU.
        ids: the words as written, the end included.
        ended: whether the model ended the picture itself.
    """

    codes: Tensor
    ids: list[int]
    ended: bool

    @property
    def note(self) -> str:
        """What the user should know, in one sentence; "" if all is well."""
        if not len(self.codes):
            return f"The model wrote no image code in {len(self.ids)} words, so there is no picture."
        return "" if self.ended else (f"The model did not end the picture within {len(self.ids)} words; it is drawn "
                                      f"from the {len(self.codes)} codes that there are.")


@torch.inference_mode()
def generate_text(llm: LlamaForCausalLM, tokenizer: LavitTokenizer, embeds: Tensor, mask: Tensor,
                  settings: WritingSettings = CAPTIONS, *, seeds: Sequence[int] | None = None,
                  watch: Callable[[], None] | None = None, streamer: Any = None) -> list[str]:
    """What the model says to prompts (`lavit.understand_inputs`), not yet cut (`lavit.caption_of`, `answer_of`).

    Args:
        embeds, mask: [B, L, D] and [B, L].
        seeds: one for each prompt, instead of the setting's.
        watch: called before each word; what it raises ends the generation.
        streamer: a transformers streamer, for one prompt without beams.

    Returns:
        B · number texts, those of a prompt one after the other.

    Raises:
        GenerationError: a prompt too long for the model, or scores that are not numbers.
    """
    budget = min(settings.max_new_tokens, room_for_answer(embeds.shape[1], llm))
    words = tokenizer.vocabulary
    answers = _write(llm, embeds, mask, settings, budget, [Forbidden(words.n_text, None)], seeds, watch, streamer,
                     bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    return [tokenizer.decode(ids) for ids in answers]


@torch.inference_mode()
def generate_codes(llm: LlamaForCausalLM, words: LavitWords, prompts: Sequence[Sequence[int]],
                   settings: CodeSettings | None = None, *, negative: Sequence[Sequence[int]] | None = None,
                   seeds: Sequence[int] | None = None, watch: Callable[[], None] | None = None, streamer: Any = None,
                   pad_id: int = 2) -> list[WrittenPicture]:
    """Pictures to prompts (`LavitTokenizer.drawing_ids`); the picture's start is put behind each.

    Args:
        negative: words to steer away from, one row for all prompts or one each, as the model reads them (the start of
            the picture comes last); None: the start alone.
        seeds, watch, streamer: as of `generate_text`.

    Returns:
        `number` pictures of each prompt, one after the other.

    Raises:
        GenerationError: no prompt or one too long, an id that is no word, or scores that are not numbers.
        RequestError: another number of negative rows than prompts.
    """
    settings = settings or CodeSettings()
    rows = [[*(int(id) for id in prompt), words.boi_id] for prompt in prompts]
    if not rows:
        return []
    against = [[int(id) for id in row] for row in negative] if negative is not None else [[words.boi_id]]
    against = against * len(rows) if len(against) == 1 else against
    if len(against) != len(rows):
        raise RequestError(f"There are {len(rows)} prompts, but {len(against)} negative ones; give one, or one each.")
    check_ids(rows, words)
    check_ids(against, words)
    embed = llm.get_input_embeddings()
    ids, mask = (part.to(embed.weight.device) for part in padded_left(rows, pad_id))
    budget = max(1, ids.shape[1] - 1) if settings.legacy_max_length else settings.max_new_tokens
    budget = min(budget, room_for_answer(max(ids.shape[1], max(map(len, against))), llm))
    rules: list[Any] = [Forbidden(FIRST_PIECE, words.n_text), Forbidden(words.size, None)]
    if settings.guidance != 1:
        rules.insert(0, Guidance(llm, settings.guidance, against, settings.num_beams, pad_id))
    answers = _write(llm, embed(ids), mask, settings, budget, rules, seeds, watch, streamer,
                     bos_token_id=words.boi_id, eos_token_id=words.eoi_id, pad_token_id=pad_id)
    return [WrittenPicture(words.codes_of(row), row, words.eoi_id in row) for row in answers]


def _write(llm: Any, embeds: Tensor, mask: Tensor, settings: WritingSettings, budget: int, rules: list[Any],
           seeds: Sequence[int] | None, watch: Callable[[], None] | None, streamer: Any, **special: int
           ) -> list[list[int]]:
    """Prompts [B, L, D] → new ids of B · number answers, each up to and including its end."""
    from transformers import (
        GenerationConfig,
        MinNewTokensLengthLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
    )

    beams = settings.num_beams > 1
    draws = Draws(settings.row_seeds(len(embeds), seeds, 1 if beams else settings.number))
    if not beams:
        embeds, mask = (part.repeat_interleave(settings.number, dim=0) for part in (embeds, mask))
    end = special["eos_token_id"]
    least = MinNewTokensLengthLogitsProcessor(0, settings.min_new_tokens, end, device=embeds.device)
    processors = [FiniteScores(llm), *([Watched(watch)] if watch else []), *rules, least]
    if settings.repetition_penalty != 1:  # `generate` itself would forgive a row as many new words as it has padding
        processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    drawing = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
    if settings.samples and beams:
        drawing = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    elif settings.samples:
        processors.append(DrawnTokens(draws, settings.temperature, settings.top_k, settings.top_p))
    ranking = {"early_stopping": settings.early_stopping, "length_penalty": settings.length_penalty} if beams else {}
    config = GenerationConfig(
        max_new_tokens=budget, num_beams=settings.num_beams, do_sample=settings.samples and beams, use_cache=True,
        num_return_sequences=settings.number if beams else 1, repetition_penalty=1.0, **ranking, **drawing, **special)
    with DrawnBeams(draws) if settings.samples and beams else contextlib.nullcontext():
        output = llm.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=config,
                              logits_processor=processors, streamer=streamer)
    return [until_end(row, end) for row in output.tolist()]


class Forbidden:
    """A logits processor: no word from `start` up to `stop` (None: to the end) is written."""

    def __init__(self, start: int, stop: int | None) -> None:
        self._range = slice(start, stop)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] → scores with -inf in the range."""
        scores = scores.clone()
        scores[:, self._range] = float("-inf")
        return scores


def guided(scores: Tensor, other: Tensor, guidance: float) -> Tensor:
    """Scores behind the prompt and behind the negative words [..., V] → their mix, of log-probabilities."""
    wanted, other = scores.float().log_softmax(dim=-1), other.float().log_softmax(dim=-1)
    return other + guidance * (wanted - other)


class Guidance:
    """A logits processor that runs the model a second time, behind other words than the prompt, and mixes the scores.

    Args:
        negative: the words of each prompt.
        beams: so many rows that follow each other belong together and may continue each other.
    """

    def __init__(self, llm: Any, guidance: float, negative: Sequence[Sequence[int]], beams: int = 1,
                 pad_id: int = 2) -> None:
        self._llm, self._guidance, self._beams = llm, guidance, beams
        self._negative = padded_left(negative, pad_id)
        self._written: Tensor | None = None  # the words of the last call, [R, n]
        self._mask = torch.empty(0)
        self._cache: Any = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`input_ids [R, n]`, all words written so far, and `scores [R, V]` → guided scores."""
        if self._written is None:
            rows = len(input_ids) // len(self._negative[0])
            new, self._mask = (part.to(input_ids.device).repeat_interleave(rows, dim=0) for part in self._negative)
            new, mask = torch.cat([new, input_ids], dim=1), torch.ones_like(input_ids)
        else:
            origin = continued(self._written, input_ids, self._beams)
            if self._beams > 1:
                self._cache.reorder_cache(origin)  # rows of one prompt have the same mask
            new = input_ids[:, -1:]
            mask = torch.ones_like(new)
        self._mask = torch.cat([self._mask, mask], dim=1)
        places = (self._mask.cumsum(dim=1) - 1).clamp(min=0)[:, -new.shape[1]:]
        output = self._llm(input_ids=new, attention_mask=self._mask, position_ids=places, use_cache=True,
                           past_key_values=self._cache, logits_to_keep=1)
        self._written, self._cache = input_ids, output.past_key_values
        return guided(scores, output.logits[:, -1], self._guidance)


def continued(before: Tensor, now: Tensor, group: int) -> Tensor:
    """Rows [R, n] and rows one word longer [R, n + 1] → [R], which row of its group each continues.

    Rows of a group that hold the same words stand for each other.

    Raises:
        GenerationError: a row that continues none.
    """
    old, new = before.unflatten(0, (-1, group)), now[:, :-1].unflatten(0, (-1, group))
    same = (new[:, :, None] == old[:, None]).all(dim=-1)  # [groups, now, before]
    if now.shape[1] != before.shape[1] + 1 or not bool(same.any(dim=-1).all()):
        raise GenerationError("The language model's beams do not continue each other, so guidance cannot follow them.")
    first = torch.arange(len(same), device=now.device)[:, None] * group
    return (same.to(torch.int8).argmax(dim=-1) + first).flatten()
