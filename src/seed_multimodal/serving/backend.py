"""Back end of the server: one system, a bounded queue, limits, and requests as calls of the system.

A text of `/generate` in the system's template (`USER: …\\nASSISTANT:`, `[INST] … [/INST]\\n`) is
parsed as a conversation, other text is continued. LaVIT has no template: it answers single
messages.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from werkzeug.exceptions import NotFound, ServiceUnavailable, TooManyRequests

from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import RequestError, short_name
from seed_multimodal.images.io import ImageLimits, StoredImage, decode_text, image_to_base64
from seed_multimodal.inference.prompt import Stopped, random_seed
from seed_multimodal.language.answer import Answer, BrokenImagePart, Event, ImagePart, left_out_note
from seed_multimodal.language.messages import Message, images_before_question, newest_turns
from seed_multimodal.language.prompts import PromptTemplate, interleave
from seed_multimodal.language.vocabulary import PLACEHOLDER
from seed_multimodal.models.registry import find_family
from seed_multimodal.pipelines.world import DESCRIPTION
from seed_multimodal.serving.responses import completion, response_events
from seed_multimodal.serving.schema import (
    MAX_IMAGES,
    MAX_MESSAGES,
    MAX_TEXT,
    ChatRequest,
    EditsRequest,
    GenerateRequest,
    GenerateResponse,
    ImageOptions,
    ImagesRequest,
    ImageUrl,
    Limits,
    ResponsesRequest,
    TokensRequest,
    contradiction,
)

if TYPE_CHECKING:
    from seed_multimodal.pipelines.base import MultimodalSystem

# Larger requests are handled one at a time, so that few of them fill the memory.
LARGE_BODY_BYTES = 8 << 20
LARGE_IMAGES_PIXELS = 2_000_000
MAX_SIDE = 2048  # of a returned image
RETRY_SECONDS = 5  # after which a refused client may come back
POLL_SECONDS = 0.2  # between two looks at the connection of a waiting request
CANNOT_DRAW = "This system cannot draw."

SentImage = str | bytes | list[int]  # base64 or a data URL, a file, codes
ReadImage = Image.Image | list[int]
Options = dict[str, Any]  # keyword arguments of a system's methods


class Deadline:
    """When an answer must end: client disconnected, server stopping, or time limit reached.

    is_cancelled: whether the client is disconnected or the server stops.
    """

    def __init__(self, is_cancelled: Callable[[], bool], seconds: float) -> None:
        self.is_cancelled = is_cancelled
        self.started = time.monotonic()
        self.seconds = seconds

    def elapsed(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self.started

    def __call__(self) -> bool:
        return self.elapsed() > self.seconds or self.is_cancelled()

    def raise_if_cancelled(self) -> None:
        if self.is_cancelled():
            raise ServiceUnavailable(
                "The server is being stopped, or the connection was closed.",
                retry_after=RETRY_SECONDS,
            )

    @contextlib.contextmanager
    def hold(
        self, lock: threading.Semaphore | threading.RLock, needed: bool = True
    ) -> Iterator[None]:
        """Hold a lock or semaphore, if it is `needed`; waiting ends if the client disconnects."""
        if not needed:
            yield
            return
        while not lock.acquire(timeout=POLL_SECONDS):
            self.raise_if_cancelled()
        try:
            yield
        finally:
            lock.release()


class Backend:
    """Answers requests with one system; `stopping` cancels all answers."""

    def __init__(self, system: MultimodalSystem, limits: Limits | None = None) -> None:
        self.system = system
        self.limits = limits or Limits()
        self.name = Path(system.config.name).name
        self.vocabulary = system.tokenizer.vocabulary
        self.has_codes = system.abilities.draws_codes and system.abilities.codes_are_rows
        self.template = system.family.template
        self.created = int(time.time())

        # The queue: requests that run or wait, and those that ended with an answer.
        self.stopping = threading.Event()
        self.admitted = 0
        self.answered = 0
        self._counting = threading.Lock()
        self._large = threading.RLock()
        self._slots = threading.Semaphore(self.limits.max_running)

        # Metrics, in a registry of this server: a process may have several.
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("seed_requests", "Answers", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "seed_request_seconds", "Time of an answer", ["route"], registry=registry
        )
        self.first = Histogram(
            "seed_first_token_seconds", "Time to the first event", registry=registry
        )
        self.tokens = Counter("seed_tokens", "Tokens", ["kind"], registry=registry)
        self.images = Counter("seed_images", "Images", ["kind"], registry=registry)
        running = Gauge("seed_running", "Requests running", registry=registry)
        running.set_function(lambda: self.health()["running"])
        waiting = Gauge("seed_waiting", "Requests waiting", registry=registry)
        waiting.set_function(lambda: self.health()["waiting"])

    # ---- state: never waits for the model

    def root(self) -> JsonObject:
        """What this server is, for a browser at its address."""
        return {
            "server": f"SEED Multimodal with the model {self.name}",
            "routes": "/openapi.json",
            "chat_page": "python gradio_demo/seed_llama_gradio.py",
        }

    def health(self) -> JsonObject:
        admitted = self.admitted
        running = min(admitted, self.limits.max_running)
        # Admitted requests may wait for rows of the KV cache. The engine counts each image of a
        # drawing, so at least one request is running.
        running -= min(self.system.engine.n_waiting, max(running - 1, 0))
        return {
            "status": "ok",
            "running": running,
            "waiting": admitted - running,
            "answered": self.answered,
        }

    def ready(self) -> tuple[dict[str, bool], int]:
        stopping = self.stopping.is_set()
        return {"ready": not stopping}, 503 if stopping else 200

    def metrics(self) -> tuple[bytes, dict[str, str]]:
        return generate_latest(self.registry), {"Content-Type": CONTENT_TYPE_LATEST}

    def models(self) -> JsonObject:
        return {"object": "list", "data": [self.model(self.name)]}

    def model(self, name: str) -> JsonObject:
        """The served model by its name. Raises NotFound: another one."""
        if name != self.name:
            raise NotFound(
                f"There is no model {short_name(name)!r}; this server has {self.name!r}."
            )
        known = self.system.family.world.listed or None
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "seed-multimodal",
            "family": self.system.config.system,
            "codes_per_image": self.system.images.codes_per_image,
            "notice": self.system.config.notice,
            "known": known,
        }

    def _model_notes(self, name: str | None) -> list[str]:
        """A note for a request that names another model."""
        if name in (None, "", self.name):
            return []
        return [f"This server serves {self.name}; the request named {short_name(name)!r}."]

    @contextlib.contextmanager
    def slot(
        self, route: str, n_bytes: int, is_disconnected: Callable[[], bool]
    ) -> Iterator[Deadline]:
        """Context with a slot for a request of `n_bytes`. Raises TooManyRequests."""
        limits = self.limits
        deadline = Deadline(lambda: self.stopping.is_set() or is_disconnected(), limits.seconds)

        # 1. A place in the queue, or a refusal at once.
        with self._counting:
            if self.admitted >= limits.max_running + limits.max_waiting:
                raise TooManyRequests(
                    f"The model is busy and {limits.max_waiting} requests wait already; try again "
                    f"later.",
                    retry_after=RETRY_SECONDS,
                )
            self.admitted += 1

        # 2. The request waits here for its turn, and gives its slot back however it ends. The time
        #    of an answer is measured with that in the queue.
        try:
            with (
                self.seconds.labels(route).time(),
                deadline.hold(self._slots),
                deadline.hold(self._large, n_bytes > LARGE_BODY_BYTES),
            ):
                deadline.raise_if_cancelled()
                yield deadline
                self.answered += 1
        except Stopped:
            deadline.raise_if_cancelled()
            sentence = f"The answer took more than {limits.seconds:g} seconds."
            raise ServiceUnavailable(sentence, retry_after=RETRY_SECONDS) from None
        finally:
            with self._counting:
                self.admitted -= 1

    # ---- images of a request

    def read_images(self, items: Sequence[SentImage], deadline: Deadline) -> list[ReadImage]:
        """The images of a request, opened.

        items: codes among them stay.

        Raises:
            RequestError: too many images or pixels, or not an image.
        """
        limits = ImageLimits(self.limits.max_pixels, self.limits.max_image_bytes)
        if len(items) > MAX_IMAGES:
            raise RequestError(f"The request has {len(items)} images; {MAX_IMAGES} are allowed.")

        # 1. Files, and their pixels as the headers say.
        inputs: list[Any] = [*items]
        files: dict[int, StoredImage] = {}
        n_pixels = 0
        for index, item in enumerate(items):
            if isinstance(item, list):
                continue
            name = f"image {index}"
            content = item if isinstance(item, bytes) else decode_text(item, name, limits)
            files[index] = StoredImage(content, name, limits)
            n_pixels += math.prod(files[index].size)
            if n_pixels > limits.max_pixels:
                raise RequestError(
                    f"The images up to {name} have {n_pixels / 1e6:.1f} megapixels; a request may "
                    f"have {limits.max_pixels / 1e6:g}."
                )

        # 2. Opened images, which need much more memory.
        with deadline.hold(self._large, n_pixels > LARGE_IMAGES_PIXELS):
            self.images.labels("read").inc(len(files))
            for index, file in files.items():
                inputs[index] = file.open(at_least=self.system.images.min_side).image
        return inputs

    # ---- conversations

    def _conversation(
        self, turns: Sequence[Message], deadline: Deadline
    ) -> tuple[list[Message], list[ReadImage], list[str]]:
        """The turns of a request as messages of the system, their images opened or as codes, and
        notes about what is left out.

        turns: their content is as it was sent, see `MessagePart`.
        """
        # 1. The images of the newest turns that are not too much for a request.
        notes: list[str] = []
        newest = newest_turns(turns, MAX_MESSAGES, MAX_IMAGES, MAX_TEXT)
        if len(newest) < len(turns):
            limit = f"{MAX_MESSAGES} messages, {MAX_IMAGES} images and {MAX_TEXT} characters"
            notes.append(left_out_note(len(turns) - len(newest), limit))
        parts: list[Any] = [part for turn in newest for part in turn.content]
        n_characters = sum(len(part) for part in parts if isinstance(part, str))
        if n_characters > MAX_TEXT:
            raise RequestError(
                f"The message has {n_characters} characters; {MAX_TEXT} are allowed."
            )
        parts = [part for part in parts if not isinstance(part, str)]
        sent = [part.url if isinstance(part, ImageUrl) else part for part in parts]
        images = self.read_images(sent, deadline)

        # 2. Their contents. SEED-X's own images have no codes, but stand where it generated some.
        next_images = iter(images)
        n_codes = self.vocabulary.tokens_per_image
        contents: list[tuple[str, list[Any]]] = []
        for turn in newest:
            is_answer = turn.role == "assistant"
            # An answer may be sent back in several items.
            if not is_answer or not contents or contents[-1][0] != turn.role:
                contents.append((turn.role, []))
            content = contents[-1][1]
            for part in turn.content:
                image = part if isinstance(part, str) else next(next_images)
                if isinstance(image, list) and len(image) < self.vocabulary.min_codes:
                    problem = f"An image broke off after {len(image)} of {n_codes} codes"
                    if not is_answer:
                        raise RequestError(f"{problem}; send all of them, or the image.")
                    notes.append(f"{problem} and was left out.")
                elif isinstance(image, Image.Image) and is_answer and not self.has_codes:
                    content.append(ImagePart(list(range(n_codes)), image=image))
                elif image != "":
                    content.append(image)
        messages = [Message(role, tuple(content)) for role, content in contents]
        return messages, images, notes

    def _events(
        self, messages: Sequence[Message], deadline: Deadline, options: Options
    ) -> Iterator[Event]:
        """Events of the answer to a conversation, counted in the metrics."""
        is_first = True
        # `deadline` is asked before each token.
        for event in self.system.chat(messages, stream=True, should_stop=deadline, **options):
            if is_first:
                self.first.observe(deadline.elapsed())
                is_first = False
            # The last event has the answer, also if it was cut off.
            if event["type"] == "done":
                deadline.raise_if_cancelled()
                answer: Answer = event["answer"]
                self.tokens.labels("prompt").inc(answer.prompt_tokens)
                self.tokens.labels("completion").inc(len(answer.ids))
                self.images.labels("drawn").inc(len(answer.images))
                if deadline.elapsed() > deadline.seconds:
                    seconds = f"{deadline.seconds:g} seconds"
                    event["notes"].append(f"The answer was cut off after {seconds}.")
            yield event

    def generate(self, request: GenerateRequest, deadline: Deadline) -> Iterator[JsonObject]:
        """The answer of `POST /generate`."""
        # 1. The text as a conversation, or as a text that is continued.
        texts: list[tuple[str, str]] = []
        if self.template and self.system.config.tuned:
            texts = read_turns(request.text, self.template)
        if not texts:
            text = request.text.rstrip() if request.force_boi else request.text
            texts = [("raw" if self.template else "user", text)]
        urls_and_codes = (
            ImageUrl(url=item) if isinstance(item, str) else item for item in request.images
        )
        turns: list[Message] = []
        for role, text in texts:
            turn_images: list[Any] = [*islice(urls_and_codes, text.count(PLACEHOLDER))]
            turns.append(Message(role, tuple(interleave(text, turn_images))))
        messages, images, notes = self._conversation(turns, deadline)

        # 2. Settings; LaVIT's own defaults stay where the request does not set them.
        options = request.model_dump(exclude_none=True, exclude_unset=self.template is None)
        if request.force_boi and "max_new_tokens" in options:
            min_new_tokens = self.vocabulary.min_codes + 1
            options["max_new_tokens"] = max(request.max_new_tokens, min_new_tokens)
        options["images"] = "forced" if request.force_boi else "auto"
        options |= {"previews": (), "read_back": False, "notes": notes}

        # 3. The last event has the answer.
        *_, done = self._events(messages, deadline, options)
        yield self._generate_response(done, images).model_dump()

    def _generate_response(self, done: Event, images: Sequence[ReadImage]) -> GenerateResponse:
        """The answer with the original's fields; `images`: of the request."""
        # The answer's images follow those of the request; a broken one has empty entries.
        codes: list[Any] = [image if isinstance(image, list) else None for image in images]
        sent = [index for index, row in enumerate(codes) if row is None]
        if sent and self.system.abilities.reads_codes:  # the encoder knows images of the request
            rows = self.system.images.encode([images[index] for index in sent])
            for index, row in zip(sent, rows, strict=True):
                codes[index] = row.tolist()
        response = GenerateResponse(images_ids=codes, error_msg=done["notes"])
        texts: list[str] = []
        for part in done["answer"].written:
            if isinstance(part, str):  # the model may spell the placeholder in ordinary letters
                texts.append(part.replace(PLACEHOLDER, "<image >").strip())
                continue
            texts.append(PLACEHOLDER)
            data = ""
            if isinstance(part, BrokenImagePart):
                response.images_ids.append([])
                response.error_msg.append(part.reason)
            else:
                response.images_ids.append(part.codes if self.has_codes else None)
                if part.image is None:
                    response.error_msg.append(CANNOT_DRAW)
                else:
                    data = image_to_base64(part.image)
            response.images.append(data)
        response.text = " ".join(filter(None, texts))
        return response

    def complete(self, request: ChatRequest, deadline: Deadline) -> Iterator[JsonObject]:
        """The answer of `POST /v1/chat/completions`, or its chunks."""
        return completion(request, self.name, self.chat(request, deadline))

    def respond(self, request: ResponsesRequest, deadline: Deadline) -> Iterator[JsonObject]:
        """The answer of `POST /v1/responses`, or its events."""
        events = response_events(request, self.name, self.chat(request, deadline))
        if request.stream:
            yield from events
        else:
            *_, last = events
            yield last["response"]

    def chat(
        self, request: ChatRequest | ResponsesRequest, deadline: Deadline
    ) -> Iterator[JsonObject]:
        """Changes of an OpenAI message (`content`, …), and last `usage` and `finish_reason`."""
        # 1. The conversation, of which LaVIT answers the last message only.
        separator = self.system.tasks.answer_after
        turns: list[Message] = []
        for message in request.conversation if self.template else request.conversation[-1:]:
            parts: Sequence[Any] = message.parts
            if message.role == "user" and self.system.config.tuned:
                parts = images_before_question(parts)
            # Another model wrote what this one never does.
            if message.reasoning and separator and message.role == "assistant":
                parts = [message.reasoning + separator, *parts]
            turns.append(Message(message.role.replace("developer", "system"), tuple(parts)))
        messages, images, notes = self._conversation(turns, deadline)
        notes += self._model_notes(request.model)

        # 2. The settings that differ from the system's.
        options = request.model_dump(exclude_none=True)
        form = request.image_options
        options |= self._drawing_options(form, request.ratio)
        options |= {"images": request.images, "previews": (), "notes": notes}
        if request.stream:
            options["previews"] = None if request.previews else self._preview_lengths(form)

        # 3. Texts and images while they are generated.
        index = 0  # of the current image
        offset = 0  # characters of the text so far
        follows_image = False
        for event in self._events(messages, deadline, options):
            if event["type"] == "reasoning":
                yield {"reasoning_content": event["text"]}
            elif event["type"] == "text":
                # Without blanks at the beginning, and with one behind an image.
                text = event["text"]
                if offset == 0:
                    text = text.lstrip()
                elif follows_image and not text[:1].isspace():
                    text = f" {text}"
                follows_image = False
                offset += len(text)
                yield {"content": text}
            else:
                # An image; previews have the index of the image that replaces them.
                follows_image = True
                is_complete = event["type"] in ("image", "image_broken")
                if event.get("image") is not None:
                    yield {"images": [self._image_part(event, index, offset, form)]}
                elif is_complete:
                    yield {"notes": [event.get("reason", CANNOT_DRAW)]}
                index += is_complete

        # 4. What is known at the end: the last event has the answer.
        answer = event["answer"]
        edges_of_boxes, _ = self.system.family.boxes(answer)
        # They are on the last image; boxes of a text alone have none to be drawn on.
        boxes = [{"image": len(images) - 1, "box": edges} for edges in edges_of_boxes if images]
        n_reasoning = len(self.system.tokenizer.encode(answer.reasoning))
        details = f"{request.usage_names[1]}_tokens_details"
        usage = {details: {"reasoning_tokens": n_reasoning}}
        yield {
            "boxes": boxes,
            "notes": event["notes"],
            "finish_reason": "stop" if answer.finish_reason == "stop" else "length",
            "usage": usage_of(answer, *request.usage_names) | usage,
        }

    def _image_part(
        self, event: Event, index: int, offset: int, options: ImageOptions
    ) -> JsonObject:
        """An image of an answer as a part of OpenAI's message, see `schema.Part`."""
        image = event["image"]
        assert image is not None
        url = f"data:image/{options.output_format};base64,{encoded(image, options)}"
        return {
            "type": "image_url",
            "image_url": {"url": url},
            "index": index,
            "offset": offset,
            "codes": event["codes"] if self.has_codes else None,
            "preview": event["type"] == "image_preview",
            **revised_prompt(image),
        }

    # ---- images

    def draw(self, request: ImagesRequest, deadline: Deadline) -> Iterator[JsonObject]:
        """Images of a text, or edits: one object, or OpenAI's events of a stream."""
        # 1. The settings.
        seed = random_seed() if request.seed is None else request.seed
        options = self._drawing_options(request, request.ratio)
        if request.partial_images and not request.stream:
            raise RequestError("Only a stream shows unfinished images.", "partial_images")
        previews = self._preview_lengths(request)
        options |= {"num_images": request.n, "stream": True, "previews": previews}
        options |= {"should_stop": deadline, "read_back": request.read_back}

        # 2. The images; all files belong to one request.
        kind = "image_generation"
        if isinstance(request, EditsRequest):
            kind = "image_edit"
            images = [self.read_images(request.image, deadline)]
            events = self.system.edit(images, [request.prompt], seed, **options)
        else:
            events = self.system.draw([request.prompt], seed, **options)

        # 3. Their events; without a stream, one object has all images and their notes.
        notes = self._model_notes(request.model)
        data: list[JsonObject] = []
        for event in events:
            image = event["image"]
            form = {
                "output_format": request.output_format,
                "size": request.size or f"{image.width}x{image.height}",
                "quality": "auto",
                "background": "opaque",
            }
            content = {"b64_json": encoded(image, request), **revised_prompt(image)}
            common = {**content, "created_at": int(time.time()), **form, "index": event["index"]}
            if event["type"] == "image_preview":
                count = previews.index(len(event["codes"]))
                yield {"type": f"{kind}.partial_image", **common, "partial_image_index": count}
                continue
            data.append(content)
            notes += [note for note in event["notes"] if note not in notes]
            self.images.labels("drawn").inc()
            if request.stream:
                usage = usage_of(event["answer"], "input", "output")
                yield {"type": f"{kind}.completed", **common, "usage": usage, "notes": notes}
        if not request.stream:
            yield {"created": int(time.time()), "data": data, **form, "notes": notes}

    def _drawing_options(self, request: ImageOptions, ratio: str | None) -> Options:
        """Settings of drawing by `size` and `ratio`. Raises RequestError: no such one."""
        ratios = find_family(self.system.config.system).page_cards().family.ratios
        if ratio is not None and not ratios:
            raise RequestError(f"{self.name} does not take it.", "ratio")
        ratios = ratios or ("1:1",)
        sides = [1]
        if request.size:
            # Drawings have the size of the model, in that ratio; `encoded` resizes them.
            sides = [int(side) for side in request.size.split("x")]
            divisor = math.gcd(*sides)
            size_ratio = ":".join(str(side // divisor) for side in sides)
            if ratio not in (None, size_ratio):
                raise contradiction("ratio", "size")
            if not self.system.abilities.codes_are_rows:
                return dict(zip(("width", "height"), sides, strict=True))
            ratio = size_ratio
        if ratio not in (None, *ratios) or max(sides) > MAX_SIDE:
            raise RequestError(
                f"{self.name} draws in {', '.join(ratios)}, at most {MAX_SIDE} pixels a side.",
                "size" if request.size else "ratio",
            )
        return {} if ratio in (None, "1:1") else {"ratio": ratio}

    def _preview_lengths(self, request: ImageOptions) -> list[int]:
        """Numbers of codes after which an image is shown, at equal distances; none where the model
        needs all codes."""
        if not self.system.abilities.first_codes:
            return []
        parts = request.partial_images + 1
        return [self.vocabulary.tokens_per_image * part // parts for part in range(1, parts)]

    def tokenize(self, request: TokensRequest, deadline: Deadline) -> Iterator[JsonObject]:
        """The codes of images, or the images of codes."""
        if not self.has_codes:
            raise RequestError("The images of this model have no rows of codes.")
        if request.codes:
            # Codes → images.
            options: Options = {}
            if request.first:
                n_codes = self.vocabulary.tokens_per_image
                if request.first > n_codes or not self.system.abilities.first_codes:
                    raise RequestError(
                        f"{self.name} cannot draw from so many of {n_codes} codes.", "first"
                    )
                options["codes"] = request.first
            drawings = self.system.reconstruct(
                request.codes, request.seed, should_stop=deadline, **options
            )
            data: list[JsonObject] = [{"b64_json": image_to_base64(image)} for image in drawings]
        else:
            # Images → codes.
            images: list[Any] = self.read_images(request.images, deadline)
            rows = self.system.images.encode(images, seed=request.seed)
            data = [{"codes": [int(code) for code in row]} for row in rows]
        yield {"created": int(time.time()), "data": data}


def encoded(image: Image.Image, options: ImageOptions) -> str:
    """Base64 of an image in the size and format that a request asks for."""
    if options.size:
        width, height = map(int, options.size.split("x"))
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return image_to_base64(image, options.output_format, quality=options.output_compression)


def revised_prompt(image: Image.Image) -> JsonObject:
    """OpenAI's field with the system's description of an image that it drew, if there is one."""
    return {"revised_prompt": image.info[DESCRIPTION]} if DESCRIPTION in image.info else {}


def usage_of(answer: Answer, prompt: str, completion: str) -> JsonObject:
    """The tokens of an answer; `prompt`, `completion`: how the route calls its two sides."""
    n_tokens = len(answer.ids)
    return {
        f"{prompt}_tokens": answer.prompt_tokens,
        f"{completion}_tokens": n_tokens,
        "total_tokens": answer.prompt_tokens + n_tokens,
    }


def read_turns(text: str, template: PromptTemplate) -> list[tuple[str, str]]:
    """Role and text of each turn of a conversation in a template; [] for another text."""
    # Blanks around the texts may differ from the template's.
    opening = template.user_prefix.rstrip()
    if not opening or not text.startswith(opening):
        return []
    turns: list[tuple[str, str]] = []
    for piece in text.removeprefix(opening).split(template.turn_marker):
        question, separator, answer = piece.partition(template.user_suffix.rstrip())
        if not separator:
            return []
        turns += [("user", question.strip()), ("assistant", answer.strip())]
    # The last turn is to be answered.
    return turns[:-1] if not turns[-1][1] else []
