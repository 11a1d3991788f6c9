"""Choice of the next tokens of running answers (`Sampler`), and ends of answers at texts."""

from __future__ import annotations

import copy
import functools
from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from seed_multimodal.errors import GenerationError
from seed_multimodal.inference.prompt import GenerationSettings
from seed_multimodal.language.answer import AnswerReader
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.language.vocabulary import ImageGrammar
from seed_multimodal.progress import import_library

if TYPE_CHECKING:
    from seed_multimodal.inference.base_engine import GeneratedSequence

LOGITS_PROCESSORS = "transformers.generation.logits_process"
DAMAGED = (
    "The language model's scores are not numbers: its weights may be damaged, or the dtype too "
    "narrow (try --dtype float32)."
)


NO_IDS = torch.zeros(0, dtype=torch.long, device="cpu")  # of processors that read none


class LogitsProcessor(Protocol):
    """Changes the scores `[B, V]` of the tokens after `input_ids` `[B, n]`, as in transformers."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor: ...


# ---- images


# Masks `[V]` of what breaks an image, by all that they depend on: few, and slow to make.
_forbidden: dict[Hashable, Tensor] = {}


class ImageConstraints:
    """Forbids tokens which would break an image; a logits processor of transformers' `generate`.

    starts: where the answer to each prompt of `generate` begins; rows of one are neighbours.
    """

    def __init__(self, starts: Sequence[ImageGrammar] = ()) -> None:
        self._starts = starts
        # Of the last call's rows, by their prompt and ids: beams change their order.
        self._grammars: dict[tuple[int, ...], ImageGrammar] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Generated ids `[B, n]`, scores `[B, V]` → scores with forbidden tokens at -inf."""
        last_grammars = self._grammars
        self._grammars = {}
        grammars: list[ImageGrammar] = []
        for row, ids in enumerate(input_ids.tolist()):
            prompt = row * len(self._starts) // len(input_ids)
            parent = last_grammars.get((prompt, *ids[:-1]))
            grammar = copy.copy(parent or self._starts[prompt])
            new_ids = ids[-1:] if parent else ids
            for id in new_ids:
                grammar.feed(id)
            self._grammars[prompt, *ids] = grammar
            grammars.append(grammar)
        return self.masked(grammars, scores)

    def masked(self, grammars: Sequence[ImageGrammar], scores: Tensor) -> Tensor:
        """Scores `[B, V]` of what follows in each of `grammars`."""
        # 1. An answer without images ends as likely as it would with one.
        vocabulary = grammars[0].vocabulary
        states = [grammar.state for grammar in grammars]
        rows = [row for row, state in enumerate(states) if state[2]]
        if rows:
            ends = [grammars[row].end_id for row in rows]
            scores = scores.clone()
            pairs = torch.stack([scores[rows, ends], scores[rows, vocabulary.boi_id]])
            scores[rows, ends] = torch.where(pairs[0].isfinite(), pairs.logsumexp(0), pairs[0])

        # 2. Tokens in a fixed order are certain, but not trained: they must not cost a beam
        #    anything.
        if vocabulary.fixed_image_order:
            in_image = [state[0] is not None for state in states]
            scores = scores.masked_fill(scores.new_tensor(in_image)[:, None] > 0, 0)

        # 3. What breaks an image; padding of the output layer.
        masks: list[Tensor] = []
        for state, grammar in zip(states, grammars, strict=True):
            key = (vocabulary, grammar.original, state, len(scores[0]), scores.device)
            if key not in _forbidden:
                n_rows = len(scores[0])  # a head may have fewer than the vocabulary
                allowed = [id for id in grammar.candidates() if id < n_rows and grammar.allows(id)]
                mask = torch.ones_like(scores[0], dtype=torch.bool)
                mask[allowed] = False
                _forbidden[key] = mask
            masks.append(_forbidden[key])
        return scores.masked_fill(torch.stack(masks), float("-inf"))


# ---- the choice


