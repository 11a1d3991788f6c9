"""Constrained generation of well-formed images, for all families.

An image is `<img>`, its codes, `</img>`; no code stands elsewhere. SEED-LLaMA: exactly 32 codes; SEED-X: the same 64
words in order, of which only the model's states count; LaVIT: 1 to 256 codes, steered by guidance. Each prompt of a
batch draws from a generator of its own, so it gets what it would get alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from seed_multimodal.errors import GenerationError
from seed_multimodal.language.answer import AnswerReader
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import ImageVocabulary, SeedXVocabulary
from seed_multimodal.settings import SEEDS, check_settings, setting

# Below it sampling is greedy (scores differ by more than 0.0001 of it), above it scores do not overflow.
COLDEST, HOTTEST = 1e-5, 1e5
BEAMS, SAMPLING = ("num_beams", "num_return_sequences", "length_penalty", "early_stopping"), (
    "temperature", "top_p", "top_k")


class Stopped(Exception):  # noqa: N818 (a signal, not an error)
    """Raised in `generate` when `should_stop` is true."""


@dataclass(frozen=True)
class GenerationSettings:
    """Generation settings; defaults of SEED-LLaMA's scripts, with well-formed images.

    `temperature` 0 and `top_p` 0: greedy. `seed` None: drawn from torch's global generator. `guidance`: of LaVIT's
    images, 1: off. `force_image`: append `<img>` to every prompt and return it as part of the answer.
    `num_return_sequences`: answers per prompt, sampled with `seed`, `seed` + 1, … or the best beams. `stop`: texts that
    end an answer, as the prompt template's; they count behind the text `stop_after` (a verdict's end) only.
    """

    max_new_tokens: int = setting(512, least=1)
    min_new_tokens: int = setting(0, least=0)
    temperature: float = setting(1.0, least=0, most=HOTTEST)
    top_p: float = setting(0.5, least=0, most=1)
    top_k: int = setting(50, least=0)  # 0: off
    num_beams: int = setting(1, least=1, most=1000)
    length_penalty: float = 1.0
    early_stopping: bool = False
    repetition_penalty: float = setting(1.0, above=0)
    guidance: float = setting(1.0, least=0, most=1000)
    num_return_sequences: int = setting(1, least=1, most=1000)
    do_sample: bool = True
    seed: int | None = setting(None, **SEEDS)
    force_image: bool = False
    constrain: bool = True
    stop: tuple[str, ...] = ()
    stop_after: str = ""

    def __post_init__(self) -> None:
        check_settings(self, "Generation setting")

    @property
    def samples(self) -> bool:
        """Whether tokens are sampled."""
        return self.do_sample and self.temperature >= COLDEST and self.top_p > 0


@dataclass
class Prompt:
    """Input of the language model."""

    ids: Sequence[int] = ()  # with `<s>` if the family uses it
    embeds: Tensor | None = None  # [L, D], instead of `ids` for feature inputs
    answered: Sequence[int] = ()  # final tokens that are part of the answer
    negative: Sequence[int] | None = None  # unconditional prompt for guidance, including `<img>`; None: `<img>`
    note: str = ""  # for `Answer`
    source: Any = None  # the image that is edited

    def __len__(self) -> int:
        return len(self.ids) if self.embeds is None else len(self.embeds)


class HiddenStates(defaultdict[int, dict[int, Tensor]]):
    """The language model's last states `[D]` (after its final norm) of each answer at its words, by their places: give
    it to `generate` or an engine, then `at(row, places)`; also while the answer is made."""

    def __init__(self) -> None:
        super().__init__(dict)

    def at(self, row: int, places: Sequence[int]) -> Tensor:
        """States `[len(places), D]` at words of answer `row` (that of word n is computed when word n + 1 is chosen;
        `GenerationError`: a word that nothing follows)."""
        if not self[row].keys() >= set(places):
            raise GenerationError("The answer ends inside an image, so there is no state at its last word.")
        return torch.stack([self[row][place] for place in places])


@torch.inference_mode()
def generate(llm: Any, tokenizer: MultimodalTokenizer, prompts: Sequence[Prompt], settings: GenerationSettings, *,
             seeds: Sequence[int] | None = None, states: HiddenStates | None = None, ends: Sequence[int] | None = None,
             original: bool = False, should_stop: Callable[[], bool] | None = None) -> list[list[int]]:
    """Answers by transformers' `generate`, for beam search (`Engine` is equal and faster without): ids including the
    end token, starting with `prompt.answered` and a forced `<img>`. Raises GenerationError: prompt too long, no space
    for a forced image, NaN scores.

    Args:
        seeds: only the first is used; None: `settings.seed`. ends: end tokens; None: `</s>`.
        original: only the original code's image constraints (see `ImageSpans`).
        should_stop: called before each token; true raises `Stopped`.
    """
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    if not prompts:
        return []
    words, seed = tokenizer.vocabulary, settings.seed if seeds is None else seeds[0]
    forced = [words.boi_id] if settings.force_image else []
    answered = [[*prompt.answered, *forced] for prompt in prompts]
    rows = [embedded(prompt, forced, llm.get_input_embeddings()) for prompt in prompts]
    embeds = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True, padding_side="left")
    budget, device = new_token_budget(embeds.shape[1], settings, llm, words), embeds.device
    end = [tokenizer.eos_id] if ends is None else list(ends)

    def check(input_ids: Tensor, scores: Tensor) -> Tensor:
        if should_stop is not None and should_stop():
            raise Stopped
        check_finite(bool(torch.isfinite(scores.amax(dim=-1)).all()))
        return scores

    processors = LogitsProcessorList([check, *row_processors(settings, None, end, device)])
    if settings.constrain:
        opened = answered[0][-1:] == [words.boi_id]
        processors.insert(1, ImageSpans(words, opened, None if original else budget, original))
    def has_stopped(input_ids: Tensor, scores: Tensor) -> Tensor:
        stopped = [stop_length(ids, settings, tokenizer) is not None for ids in input_ids.tolist()]
        return torch.tensor(stopped, device=input_ids.device)

    config = GenerationConfig(
        max_new_tokens=budget, use_cache=True, bos_token_id=tokenizer.bos_id, eos_token_id=end,
        pad_token_id=tokenizer.pad_id, do_sample=settings.samples,
        **{name: getattr(settings, name) for name in (*BEAMS, *(SAMPLING if settings.samples else ()))})
    with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=settings.samples):
        if settings.samples:  # transformers draws from the global generator
            torch.manual_seed(random_seed() if seed is None else seed)
        made = llm.generate(inputs_embeds=embeds, attention_mask=mask.to(device), generation_config=config,
                            logits_processor=processors,
                            stopping_criteria=StoppingCriteriaList([has_stopped])).tolist()
    each = settings.num_return_sequences
    lengths = [next((place for place, id in enumerate(ids, 1) if id in end), stop_length(ids, settings, tokenizer))
               for ids in made]
    answers = [[*answered[row // each], *ids[:lengths[row]]] for row, ids in enumerate(made)]
    if states is not None and words.in_order:  # the only words whose states are read
        for row, ids in enumerate(answers):
            prompt = prompts[row // each]
            whole = embedded(prompt, ids[len(prompt.answered):], llm.get_input_embeddings())
            passed = llm.get_decoder()(inputs_embeds=whole[None]).last_hidden_state[0]
            states[row] = dict(enumerate(passed[len(whole) - len(ids):-1]))
    return answers


def stop_length(ids: Sequence[int], settings: GenerationSettings, tokenizer: MultimodalTokenizer) -> int | None:
    """After how many of the `ids` one of the settings' stops is complete; None: none is."""
    text = tokenizer.decode(ids) if settings.stop else ""
    if not any(stop in text for stop in settings.stop):  # in most steps
        return None
    reader = AnswerReader(tokenizer, settings.stop, after=settings.stop_after)
    for count, token in enumerate(ids, 1):
        reader.read(token)
        if reader.finished:
            return count
    return None


