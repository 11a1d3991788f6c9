"""What the page's buttons do: one visitor's conversation, images and requests.

A conversation is a list of OpenAI's messages, sent as they are. Their images also have the `path` of a file; `below`:
what is shown under a message and not sent.
"""

from __future__ import annotations

import asyncio
import contextlib
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
from seed_multimodal.serving.client import Kind, Model

IMAGES = Path(__file__).resolve().parents[3] / "images"  # of the examples
UPLOADS = io.ImageLimits(max_bytes=64 << 20)
LONGEST_SIDE = 1792  # of an image that is sent: four views of 448 pixels (SEED-X)
AGAIN = 0.7  # temperature of a second answer where the first was the likeliest one
SEEDS = 4  # of the grid of drawings
STOPPED = "Stopped."
TOO_LONG = "Error: History exceeds maximum rounds, please clear history and restart."
TABS = ("draw", "edit", "codes", "find")
Message = dict[str, Any]


@contextlib.contextmanager
def errors_shown() -> Iterator[None]:
    """Show a `SeedError` to the visitor."""
    try:
        yield
    except SeedError as error:
        raise gr.Error(str(error), print_exception=False) from error


@dataclass
class Visit:
    """One visitor, and the page's handlers; `asked`: a conversation to be answered; `returned`: a message that returns
    to its box; `stored`: images of uploads, as parts of messages."""

    models: list[Model]
    model: Model
    turns: list[Message] = field(default_factory=list)
    asked: list[Message] = field(default_factory=list)
    returned: Message | None = None
    stored: dict[str, Message] = field(default_factory=dict)
    folder: str = ""

    def keep(self, image: Image.Image) -> str:
        """Store an image in the visitor's folder; returns its path."""
        self.folder = self.folder or tempfile.mkdtemp(prefix="visit_", dir=os.environ["GRADIO_TEMP_DIR"])
        image.save(path := f"{self.folder}/{uuid.uuid4().hex}.png")
        return path

    def forget(self) -> None:
        """Start over; the visitor's images are removed."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.turns, self.returned, self.stored, self.folder = [], None, {}, ""

    async def take(self, upload: str | None) -> Message:
        """An uploaded image as a part of a message, checked, and stored as the model is shown it."""

        def store(upload: str) -> Message:
            image = io.open_image(upload, limits=UPLOADS, at_least=LONGEST_SIDE)
            image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            whole = self.model.kind.whole
            path = self.keep(image := image if whole else io.chat_image(image))
            data = io.image_to_base64(image if whole else io.request_image(image))
            return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}, "path": path}

        if not upload:
            raise RequestError("Choose an image first.")
        if upload not in self.stored:
            self.stored[upload] = await asyncio.to_thread(store, upload)
        return self.stored[upload]

    # ---- the chat

    async def on_submit(self, message: dict[str, Any]) -> None:
        with errors_shown():
            images = [await self.take(upload) for upload in message["files"]]
            self.asked = [*self.turns, user_message((message["text"] or "").strip(), images)]

    async def on_example(self, chosen: gr.SelectData) -> None:
        files = [file["path"] for file in chosen.value.get("files", ())]
        await self.on_submit({"text": chosen.value["text"], "files": files})

    def on_retry(self) -> None:
        self.asked = self.turns[:-1]

    def on_edit(self, edited: gr.EditData) -> None:
        """An earlier message with other words, its images kept; what followed it is dropped."""
        place = edited.index[0] if isinstance(edited.index, list | tuple) else edited.index
        images = [part for part in self.turns[place]["content"] if "path" in part]
        with errors_shown():
            self.asked = [*self.turns[:place], user_message(str(edited.value).strip(), images)]

    async def reply(self, *settings: Any) -> AsyncIterator[tuple[Any, Any]]:
        """Conversation and message box while `asked` is answered. Stopped, what there is of the answer stays;
        without any the conversation is as before, and a new message returns to its box."""
        before, asked, complete = self.turns, self.asked, False
        answer: Message = {"role": "assistant", "content": [], "below": []}
        self.returned = asked[-1] if len(asked) > len(before) else None
        yield shown([*asked, answer]), box(asking=True, **({"value": None} if self.returned else {}))
        try:
            body = {**self.request(asked, *settings), "stream": True, "previews": True}
            async for piece in self.model.ask("/v1/chat/completions", json=body):
                change = piece["choices"][0]["delta"]
                for image in change.get("images", ()):
                    decoded = await asyncio.to_thread(io.image_from_base64, image["image_url"]["url"])
                    image["path"] = self.keep(decoded)
                if change.get("boxes"):
                    last = [part["path"] for one in asked for part in one["content"] if "path" in part][-1]
                    answer["below"].append({"path": self.keep(framed(last, change["boxes"]))})
                extend(answer, change)
                yield shown([*asked, answer]), gr.skip()
            complete = True
        except SeedError as error:
            answer["content"] = []
            gr.Warning(str(error))
        finally:
            answer["content"] = [part for part in answer["content"] if not part.get("preview")]
            if (complete or answer["content"]) and self.turns is before:
                answer["below"] += [] if complete else [{"text": STOPPED}]
                self.turns, self.returned = [*asked, answer], None

    def request(self, messages: list[Message], force: bool, ratio: str | None, beams: float,
                tokens: float, temperature: float, top_p: float, rounds: float) -> dict[str, Any]:
        """The body of a chat request, with another seed each time; the same messages again get some chance, too."""
        kind, again = self.model.kind, messages == self.turns[:-1]
        if kind.around is not None:
            opening, closing = ({"type": "text", "text": words} for words in kind.around)
            messages = [{"role": "user", "content": [opening, *messages[-1]["content"], closing]}]
        check_rounds(messages, int(rounds))
        settings: dict[str, Any] = {"num_beams": int(beams), "max_tokens": int(tokens), "top_p": top_p,
                                    "temperature": temperature or (AGAIN if again else 0)}
        if kind.ratios:
            settings = {"ratio": ratio} if force else {}
        return {"messages": messages, **settings, "force_image": bool(force), "seed": random.randrange(2**31)}

    def on_end(self) -> tuple[Any, Any]:
        """The conversation as it is now; a message without an answer is in its box again."""
        returned, self.returned = self.returned, None
        if returned is None:
            return shown(self.turns), box(asking=False)
        *images, words = returned["content"]
        value = {"text": words["text"], "files": [image["path"] for image in images]}
        return shown(self.turns), box(asking=False, value=value)

    def on_undo(self) -> tuple[Any, Any]:
        """Take back the last message and its answer."""
        self.turns, self.returned = self.turns[:-2], self.turns[-2]
        return self.on_end()

    def on_clear(self) -> tuple[Any, Any]:
        self.forget()
        return self.on_end()

    async def on_choose(self, message: dict[str, Any]) -> Any:
        """Name a file that is no image at once, and take it out of the message."""
        good = []
        for upload in message["files"]:
            try:
                await self.take(upload)
                good.append(upload)
            except SeedError as error:
                gr.Warning(str(error))
        return gr.skip() if good == message["files"] else {**message, "files": good}

    async def on_model(self, place: int) -> tuple[Any, ...]:
        """Another model, and a new conversation; shows what it can."""
        self.forget()
        self.model = self.models[place]
        try:
            await self.model.learn()
        except SeedError as error:
            gr.Warning(str(error))
        kind = self.model.kind
        names = gr.update(choices=[(one.kind.title, number) for number, one in enumerate(self.models)])
        shapes = gr.update(choices=list(kind.ratios), value=next(iter(kind.ratios), None), visible=bool(kind.ratios))
        return (self, f"# {kind.title}", names, gr.update(value=[], examples=examples(kind)), box(asking=False),
                shapes, kind.temperature, kind.rounds, shapes, *(gr.update(visible=tab in kind.can) for tab in TABS))

    # ---- the other tabs

    async def images(self, captions: Sequence[str], route: str, **body: Any) -> list[Any]:
        """Images of a route, for a gallery."""
        with errors_shown():
            made = (await self.model.fetch(route, **body))["data"]
            return [(await asyncio.to_thread(io.image_from_base64, one["b64_json"]), caption)
                    for one, caption in zip(made, captions, strict=True)]

    async def on_draw(self, words: str, seed: float, ratio: str | None) -> list[Any]:
        """Images of a text, from seeds one after another."""
        captions = [f"seed {int(seed) + number}" for number in range(SEEDS)]
        body = {"prompt": words, "seed": int(seed), "n": SEEDS, "ratio": ratio}
        return await self.images(captions, "/v1/images/generations", json=body)

    async def on_change(self, upload: str | None, words: str, seed: float) -> list[Any]:
        """An image changed as a text says."""
        with errors_shown():
            file = {"image": Path((await self.take(upload))["path"]).read_bytes()}
        body = {"prompt": words, "seed": int(seed)}
        return await self.images([words], "/v1/images/edits", files=file, data=body)

    async def on_codes(self, upload: str | None) -> tuple[str, list[int]]:
        """The codes of an uploaded image, as a strip of colours and as numbers."""
        if not upload:
            return "", []
        with errors_shown():
            body = {"images": [(await self.take(upload))["image_url"]["url"]]}
            codes = (await self.model.fetch("/v1/images/tokens", json=body))["data"][0]["codes"]
        return strip(codes), codes

    async def on_swap(self, first: list[int], second: list[int], count: float, start: float, end: float
                      ) -> list[Any]:
        """Images from the first so many of their codes, a range of which is exchanged if there are two."""
        span, rows = slice(int(start) - 1, int(end)), {"first": [*first], "second": [*second]}
        if first and second:
            rows["first"][span], rows["second"][span] = second[span], first[span]
        rows = {name: row for name, row in rows.items() if row}
        body = {"codes": [*rows.values()], "first": int(count)}
        return await self.images([*rows], "/v1/images/tokens", json=body)

    async def on_find(self, upload: str | None, phrase: str) -> list[Any]:
        """The image with boxes around what was asked for."""
        with errors_shown():
            image = await self.take(upload)
            asked = [user_message(SEED_X_TASKS.detect_request(phrase), [image])]
            body = self.request(asked, False, None, 1, 256, 0.0, 0.5, 1)
            answer = (await self.model.fetch("/v1/chat/completions", json=body))["choices"][0]["message"]
            return [(framed(image["path"], answer["boxes"]),
                     " ".join([BOX_WORDS.sub(" ", answer["content"]).strip(), *answer["notes"]]))]


def user_message(words: str, images: Sequence[Message]) -> Message:
    """The user's input. Raises RequestError: empty, or contains the image placeholder."""
    if PLACEHOLDER in words:
        raise RequestError(f"Please do not type {PLACEHOLDER}: it stands for images.")
    if not images and not words.strip(" ?.;!/"):
        raise RequestError("Write a message or choose an image first.")
    return {"role": "user", "content": [*images, {"type": "text", "text": words}]}


