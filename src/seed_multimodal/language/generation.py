"""Generation with well-formed pictures: after `<img>` exactly 32 codes, then `</img>`; no image word anywhere else.

SEED-X's 64 image words come one after the other, always the same: of its pictures only the model's states count
(`ImageStates`), and prompts are given as embeddings. Note: its released processor sets forbidden words to 0 instead of
-inf, so that they win where all scores are negative (always with beams).

The released programs do not ensure this; here a logits processor enforces it (`constrain=False` switches it off, then
the ids are those of a plain `model.generate`). It reads its state from the ids themselves, so it needs no memory of its
own and works in batches, with beams, and after a prompt that ends in `<img>`. A picture is only begun when the token
budget reaches to its end.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seed_multimodal.errors import GenerationError, first_line
from seed_multimodal.language.padding import padded_left
from seed_multimodal.language.sampling import DrawnBeams, DrawnTokens, Draws, FiniteScores, own_seed
from seed_multimodal.language.vocabulary import ImageVocabulary, SeedXVocabulary
from seed_multimodal.settings import SEEDS, check_settings, setting

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from seed_multimodal.language.tokenizer import MultimodalTokenizer


# Below it the likeliest token is certain (scores differ by more than 0.0001 of it), and above scores do not overflow.
COLDEST, HOTTEST = 1e-5, 1e5


@dataclass(frozen=True)
class GenerationSettings:
    """How to generate; the defaults are those of the released scripts, except that spans are kept well-formed.

    `temperature` 0 (or below `COLDEST`) and `top_p` 0 mean greedy: the likeliest token each time. Tokens are drawn from
    generators of the call's own (`sampling`); `seed` None takes one number from torch's global generator as the seed.
    `force_image` puts `<img>` at the end of every prompt and returns it as part of the answer.
    """

    max_new_tokens: int = setting(512, least=1)
    temperature: float = setting(1.0, least=0, most=HOTTEST)
    top_p: float = setting(0.5, least=0, most=1)
    top_k: int = setting(50, least=0)  # 0: off
    num_beams: int = setting(1, least=1, most=1000)
    do_sample: bool = True
    seed: int | None = setting(None, **SEEDS)
    force_image: bool = False
    constrain: bool = True

    def __post_init__(self) -> None:
        check_settings(self, "Generation setting")

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn (temperature 0 or top_p 0 turns drawing off)."""
        return self.do_sample and self.temperature >= COLDEST and self.top_p > 0

    def with_seed(self) -> GenerationSettings:
        """With a seed of its own where none was given."""
        return self if self.seed is not None or not self.samples else replace(self, seed=own_seed())


