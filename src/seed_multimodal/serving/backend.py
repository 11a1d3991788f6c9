"""What the server needs of a model: the interface, and how models answer whose texts and pictures are words of one
answer.

Systems with codes are served by `codes_backend`, SEED-X by `features_backend`, LaVIT by `message_backend`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from seed_multimodal.images.io import image_to_base64
from seed_multimodal.language.answer import ImagePart
from seed_multimodal.language.generation import GenerationSettings
from seed_multimodal.serving.gate import Vanished
from seed_multimodal.serving.rendering import render_answer, render_original
from seed_multimodal.serving.schema import FoundBox, GenerateRequest, GenerateResponse, Preview

if TYPE_CHECKING:
    from seed_multimodal.language.tokenizer import MultimodalTokenizer
    from seed_multimodal.systems.talking import Request, TalkingSystem

Size = tuple[int, int]


@dataclass
class Asked:
    """A request as the model is asked it.

    Attributes:
        prompt: ids. opening: words of the answer that are fixed; or the ids at the prompt's end that belong to it.
        forced: whether the answer must then begin a picture.
        images_ids: of each picture of the request its codes; None: it has none, and must be sent again.
        notes: sentences for `error_msg`. request: what the system made of it.
    """

    prompt: list[int]
    opening: str | list[int]
    images_ids: list[list[int] | None]
    forced: bool = False
    notes: list[str] = field(default_factory=list)
    request: Request | None = None


class Backend(Protocol):
    """Interface of a model for the engine.

    A backend may also have `at_least` (larger pictures may reach it reduced to so many pixels a side) and `kept_bytes`
    (of a pixel of a picture that waits, where `transform` keeps them all). `request.gone()` says whether the client has
    left.
    """

    @property
    def tokenizer(self) -> MultimodalTokenizer:
        """Of the language model."""
        ...

    @property
    def ratios(self) -> Sequence[str]:
        """Shapes that pictures can be asked for in, such as "3:2"; none: all are drawn in one."""
        ...

    def transform(self, image: Image.Image) -> Any:
        """One picture as it is kept while its request waits."""
        ...

    def check(self, request: GenerateRequest, sizes: Sequence[Size | None], exact_original: bool) -> None:
        """Refuse what can be refused before any picture is decoded; `sizes` (None: codes) are from their headers."""
        ...

    def reply(self, request: GenerateRequest, pictures: Sequence[Any],
              exact_original: bool) -> Generator[Preview, None, GenerateResponse]:
        """Answer a request with its transformed pictures, and give the previews that it asks for on the way."""
        ...


class WordsBackend:
    """Models that write texts and pictures as words of one answer; the methods that raise NotImplementedError are a
    model's own."""

    tokenizer: MultimodalTokenizer
    ratios: Sequence[str] = ()

    def ask(self, request: GenerateRequest, pictures: Sequence[Any], exact_original: bool) -> Asked:
        """A request with its transformed pictures -> what the model is asked."""
        raise NotImplementedError

    def generate(self, asked: Asked, request: GenerateRequest) -> list[int]:
        """The ids of the answer, its opening included."""
        raise NotImplementedError

    def draw(self, asked: Asked, part: ImagePart, request: GenerateRequest) -> Image.Image:
        """A whole picture of the answer, drawn from the request's seed."""
        raise NotImplementedError

    def follow(self, asked: Asked, request: GenerateRequest) -> Generator[Preview, None, list[int]]:
        """As `generate`, with previews of the pictures."""
        yield from ()
        return list(self.generate(asked, request))

    def boxes(self, asked: Asked, ids: list[int]) -> tuple[list[FoundBox], list[str]]:
        """The boxes of an answer, and a sentence about each that is malformed."""
        return [], []

    def reply(self, request: GenerateRequest, pictures: Sequence[Any],
              exact_original: bool) -> Generator[Preview, None, GenerateResponse]:
        """See `Backend`."""
        asked = self.ask(request, pictures, exact_original)
        ids = (yield from self.follow(asked, request)) if request.previews else list(self.generate(asked, request))

        def draw(part: ImagePart) -> Image.Image:
            if request.gone():
                raise Vanished
            return self.draw(asked, part, request)

        response = (render_original if exact_original else render_answer)(ids, self.tokenizer, draw)
        response.images_ids = asked.images_ids + response.images_ids
        response.boxes, problems = self.boxes(asked, ids)
        response.error_msg += asked.notes + problems
        return response


class SystemBackend(WordsBackend):
    """How systems generate for the server that hold conversations."""

    def __init__(self, system: TalkingSystem) -> None:
        self.system: Any = system
        self.tokenizer = system.tokenizer

    def generate(self, asked: Asked, request: GenerateRequest) -> list[int]:
        settings, watch = self._settings(request, asked.forced)
        ids: list[int] = self.system.speaker.answer(asked.prompt, settings, asked.opening, watch, _reading(asked))
        return ids

    def follow(self, asked: Asked, request: GenerateRequest) -> Generator[Preview, None, list[int]]:
        """As `generate`, with previews as `system.json` names them."""
        settings, watch = self._settings(request, asked.forced)
        pictures, due = self.system.pictures, self.system.spec.previews if self.system.pictures.can_draw else ()
        number = -1
        with contextlib.closing(self.system.speaker.events(
                asked.prompt, settings, asked.opening, due, watch, _reading(asked))) as events:
            for event in events:
                number += event["type"] == "image_start"
                if event["type"] == "image_preview":
                    drawn = pictures.preview(event["codes"], request.seed)
                    yield Preview(number, len(event["codes"]), image_to_base64(drawn))
                elif event["type"] == "end":
                    return list(event["ids"])
        raise AssertionError("the last event is the end")

    def _settings(self, request: GenerateRequest, forced: bool) -> tuple[GenerationSettings, Callable[[], None]]:
        """How to generate, and what is called before each token."""
        needed = self.tokenizer.vocabulary.tokens_per_image + 1 if request.force_boi else 1
        settings = self.system.settings(
            num_beams=request.num_beams, seed=request.seed, max_new_tokens=max(request.max_new_tokens, needed),
            do_sample=request.do_sample, temperature=request.temperature, top_p=request.top_p, force_image=forced)

        def watch() -> None:
            if request.gone():
                raise Vanished

        return settings, watch


def _reading(asked: Asked) -> dict[str, Any] | None:
    return None if asked.request is None else asked.request.reading
