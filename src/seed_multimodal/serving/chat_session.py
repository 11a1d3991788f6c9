"""What the page's buttons do: one visitor's conversation, images and requests.

A conversation is a list of OpenAI's messages, sent as they are; `path`: an image's file; `below`: shown, and not sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import os
import random
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from seed_multimodal.errors import RequestError, SeedError
from seed_multimodal.images import io
from seed_multimodal.images.sheet import draw_boxes
from seed_multimodal.language.prompts import SEED_X_TASKS
from seed_multimodal.language.vocabulary import BOX_WORDS, PLACEHOLDER
from seed_multimodal.serving.client import ModelClient

IMAGES = Path(__file__).resolve().parents[3] / "images"  # of the examples
UPLOADS = io.ImageLimits(max_bytes=64 << 20)
LONGEST_SIDE = 1792  # of an image that is sent: four views of 448 pixels (SEED-X)
AGAIN = 0.7  # temperature of a second answer where the first was the likeliest one
TOO_LONG = "Error: History exceeds maximum rounds, please clear history and restart."
Message = dict[str, Any]


@contextlib.contextmanager
def warn_about_errors() -> Iterator[None]:
    """Show a `SeedError` to the visitor, and go on."""
    try:
        yield
    except SeedError as error:
        gr.Warning(html.escape(str(error)))


@dataclass
class ChatSession:
    """One visitor, and the page's handlers; `pending`: a conversation to be answered; `draft`: a message that returns
    to its box; `uploads`: images of uploads, as parts of messages."""

    models: list[ModelClient]
    model: ModelClient
    turns: list[Message] = field(default_factory=list)
    pending: list[Message] = field(default_factory=list)
    draft: Message | None = None
    uploads: dict[str, Message] = field(default_factory=dict)
    folder: str = ""

    def save_image(self, image: Image.Image) -> str:
        """Store an image in the visitor's folder; returns its path."""
        self.folder = self.folder or tempfile.mkdtemp(
            prefix="visit_", dir=os.environ["GRADIO_TEMP_DIR"]
        )
        image.save(path := f"{self.folder}/{uuid.uuid4().hex}.png")
        return path

    def reset(self) -> None:
        """Start over; the visitor's images are removed."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.turns, self.draft, self.uploads, self.folder = [], None, {}, ""

    def store_upload(self, upload: str | None) -> Message:
        """An uploaded image as a part of a message, checked, and stored as the model is shown it."""
        if not upload:
            raise RequestError("Choose an image first.")
        if upload not in self.uploads:
            whole, image = (
                self.model.card.keeps_aspect,
                io.open_image(upload, limits=UPLOADS, at_least=LONGEST_SIDE),
            )
            image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            image = image if whole else io.chat_image(image)
            data = io.image_to_base64(image if whole else io.request_image(image))
            self.uploads[upload] = {
                "type": "image_url",
                "image_url": {"url": f"data:image/png;base64,{data}"},
                "path": self.save_image(image),
            }
        return self.uploads[upload]

    def on_submit(self, message: dict[str, Any]) -> None:
        with warn_about_errors():
            images = [self.store_upload(upload) for upload in message["files"]]
            self.pending = [*self.turns, user_message((message["text"] or "").strip(), images)]

    def on_example(self, chosen: gr.SelectData) -> None:
        self.on_submit(
            {**chosen.value, "files": [file["path"] for file in chosen.value.get("files", ())]}
        )

    def on_retry(self) -> None:
        self.pending = self.turns[:-1]

    def on_edit(self, edited: gr.EditData) -> None:
        """An earlier message with other words, its images kept; what followed it is dropped."""
        place = edited.index[0] if isinstance(edited.index, list | tuple) else edited.index
        images = [part for part in self.turns[place]["content"] if "path" in part]
        with warn_about_errors():
            self.pending = [*self.turns[:place], user_message(str(edited.value).strip(), images)]

    async def reply(self, *settings: Any) -> AsyncIterator[tuple[Any, Any]]:
        """Conversation and message box while `pending` is answered. Stopped, what there is of the answer stays;
        without any the conversation is as before, and a new message returns to its box."""
        before, asked, complete = self.turns, self.pending, False
        if not asked:  # it was refused
            yield gr.skip(), gr.skip()
            return
        answer: Message = {"role": "assistant", "content": [], "below": []}
        self.draft = asked[-1] if len(asked) > len(before) else None
        emptied = {"value": None} if self.draft else {}
        yield (
            chatbot_messages([*asked, answer]),
            gr.update(submit_btn=False, stop_btn=True, **emptied),
        )
        try:
            with warn_about_errors():
                body = {**self.request(asked, *settings), "stream": True, "previews": True}
                async for piece in self.model.stream("/v1/chat/completions", json=body):
                    change = piece["choices"][0]["delta"]
                    for image in change.get("images", ()):
                        decoded = await asyncio.to_thread(
                            io.image_from_base64, image["image_url"]["url"]
                        )
                        image["path"] = self.save_image(decoded)
                    if change.get("boxes"):
                        answer["below"].append(
                            {"path": self.save_image(image_with_boxes(asked, change["boxes"]))}
                        )
                    add_change(answer, change)
                    yield chatbot_messages([*asked, answer]), gr.skip()
                complete = True
            answer["content"] = answer["content"] if complete else []
        finally:
            answer["content"] = [part for part in answer["content"] if not part.get("preview")]
            if (complete or answer["content"]) and self.turns is before:
                answer["below"] += [] if complete else [{"text": "Stopped."}]
                self.turns, self.draft = [*asked, answer], None

    def request(
        self,
        messages: list[Message],
        force: bool,
        ratio: str | None,
        beams: float,
        tokens: float,
        temperature: float,
        top_p: float,
        rounds: float,
    ) -> dict[str, Any]:
        """The body of a chat request, with another seed each time; the same messages again get some chance, too."""
        kind, again = self.model.card, messages == self.turns[:-1]
        if kind.single_turn_template is not None:
            opening, closing = (
                {"type": "text", "text": words} for words in kind.single_turn_template
            )
            messages = [{"role": "user", "content": [opening, *messages[-1]["content"], closing]}]
        if len(messages) > 2 * rounds:
            raise RequestError(TOO_LONG)
        settings: dict[str, Any] = {
            "num_beams": int(beams),
            "max_tokens": int(tokens),
            "top_p": top_p,
            "temperature": temperature or (AGAIN if again else 0),
        }
        if kind.ratios:
            settings = {"ratio": ratio} if force else {}
        return {
            "messages": messages,
            **settings,
            "force_image": bool(force),
            "seed": random.randrange(2**31),
        }

    def on_end(self) -> tuple[Any, Any]:
        """The conversation as it is now; a message without an answer is in its box again."""
        value = {}
        if self.draft:
            *images, words = self.draft["content"]
            value["value"] = {"text": words["text"], "files": [image["path"] for image in images]}
        self.pending, self.draft = [], None
        return chatbot_messages(self.turns), gr.update(submit_btn=True, stop_btn=False, **value)

    def on_undo(self) -> tuple[Any, Any]:
        """Take back the last message and its answer."""
        self.turns, self.draft = self.turns[:-2], self.turns[-2]
        return self.on_end()

    @staticmethod
    def on_clear() -> tuple[Any, Any]:
        """An empty conversation and message box, once the end of an answer that was on its way is on the page."""
        return [], gr.update(value=None, submit_btn=True, stop_btn=False)

    def on_choose(self, message: dict[str, Any]) -> Any:
        """Name a file that is no image at once, and take it out of the message."""
        good = []
        for upload in message["files"]:
            with warn_about_errors():
                self.store_upload(upload)
                good.append(upload)
        return gr.skip() if good == message["files"] else {**message, "files": good}

    async def on_model(self, place: int) -> tuple[Any, ...]:
        """Another model, and a new conversation; shows what it can."""
        self.reset()
        for model in self.models:
            with warn_about_errors():
                await model.load_card()
        self.model = self.models[place]
        kind = self.model.card
        names = gr.update(
            choices=[(one.card.title, number) for number, one in enumerate(self.models)]
        )
        examples = [
            {
                "text": text,
                "display_text": text or "Describe it",
                "files": [str(IMAGES / name)] if name else [],
            }
            for text, name in kind.examples
            if not name or (IMAGES / name).is_file()
        ]
        shapes = gr.update(
            choices=list(kind.ratios),
            value=next(iter(kind.ratios), None),
            visible=bool(kind.ratios),
        )
        return (
            self,
            f"# {kind.title}",
            names,
            gr.update(value=[], examples=examples),
            kind.temperature,
            kind.rounds,
            False,
            shapes,
            shapes,
            *(gr.update(visible=tab in kind.tabs) for tab in ("draw", "edit", "codes", "find")),
        )

    async def images(self, captions: Sequence[str], route: str, **body: Any) -> Any:
        """Images of a route, for a gallery."""
        with warn_about_errors():
            made = await anext(self.model.stream(route, **body))
            for note in made.get("notes", ()):
                gr.Info(html.escape(note))
            return [
                (await asyncio.to_thread(io.image_from_base64, one["b64_json"]), caption)
                for one, caption in zip(made["data"], captions, strict=False)
            ]
        return gr.skip()

    async def on_draw(self, words: str, seed: float, ratio: str | None) -> list[Any]:
        """Four images of a text, from seeds one after another."""
        with warn_about_errors():
            return await self.images(
                [f"seed {int(seed) + number}" for number in range(4)],
                "/v1/images/generations",
                json={"prompt": checked(words), "seed": int(seed), "n": 4, "ratio": ratio},
            )
        return gr.skip()

    async def on_change(self, upload: str | None, words: str, seed: float) -> list[Any]:
        """An image changed as a text says."""
        with warn_about_errors():
            file = {
                "image": Path(
                    (await asyncio.to_thread(self.store_upload, upload))["path"]
                ).read_bytes()
            }
            return await self.images(
                [words],
                "/v1/images/edits",
                files=file,
                data={"prompt": checked(words), "seed": int(seed)},
            )
        return []

    async def on_codes(self, upload: str | None) -> tuple[str, list[int]]:
        """The codes of an uploaded image, as a strip of colours and as numbers."""
        if upload:
            with warn_about_errors():
                body = {
                    "images": [
                        (await asyncio.to_thread(self.store_upload, upload))["image_url"]["url"]
                    ]
                }
                codes = (await anext(self.model.stream("/v1/images/tokens", json=body)))["data"][0][
                    "codes"
                ]
                return code_strip(codes), codes
        return "", []

    async def on_swap(
        self, first: list[int], second: list[int], count: float, exchanged: float
    ) -> list[Any]:
        """Images from the first `count` of their codes, some of which are exchanged if there are two."""
        span, rows = slice(int(exchanged)), {"first": [*first], "second": [*second]}
        if first and second:
            rows["first"][span], rows["second"][span] = second[span], first[span]
        rows = {name: row for name, row in rows.items() if row}
        if not rows:
            gr.Warning("Choose an image first.")
            return gr.skip()
        body = {"codes": [*rows.values()], "first": int(count)}
        return await self.images([*rows], "/v1/images/tokens", json=body)

    async def on_find(self, upload: str | None, phrase: str) -> list[Any]:
        """The image with boxes around what was asked for."""
        with warn_about_errors():
            words = SEED_X_TASKS.detect_request(checked(phrase))
            asked = [user_message(words, [await asyncio.to_thread(self.store_upload, upload)])]
            body = self.request(asked, False, None, 1, 256, 0.0, 0.5, 1)
            answer = (await anext(self.model.stream("/v1/chat/completions", json=body)))["choices"][
                0
            ]["message"]
            caption = " ".join([BOX_WORDS.sub(" ", answer["content"]), *answer["notes"]])
            return [(image_with_boxes(asked, answer["boxes"]), caption)]
        return []


def checked(words: str) -> str:
    """The text of a tab. Raises RequestError: empty."""
    if not words.strip():
        raise RequestError("Write a text first.")
    return words


def user_message(words: str, images: Sequence[Message]) -> Message:
    """The user's input. Raises RequestError: empty, or contains the image placeholder."""
    if PLACEHOLDER in words:
        raise RequestError(f"Please do not type {PLACEHOLDER}: it stands for images.")
    if not images and not words.strip(" ?.;!/"):
        raise RequestError("Write a message or choose an image first.")
    return {"role": "user", "content": [*images, {"type": "text", "text": words}]}