def check_rounds(messages: Sequence[Message], rounds: int) -> None:
    """Raise `RequestError` for more than `rounds`."""
    if len(messages) > 2 * rounds:
        raise RequestError(TOO_LONG)


def extend(answer: Message, change: Mapping[str, Any]) -> None:
    """Add what a stream brings: images, which replace previews, text, and notes."""
    for image in change.get("images", ()):
        answer["content"] = [*(part for part in answer["content"] if not part.get("preview")), image]
    if words := change.get("content"):
        if not answer["content"] or "text" not in answer["content"][-1]:
            answer["content"].append({"type": "text", "text": ""})
        answer["content"][-1]["text"] += words
    answer["below"] += [{"text": note} for note in change.get("notes", ())]


def shown(messages: Sequence[Message]) -> list[Message]:
    """Messages as Gradio's Chatbot shows them."""

    def part(one: Message) -> Any:
        return {"path": one["path"], "alt_text": "image"} if "path" in one else BOX_WORDS.sub(" ", one["text"]).strip()

    return [{"role": one["role"], "content": [
        *filter(None, map(part, [*one["content"], *one.get("below", ())]))] or ["…"]} for one in messages]


def box(asking: bool, **value: Any) -> Any:
    """The message box, with the Stop button while a model is asked."""
    return gr.update(submit_btn=not asking, stop_btn=asking, **value)


def framed(path: str, boxes: Sequence[Mapping[str, Any]]) -> Image.Image:
    """An image with an answer's boxes."""
    image = io.open_image(path)
    return draw_boxes(image, [[int(share * side) for share, side in zip(one["box"], image.size * 2, strict=True)]
                              for one in boxes])


def strip(codes: Sequence[int]) -> str:
    """Codes as coloured fields, equal codes in equal colours."""
    fields = "".join(f'<span style="background: hsl({code * 137.508 % 360:.0f} 65% {60 + code % 5 * 6}%)">{code}</span>'
                     for code in codes)
    return f'<div class="strip" role="img" aria-label="codes {", ".join(map(str, codes))}">{fields}</div>'


def examples(kind: Kind) -> list[Any]:
    """The model's examples, as far as their images are there."""
    return [{"text": words, "display_text": words or "Describe it", "files": [str(IMAGES / name)] if name else []}
            for words, name in kind.examples if not name or (IMAGES / name).is_file()]
