"""The page's chat session: a visitor's conversation and images, and the page's event handlers.

A conversation is a list of OpenAI's messages, which are sent as they are, with further keys:
`path`, an image's file, and of an answer `below`, texts and images that are displayed below it, and
`settings`, those of its request.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import logging
import os
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import RequestError, SeedError
from seed_multimodal.images import io
from seed_multimodal.images.sheet import draw_boxes
from seed_multimodal.language.vocabulary import BLANK, BOX_WORDS, PLACEHOLDER
from seed_multimodal.models.registry import Example
from seed_multimodal.serving.client import ModelClient
from seed_multimodal.serving.conversation_log import ConversationLog

logger = logging.getLogger(__name__)

# The original's page refuses more than its server.
BLANK_INPUT = BLANK + "?!;/"
IMAGES = Path(__file__).resolve().parents[3] / "images"  # of the examples
UPLOADS = io.ImageLimits(max_bytes=64 << 20)
LONGEST_SIDE = 1792  # of an image that is sent: four views of 448 pixels (SEED-X)
RETRY_TEMPERATURE = 0.7  # of a second answer where the first was the likeliest one
DRAWN_AT_ONCE = 4  # images of the Draw tab, from consecutive seeds
WARNING_SECONDS = 10  # that a warning is displayed
TABS = ("draw", "edit", "codes", "find")
TOO_LONG = "Error: History exceeds maximum rounds, please clear history and restart."

Message = JsonObject
Update = Any  # what a handler returns for a component: a value, `gr.update(…)` or `gr.skip()`


@contextlib.contextmanager
def warn_about_errors() -> Iterator[None]:
    """Display a `SeedError` as a warning of the page, and continue behind the block."""
    try:
        yield
    except SeedError as error:
        gr.Warning(html.escape(str(error)))


@dataclass
class ChatSession:
    """One visitor's session.

    Attributes:
        model: the chosen one of `models`.
        log: of conversations and votes; None: nothing is logged.
        turns: the conversation.
        pending: the conversation that is to be answered.
        draft: a message for the box: one that was not answered, or the next one of an example.
        script: messages of an example that follow, each after the answer before.
        uploads: images of uploaded files, as parts of messages.
        refused: files that are no images, and when the visitor was warned about each.
        folder: of the visitor's images; "": none yet.
    """

    models: list[ModelClient]
    model: ModelClient
    log: ConversationLog | None = None
    turns: list[Message] = field(default_factory=list)
    pending: list[Message] = field(default_factory=list)
    draft: Message | None = None
    script: list[str] = field(default_factory=list)
    uploads: dict[str, Message] = field(default_factory=dict)
    refused: dict[str, float] = field(default_factory=dict)
    folder: str = ""

    # ---- the visitor's images

    def save_image(self, image: Image.Image) -> str:
        """Store an image in the visitor's folder; returns its path."""
        if not self.folder:
            self.folder = tempfile.mkdtemp(prefix="visit_", dir=os.environ["GRADIO_TEMP_DIR"])
        path = f"{self.folder}/{uuid.uuid4().hex}.png"
        image.save(path)
        return path

    def store_upload(self, upload: str | None) -> Message:
        """Check an uploaded image and store it in the model's size; returns a part of a message."""
        if not upload:
            raise RequestError("Choose an image first.")
        if upload not in self.uploads:
            image = io.open_image(upload, limits=UPLOADS, at_least=LONGEST_SIDE).image
            # The page shows what the model sees: the image, or a square of it.
            image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            if self.model.card.keeps_aspect:
                sent = image
            else:
                image = io.chat_image(image)
                sent = io.request_image(image)
            self.uploads[upload] = {
                "type": "image_url",
                "image_url": {"url": f"data:image/png;base64,{io.image_to_base64(sent)}"},
                "path": self.save_image(image),
            }
        return self.uploads[upload]

    async def stored_upload(self, upload: str | None) -> Message:
        """`store_upload` in a thread: decoding an image would delay other visitors' answers."""
        return await asyncio.to_thread(self.store_upload, upload)

    # ---- what is to be answered

    def on_submit(self, message: JsonObject) -> None:
        with warn_about_errors():
            images = [self.store_upload(upload) for upload in message["files"]]
            text = (message["text"] or "").strip()
            self.pending = [*self.turns, user_message(text, images)]
            # Another message than the one in the box ends an example.
            if self.script and text == self.script[0]:
                self.script = self.script[1:]
            else:
                self.script = []

    def on_example(self, chosen: gr.SelectData) -> None:
        example = installed_examples(self.model.card.examples)[int(chosen.index)]
        self.on_submit({"text": example.text, "files": example_files(example)})
        self.script = [*example.then]

    def on_retry(self) -> None:
        self.pending = self.turns[:-1]

    def on_edit(self, edited: gr.EditData) -> None:
        """An earlier message with another text; its images stay, what followed it is dropped."""
        index = message_index(edited)
        images = [part for part in self.turns[index]["content"] if "path" in part]
        with warn_about_errors():
            message = user_message(str(edited.value).strip(), images)
            self.pending = [*self.turns[:index], message]

    # ---- the answer

    async def reply(self, *settings: Any) -> AsyncIterator[tuple[Update, Update]]:
        """Conversation and message box while `pending` is answered.

        If it is stopped, the answer so far stays. Without any, the conversation is as before, and
        a new message returns to its box.

        settings: as of `request`.
        """
        # 1. The page shows the message at once, and an empty answer.
        turns_before = self.turns
        messages = self.pending
        if not messages:  # the message was refused
            yield gr.skip(), gr.skip()
            return
        answer: Message = {"role": "assistant", "content": [], "below": []}
        box = gr.update(submit_btn=False, stop_btn=True)
        self.draft = None
        if len(messages) > len(turns_before):  # a new message, which leaves the box
            self.draft = messages[-1]
            box["value"] = None
        yield chatbot_messages([*messages, answer]), box

        complete = False
        try:
            # 2. The answer grows with each event.
            with warn_about_errors():
                request = self.request(messages, *settings)
                answer["settings"] = {**request}
                del answer["settings"]["messages"]
                body = {**request, "stream": True, "previews": True}
                async for event in self.model.stream("/v1/chat/completions", json=body):
                    change = event["choices"][0]["delta"]
                    for image in change.get("images", ()):
                        image["path"] = self.save_image(
                            await decode_image(image["image_url"]["url"])
                        )
                    if change.get("boxes"):
                        marked = image_with_boxes(messages, change["boxes"])
                        answer["below"].append({"path": self.save_image(marked)})
                    add_change(answer, change)
                    yield chatbot_messages([*messages, answer]), gr.skip()
                complete = True
            if not complete:  # it failed
                answer["content"] = []
        finally:
            # 3. Also when the visitor stops it. A conversation that was begun meanwhile stays.
            answer["content"] = without_previews(answer["content"])
            if (complete or answer["content"]) and self.turns is turns_before:
                if not complete:
                    answer["below"].append({"text": "Stopped."})
                self.turns = [*messages, answer]
                self.draft = None
                if complete and self.script:
                    self.draft = user_message(self.script[0], [])
        # 4. A full disk of the log is the operator's concern, not the visitor's.
        if complete and self.turns and self.turns[-1] is answer:
            try:
                await self.add_to_log("common", self.turns)
            except SeedError as error:
                logger.warning("%s", error)

    def request(
        self,
        messages: list[Message],
        force_image: bool,
        ratio: str | None,
        beams: float,
        max_new_tokens: float,
        temperature: float,
        top_p: float,
        max_rounds: float,
    ) -> JsonObject:
        """The body of a chat request, with a new seed. A retry is sampled even at temperature 0."""
        # 1. The conversation, or the last message in the model's template.
        card = self.model.card
        is_retry = messages == self.turns[:-1]
        if card.single_turn_template is not None:
            opening, closing = card.single_turn_template
            content = [text_part(opening), *messages[-1]["content"], text_part(closing)]
            messages = [{"role": "user", "content": content}]
        if len(messages) > 2 * max_rounds:
            raise RequestError(TOO_LONG)

        # 2. Its settings.
        body = {
            "messages": [sent_message(message) for message in messages],
            "force_image": bool(force_image),
            "seed": random.randrange(2**31),
        }
        if card.ratios:  # the model's own settings
            if force_image:
                body["ratio"] = ratio
            return body
        if not temperature:
            temperature = RETRY_TEMPERATURE if is_retry else 0
        return {
            **body,
            "num_beams": int(beams),
            "max_tokens": int(max_new_tokens),
            "top_p": top_p,
            "temperature": temperature,
        }

    def on_end(self) -> tuple[Update, Update]:
        """The conversation; a message without an answer returns to its box."""
        box = gr.update(submit_btn=True, stop_btn=False)
        if self.draft:
            # Images stand before the text, see `user_message`.
            *images, text = self.draft["content"]
            files = [image["path"] for image in images]
            box["value"] = {"text": text["text"], "files": files}
        self.pending = []
        self.draft = None
        return chatbot_messages(self.turns), box

    # ---- the log

    async def add_to_log(self, kind: str, messages: Sequence[Message]) -> None:
        """Log a conversation, if there is a log; in a thread. Raises DataError: disk error."""
        if self.log is not None:
            await asyncio.to_thread(self.log.add, kind, self.model.name, messages)

    async def on_vote(self, vote: gr.LikeData) -> None:
        """Log a vote with the conversation up to its answer."""
        kinds = {True: "upvote", False: "downvote"}  # "": taken back
        with warn_about_errors():
            kind = kinds.get(vote.liked, "withdrawn")
            await self.add_to_log(kind, self.turns[: message_index(vote) + 1])

    # ---- the conversation's other buttons

    def on_undo(self) -> None:
        """Take back the last message and its answer."""
        self.draft = self.turns[-2]
        self.script = []
        self.turns = self.turns[:-2]

    def reset(self) -> None:
        """A new conversation; the visitor's images are removed."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.turns = []
        self.draft = None
        self.script = []
        self.uploads = {}
        self.folder = ""

    @staticmethod
    def on_clear() -> tuple[Update, Update]:
        """An empty conversation and message box, after the last update of a cancelled answer."""
        return [], gr.update(value=None, submit_btn=True, stop_btn=False)

    def on_choose(self, message: JsonObject) -> Update:
        """Warn about a chosen file that is no image, and take it out of the message."""
        files = []
        for upload in message["files"]:
            try:
                self.store_upload(upload)
                files.append(upload)
            except SeedError as error:
                # Gradio calls this twice for a choice: the warning is displayed already.
                warned = self.refused.get(upload, -WARNING_SECONDS)
                if time.monotonic() - warned > WARNING_SECONDS:
                    self.refused[upload] = time.monotonic()
                    gr.Warning(html.escape(str(error)), WARNING_SECONDS)
        return gr.skip() if files == message["files"] else {**message, "files": files}

    async def on_model(self, index: int) -> tuple[Update, ...]:
        """Start a new conversation with a model; returns updates of the outputs in `page.build`."""
        # 1. The models that the backends serve now.
        self.reset()
        for model in self.models:
            with warn_about_errors():
                await model.load_card()
        self.model = self.models[index]
        card = self.model.card

        # 2. What differs between them.
        names = [(model.card.title, position) for position, model in enumerate(self.models)]
        ratios = gr.update(
            choices=list(card.ratios),
            value=next(iter(card.ratios), None),
            visible=bool(card.ratios),
        )
        n_codes = self.model.codes_per_image
        most_codes = max(2, n_codes)  # a slider needs a range, hidden ones too
        return (
            self,
            f"# {card.title}",
            gr.update(choices=names),
            gr.update(value=[], examples=chatbot_examples(card.examples)),
            card.temperature,
            card.max_rounds,
            False,
            ratios,
            ratios,
            gr.update(maximum=most_codes, value=most_codes),
            gr.update(maximum=most_codes, value=n_codes // 2),
            *(gr.update(visible=tab in card.tabs) for tab in TABS),
        )

    # ---- the other tabs

    async def images(
        self,
        captions: Sequence[str],
        route: str,
        **content: Any,
    ) -> Update:
        """Images of a route, for a gallery; `content`: as of `ModelClient.stream`."""
        response = await anext(self.model.stream(route, **content))
        for note in response.get("notes", ()):
            gr.Info(html.escape(note))
        return [
            (await decode_image(image["b64_json"]), caption)
            for image, caption in zip(response["data"], captions, strict=False)
        ]

    async def on_draw(self, text: str, seed: float, ratio: str | None) -> Update:
        """Images of a text, from consecutive seeds."""
        first_seed = int(seed)
        captions = [f"seed {first_seed + offset}" for offset in range(DRAWN_AT_ONCE)]
        with warn_about_errors():
            body = {
                "prompt": not_empty(text),
                "seed": first_seed,
                "n": DRAWN_AT_ONCE,
                "ratio": ratio,
            }
            return await self.images(captions, "/v1/images/generations", json=body)
        return gr.skip()

    async def on_change(self, upload: str | None, text: str, seed: float) -> Update:
        """An image changed as a text says."""
        with warn_about_errors():
            image = await self.stored_upload(upload)
            return await self.images(
                [text],
                "/v1/images/edits",
                files={"image": Path(image["path"]).read_bytes()},
                data={"prompt": not_empty(text), "seed": int(seed)},
            )
        return gr.skip()

    async def on_codes(self, upload: str | None) -> tuple[str, list[int]]:
        """The codes of an uploaded image, as a strip of colours and as numbers."""
        if upload:
            with warn_about_errors():
                image = await self.stored_upload(upload)
                body = {"images": [image["image_url"]["url"]]}
                response = await anext(self.model.stream("/v1/images/tokens", json=body))
                codes = response["data"][0]["codes"]
                return code_strip(codes), codes
        return "", []

    async def on_swap(
        self, first: list[int], second: list[int], count: float, n_exchanged: float
    ) -> Update:
        """Images of the first `count` codes of each image.

        first, second: codes of an image, or none.
        n_exchanged: with two images, so many of their first codes change places.
        """
        # 1. The exchange.
        if first and second:
            n = int(n_exchanged)
            first, second = [*second[:n], *first[n:]], [*first[:n], *second[n:]]

        # 2. Images of the codes that there are.
        rows = {"first": first, "second": second}
        rows = {name: codes for name, codes in rows.items() if codes}
        if not rows:
            gr.Warning("Choose an image first.")
            return gr.skip()
        body = {"codes": [*rows.values()], "first": int(count)}
        with warn_about_errors():
            return await self.images([*rows], "/v1/images/tokens", json=body)
        return gr.skip()

    async def on_find(self, upload: str | None, phrase: str) -> Update:
        """The image with boxes around what a phrase names."""
        with warn_about_errors():
            # The tuned request, greedy.
            question = self.model.card.tasks.detect_request(not_empty(phrase))
            messages = [user_message(question, [await self.stored_upload(upload)])]
            body = {
                "messages": list(map(sent_message, messages)),
                "num_beams": 1,
                "max_tokens": 256,
                "temperature": 0,
            }
            response = await anext(self.model.stream("/v1/chat/completions", json=body))
            answer = response["choices"][0]["message"]
            caption = " ".join([BOX_WORDS.sub(" ", answer["content"]), *answer["notes"]])
            return [(image_with_boxes(messages, answer["boxes"]), caption)]
        return []


# ---- messages


def not_empty(text: str) -> str:
    """The text of a tab. Raises RequestError: empty."""
    if not text.strip(BLANK_INPUT):
        raise RequestError("Write a text first.")
    return text


def message_index(event: gr.EventData) -> int:
    """The position of the message that was edited or voted on."""
    index = event.index
    return int(index[0] if isinstance(index, list | tuple) else index)


def text_part(text: str) -> Message:
    return {"type": "text", "text": text}


def sent_message(message: Message) -> Message:
    """A message without what only the page reads, as paths of images."""
    content: list[JsonObject] = []
    for part in message["content"]:
        content.append({name: value for name, value in part.items() if name != "path"})
    return {"role": message["role"], "content": content}


def user_message(text: str, images: Sequence[Message]) -> Message:
    """The user's input. Raises RequestError: empty, or contains the image placeholder."""
    if PLACEHOLDER in text:
        raise RequestError(f"Please do not type {PLACEHOLDER}: it stands for images.")
    if not images and not text.strip(BLANK_INPUT):
        raise RequestError("Write a message or choose an image first.")
    return {"role": "user", "content": [*images, text_part(text)]}