@functools.lru_cache(maxsize=64)
def build_warpers(temperature: float, top_k: int, top_p: float) -> list[LogitsProcessor]:
    """Processors that narrow a distribution before sampling, in transformers' order."""
    library = import_library(LOGITS_PROCESSORS)
    warpers: list[LogitsProcessor] = []
    if temperature != 1:
        warpers.append(library.TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warpers.append(library.TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(library.TopPLogitsWarper(float(top_p)))
    return warpers


def refuse_damaged(input_ids: Tensor, scores: Tensor) -> Tensor:
    """The logits processor that raises GenerationError where a row's scores are not numbers."""
    if not bool(scores.amax(dim=-1).isfinite().all()):
        raise GenerationError(DAMAGED)
    return scores


def guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance on scores `[B, V]`, as in transformers."""
    conditional = conditional.log_softmax(dim=-1)
    unconditional = unconditional.log_softmax(dim=-1)
    return guidance * (conditional - unconditional) + unconditional


class ChosenToken(NamedTuple):
    """The next token of a sequence.

    log_prob: natural logarithm of its probability.
    is_sound: whether the scores are numbers.
    """

    id: int
    log_prob: float
    is_likeliest: bool
    is_sound: bool


class Sampler:
    """Chooses the next tokens of sequences in a batch, each as it would be chosen alone."""

    def __init__(self) -> None:
        self._constraints = ImageConstraints()

    def distributions(self, sequences: Sequence[GeneratedSequence], scores: Tensor) -> Tensor:
        """Scores `[B, V]` from which the next tokens are chosen, by the model's scores.

        sequences: with the same `sampling_key`.
        """
        first = sequences[0]
        settings = first.settings
        if settings.constrain:
            grammars = [sequence.grammar for sequence in sequences]
            scores = self._constraints.masked(grammars, scores)
        rows: list[int] = []
        ends: list[int] = []
        for row, sequence in enumerate(sequences):
            if len(sequence.ids) < sequence.settings.min_new_tokens:
                rows += [row] * len(sequence.end_ids)
                ends += sequence.end_ids
        if rows:
            scores = scores.clone()
            scores[rows, ends] = float("-inf")
        if settings.repetition_penalty != 1:
            scores = _penalised(scores, sequences, settings.repetition_penalty)
        if first.generator is not None:
            warpers = build_warpers(settings.temperature, settings.top_k, settings.top_p)
            for warp in warpers:
                scores = warp(NO_IDS, scores)
        return scores

    def choose(self, sequences: Sequence[GeneratedSequence]) -> Iterator[ChosenToken]:
        """The next token of each sequence by the scores in its rows; `sequences`: as above."""
        # 1. The scores `[B, V]`; NaN is passed on by guidance, which reads two rows.
        first = sequences[0]
        settings = first.settings
        scores = torch.stack([sequence.rows[0].scores for sequence in sequences])
        if settings.guidance != 1:
            unconditional = torch.stack([sequence.rows[1].scores for sequence in sequences])
            scores = guided(scores, unconditional, settings.guidance)
        is_sound = scores.amax(dim=-1).isfinite()

        scores = self.distributions(sequences, scores)

        # 2. The tokens `[B]`. Each row draws its own random numbers, those of `torch.multinomial`,
        #    whose sample is the largest quotient of a probability and an exponential number.
        likeliest = scores.argmax(dim=-1)
        tokens = likeliest
        if first.request.forced_ids:
            forced = [sequence.request.forced_ids[len(sequence.ids)] for sequence in sequences]
            tokens = likeliest.new_tensor(forced)
        elif first.generator is not None:
            probabilities = scores.softmax(dim=-1)
            noise = torch.empty_like(probabilities)
            for row_noise, sequence in zip(noise, sequences, strict=True):
                row_noise.exponential_(generator=sequence.generator)
            tokens = (probabilities / noise).argmax(dim=-1)

        # 3. What is known of them, in one transfer from the device; float32 holds all ids exactly.
        log_probs = scores.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
        columns = torch.stack([tokens, log_probs, tokens == likeliest, is_sound])
        for token, log_prob, is_likeliest, sound in columns.T.tolist():
            yield ChosenToken(int(token), log_prob, bool(is_likeliest), bool(sound))


def _penalised(scores: Tensor, sequences: Sequence[GeneratedSequence], penalty: float) -> Tensor:
    """Scores `[B, V]` with a penalty of the tokens that each answer has, as in transformers."""
    is_repeated = torch.zeros_like(scores, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        is_repeated[row, sequence.ids] = True
    penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(is_repeated, penalised, scores)


# ---- answers


def read_answer(
    tokenizer: TextTokenizer, ids: Sequence[int], settings: GenerationSettings
) -> AnswerReader:
    """The reader of a complete answer, which ends at the stops of `settings`."""
    reader = AnswerReader(
        tokenizer,
        settings.stop,
        stop_after=settings.stop_after,
        answer_after=settings.answer_after,
    )
    return reader.read_all(ids)
