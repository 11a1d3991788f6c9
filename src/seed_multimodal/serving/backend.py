"""One system behind the server: a request becomes messages, `MultimodalSystem.chat` answers them.

A text in the system's template (`USER: …\\nASSISTANT:`, `[INST] … [/INST]\\n`) is read as that conversation, any other
text is continued as it is. LaVIT has no template: its text is one message. Requests are answered one at a time.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from seed_multimodal.errors import RequestError
from seed_multimodal.images.io import ImageLimits, bytes_from_base64, image_size, image_to_base64, open_image
from seed_multimodal.language.answer import BrokenImagePart, TextPart
from seed_multimodal.language.messages import Answer, DrawnPart, Message
from seed_multimodal.language.prompts import PromptTemplate
from seed_multimodal.language.tasks import answer_in
from seed_multimodal.language.vocabulary import BOX, PLACEHOLDER
from seed_multimodal.serving.schema import FoundBox, GenerateRequest, GenerateResponse, Limits, Preview, read_request
from seed_multimodal.serving.waiting import Queue, Vanished

if TYPE_CHECKING:
    from seed_multimodal.system.base import MultimodalSystem

SETTINGS = ("temperature", "num_beams", "max_new_tokens", "top_p")


class Backend:
    """Answers requests with one system; `stopping` ends all that wait."""

    def __init__(self, system: MultimodalSystem, limits: Limits | None = None) -> None:
        self.system: Any = system
        self.limits = limits or Limits()
        self.words = system.tokenizer.vocabulary
        self.template: PromptTemplate | None = getattr(system, "template", None)
        self.queue, self.stopping = Queue(self.limits.max_waiting), threading.Event()
        self._started = time.monotonic()

    def health(self) -> dict[str, object]:
        """Answer of `GET /health`; never waits for the model."""
        busy = self.queue.busy
        return {"status": "ok", "busy": busy, "waiting": max(0, self.queue.admitted - busy),
                "answered": self.queue.answered, "seconds_up": round(time.monotonic() - self._started, 1),
                "codes": self.words.n_codes, "tokens_per_image": self.words.tokens_per_image}

    def handle(self, body: bytes, disconnected: Callable[[], bool] = lambda: False
               ) -> Iterator[Preview | GenerateResponse]:
        """Answer the JSON of a request: previews of images if they are asked for, and last the answer.

        Raises:
            Busy, Vanished; SeedError: a request that cannot be answered.
        """
        def left() -> bool:
            return self.stopping.is_set() or disconnected()

        with self.queue.admission():
            request = read_request(body)
            images = self._images(request)
            with self.queue.turn(left):
                response = yield from self._answer(request, images, left)
            yield response

    # ---- requests

    def _images(self, request: GenerateRequest) -> list[bytes | list[int] | None]:
        """Each image of a request: its file, within the limits as far as its header says; its codes; or None."""
        limits = ImageLimits(max_bytes=self.limits.max_image_bytes, max_pixels=self.limits.max_pixels)
        images, pixels = list[bytes | list[int] | None](), 0
        for number, item in enumerate(request.images):
            if isinstance(item, list):
                images.append(self._codes(number, item))
                continue
            name = f"images[{number}]"
            images.append(file := bytes_from_base64(item, name, limits))
            pixels += math.prod(image_size(file, name=name, limits=limits))
            if pixels > self.limits.max_pixels:
                raise RequestError(f"The images up to {name} have {pixels / 1e6:.1f} megapixels; a request may have "
                                   f"{self.limits.max_pixels / 1e6:g}.")
        return images

    def _codes(self, number: int, codes: list[int]) -> list[int] | None:
        """The codes of an image; None where they are fewer than an image has."""
        words = self.words
        if words.in_order and codes != list(range(min(len(codes), words.tokens_per_image))):
            raise RequestError(f"images[{number}] holds codes, but the images of this model have none; send the image "
                               f"itself.")
        if len(codes) > words.tokens_per_image:
            raise RequestError(f"images[{number}] has {len(codes)} codes; an image has {words.tokens_per_image}.")
        wrong = next((code for code in codes if not 0 <= code < words.n_codes), None)
        if wrong is not None:
            raise RequestError(f"images[{number}] holds code {wrong:.6g}; codes lie between 0 and {words.n_codes - 1}.")
        return codes if len(codes) >= words.least_codes else None

    def _messages(self, request: GenerateRequest, images: Sequence[Any]) -> list[Message]:
        """The conversation in a request's text; `images`: opened images, codes, or None for what is left out."""
        rest = iter(images)

        def content(role: str, text: str) -> tuple[Any, ...]:
            first, *texts = text.split(PLACEHOLDER)
            items: list[Any] = [first]
            for after in texts:
                image = next(rest)
                if role == "assistant" and self.words.in_order and isinstance(image, Image.Image):
                    image = DrawnPart(list(range(self.words.tokens_per_image)), image)  # as the model wrote it
                items += [image, after]
            return tuple(item for item in items if item is not None and item != "")

        text = request.text
        if self.template is None:
            return [Message("user", tuple(item.strip() if isinstance(item, str) else item
                                          for item in content("user", text)))]
        if turns := read_turns(text, self.template) if self.system.config.tuned else []:
            return [Message(role, content(role, said)) for role, said in turns]
        return [Message("raw", content("raw", text.rstrip() if request.force_boi else text))]

    def _options(self, request: GenerateRequest) -> dict[str, Any]:
        """Generation settings; LaVIT keeps its own where the client names none."""
        named = SETTINGS if self.template is not None else request.model_fields_set & set(SETTINGS)
        options = {name: getattr(request, name) for name in named}
        if request.force_boi and "max_new_tokens" in options:
            options["max_new_tokens"] = max(options["max_new_tokens"], self.words.least_codes + 1)
        return {**options, "seed": request.seed, **({"ratio": request.ratio} if request.ratio else {})}

    # ---- answers

    def _answer(self, request: GenerateRequest, images: list[Any],
                left: Callable[[], bool]) -> Generator[Preview, None, GenerateResponse]:
        for number, item in enumerate(images):
            if isinstance(item, bytes):
                images[number] = open_image(item, name=f"images[{number}]", at_least=self.system.images.at_least)
        ids = self._image_ids(request, images)
        chat = {"force_image": request.force_boi, "should_stop": left, **self._options(request)}
        messages, answer = self._messages(request, images), None
        if request.previews and self.system.images.progressive:
            number = -1
            for event in self.system.chat(messages, stream=True, **chat):
                number += event["type"] == "image_start"
                if event["type"] == "image_preview":
                    yield Preview(picture=number, codes=len(event["codes"]), preview=image_to_base64(event["image"]))
                answer = event.get("answer")
        else:
            answer = self.system.chat(messages, **chat)
        if left() or answer is None:
            raise Vanished
        response = self._render(answer, ids)
        response.error_msg += [f"images[{number}] broke off after {len(item)} of {self.words.tokens_per_image} codes "
                               f"and was left out." for number, item in enumerate(request.images)
                               if images[number] is None]
        response.error_msg += [answer.note] if answer.note else []
        if hasattr(self.system, "detection"):
            self._add_boxes(response, request, images, answer)
        return response

    def _image_ids(self, request: GenerateRequest, images: Sequence[Any]) -> list[list[int] | None]:
        """The codes of the request's images, for `images_ids`; None for those that the model reads as features."""
        opened = [image for image in images if isinstance(image, Image.Image)]
        reads_codes = self.template is not None and not self.words.in_order
        codes = iter(self.system.images.encode(opened).tolist() if reads_codes else [None] * len(opened))
        return [item if isinstance(item, list) else next(codes) for item in request.images]

    def _render(self, answer: Answer, images_ids: list[list[int] | None]) -> GenerateResponse:
        """An answer as text and images in order; `images_ids`: of the request."""
        response, pieces = GenerateResponse(images_ids=images_ids), []
        for part in answer.parts:
            if isinstance(part, TextPart):
                # The model may spell the placeholder in ordinary letters: it must not count as an image.
                pieces.append(part.text.replace(PLACEHOLDER, "<image >").strip())
                continue
            pieces.append(PLACEHOLDER)
            if isinstance(part, BrokenImagePart):
                image, problem = None, part.reason
                codes = [id - self.words.code_start for id in part.ids if self.words.is_code_id(id)]
            else:
                image, problem, codes = getattr(part, "image", None), "This system cannot draw.", list(part.codes)
            response.images.append("" if image is None else image_to_base64(image))
            response.images_ids.append(None if self.words.in_order and image is not None else codes)
            response.error_msg += [problem] if image is None else []
        text = " ".join(filter(None, pieces))
        response.text = answer_in(text, answer.answer_after) if self.template is None else text
        return response

    def _add_boxes(self, response: GenerateResponse, request: GenerateRequest, images: Sequence[Any],
                   answer: Answer) -> None:
        """The boxes of an answer on the last image before it, and a sentence about each that is malformed."""
        opened = [image for image in images if isinstance(image, Image.Image)]
        found = self.system.detection(opened[-1] if opened else Image.new("RGB", (1, 1)), answer.ids,
                                      opened=request.text.rstrip().endswith(BOX))
        grid = self.system.prompts.vocabulary.n_locations
        if found.grid and not images:
            response.error_msg.append("The answer holds boxes, but there is no image that they could lie on.")
        else:
            edges = [box.corners((10**6, 10**6), grid) for box in found.grid]  # millionths of the image
            response.boxes = [FoundBox(image=len(images) - 1, box=tuple(edge / 1e6 for edge in one)) for one in edges]
        response.error_msg += found.problems


def read_turns(text: str, template: PromptTemplate) -> list[tuple[str, str]]:
    """Role and text of each turn of a conversation written in a template, up to where an answer begins; none where the
    text is something else."""
    if not template.user_prefix or not text.startswith(template.user_marker):
        return []
    turns: list[tuple[str, str]] = []
    for piece in text.removeprefix(template.user_marker).split(template.turn_marker):
        said, closed, answer = piece.partition(template.user_suffix.rstrip())
        if not closed:
            return []
        turns += [("user", said.strip()), ("assistant", answer.strip())]
    return turns[:-1] if not turns[-1][1] else []