class ImageSpanLogitsProcessor:
    """Forbids every next token that would break a picture; a transformers logits processor by its call signature.

    Args:
        vocabulary: ids of the image words.
        max_length: length of prompt and answer together; `<img>` is forbidden where `</img>` would not fit any more.
        released: of SEED-X's image words forbid only those that the released code does: other words that its answers
            never hold (`<patch>`, unused image words) stay possible.
    """

    def __init__(self, vocabulary: ImageVocabulary, max_length: int | None = None, released: bool = False) -> None:
        self.vocabulary = vocabulary
        self.max_length = max_length
        self.released = released

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`input_ids [B, L]`, `scores [B, V]` -> scores with forbidden tokens at -inf."""
        words = self.vocabulary
        inside, done = self.span_state(input_ids)
        needs_code = inside & (done < words.tokens_per_image)
        needs_end = inside & (done >= words.tokens_per_image)
        forbidden = inside[:, None].repeat(1, scores.shape[1])
        codes = words.tokens_per_image if self.released else words.n_codes
        next_code = needs_code[:, None].expand(-1, codes)
        if words.in_order:
            next_code = next_code & (torch.arange(codes, device=scores.device) == done[:, None])
            scores = scores.masked_fill(inside[:, None], 0.0)  # never learned, but certain: costs a beam nothing
        forbidden[:, words.code_start:words.code_start + codes] = ~next_code
        if isinstance(words, SeedXVocabulary) and not self.released:
            forbidden[:, words.patches:words.patches + 2] = True
        forbidden[:, words.boi_id] = inside | (not self._room_for_image(input_ids.shape[1]))
        forbidden[:, words.eoi_id] = ~needs_end
        forbidden[:, words.size:] = True  # padding rows of a larger output layer
        return scores.masked_fill(forbidden, float("-inf"))

    def _room_for_image(self, length: int) -> bool:
        return self.max_length is None or self.max_length - length >= self.vocabulary.image_length

    def span_state(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """`input_ids [B, L]` -> whether each row ends inside a picture `[B]`, and words since its `<img>` `[B]`."""
        words = self.vocabulary
        if words.in_order:  # the last word says it
            last = input_ids[:, -1]
            code = last - words.code_start
            opened = last == words.boi_id
            return opened | ((code >= 0) & (code < words.tokens_per_image)), torch.where(opened, 0, code + 1)
        places = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        last_open = ((input_ids == words.boi_id) * places).amax(dim=1)
        last_close = ((input_ids == words.eoi_id) * places).amax(dim=1)
        return last_open > last_close, input_ids.shape[1] - last_open


class ImageStates:
    """The language model's last states (after its final norm) at the words of its answers, kept while it generates.

    Use: give it to `generate_ids`, then `at(row, places)`. With beams it follows the chosen one.

    Args:
        opening: so many words at the prompts' end count as the answers' first, beside a forced `<img>`.
    """

    def __init__(self, opening: int = 0) -> None:
        self._opening = opening
        self._steps: list[Tensor] = []  # of each pass the state at its last token, [rows, D]
        self._rows: Tensor | None = None  # with beams: the row of each pass that led to each answer's tokens
        self._forced = 0

    @contextlib.contextmanager
    def listening(self, model: Any, forced: int) -> Iterator[None]:
        """Inside, every pass of `model` is followed; `forced`: how many of the answer's words the prompts end in."""
        self._steps, self._forced = [], forced + self._opening

        def keep(module: Any, arguments: Any, output: Any) -> None:
            self._steps.append(output.last_hidden_state[:, -1].clone())

        handle = model.get_decoder().register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def choose(self, rows: Tensor | None) -> None:
        """`rows [B, answer]`: transformers' `beam_indices`; None without beams."""
        self._rows = rows

    def at(self, row: int, places: Sequence[int]) -> Tensor:
        """States `[len(places), D]` at words of answer `row` (that of word n is computed when word n + 1 is chosen).

        Raises:
            GenerationError: a word that nothing follows.
        """
        steps = [place - self._forced + 1 for place in places]
        if steps and not 0 <= min(steps) <= max(steps) < len(self._steps):
            raise GenerationError("The answer ends inside a picture, so there is no state at its last word.")
        chosen = [row if self._rows is None else int(self._rows[row, step]) for step in steps]
        return torch.stack([self._steps[step][number] for step, number in zip(steps, chosen, strict=True)])


