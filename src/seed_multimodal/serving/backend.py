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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from werkzeug.exceptions import NotFound, ServiceUnavailable, TooManyRequests

from seed_multimodal.errors import RequestError
from seed_multimodal.images.io import (
    ImageLimits,
    bytes_from_base64,
    image_size,
    image_to_base64,
    open_image,
)
from seed_multimodal.inference.prompt import Stopped, random_seed
from seed_multimodal.language.answer import ImagePart
from seed_multimodal.language.messages import Answer, Message
from seed_multimodal.language.prompts import PromptTemplate
from seed_multimodal.language.vocabulary import PLACEHOLDER
from seed_multimodal.seed.pipeline import SeedLlama
from seed_multimodal.serving.schema import (
    ChatRequest,
    GenerateRequest,
    ImagesRequest,
    ImageUrl,
    Limits,
    TokensRequest,
)

if TYPE_CHECKING:
    from seed_multimodal.system.base import MultimodalSystem

SETTINGS = {"temperature", "num_beams", "max_new_tokens", "top_p", "seed", "ratio", "stop"}
LARGE_BODY, LARGE_IMAGES = (
    8 << 20,
    2_000_000,
)  # bytes, pixels: such requests, and such images, one at a time


class Deadline:
    """Whether an answer must end: client disconnected, server stopping, or time limit reached."""

    def __init__(self, gone: Callable[[], bool], seconds: float) -> None:
        self.gone = gone
        self.started = time.monotonic()
        self.until = self.started + seconds

    def elapsed(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self.started

    def late(self) -> bool:
        return time.monotonic() > self.until

    def __call__(self) -> bool:
        return self.late() or self.gone()

    def check(self) -> None:
        if self.gone():
            raise ServiceUnavailable("The server is being stopped, or the connection was closed.")

    @contextlib.contextmanager
    def holding(self, lock: Any, needed: bool = True) -> Iterator[None]:
        """Hold a lock or semaphore; stop waiting if the client disconnects (looked at every 0.2 s)."""
        while needed and not lock.acquire(timeout=0.2):
            self.check()
        try:
            yield
        finally:
            if needed:
                lock.release()


class Backend:
    """Answers requests with one system; `stopping` cancels all answers."""

    def __init__(self, system: MultimodalSystem, limits: Limits | None = None) -> None:
        self.system: Any = system
        self.limits, self.name = limits or Limits(), Path(system.config.name).name
        self.vocabulary = system.tokenizer.vocabulary
        self.template: PromptTemplate | None = getattr(system, "template", None)
        self.stopping, self.created, self.admitted, self.answered = (
            threading.Event(),
            int(time.time()),
            0,
            0,
        )
        self._counting, self._large = threading.Lock(), threading.RLock()
        self._slots = threading.Semaphore(self.limits.max_running)
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "seed_requests", "Answers", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "seed_request_seconds", "Time of an answer", ["route"], registry=self.registry
        )
        self.first = Histogram(
            "seed_first_token_seconds", "Time to the first event", registry=self.registry
        )
        self.tokens = Counter("seed_tokens", "Tokens", ["kind"], registry=self.registry)
        self.images = Counter("seed_images", "Images", ["kind"], registry=self.registry)
        for name in ("running", "waiting"):
            gauge = Gauge(f"seed_{name}", f"Requests {name}", registry=self.registry)
            gauge.set_function(lambda name=name: self.health()[name])  # type: ignore[misc]

    # ---- state: never waits for the model

    def health(self) -> dict[str, Any]:
        admitted = self.admitted
        running = min(admitted, self.limits.max_running)
        # Admitted requests may wait for rows of the KV cache. The engine counts each image of a drawing, so at least
        # one request is running.
        running -= min(self.system.engine.n_waiting, max(running - 1, 0))
        return {
            "status": "ok",
            "running": running,
            "waiting": admitted - running,
            "answered": self.answered,
        }

    def ready(self) -> tuple[dict[str, bool], int]:
        return {"ready": not self.stopping.is_set()}, 503 if self.stopping.is_set() else 200

    def metrics(self) -> tuple[bytes, dict[str, str]]:
        return generate_latest(self.registry), {"Content-Type": CONTENT_TYPE_LATEST}

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self.model(self.name)]}

    def model(self, name: str) -> dict[str, Any]:
        """The served model by its name. Raises NotFound: another one."""
        if name != self.name:
            raise NotFound(f"There is no model {name!r} here; this server has {self.name!r}.")
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "seed-multimodal",
        }

    @contextlib.contextmanager
    def slot(self, route: str, size: int, disconnected: Callable[[], bool]) -> Iterator[Deadline]:
        """Context with a slot for a request of `size` bytes. Raises TooManyRequests."""
        limits = self.limits
        watch = Deadline(lambda: self.stopping.is_set() or disconnected(), limits.seconds)
        with self._counting:
            if self.admitted >= limits.max_running + limits.max_waiting:
                raise TooManyRequests(
                    f"The model is busy and {limits.max_waiting} requests wait already; try again "
                    f"later."
                )
            self.admitted += 1
        try:
            with watch.holding(self._slots), watch.holding(self._large, size > LARGE_BODY):
                yield watch
                self.answered += 1
        except Stopped:
            watch.check()
            raise ServiceUnavailable(
                f"The answer took more than {limits.seconds:g} seconds."
            ) from None
        finally:
            self.seconds.labels(route).observe(watch.elapsed())  # with the time in the queue
            with self._counting:
                self.admitted -= 1

    # ---- answers

    def read_images(self, items: Sequence[Any], watch: Deadline) -> list[Any]:
        """The images of a request, opened; for SEED-LLaMA their codes. `items`: base64, an `ImageUrl`, the bytes of a
        file, or codes, which stay.

        Raises:
            RequestError: not an image, or too many pixels.
        """
        limits = ImageLimits(
            self.limits.max_pixels, self.limits.max_image_bytes, formats=("PNG", "JPEG", "WEBP")
        )
        files, pixels = dict[int, bytes](), 0
        for number, item in enumerate(items):
            if isinstance(item, list):
                continue
            name, text = f"image {number}", item.url if isinstance(item, ImageUrl) else item
            if isinstance(text, str) and "://" in text[:12]:
                raise RequestError(
                    f"{name}: nothing is fetched; send the image itself, as data:image/png;base64,…."
                )
            files[number] = (
                text if isinstance(text, bytes) else bytes_from_base64(text, name, limits)
            )
            pixels += math.prod(image_size(files[number], name=name, limits=limits))
            if pixels > limits.max_pixels:
                raise RequestError(
                    f"The images up to {name} have {pixels / 1e6:.1f} megapixels; a request may have "
                    f"{limits.max_pixels / 1e6:g}."
                )
        with watch.holding(self._large, pixels > LARGE_IMAGES):
            self.images.labels("read").inc(len(files))
            opened: Any = [
                open_image(
                    file,
                    name=f"image {number}",
                    limits=limits,
                    at_least=self.system.images.min_side,
                )
                for number, file in files.items()
            ]
            if opened and isinstance(self.system, SeedLlama):
                opened = self.system.images.encode(opened).tolist()
        read = dict(zip(files, opened, strict=True))
        return [read.get(number, item) for number, item in enumerate(items)]

    def _chat(
        self, turns: Sequence[tuple[str, Sequence[Any]]], watch: Deadline, options: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """Events of the answer to a conversation (role and parts of each turn), with metrics; the last has `notes`."""
        messages, notes = list[Message](), list[str]()
        whole, least = list(range(self.vocabulary.tokens_per_image)), self.vocabulary.min_codes
        for role, parts in turns:
            content = [
                part
                for part in parts
                if part != "" and not (isinstance(part, list) and len(part) < least)
            ]
            notes += [
                f"An image broke off after {len(part)} of {len(whole)} codes and was left out."
                for part in parts
                if isinstance(part, list) and len(part) < least
            ]
            if (
                role == "assistant" and self.vocabulary.fixed_image_order
            ):  # images without codes, as the model wrote them
                content = [
                    ImagePart(whole, image=part) if isinstance(part, Image.Image) else part
                    for part in content
                ]
            messages.append(Message(role, tuple(content)))
        for number, event in enumerate(
            self.system.chat(messages, stream=True, should_stop=watch, **options)
        ):
            if number == 0:
                self.first.observe(watch.elapsed())
            if event["type"] == "done":
                watch.check()
                answer: Answer = event["answer"]
                self.tokens.labels("prompt").inc(answer.prompt_tokens)
                self.tokens.labels("completion").inc(len(answer.ids))
                self.images.labels("drawn").inc(len(answer.images))
                notes += [answer.note] if answer.note else []
                notes += (
                    [f"The answer was cut off after {self.limits.seconds:g} seconds."]
                    if watch.late()
                    else []
                )
                event["notes"] = notes
            yield event

    def generate(self, asked: GenerateRequest, watch: Deadline) -> dict[str, Any]:
        """The answer of `POST /generate`."""
        images = self.read_images(asked.images, watch)
        rest = iter(images)

        def parts(text: str) -> list[Any]:
            first, *texts = text.split(PLACEHOLDER)
            return [first, *(part for after in texts for part in (next(rest), after))]

        turns = (
            read_turns(asked.text, self.template)
            if self.template and self.system.config.tuned
            else []
        )
        if not turns:
            turns = [
                (
                    "raw" if self.template else "user",
                    asked.text.rstrip() if asked.force_boi else asked.text,
                )
            ]
        options = asked.model_dump(include=SETTINGS, exclude_unset=self.template is None)
        if asked.force_boi and "max_new_tokens" in options:
            options["max_new_tokens"] = max(asked.max_new_tokens, self.vocabulary.min_codes + 1)
        *_, last = self._chat(
            [(role, parts(text)) for role, text in turns],
            watch,
            {"force_image": asked.force_boi, "previews": (), **options},
        )
        pieces, drawn, errors = list[str](), list[str](), list[str](last["notes"])
        codes = [image if isinstance(image, list) else None for image in images]
        for part in last["answer"].parts:
            if isinstance(part, str):  # the model may spell the placeholder in ordinary letters
                pieces.append(part.replace(PLACEHOLDER, "<image >").strip())
                continue
            image = getattr(part, "image", None)
            pieces.append(PLACEHOLDER)
            drawn.append("" if image is None else image_to_base64(image))
            codes.append(
                None if self.vocabulary.fixed_image_order and image else getattr(part, "codes", [])
            )
            errors += [getattr(part, "reason", "This system cannot draw.")] if image is None else []
        return {
            "text": " ".join(filter(None, pieces)),
            "images": drawn,
            "images_ids": codes,
            "error_msg": errors,
        }

    def chat(self, asked: ChatRequest, watch: Deadline) -> Iterator[dict[str, Any]]:
        """Changes of an OpenAI message (`content`, `images`, …), and last `usage` and `finish_reason`."""
        said = asked.messages if self.template else asked.messages[-1:]
        images = self.read_images(
            [part for one in said for part in one.parts if not isinstance(part, str)], watch
        )
        rest = iter(images)
        turns = [
            (
                one.role.replace("developer", "system"),
                [part if isinstance(part, str) else next(rest) for part in one.parts],
            )
            for one in said
        ]
        options = asked.model_dump(include=SETTINGS, exclude_none=True)
        options["force_image"] = asked.force_image or asked.modalities == ["image"]
        options["previews"] = None if asked.stream and asked.previews else ()
        index, length, after_image = -1, 0, False
        for event in self._chat(turns, watch, options):
            kind = event["type"]
            index += kind == "image_start"
            after_image = after_image or kind != "text"
            if kind == "text":
                text = event["text"] if length else event["text"].lstrip()
                if (
                    after_image and length and not text[:1].isspace()
                ):  # texts around an image stay apart
                    text = f" {text}"
                after_image = False
                length += len(text)
                yield {"content": text}
            elif kind in ("image", "image_preview") and event["image"] is not None:
                codes = None if self.vocabulary.fixed_image_order else event["codes"]
                url = f"data:image/png;base64,{image_to_base64(event['image'])}"
                yield {
                    "images": [
                        {
                            "type": "image_url",
                            "image_url": {"url": url},
                            "index": index,
                            "offset": length,
                            "codes": codes,
                            "preview": kind == "image_preview",
                        }
                    ]
                }
            elif kind in ("image", "image_broken"):
                yield {"notes": [event.get("reason", "This system cannot draw.")]}
        answer = event["answer"]
        boxes, problems = self._boxes(answer, images)
        used = len(answer.ids)
        yield {"boxes": boxes, "notes": event["notes"] + problems}
        yield {
            "finish_reason": "stop" if answer.finish_reason == "stop" else "length",
            "usage": {
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": used,
                "total_tokens": answer.prompt_tokens + used,
            },
        }

    def _boxes(
        self, answer: Answer, images: Sequence[Any]
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """The boxes of SEED-X's answer on the last image, as shares of its size, and notes about malformed ones."""
        if not hasattr(self.system, "detection"):
            return [], []
        found, whole = (
            self.system.detection(Image.new("1", (1, 1)), answer.ids, opened=False),
            10**6,
        )
        corners = [
            box.corners((whole, whole), self.system.prompts.vocabulary.n_locations)
            for box in found.grid
        ]
        return [
            {"image": len(images) - 1, "box": tuple(edge / whole for edge in one)}
            for one in corners
            if images
        ], found.problems

    def draw(self, asked: ImagesRequest, files: Sequence[bytes], watch: Deadline) -> dict[str, Any]:
        """Images of a text, or edits of `files`."""
        seed = random_seed() if asked.seed is None else asked.seed
        options = {
            "num_images": asked.n,
            "should_stop": watch,
            **({"ratio": asked.ratio} if asked.ratio else {}),
        }
        drawn = (
            self.system.edit([self.read_images(files, watch)], [asked.prompt], seed, **options)
            if files
            else self.system.draw([asked.prompt], seed, **options)
        )
        self.images.labels("drawn").inc(len(drawn))
        return {
            "created": int(time.time()),
            "data": [{"b64_json": image_to_base64(image)} for image in drawn],
            "notes": [
                *filter(None, [self.system.unknown_words_note(Message("user", (asked.prompt,)))])
            ],
        }

    def tokenize(self, asked: TokensRequest, watch: Deadline) -> dict[str, Any]:
        """The codes of images, or the images of codes."""
        if self.vocabulary.fixed_image_order:
            raise RequestError("The images of this model have no codes.")
        if asked.codes:
            first = {"codes": asked.first} if asked.first else {}
            drawn = self.system.reconstruct(asked.codes, asked.seed, should_stop=watch, **first)
            data: list[Any] = [{"b64_json": image_to_base64(image)} for image in drawn]
        else:
            images = self.read_images(asked.images, watch)
            seeds = [asked.seed] * len(images)
            rows = (
                images
                if isinstance(self.system, SeedLlama)
                else self.system.codes_of(images, seeds)
            )
            data = [{"codes": [int(code) for code in row]} for row in rows]
        return {"created": int(time.time()), "data": data}


def read_turns(text: str, template: PromptTemplate) -> list[tuple[str, str]]:
    """Role and text of each turn of a conversation written in a template, or none: the text is something else."""
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