def random_seed() -> int:
    """One number of torch's global generator of the CPU."""
    return int(torch.randint(2**63 - 1, ()))


class ImageSpans:
    """A logits processor that forbids tokens which would break an image. Its state is derived from the generated ids,
    so it works in batches and with beams. `opened`: the prompt ends in `<img>`; `budget`: maximum new tokens (`<img>`
    is forbidden if `</img>` would not fit); `original`: forbid only those of SEED-X's image tokens that the original
    code forbids."""

    def __init__(self, words: ImageVocabulary, opened: bool = False, budget: int | None = None,
                 original: bool = False) -> None:
        self.words, self.opened, self.budget, self.original = words, opened, budget, original

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Generated `input_ids [B, n]`, `scores [B, V]` → scores with forbidden tokens at -inf."""
        left = None if self.budget is None else torch.tensor(self.budget - input_ids.shape[1], device=scores.device)
        return self.masked(scores, *self.span_state(input_ids), left)

    def masked(self, scores: Tensor, inside: Tensor, done: Tensor, left: Tensor | None) -> Tensor:
        """The same from the state of each row: inside an image, image tokens so far, and remaining tokens."""
        words = self.words
        needs_code = inside & (done < words.tokens_per_image)
        forbidden = inside[:, None].repeat(1, scores.shape[1])
        forbidden[:, :words.free_inside] = False
        codes = words.tokens_per_image if self.original else words.n_codes
        next_code = needs_code[:, None].expand(-1, codes)
        if words.in_order:
            next_code = next_code & (torch.arange(codes, device=scores.device) == done[:, None])
            scores = scores.masked_fill(inside[:, None], 0.0)  # not trained, but certain: no cost for a beam
        forbidden[:, words.code_start:words.code_start + codes] = ~next_code
        if isinstance(words, SeedXVocabulary) and not self.original:
            forbidden[:, words.patches:words.patches + 2] = True
        too_few = inside if left is None else left < words.image_length
        forbidden[:, words.boi_id] = ~inside if words.begun_only else inside | too_few
        forbidden[:, words.eoi_id] = ~(inside & (done >= words.least_codes))
        forbidden[:, words.size:] = True  # padding rows of the output layer
        return scores.masked_fill(forbidden, float("-inf"))

    def span_state(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """`input_ids [B, n]` → whether each row ends inside an image `[B]`, and tokens since its `<img>` `[B]`."""
        rows, length = input_ids.shape
        before = torch.full((rows, 1), self.words.boi_id if self.opened else -1, device=input_ids.device)
        ids, places = torch.cat([before, input_ids], 1), torch.arange(length + 1, device=input_ids.device)
        opened, closed = (torch.where(ids == word, places, -1).amax(1) for word in (self.words.boi_id,
                                                                                    self.words.eoi_id))
        return opened > closed, length - opened


class SeededDraw:
    """The last logits processor of sampling: samples one token with its own generator, as transformers' `generate`
    after `torch.manual_seed(seed)`, and forbids all others."""

    def __init__(self, seed: int, settings: GenerationSettings, device: torch.device) -> None:
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self.generator = torch.Generator(device).manual_seed(seed)
        warpers = (TemperatureLogitsWarper(float(settings.temperature)) if settings.temperature != 1 else None,
                   TopKLogitsWarper(settings.top_k) if settings.top_k else None,
                   TopPLogitsWarper(float(settings.top_p)) if settings.top_p < 1 else None)
        self.warpers = list(filter(None, warpers))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores [1, V]` → 0 for the sampled token, -inf for the others."""
        narrowed = scores
        for warp in self.warpers:
            narrowed = warp(input_ids, narrowed)
        drawn = torch.multinomial(narrowed.softmax(-1), 1, generator=self.generator)
        return torch.full_like(scores, float("-inf")).scatter_(1, drawn, 0.0)


