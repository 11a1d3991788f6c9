"""Models whose pictures are codes: prompts from one text and rows of codes, `SeedLlama` as a backend."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from seed_multimodal.errors import RequestError
from seed_multimodal.images.io import DETAIL
from seed_multimodal.language.answer import ImagePart
from seed_multimodal.language.generation import room_for_answer
from seed_multimodal.language.vocabulary import BOI, PLACEHOLDER
from seed_multimodal.serving.backend import Asked, Size, SystemBackend, WordsBackend
from seed_multimodal.serving.schema import GenerateRequest, shown

if TYPE_CHECKING:
    from torch import Tensor

    from seed_multimodal.language.prompts import PromptTemplate


class CodesBackend(WordsBackend):
    """What all such models share; the methods that raise NotImplementedError are a model's own."""

    def transform(self, image: Image.Image) -> Tensor:
        """One picture -> float32 [3, S, S]."""
        raise NotImplementedError

    def encode(self, pixels: Tensor) -> Sequence[Sequence[int]]:
        """[B, 3, S, S] -> B rows of codes."""
        raise NotImplementedError

    def decode(self, codes: list[int], request: GenerateRequest) -> Image.Image:
        """The codes of one picture -> that picture, drawn from the request's seed."""
        raise NotImplementedError

    def spans(self, text: str) -> list[str]:
        """A stretch of prompt text cut where the model was tuned to read separately encoded spans."""
        return [text]

    def forced_words(self, request: GenerateRequest) -> str:
        """The words that come before a forced picture, `""` when the model was not tuned with any."""
        return ""

    def check_prompt(self, length: int) -> None:
        """Refuse a prompt that leaves no room for an answer."""

    def notes(self, request: GenerateRequest, pictures: Sequence[Tensor]) -> list[str]:
        """Sentences about the request that are reported beside the answer."""
        return []

    def check(self, request: GenerateRequest, sizes: Sequence[Size | None], exact_original: bool) -> None:
        """See `Backend`; pictures have the same length whatever they show."""
        if not exact_original:
            self._check_codes(request)
        some = [0] * self.tokenizer.vocabulary.tokens_per_image
        rows = [item if isinstance(item, list) else some for item in request.images]
        if exact_original and len({*map(len, rows)}) > 1:
            raise RequestError(f"The pictures have {' and '.join(map(str, sorted({*map(len, rows)})))} codes; the "
                               f"released server takes lists of one length.")
        self.check_prompt(sum(map(len, rows)))  # quickly, before a very long one is made
        self.check_prompt(len(self._prompt(request, rows, exact_original)[0]))

    def ask(self, request: GenerateRequest, pictures: Sequence[Tensor], exact_original: bool) -> Asked:
        """See `Backend`; new pictures are encoded in one batch."""
        rows: Iterator[list[int]] = iter(())
        if pictures:
            import torch

            rows = iter([[int(code) for code in row] for row in self.encode(torch.stack(list(pictures)))])
        codes = [list(item) if isinstance(item, list) else next(rows) for item in request.images]
        prompt, opening = self._prompt(request, codes, exact_original)
        left_out = [] if exact_original else left_out_notes(codes, self.tokenizer.vocabulary.tokens_per_image)
        return Asked(prompt, opening, [*codes], notes=[*left_out, *self.notes(request, pictures)])

    def draw(self, asked: Asked, part: ImagePart, request: GenerateRequest) -> Image.Image:
        return self.decode(list(part.codes), request)

    def _check_codes(self, request: GenerateRequest) -> None:
        vocabulary = self.tokenizer.vocabulary
        for number, item in enumerate(request.images):
            if not isinstance(item, list):
                continue
            if len(item) > vocabulary.tokens_per_image:
                raise RequestError(f"images[{number}] has {len(item)} codes; a picture has "
                                   f"{vocabulary.tokens_per_image}.")
            wrong = [code for code in item if not 0 <= code < vocabulary.n_codes]
            if wrong:
                raise RequestError(f"images[{number}] holds code {shown(wrong[0])}; codes lie between 0 and "
                                   f"{vocabulary.n_codes - 1}.")

    def _prompt(self, request: GenerateRequest, codes: list[list[int]],
                exact_original: bool) -> tuple[list[int], list[int]]:
        """Prompt ids, and their end that already belongs to the answer (a forced `<img>` and the words before it)."""
        tokenizer = self.tokenizer
        spans = request.text_spans
        forced = [tokenizer.vocabulary.boi_id] if request.force_boi else []
        if exact_original:
            text = spans[0] + "".join(tokenizer.vocabulary.image_text(row) + span
                                      for row, span in zip(codes, spans[1:], strict=True))
            return tokenizer.encode(text + (BOI if forced else ""), add_bos=True), forced
        if forced:
            spans[-1] = spans[-1].rstrip()  # as next to every image token
            words = self.forced_words(request)
            forced = [*(tokenizer.encode_parts([words]) if words else []), *forced]
        parts: list[str | list[int]] = [*self.spans(spans[0])]
        whole = tokenizer.vocabulary.tokens_per_image
        for row, span in zip(codes, spans[1:], strict=True):
            parts += [row if len(row) == whole else [], *self.spans(span)]
        return [*tokenizer.encode_parts([part for part in parts if part], add_bos=True), *forced], forced