def without_previews(content: Sequence[Message]) -> list[Message]:
    return [part for part in content if not part.get("preview")]


def add_change(answer: Message, change: JsonObject) -> None:
    """Add a change of a stream to an answer: images, which replace previews, text, and notes."""
    for image in change.get("images", ()):
        answer["content"] = [*without_previews(answer["content"]), image]
    text = change.get("content")
    if text:
        content = answer["content"]
        if not content or "text" not in content[-1]:
            content.append(text_part(""))
        content[-1]["text"] += text
    answer["below"] += [{"text": note} for note in change.get("notes", ())]


async def decode_image(data: str) -> Image.Image:
    """An image of base64 or a data URL, decoded in a thread."""
    return (await asyncio.to_thread(io.open_image, data)).image


# ---- what the page displays


def chatbot_messages(messages: Sequence[Message]) -> list[Message]:
    """Messages in the form of Gradio's Chatbot."""
    displayed = []
    for message in messages:
        # Texts without words for boxes, which are drawn instead.
        content: list[str | JsonObject] = []
        for part in [*message["content"], *message.get("below", ())]:
            if "path" in part:
                content.append({"path": part["path"], "alt_text": "image"})
                continue
            text = BOX_WORDS.sub(" ", part["text"]).strip()
            if text:
                content.append(text)
        displayed.append({"role": message["role"], "content": content or ["…"]})
    return displayed


