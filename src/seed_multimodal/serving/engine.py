"""One model behind a lock: the only place where the server uses weights.

Flask answers in threads, and a model (its caches, its random state, its moves between devices) serves one
request at a time; `Engine.answer` holds one lock from the first picture read to the last drawn. A queue that batches
requests could replace that lock without changes outside this file.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from seed_multimodal.errors import RequestError
from seed_multimodal.images.encode import image_from_base64
from seed_multimodal.images.open import ImageLimits
from seed_multimodal.language.vocabulary import BOI, PLACEHOLDER
from seed_multimodal.serving.rendering import render_answer, render_original
from seed_multimodal.serving.schema import GenerateRequest, GenerateResponse, Limits

if TYPE_CHECKING:
    from torch import Tensor

    from seed_multimodal.language.prompts import PromptTemplate
    from seed_multimodal.language.tokenizer import MultimodalTokenizer
    from seed_multimodal.systems.seed_llama import SeedLlama


class Backend(Protocol):
    """Interface of a model for the engine; `SystemBackend` implements it with `SeedLlama`."""

    tokenizer: MultimodalTokenizer

    def transform(self, image: Image.Image) -> Tensor:
        """One picture -> float32 [3, S, S]."""
        ...

    def encode(self, pixels: Tensor) -> Sequence[Sequence[int]]:
        """[B, 3, S, S] -> B rows of codes."""
        ...

    def generate(self, prompt_ids: list[int], request: GenerateRequest) -> list[int]:
        """Prompt ids -> the new ids only."""
        ...

    def decode(self, codes: list[int], request: GenerateRequest) -> Image.Image:
        """The codes of one picture -> that picture, drawn from the request's seed."""
        ...

    def spans(self, text: str) -> list[str]:
        """A stretch of prompt text cut where the model was tuned to read separately encoded spans."""
        ...

    def forced_words(self, request: GenerateRequest) -> str:
        """The words that come before a forced picture, `""` when the model was not tuned with any."""
        ...


class SystemBackend:
    """`SeedLlama` as a backend."""

    def __init__(self, system: SeedLlama) -> None:
        self.system = system
        self.tokenizer = system.tokenizer

    def transform(self, image: Image.Image) -> Tensor:
        return self.system.transform(image)

    def encode(self, pixels: Tensor) -> Sequence[Sequence[int]]:
        return self.system.pictures.encode_once(pixels).tolist()  # clients send earlier turns again

    def generate(self, prompt_ids: list[int], request: GenerateRequest) -> list[int]:
        needed = self.tokenizer.vocabulary.tokens_per_image + 1 if request.force_boi else 1
        options: dict[str, Any] = {"num_beams": request.num_beams, "seed": request.seed,
                                   "max_new_tokens": max(request.max_new_tokens, needed)}
        if request.do_sample and request.top_p > 0:
            options.update(do_sample=True, temperature=request.temperature, top_p=request.top_p)
        else:  # temperature or top_p 0 mean the likeliest token
            options.update(do_sample=False)
        return self.system.generate(prompt_ids, self.system.settings(**options))

    def decode(self, codes: list[int], request: GenerateRequest) -> Image.Image:
        return self.system.reconstruct(codes, seed=request.seed or 0)[0]

    def spans(self, text: str) -> list[str]:
        return cut_at_turns(text, self.system.template)

    def forced_words(self, request: GenerateRequest) -> str:
        last_turn = request.text.rpartition(self.system.template.user_marker)[2]
        tasks = self.system.tasks
        return tasks.edit_response if PLACEHOLDER in last_turn else tasks.draw_response