class CodesSystem(SystemBackend, CodesBackend):
    """`SeedLlama` as a backend."""

    def transform(self, image: Image.Image) -> Tensor:
        pixels: Tensor = self.system.transform(image)
        return pixels

    def encode(self, pixels: Tensor) -> Sequence[Sequence[int]]:
        codes: list[list[int]] = self.system.pictures.encode_once(pixels).tolist()  # clients send earlier turns again
        return codes

    @property
    def at_least(self) -> int:
        """See `Backend`."""
        return DETAIL * int(self.system.spec.image_size)

    def check_prompt(self, length: int) -> None:
        room_for_answer(length, self.system.llm)

    def decode(self, codes: list[int], request: GenerateRequest) -> Image.Image:
        drawn: Image.Image = self.system.reconstruct(codes, seed=request.seed or 0)[0]
        return drawn

    def spans(self, text: str) -> list[str]:
        return cut_at_turns(text, self.system.template)

    def forced_words(self, request: GenerateRequest) -> str:
        words: str = self.system.forced_opening(PLACEHOLDER in request.text)
        return words

    def notes(self, request: GenerateRequest, pictures: Sequence[Tensor]) -> list[str]:
        """About words and pictures that are unlike those of the training."""
        template = self.system.template
        said = request.text.rpartition(template.user_marker)[2]
        ending = template.user_suffix.strip()  # the answer's role is no word of the message
        words = self.system.note([said.partition(ending)[0] if ending else said])
        return [note for note in (words, self.system.pictures.note(pictures)) if note]


def left_out_notes(codes: Sequence[Any], whole: int) -> list[str]:
    """A sentence for each picture of earlier answers that broke off, as they end when the tokens are used up."""
    return [f"images[{number}] broke off after {len(row)} of {whole} codes and was left out."
            for number, row in enumerate(codes) if isinstance(row, list) and len(row) < whole]


def cut_at_turns(text: str, template: PromptTemplate) -> list[str]:
    """Prompt text as its turns were encoded in tuning: a question up to where the answer begins, an answer, and so on.

    One long string would put answers and the markers around them into one span, which the models never saw. Blanks
    that clients leave in front of an answer are dropped.
    """
    marker = template.separator + template.user_marker
    if not template.user_prefix:
        return [text]
    spans = re.split(f"(?<={re.escape(template.user_suffix)})|(?={re.escape(marker)})", text)
    return [spans[0], *(span if span.startswith(marker) else span.lstrip(" ") for span in spans[1:])]
