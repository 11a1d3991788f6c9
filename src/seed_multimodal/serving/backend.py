"""Back end of the server: one system, a bounded queue, limits, and translation of requests into calls.

A text of `/generate` in the system's template (`USER: …\\nASSISTANT:`, `[INST] … [/INST]\\n`) is parsed as a
conversation, other text is continued. LaVIT has no template: it answers single messages.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from seed_multimodal.errors import RequestError, SeedError
from seed_multimodal.images.io import ImageLimits, bytes_from_base64, image_size, image_to_base64, open_image
from seed_multimodal.language.answer import BrokenImagePart, ImagePart
from seed_multimodal.language.generation import random_seed
from seed_multimodal.language.messages import Answer, Message
from seed_multimodal.language.prompts import PromptTemplate, answer_in
from seed_multimodal.language.vocabulary import BOX, PLACEHOLDER
from seed_multimodal.serving.schema import (
    ChatRequest,
    GenerateRequest,
    GenerateResponse,
    ImagesRequest,
    ImageUrl,
    Limits,
    TokensRequest,
)

if TYPE_CHECKING:
    from seed_multimodal.system.base import MultimodalSystem

SETTINGS = ("temperature", "num_beams", "max_new_tokens", "top_p")
FORMATS = ("PNG", "JPEG", "WEBP")
LOOK_SECONDS = 0.2  # how often a waiting request checks whether its client is still connected
LARGE_BODY, LARGE_IMAGES = 8 << 20, 2_000_000  # bytes, pixels: such requests, and such images, one at a time


class Refused(SeedError):
    """A rejected request with its HTTP status; `seconds`: for Retry-After."""

    def __init__(self, sentence: str, status: int = 503, seconds: int = 0) -> None:
        self.status, self.seconds = status, seconds
        super().__init__(sentence)


class Watch:
    """Whether an answer must end: client disconnected, server stopping, or time limit reached."""

    def __init__(self, gone: Callable[[], bool], seconds: float) -> None:
        self.gone, self.until = gone, time.monotonic() + seconds

    def late(self) -> bool:
        return time.monotonic() > self.until

    def __call__(self) -> bool:
        return self.late() or self.gone()

    def check(self) -> None:
        if self.gone():
            raise Refused("The connection was closed before the answer was ready.")

    @contextlib.contextmanager
    def holding(self, lock: Any) -> Iterator[None]:
        """Hold a lock or semaphore; stop waiting if the client disconnects."""
        while not lock.acquire(timeout=LOOK_SECONDS):
            self.check()
        try:
            yield
        finally:
            lock.release()


class Backend:
    """Answers requests with one system; `stopping` cancels all answers."""

    def __init__(self, system: MultimodalSystem, limits: Limits | None = None) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.system: Any = system
        self.limits = limits or Limits()
        self.words = system.tokenizer.vocabulary
        self.template: PromptTemplate | None = getattr(system, "template", None)
        self.reads_codes = self.template is not None and not self.words.in_order  # of images, as SEED-LLaMA does
        self.stopping, self._started, self._seconds = threading.Event(), time.monotonic(), 1.0
        self.name, self.created, self.admitted, self.answered = system.config.name, int(time.time()), 0, 0
        self._counting, self._large = threading.Lock(), threading.RLock()
        self._slots = threading.Semaphore(self.limits.max_running)
        self.metrics = CollectorRegistry()
        self.requests = Counter("seed_requests", "Answers", ["route", "status"], registry=self.metrics)
        self.seconds = Histogram("seed_request_seconds", "Time of an answer", ["route"], registry=self.metrics)
        self.first = Histogram("seed_first_token_seconds", "Time to the first event", registry=self.metrics)
        self.tokens = Counter("seed_tokens", "Tokens", ["kind"], registry=self.metrics)
        self.images = Counter("seed_images", "Images", ["kind"], registry=self.metrics)
        for name, value in (("running", lambda: self.running), ("waiting", lambda: self.admitted - self.running)):
            Gauge(f"seed_{name}", f"Requests {name}", registry=self.metrics).set_function(value)

    @property
    def running(self) -> int:
        return min(self.admitted, self.limits.max_running)

    def health(self) -> dict[str, object]:
        """Answer of `GET /health`; never waits for the model."""
        return {"status": "ok", "busy": self.running > 0, "running": self.running,
                "waiting": self.admitted - self.running, "answered": self.answered,
                "seconds_up": round(time.monotonic() - self._started, 1), "codes": self.words.n_codes,
                "tokens_per_image": self.words.tokens_per_image}

    @contextlib.contextmanager
    def place(self, route: str, size: int, disconnected: Callable[[], bool]) -> Iterator[Watch]:
        """Context with a slot for a request of `size` bytes. Raises Refused: queue full."""
        limits = self.limits
        watch = Watch(lambda: self.stopping.is_set() or disconnected(), limits.seconds)
        with self._counting:
            if self.admitted >= limits.max_running + limits.max_waiting:
                wait = min(max(math.ceil(self._seconds * self.admitted / limits.max_running), 1), 600)
                raise Refused(f"The model is busy and {limits.max_waiting} requests wait already; try again in {wait} "
                              f"seconds.", 429, wait)
            self.admitted += 1
        try:
            with watch.holding(self._slots), self._alone(size > LARGE_BODY, watch):
                start = time.monotonic()
                yield watch
                self.answered += 1
                self._seconds += 0.2 * (time.monotonic() - start - self._seconds)
                self.seconds.labels(route).observe(time.monotonic() - start)
        finally:
            with self._counting:
                self.admitted -= 1

    def _alone(self, large: bool, watch: Watch) -> contextlib.AbstractContextManager[None]:
        """Context that admits large requests one at a time, to limit memory."""
        return watch.holding(self._large) if large else contextlib.nullcontext()

    # ---- images

    def read_images(self, items: Sequence[Any], names: str, watch: Watch) -> list[Any]:
        """The images of a request, opened; of a system that reads codes, their codes. `items`: base64, an
        `ImageUrl`, the bytes of a file, or codes, which stay; `names`: for errors, with their number.

        Raises:
            RequestError: invalid codes, or too many pixels.
        """
        limits = ImageLimits(self.limits.max_pixels, self.limits.max_image_bytes, formats=FORMATS)
        read, pixels = list[Any](), 0
        for number, item in enumerate(items):
            name = names.format(number)
            if isinstance(item, list):
                read.append(self._codes(item, name))
                continue
            text = item.url if isinstance(item, ImageUrl) else item
            if isinstance(text, str) and "://" in text[:12]:
                raise RequestError(f"{name}: nothing is fetched; send the image itself, as data:image/png;base64,….")
            read.append(file := text if isinstance(text, bytes) else bytes_from_base64(text, name, limits))
            pixels += math.prod(image_size(file, name=name, limits=limits))
            if pixels > self.limits.max_pixels:
                raise RequestError(f"The images up to {name} have {pixels / 1e6:.1f} megapixels; a request may have "
                                   f"{self.limits.max_pixels / 1e6:g}.")
        with self._alone(pixels > LARGE_IMAGES, watch):
            places = [place for place, item in enumerate(read) if isinstance(item, bytes)]
            self.images.labels("read").inc(len(places))
            opened: Any = [open_image(read[place], name=names.format(place), limits=limits,
                                      at_least=self.system.images.at_least) for place in places]
            if opened and self.reads_codes:
                opened = self.system.images.encode(opened).tolist()
        for place, image in zip(places, opened, strict=True):
            read[place] = image
        return read

    def _whole(self, items: Sequence[Any], watch: Watch) -> list[Any]:
        """As `read_images`, but raises for an incomplete image."""
        read = self.read_images(items, "image {}", watch)
        if None in read:
            raise RequestError(f"image {read.index(None)} has fewer than {self.words.least_codes} codes.")
        return read

    def _codes(self, codes: list[int], name: str) -> list[int] | None:
        """The codes of an image; None if incomplete."""
        words = self.words
        if words.in_order and codes != list(range(min(len(codes), words.tokens_per_image))):
            raise RequestError(f"{name} holds codes, but the images of this model have none; send the image itself.")
        if len(codes) > words.tokens_per_image:
            raise RequestError(f"{name} has {len(codes)} codes; an image has {words.tokens_per_image}.")
        wrong = next((code for code in codes if not 0 <= code < words.n_codes), None)
        if wrong is not None:
            raise RequestError(f"{name} holds code {wrong:.6g}; codes lie between 0 and {words.n_codes - 1}.")
        return codes if len(codes) >= words.least_codes else None

    def _said(self, role: str, parts: Sequence[Any]) -> list[Any]:
        """Content of a message; an image of an answer as the model wrote it, where it has no codes."""
        return [ImagePart(list(range(self.words.tokens_per_image)), image=part)
                if role == "assistant" and self.words.in_order and isinstance(part, Image.Image) else part
                for part in parts if part is not None and part != ""]

    # ---- POST /generate

    def generate(self, asked: GenerateRequest, watch: Watch) -> Iterator[dict[str, Any]]:
        """Previews of images if they are asked for, and last the answer."""
        images = self.read_images(asked.images, "images[{}]", watch)
        number, stream = -1, asked.previews and self.system.images.progressive
        options = {"force_image": asked.force_boi, **self._options(asked)}
        for event in self._chat(self._messages(asked, images), watch, stream, options):
            number += event["type"] == "image_start"
            if event["type"] == "image_preview":
                yield {"picture": number, "codes": len(event["codes"]), "preview": image_to_base64(event["image"])}
        answer = event["answer"]
        response = self._render(answer, [sent if isinstance(sent, list) else image if isinstance(image, list) else None
                                         for sent, image in zip(asked.images, images, strict=True)])
        response.error_msg += [f"images[{place}] broke off after {len(item)} of {self.words.tokens_per_image} codes "
                               f"and was left out." for place, item in enumerate(asked.images)
                               if images[place] is None]
        response.boxes, notes = self._notes(answer, images, watch, asked.text)
        response.error_msg += notes
        yield response.to_json()

    def _chat(self, messages: Sequence[Any], watch: Watch, stream: bool, options: dict[str, Any]
              ) -> Iterator[dict[str, Any]]:
        """Events of an answer, with metrics; without `stream` only the last one."""
        start, chat = time.monotonic(), self.system.chat(messages, stream=stream, should_stop=watch, **options)
        for number, event in enumerate(chat if stream else [{"type": "done", "answer": chat}]):
            if number == 0:
                self.first.observe(time.monotonic() - start)
            if event["type"] == "done":
                watch.check()
                self.tokens.labels("prompt").inc(event["answer"].prompt_tokens)
                self.tokens.labels("completion").inc(len(event["answer"].ids))
                self.images.labels("drawn").inc(len(event["answer"].images))
            yield event

    def _messages(self, asked: GenerateRequest, images: Sequence[Any]) -> list[Message]:
        """The conversation in a request's text; `images`: opened images, codes, or None for skipped ones."""
        rest = iter(images)

        def content(role: str, text: str) -> tuple[Any, ...]:
            first, *texts = text.split(PLACEHOLDER)
            return tuple(self._said(role, [first, *(item for after in texts for item in (next(rest), after))]))

        text = asked.text
        if self.template is None:
            return [Message("user", tuple(item.strip() if isinstance(item, str) else item
                                          for item in content("user", text)))]
        if turns := read_turns(text, self.template) if self.system.config.tuned else []:
            return [Message(role, content(role, said)) for role, said in turns]
        return [Message("raw", content("raw", text.rstrip() if asked.force_boi else text))]

    def _options(self, asked: GenerateRequest) -> dict[str, Any]:
        """Generation settings; defaults of LaVIT are its own."""
        named = SETTINGS if self.template is not None else asked.model_fields_set & set(SETTINGS)
        options = {name: getattr(asked, name) for name in named}
        if asked.force_boi and "max_new_tokens" in options:
            options["max_new_tokens"] = max(options["max_new_tokens"], self.words.least_codes + 1)
        return {**options, "seed": asked.seed, **({"ratio": asked.ratio} if asked.ratio else {})}

    def _render(self, answer: Answer, images_ids: list[list[int] | None]) -> GenerateResponse:
        """An answer as text and images in order; `images_ids`: of the request."""
        response, pieces = GenerateResponse(images_ids=images_ids), []
        for part in answer.parts:
            if isinstance(part, str):
                # The model may spell the placeholder in ordinary letters: it must not count as an image.
                pieces.append(part.replace(PLACEHOLDER, "<image >").strip())
                continue
            pieces.append(PLACEHOLDER)
            if isinstance(part, BrokenImagePart):
                image, problem = None, part.reason
                codes = [id - self.words.code_start for id in part.ids if self.words.is_code_id(id)]
            else:
                image, problem, codes = part.image, "This system cannot draw.", list(part.codes)
            response.images.append("" if image is None else image_to_base64(image))
            response.images_ids.append(None if self.words.in_order and image is not None else codes)
            response.error_msg += [problem] if image is None else []
        text = " ".join(filter(None, pieces))
        response.text = answer_in(text, answer.answer_after) if self.template is None else text
        return response

    def _notes(self, answer: Answer, images: Sequence[Any], watch: Watch, prompt: str = ""
               ) -> tuple[list[dict[str, Any]], list[str]]:
        """The boxes of an answer on the last image before it, and notes about the answer."""
        notes, boxes = [answer.note] if answer.note else [], list[dict[str, Any]]()
        if watch.late():
            notes.append(f"The answer was cut off after {self.limits.seconds:g} seconds.")
        if hasattr(self.system, "detection"):
            opened = [image for image in images if isinstance(image, Image.Image)]
            found = self.system.detection(opened[-1] if opened else Image.new("RGB", (1, 1)), answer.ids,
                                          opened=prompt.rstrip().endswith(BOX))
            if found.grid and not images:
                notes.append("The answer holds boxes, but there is no image that they could lie on.")
            for box in found.grid if images else ():
                corners = box.corners((10**6, 10**6), self.system.prompts.vocabulary.n_locations)
                boxes.append({"image": len(images) - 1, "box": tuple(edge / 1e6 for edge in corners)})
            notes += found.problems
        return boxes, notes

    # ---- /v1

    def chat(self, asked: ChatRequest, watch: Watch) -> Iterator[dict[str, Any]]:
        """Changes of an OpenAI message (`content`, `images`, `boxes`, `notes`), and last `usage` and
        `finish_reason`."""
        said = asked.messages if self.template is not None else asked.messages[-1:]
        sent = [part for one in said for part in one.parts if not isinstance(part, str)]
        images = self._whole(sent, watch)
        rest = iter(images)
        messages = [{"role": one.role.replace("developer", "system"), "content": self._said(
            one.role, [part if isinstance(part, str) else next(rest) for part in one.parts])} for one in said]
        index, length = -1, 0
        for event in self._chat(messages, watch, True, {"previews": None if asked.previews else (), **asked.settings}):
            kind = event["type"]
            index += kind == "image_start"
            if kind == "text":
                text = event["text"] if length else event["text"].lstrip()
                length += len(text)
                yield {"content": text}
            elif kind in ("image", "image_preview") and event["image"] is not None:
                codes = None if self.words.in_order else event["codes"]
                yield {"images": [{"type": "image_url", "image_url": {"url": data_url(event["image"])}, "index": index,
                                   "offset": length, "codes": codes, "preview": kind == "image_preview"}]}
            elif kind in ("image", "image_broken"):
                yield {"notes": [event.get("reason", "This system cannot draw.")]}
        answer = event["answer"]
        boxes, notes = self._notes(answer, images, watch)
        yield {"boxes": boxes, "notes": notes}
        used, most = len(answer.ids), asked.settings.get("max_new_tokens", math.inf)
        yield {"finish_reason": "length" if used >= most or watch.late() else "stop", "usage": {
            "prompt_tokens": answer.prompt_tokens, "completion_tokens": used,
            "total_tokens": answer.prompt_tokens + used}}

    def draw(self, asked: ImagesRequest, files: Sequence[bytes], watch: Watch) -> list[Image.Image]:
        """Images of a text, or edits of `files`."""
        seed = random_seed() if asked.seed is None else asked.seed
        options = {"num_images": asked.n, **({"ratio": asked.ratio} if asked.ratio else {})}
        if files:
            images = self._whole(files, watch)
            drawn: list[Image.Image] = self.system.edit([images], [asked.prompt], seed, **options)
        else:
            drawn = self.system.draw([asked.prompt], seed, **options)
        self.images.labels("drawn").inc(len(drawn))
        return drawn

    def tokenize(self, asked: TokensRequest, watch: Watch) -> list[list[int]] | list[Image.Image]:
        """The codes of images, or the images of codes."""
        if self.words.in_order:
            raise RequestError("The images of this model have no codes.")
        items: Sequence[Any] = asked.images or asked.codes
        read = self._whole(items, watch)
        if asked.codes:
            first = {"codes": asked.first} if asked.first else {}
            drawn: list[Image.Image] = self.system.reconstruct(read, asked.seed, **first)
            return drawn
        return [[int(code) for code in row] for row in (read if self.reads_codes else self.system.tokenize(read))]


def data_url(image: Image.Image) -> str:
    return f"data:image/png;base64,{image_to_base64(image)}"


def read_turns(text: str, template: PromptTemplate) -> list[tuple[str, str]]:
    """Role and text of each turn of a conversation written in a template, up to where an answer begins; none where the
    text is something else."""
    opening = template.user_prefix.rstrip()
    if not opening or not text.startswith(opening):
        return []
    turns: list[tuple[str, str]] = []
    for piece in text.removeprefix(opening).split(template.turn_marker):
        said, closed, answer = piece.partition(template.user_suffix.rstrip())
        if not closed:
            return []
        turns += [("user", said.strip()), ("assistant", answer.strip())]
    return turns[:-1] if not turns[-1][1] else []