def example_files(example: Example) -> list[str]:
    return [str(IMAGES / name) for name in example.images]


def installed_examples(examples: Sequence[Example]) -> list[Example]:
    """Those whose images are installed: a wheel has none."""
    return [example for example in examples if all(map(os.path.isfile, example_files(example)))]


def chatbot_examples(examples: Sequence[Example]) -> list[JsonObject]:
    """Examples in the form of Gradio's Chatbot."""
    displayed = []
    for example in installed_examples(examples):
        label = example.text or "Describe it"
        if example.then:
            label += " …"
        displayed.append(
            {"text": example.text, "display_text": label, "files": example_files(example)}
        )
    return displayed


def image_with_boxes(messages: Sequence[Message], boxes: Sequence[JsonObject]) -> Image.Image:
    """The last image of messages with the boxes of their answer, which are shares of its sides."""
    paths: list[str] = []
    for message in messages:
        paths += [part["path"] for part in message["content"] if "path" in part]
    # Shares of the sides → pixels.
    image = io.open_image(paths[-1]).image
    width, height = image.size
    corners = []
    for box in boxes:
        left, top, right, bottom = box["box"]
        corners.append(
            [int(left * width), int(top * height), int(right * width), int(bottom * height)]
        )
    return draw_boxes(image, corners)


def code_strip(codes: Sequence[int]) -> str:
    """Codes as coloured fields, equal codes in equal colours."""
    fields = []
    for code in codes:
        hue = code * 137.508 % 360  # the golden angle: neighbours differ
        lightness = 60 + code % 5 * 6
        fields.append(f'<span style="background: hsl({hue:.0f} 65% {lightness}%)">{code}</span>')
    label = f"codes {', '.join(map(str, codes))}"
    return f'<div class="strip" role="img" aria-label="{label}">{"".join(fields)}</div>'