def embedded(prompt: Prompt, forced: list[int], embed: Any) -> Tensor:
    """Embeddings [L, D] of a prompt, with a forced `<img>` at the end."""
    words = [*(prompt.ids if prompt.embeds is None else ()), *forced]
    rows = embed(torch.tensor(words, dtype=torch.long, device=embed.weight.device))
    return rows if prompt.embeds is None else torch.cat([prompt.embeds.to(embed.weight), rows])


def new_token_budget(length: int, settings: GenerationSettings, llm: Any, words: ImageVocabulary) -> int:
    """Available new tokens; a forced image needs its codes and `</img>`."""
    context = int(llm.config.max_position_embeddings)
    if length >= context:
        raise GenerationError(f"The prompt has {length} tokens, but the model's context ends at {context}; make it "
                              f"shorter.")
    budget = min(settings.max_new_tokens, context - length)
    needed = words.least_codes + 1
    if settings.force_image and settings.constrain and budget < needed:
        raise GenerationError(f"An image needs {needed} new tokens, but only {budget} are left (max_new_tokens "
                              f"{settings.max_new_tokens}, context {context}).")
    return budget


def row_processors(settings: GenerationSettings, seed: int | None, end: list[int], device: torch.device) -> list[Any]:
    """The logits processors after the image constraints; with a `seed` the last one samples."""
    from transformers import MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

    processors: list[Any] = []
    if settings.min_new_tokens:
        processors.append(MinNewTokensLengthLogitsProcessor(0, settings.min_new_tokens, end, device=device))
    if settings.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    return [*processors, *([] if seed is None else [SeededDraw(seed, settings, device)])]


def check_finite(is_finite: bool) -> None:
    """Check scores for NaN, which would crash a CUDA process. Raises GenerationError."""
    if not is_finite:
        raise GenerationError("The language model's scores are not numbers: its weights may be damaged, or the "
                              "dtype too narrow (try --dtype float32).")