def add_change(answer: Message, change: Mapping[str, Any]) -> None:
    """Add what a stream brings: images, which replace previews, text, and notes."""
    for image in change.get("images", ()):
        answer["content"] = [
            *(part for part in answer["content"] if not part.get("preview")),
            image,
        ]
    if words := change.get("content"):
        if not answer["content"] or "text" not in answer["content"][-1]:
            answer["content"].append({"type": "text", "text": ""})
        answer["content"][-1]["text"] += words
    answer["below"] += [{"text": note} for note in change.get("notes", ())]


def chatbot_messages(messages: Sequence[Message]) -> list[Message]:
    """Messages as Gradio's Chatbot shows them."""

    def part(one: Message) -> Any:
        return (
            {"path": one["path"], "alt_text": "image"}
            if "path" in one
            else BOX_WORDS.sub(" ", one["text"]).strip()
        )

    return [
        {
            "role": one["role"],
            "content": [*filter(None, map(part, [*one["content"], *one.get("below", ())]))]
            or ["…"],
        }
        for one in messages
    ]


def image_with_boxes(
    messages: Sequence[Message], boxes: Sequence[Mapping[str, Any]]
) -> Image.Image:
    """The last image of messages with the boxes of their answer."""
    image = io.open_image(
        [part["path"] for one in messages for part in one["content"] if "path" in part][-1]
    )
    return draw_boxes(
        image,
        [
            [int(share * side) for share, side in zip(one["box"], image.size * 2, strict=True)]
            for one in boxes
        ],
    )


def code_strip(codes: Sequence[int]) -> str:
    """Codes as coloured fields, equal codes in equal colours."""
    fields = "".join(
        f'<span style="background: hsl({code * 137.508 % 360:.0f} 65% {60 + code % 5 * 6}%)">{code}</span>'
        for code in codes
    )
    return f'<div class="strip" role="img" aria-label="codes {", ".join(map(str, codes))}">{fields}</div>'
