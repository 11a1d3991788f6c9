"""One model, and the line of requests in front of it: the only place where the server uses weights.

A request passes, in this order: the count of those that wait (429 when it is full), a place for its body, the checks of
every limit and of the prompt's length, the headers of its pictures, a place for them while they wait (where they are
kept whole), a place for decoding each of them (they are reduced and turned into the model's pixels at once), and the
model, one request at a time. Nobody holds the model while reading or decoding; whoever has left is dropped in each line
and between two tokens of an answer.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from seed_multimodal.errors import RequestError, SeedError
from seed_multimodal.images.io import DETAIL, ImageLimits, bytes_from_base64, image_size, open_image
from seed_multimodal.serving.backend import Backend
from seed_multimodal.serving.body import read_body
from seed_multimodal.serving.gate import Gate
from seed_multimodal.serving.schema import GenerateRequest, GenerateResponse, Limits, Preview, parse_request

DECODERS = 2  # threads that decode pictures at once
BYTES_PER_PIXEL = 4.5  # of memory for decoding, per pixel of the limits: Pillow's four, and a reduced copy
PARSING_BYTES = 8 << 20  # what a body needs beside its pictures
KEPT_BYTES = 128 << 20  # of decoded pictures that wait for the model, where a backend keeps them whole
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
        self._kept = Gate(KEPT_BYTES)
        self._decoding = Gate(int(self.limits.max_decoding_pixels * BYTES_PER_PIXEL))
        self._files = ImageLimits(
            max_bytes=self.limits.max_image_bytes, max_pixels=self.limits.max_image_pixels)
        self._detail = int(getattr(backend, "at_least", DETAIL * 448))
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

        with self.admitted(), contextlib.ExitStack() as kept:
            with self._bodies.hold(length + PARSING_BYTES, left):
                request = parse_request(read_body(stream, self.limits), self.limits, left)
                pictures = self._read_pictures(request, kept)
            yield from self._answer(request, pictures)

    def answer(self, request: GenerateRequest) -> Iterator[Preview | GenerateResponse]:
        """Read the pictures, generate, draw; what it gives: see `handle`.

        Raises:
            ImageError: a picture that cannot be read; RequestError: code lists that are no picture, pictures with too
                many pixels; GenerationError: a prompt too long for the model.
        """
        with contextlib.ExitStack() as kept:
            yield from self._answer(request, self._read_pictures(request, kept))

    def _answer(self, request: GenerateRequest, pictures: list[Any]) -> Iterator[Preview | GenerateResponse]:
        with self._model.hold(gone=request.gone):
            began = time.monotonic()
            response = yield from self.backend.reply(request, pictures, self.exact_original)
            self.answered += 1
            self._seconds += 0.2 * (time.monotonic() - began - self._seconds)
        yield response

    def _read_pictures(self, request: GenerateRequest, kept: contextlib.ExitStack) -> list[Any]:
        """The pictures of a request as the backend keeps them; all that can be refused is refused before the first one
        is decoded. What was read is taken out of the request; its place among kept pictures is given back with `kept`.
        """
        ratios = self.backend.ratios
        if request.ratio is not None and request.ratio not in ratios:
            raise RequestError(f"'ratio' is {request.ratio[:20]!r}; this model draws pictures in "
                               f"{', '.join(ratios) if ratios else 'one shape'}.")
        numbers = [number for number, item in enumerate(request.images) if not isinstance(item, list)]
        sizes = self._check_headers(request, numbers)
        self.backend.check(request, [sizes.get(number) for number in range(len(request.images))], self.exact_original)
        pixels = sum(width * height for width, height in sizes.values())
        kept.enter_context(self._kept.hold(getattr(self.backend, "kept_bytes", 0) * pixels, request.gone))
        pictures = []
        for number, (width, height) in sizes.items():
            # A small picture counts as one of DECODERS, so that no more threads than that decode.
            memory = 8 * width * height  # the decoded picture and its RGB copy
            with self._decoding.hold(max(memory, self._decoding.capacity // DECODERS), request.gone):
                data, name = self._file(request, number), f"images[{number}]"
                request.images[number] = ""
                picture = open_image(data, name=name, limits=self._files, at_least=self._detail)
                del data
                pictures.append(self.backend.transform(picture))
        return pictures

    def _check_headers(self, request: GenerateRequest, numbers: list[int]) -> dict[int, tuple[int, int]]:
        """Sizes of these pictures by their headers."""
        total, sizes = 0, {}
        for number in numbers:
            size = image_size(self._file(request, number), name=f"images[{number}]", limits=self._files)
            total += size[0] * size[1]
            if total > self.limits.max_request_pixels:
                raise RequestError(f"The pictures up to images[{number}] have {total / 1e6:.1f} megapixels; a request "
                                   f"may have {self.limits.max_request_pixels / 1e6:g}. Send them smaller: the model "
                                   f"sees a few hundred pixels a side.")
            sizes[number] = size
        return sizes

    def _file(self, request: GenerateRequest, number: int) -> bytes:
        item = request.images[number]
        assert isinstance(item, str | bytes)
        return bytes_from_base64(item, f"images[{number}]", self._files)