class Engine:
    """Answers checked requests, one at a time.

    Args:
        exact_original: behave exactly as the released server: control tokens typed in the text take effect (`</s>`,
            `<img_00012>`), code lists of any length pass, answers are rendered by `render_original`.
    """

    def __init__(self, backend: Backend, *, limits: Limits | None = None, exact_original: bool = False) -> None:
        self.backend = backend
        self.limits = limits or Limits()
        self.exact_original = exact_original
        self.answered = 0
        self._lock = threading.Lock()
        self._started = time.monotonic()

    def health(self) -> dict[str, object]:
        """Answer of `GET /health`; never waits for the model."""
        return {"status": "ok", "busy": self._lock.locked(), "answered": self.answered,
                "seconds_up": round(time.monotonic() - self._started, 1),
                "codes": self.backend.tokenizer.vocabulary.n_codes,
                "tokens_per_image": self.backend.tokenizer.vocabulary.tokens_per_image}

    def answer(self, request: GenerateRequest) -> GenerateResponse:
        """Read the pictures, generate, draw.

        Raises:
            ImageError: a picture that cannot be read; RequestError: code lists that are no picture.
        """
        pictures = self._open(request)  # before the lock: reading a bad file must not block the model
        with self._lock:
            codes = self._codes(request, pictures)
            prompt, opening = self._prompt(request, codes)
            new_ids = opening + list(self.backend.generate(prompt, request))
            render = render_original if self.exact_original else render_answer
            response = render(new_ids, self.backend.tokenizer, partial(self.backend.decode, request=request))
            self.answered += 1
        response.images_ids = codes + response.images_ids
        return response

    def _open(self, request: GenerateRequest) -> dict[int, Image.Image]:
        """Pictures by their position in the request; code lists are checked against the vocabulary."""
        limits = ImageLimits(max_bytes=self.limits.max_image_bytes, max_pixels=self.limits.max_image_pixels)
        vocabulary = self.backend.tokenizer.vocabulary
        pictures: dict[int, Image.Image] = {}
        for number, item in enumerate(request.images):
            if isinstance(item, str):
                pictures[number] = image_from_base64(item, name=f"images[{number}]", limits=limits)
            elif not self.exact_original:
                if len(item) != vocabulary.tokens_per_image:
                    raise RequestError(f"images[{number}] has {len(item)} codes; a picture has "
                                       f"{vocabulary.tokens_per_image}.")
                wrong = [code for code in item if not 0 <= code < vocabulary.n_codes]
                if wrong:
                    raise RequestError(f"images[{number}] holds code {wrong[0]}; codes lie between 0 and "
                                       f"{vocabulary.n_codes - 1}.")
        return pictures

    def _codes(self, request: GenerateRequest, pictures: dict[int, Image.Image]) -> list[list[int]]:
        """Codes of every picture of the request, in order; new pictures are encoded in one batch."""
        rows: Iterator[list[int]] = iter(())
        if pictures:
            import torch

            pixels = torch.stack([self.backend.transform(picture) for picture in pictures.values()])
            rows = iter([[int(code) for code in row] for row in self.backend.encode(pixels)])
        codes = [next(rows) if isinstance(item, str) else list(item) for item in request.images]
        lengths = {len(row) for row in codes}
        if len(lengths) > 1:
            raise RequestError(f"The pictures of one request have code lists of different lengths {sorted(lengths)}.")
        return codes

    def _prompt(self, request: GenerateRequest, codes: list[list[int]]) -> tuple[list[int], list[int]]:
        """Prompt ids, and their end that already belongs to the answer (a forced `<img>` and the words before it)."""
        tokenizer = self.backend.tokenizer
        spans = request.text_spans
        forced = [tokenizer.vocabulary.boi_id] if request.force_boi else []
        if self.exact_original:
            text = spans[0] + "".join(tokenizer.vocabulary.image_text(row) + span
                                      for row, span in zip(codes, spans[1:], strict=True))
            return tokenizer.encode(text + (BOI if forced else ""), add_bos=True), forced
        if forced:
            spans[-1] = spans[-1].rstrip()  # as next to every image token
            words = self.backend.forced_words(request)
            forced = [*(tokenizer.encode_parts([words]) if words else []), *forced]
        parts: list[str | list[int]] = [*self.backend.spans(spans[0])]
        for row, span in zip(codes, spans[1:], strict=True):
            parts += [row, *self.backend.spans(span)]
        return [*tokenizer.encode_parts([part for part in parts if part], add_bos=True), *forced], forced


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