@torch.inference_mode()
def generate_ids(
    model: LlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    tokenizer: MultimodalTokenizer,
    streamer: Any = None,
    watch: Callable[[], None] | None = None,
    *,
    embed: Callable[[Tensor], Tensor] | None = None,
    states: ImageStates | None = None,
    released: bool = False,
    seeds: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue every prompt.

    Args:
        prompts: token ids with their `<s>`; of different lengths (padded on the left, masked).
        streamer: a transformers streamer (`put`, `end`), for a single prompt without beams.
        watch: called before each token; what it raises ends the generation and is raised here.
        embed: the prompts' ids `[B, L]`, padded on the left -> what the model reads in their place `[B, L, D]`.
        states: gets the model's states at the answers' words.
        released: keep to the released rules of `ImageSpanLogitsProcessor`, and begin pictures without room for them.
        seeds: one for each prompt; None: `settings.seed` for all.

    Returns:
        The new ids of each prompt up to and including `</s>`; a forced `<img>` comes first. The budget is cut to what
        the model's context has room for. With a seed, each prompt gets what it would get alone.

    Raises:
        GenerationError: a prompt too long for the model, no room for a forced picture, or scores that are not numbers.
        CheckpointError: weights that are not numbers.
    """
    vocabulary = tokenizer.vocabulary
    forced = [vocabulary.boi_id] if settings.force_image else []
    try:
        rows = [[*map(operator.index, prompt), *forced] for prompt in prompts]
    except TypeError as error:
        raise GenerationError(f"Prompts are lists of token ids ({first_line(error)}).") from error
    if not rows:
        return []
    check_ids(rows, vocabulary)
    longest = max(len(row) for row in rows)
    budget = _budget(longest, settings, model, vocabulary)
    ids, mask = padded_left(rows, tokenizer.pad_id)
    device = model.get_input_embeddings().weight.device
    ids, mask = ids.to(device), mask.to(device)
    processors: list[Any] = [FiniteScores(model)]
    if watch is not None:
        processors.append(Watched(watch))
    if settings.constrain:
        processors.append(ImageSpanLogitsProcessor(vocabulary, None if released else longest + budget, released))
    with contextlib.ExitStack() as inside:
        if settings.samples:
            draws = Draws(list(seeds) if seeds is not None else
                          [own_seed() if settings.seed is None else settings.seed for _ in rows])
            if settings.num_beams > 1:
                inside.enter_context(DrawnBeams(draws))
            else:
                processors.append(DrawnTokens(draws, settings.temperature, settings.top_k, settings.top_p))
        if states is not None:
            inside.enter_context(states.listening(model, len(forced)))
        given = {} if embed is None else {"inputs_embeds": embed(ids)}
        output = model.generate(
            ids, attention_mask=mask, streamer=streamer, logits_processor=processors,
            generation_config=_config(settings, budget, tokenizer), **given)
    if states is not None:
        states.choose(getattr(output, "beam_indices", None))
    return [forced + until_end(row, tokenizer.eos_id) for row in output.sequences[:, longest:].tolist()]


def _config(settings: GenerationSettings, budget: int, tokenizer: MultimodalTokenizer) -> Any:
    """The call's settings; the model's own configuration holds nothing that could fill the rest (`llama`)."""
    from transformers import GenerationConfig

    # Without beams the last logits processor draws the token, and `generate` takes the only one that is left.
    samples = settings.samples and settings.num_beams > 1
    drawing = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
    return GenerationConfig(
        max_new_tokens=budget, num_beams=settings.num_beams, do_sample=samples, use_cache=True,
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id,
        repetition_penalty=1.0, length_penalty=1.0, early_stopping=False, num_return_sequences=1,
        return_dict_in_generate=True,
        **(drawing if samples else {"temperature": 1.0, "top_p": 1.0, "top_k": 50}))


def check_ids(rows: Sequence[Sequence[int]], vocabulary: ImageVocabulary) -> None:
    """Refuse prompts without ids, or with ids that are no word (GenerationError)."""
    for number, row in enumerate(rows):
        if not row:
            raise GenerationError(f"Prompt {number} is empty.")
        if min(row) < 0 or max(row) >= vocabulary.size:
            raise GenerationError(f"Prompt {number} holds an id outside the vocabulary of {vocabulary.size} words.")


def _budget(length: int, settings: GenerationSettings, model: Any, vocabulary: ImageVocabulary) -> int:
    """New tokens there is room for; a forced picture needs its codes and `</img>`."""
    budget = min(settings.max_new_tokens, room_for_answer(length, model))
    if settings.force_image and settings.constrain and budget < vocabulary.tokens_per_image + 1:
        raise GenerationError(f"A picture needs {vocabulary.tokens_per_image + 1} new tokens, but only {budget} are "
                              f"left (max_new_tokens {settings.max_new_tokens}, context "
                              f"{model.config.max_position_embeddings}).")
    return budget


def room_for_answer(length: int, model: Any, unread: int = 0) -> int:
    """Tokens that fit behind a prompt of `length`; of `unread` pictures it counts one token, as they were not read yet.

    Raises:
        GenerationError: none.
    """
    context = int(model.config.max_position_embeddings)
    if length >= context:
        raise GenerationError(f"The prompt has {'at least ' * (unread > 0)}{length} tokens, but the model's context "
                              f"ends at {context}; make it shorter.")
    return context - length


class Watched:
    """A logits processor that leaves the scores alone and calls `watch`, once for each token of all beams."""

    def __init__(self, watch: Callable[[], None]) -> None:
        self._watch = watch

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._watch()
        return scores


def until_end(ids: list[int], eos_id: int) -> list[int]:
    """What was written up to and including the end word."""
    return ids[:ids.index(eos_id) + 1] if eos_id in ids else ids
