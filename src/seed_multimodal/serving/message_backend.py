"""`Lavit` as a backend: a request is one message, its text without any template, as for `Lavit.chat`.

    <image>                    a caption                  <image>What is it?     an answer
    force_boi, words           a picture                  force_boi, words, <image> or codes in any order: composed

Settings that a request does not name are the system's own.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any

from PIL import Image

from seed_multimodal.errors import CheckpointError, CodesError, ConfigError, RequestError
from seed_multimodal.images.io import image_to_base64
from seed_multimodal.language.vocabulary import PLACEHOLDER
from seed_multimodal.lavit.ratios import RATIOS
from seed_multimodal.serving.backend import Size
from seed_multimodal.serving.gate import Vanished
from seed_multimodal.serving.schema import GenerateRequest, GenerateResponse, Preview
from seed_multimodal.systems.lavit import Lavit


class MessageBackend:
    """A system that answers single messages. Its pictures are kept whole: the model squashes them itself."""

    kept_bytes = 3
    ratios = tuple(RATIOS)

    def __init__(self, system: Lavit) -> None:
        self.system, self.tokenizer = system, system.tokenizer

    @property
    def at_least(self) -> int:
        """See `Backend`."""
        return int(self.system.pictures.at_least or 0)

    def transform(self, image: Image.Image) -> Image.Image:
        return image

    def check(self, request: GenerateRequest, sizes: Sequence[Size | None], exact_original: bool) -> None:
        """See `Backend`."""
        for number, item in enumerate(request.images):
            if isinstance(item, list):
                try:
                    self.tokenizer.vocabulary.check_codes(item)
                except CodesError as error:
                    raise RequestError(f"images[{number}]: {error}") from error
        small = Image.new("RGB", (1, 1))
        items = self._items(request, iter([small for size in sizes if size is not None]))
        if not items:
            raise RequestError("The message is empty: it has no picture and no word.")
        try:
            self.system.check_message(items, force_image=request.force_boi, **self._options(request))
        except (ConfigError, CheckpointError) as error:  # a setting; a part that this system has not
            raise RequestError(str(error)) from error

    def reply(self, request: GenerateRequest, pictures: Sequence[Image.Image],
              exact_original: bool) -> Generator[Preview, None, GenerateResponse]:
        """See `Backend`; there are no previews."""
        def watch() -> None:
            if request.gone():
                raise Vanished

        yield from ()
        asked: list[list[int] | None] = [item if isinstance(item, list) else None for item in request.images]
        message = {"role": "user", "content": self._items(request, iter(pictures))}
        answer = self.system.chat([message], force_image=request.force_boi, watch=watch, **self._options(request))
        # The model may spell the placeholder in ordinary letters: it must not count as a picture.
        said = str(answer) if request.force_boi else answer.text.replace(PLACEHOLDER, "<image >")
        return GenerateResponse(said, [image_to_base64(drawn) for drawn in answer.images], [*asked, *answer.codes],
                                [answer.note] if answer.note else [])

    def _items(self, request: GenerateRequest, pictures: Iterator[Image.Image]) -> list[Any]:
        """The message: words, pictures and codes in order."""
        first, *spans = (span.strip() for span in request.text_spans)
        items: list[Any] = [first]
        for item, span in zip(request.images, spans, strict=True):
            items += [item if isinstance(item, list) else next(pictures), span]
        return [item for item in items if not isinstance(item, str) or item]

    def _options(self, request: GenerateRequest) -> dict[str, Any]:
        options = {name: getattr(request, name) for name in sorted(request.given)}
        return {"seed": request.seed, **options, **({"ratio": request.ratio} if request.ratio else {})}
