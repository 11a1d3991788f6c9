"""One model, and the line of requests in front of it: the only place where the server uses weights.

A request passes, in this order: the count of those that wait (429 when it is full), a place for its body, the checks of
every limit and of the prompt's length, the headers of its pictures, a place for decoding each of them (they are reduced
and turned into the model's pixels at once), and the model, one request at a time. Nobody holds the model while reading
or decoding; whoever has left is dropped in each line and between two tokens of an answer.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import IO, TYPE_CHECKING

from PIL import Image

from seed_multimodal.errors import RequestError, SeedError
from seed_multimodal.images.encode import bytes_from_base64
from seed_multimodal.images.open import DETAIL, ImageLimits, image_header, open_image
from seed_multimodal.language.vocabulary import BOI
from seed_multimodal.serving.backend import Backend
from seed_multimodal.serving.body import read_body
from seed_multimodal.serving.gate import Gate, Vanished
from seed_multimodal.serving.rendering import render_answer, render_original
from seed_multimodal.serving.schema import GenerateRequest, GenerateResponse, Limits, Preview, parse_request, shown

if TYPE_CHECKING:
    from torch import Tensor


DECODERS = 2  # threads that decode pictures at once
BYTES_PER_PIXEL = 4.5  # of memory for decoding, per pixel of the limits: Pillow's four, and a reduced copy
PARSING_BYTES = 8 << 20  # what a body needs beside its pictures
BODIES_BYTES = 32 << 20  # of bodies that are parsed and decoded at once; a longer one is alone


class Busy(SeedError):
    """As many requests wait as may; `seconds`: after which it makes sense to ask again."""

    def __init__(self, waiting: int, seconds: int) -> None:
        self.seconds = seconds
        super().__init__(f"The model is busy and {waiting} requests wait already; try again in {seconds} seconds.")


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
        self.stopping = threading.Event()  # set: everybody who waits is sent away
        self._model = Gate(1)
        self._bodies = Gate(BODIES_BYTES)
        self._decoding = Gate(int(self.limits.max_decoding_pixels * BYTES_PER_PIXEL))
        self._files = ImageLimits(
            max_bytes=self.limits.max_image_bytes, max_pixels=self.limits.max_image_pixels,
            max_memory=self._decoding.capacity)
        self._detail = DETAIL * int(getattr(backend, "image_size", 448))
        self._admitted = 0
        self._counting = threading.Lock()
        self._seconds = 1.0  # of one answer, on average
        self._started = time.monotonic()

    def health(self) -> dict[str, object]:
        """Answer of `GET /health`; never waits for the model."""
        busy = self._model.inside > 0
        return {"status": "ok", "busy": busy, "waiting": max(0, self._admitted - busy), "answered": self.answered,
                "seconds_up": round(time.monotonic() - self._started, 1),
                "codes": self.backend.tokenizer.vocabulary.n_codes,
                "tokens_per_image": self.backend.tokenizer.vocabulary.tokens_per_image}

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Be counted as one of those who wait or are answered.

        Raises:
            Busy: `max_waiting` wait already.
        """
        with self._counting:
            if self._admitted > self.limits.max_waiting:  # one of them is being answered
                seconds = math.ceil(self._seconds * self._admitted)
                raise Busy(self.limits.max_waiting, min(max(seconds, 1), 600))
            self._admitted += 1
        try:
            yield
        finally:
            with self._counting:
                self._admitted -= 1

    def handle(self, stream: IO[bytes], length: int,
               gone: Callable[[], bool] = lambda: False) -> Iterator[Preview | GenerateResponse]:
        """Answer the JSON body in `stream`: last the answer, before it previews of its pictures if they are asked for.

        Args:
            length: bytes of the body, as its header says.
            gone: whether the client has left; asked in each line and before each token.

        Raises:
            Busy, `gate.Vanished`; RequestError: a body, and what `answer` raises.
        """
        def left() -> bool:
            return self.stopping.is_set() or gone()

        with self.admitted():
            with self._bodies.hold(length + PARSING_BYTES, left):
                request = parse_request(read_body(stream, self.limits), self.limits, left)
                pixels = self._read_pictures(request)
            yield from self._answer(request, pixels)

    def answer(self, request: GenerateRequest) -> Iterator[Preview | GenerateResponse]:
        """Read the pictures, generate, draw; what it gives: see `handle`.

        Raises:
            ImageError: a picture that cannot be read; RequestError: code lists that are no picture, pictures with too
                many pixels; GenerationError: a prompt too long for the model.
        """
        yield from self._answer(request, self._read_pictures(request))

    def _answer(self, request: GenerateRequest, pixels: list[Tensor]) -> Iterator[Preview | GenerateResponse]:
        with self._model.hold(gone=request.gone):
            began = time.monotonic()
            codes = self._codes(request, pixels)
            prompt, opening = self._prompt(request, codes)
            new_ids = yield from self._generate(prompt, opening, request)
            render = render_original if self.exact_original else render_answer
            response = render(new_ids, self.backend.tokenizer, partial(self._draw, request=request))
            self.answered += 1
            self._seconds += 0.2 * (time.monotonic() - began - self._seconds)
        response.images_ids = codes + response.images_ids
        note = getattr(self.backend, "note", None)
        response.error_msg += filter(None, [*self._left_out(codes), note(request) if note else ""])
        yield response

    def _generate(self, prompt: list[int], opening: list[int],
                  request: GenerateRequest) -> Generator[Preview, None, list[int]]:
        """The ids of the answer, its fixed opening included."""
        follow = getattr(self.backend, "follow", None)
        if request.previews and follow is not None:
            return (yield from follow(prompt, opening, request))
        return opening + list(self.backend.generate(prompt, request))

    def _draw(self, codes: list[int], request: GenerateRequest) -> Image.Image:
        if request.gone():
            raise Vanished
        return self.backend.decode(codes, request)

    def _read_pictures(self, request: GenerateRequest) -> list[Tensor]:
        """The pictures of a request as the model's pixels [3, S, S]; all that can be refused is refused before the
        first one is decoded. What was read is taken out of the request."""
        self._check_codes(request)
        self._check_length(request)
        numbers = [number for number, item in enumerate(request.images) if not isinstance(item, list)]
        costs = self._check_headers(request, numbers)
        pixels = []
        for number, cost in zip(numbers, costs, strict=True):
            # A small picture counts as one of DECODERS, so that no more threads than that decode.
            with self._decoding.hold(max(cost, self._decoding.capacity // DECODERS), request.gone):
                data, name = self._file(request, number), f"images[{number}]"
                request.images[number] = ""
                picture = open_image(data, name=name, limits=self._files, at_least=self._detail)
                del data
                pixels.append(self.backend.transform(picture))
        return pixels

    def _check_length(self, request: GenerateRequest) -> None:
        """Refuse a prompt too long for the model; pictures have the same length whatever they show."""
        check = getattr(self.backend, "check_prompt", None)
        if check is not None:
            some = [0] * self.backend.tokenizer.vocabulary.tokens_per_image
            rows = [item if isinstance(item, list) else some for item in request.images]
            check(sum(map(len, rows)), request)  # quickly, before a very long one is made
            check(len(self._prompt(request, rows)[0]), request)

    def _check_headers(self, request: GenerateRequest, numbers: list[int]) -> list[int]:
        """The bytes that decoding each of these pictures takes."""
        total, costs = 0, []
        for number in numbers:
            header = image_header(self._file(request, number), name=f"images[{number}]", limits=self._files,
                                  at_least=self._detail)
            total += header.size[0] * header.size[1]
            if total > self.limits.max_request_pixels:
                raise RequestError(f"The pictures up to images[{number}] have {total / 1e6:.1f} megapixels; a request "
                                   f"may have {self.limits.max_request_pixels / 1e6:g}. Send them smaller: the model "
                                   f"sees a few hundred pixels a side.")
            costs.append(header.memory)
        return costs

    def _file(self, request: GenerateRequest, number: int) -> bytes:
        item = request.images[number]
        assert isinstance(item, str | bytes)
        return bytes_from_base64(item, f"images[{number}]", self._files)

    def _check_codes(self, request: GenerateRequest) -> None:
        vocabulary = self.backend.tokenizer.vocabulary
        for number, item in enumerate(request.images):
            if self.exact_original or not isinstance(item, list):
                continue
            if len(item) > vocabulary.tokens_per_image:
                raise RequestError(f"images[{number}] has {len(item)} codes; a picture has "
                                   f"{vocabulary.tokens_per_image}.")
            wrong = [code for code in item if not 0 <= code < vocabulary.n_codes]
            if wrong:
                raise RequestError(f"images[{number}] holds code {shown(wrong[0])}; codes lie between 0 and "
                                   f"{vocabulary.n_codes - 1}.")

    def _codes(self, request: GenerateRequest, pixels: list[Tensor]) -> list[list[int]]:
        """Codes of every picture of the request, in order; new pictures are encoded in one batch."""
        rows: Iterator[list[int]] = iter(())
        if pixels:
            import torch

            rows = iter([[int(code) for code in row] for row in self.backend.encode(torch.stack(pixels))])
        codes = [list(item) if isinstance(item, list) else next(rows) for item in request.images]
        if self.exact_original and len(lengths := {len(row) for row in codes}) > 1:
            raise RequestError(f"The pictures of one request have code lists of different lengths {sorted(lengths)}.")
        return codes

    def _left_out(self, codes: list[list[int]]) -> list[str]:
        """A sentence for each picture of earlier answers that broke off, as they end when the tokens are used up."""
        whole = self.backend.tokenizer.vocabulary.tokens_per_image
        return [] if self.exact_original else [
            f"images[{number}] broke off after {len(row)} of {whole} codes and was left out."
            for number, row in enumerate(codes) if len(row) < whole]

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
        whole = tokenizer.vocabulary.tokens_per_image
        for row, span in zip(codes, spans[1:], strict=True):
            parts += [row if len(row) == whole else [], *self.backend.spans(span)]
        return [*tokenizer.encode_parts([part for part in parts if part], add_bos=True), *forced], forced
