"""What the page's buttons do: one visitor's conversation, images and requests."""

from __future__ import annotations

import asyncio
import hashlib
import html
import os
import random
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from seed_multimodal.errors import ImageError, RequestError, SeedError
from seed_multimodal.images import io
from seed_multimodal.images.sheet import draw_boxes
from seed_multimodal.language.vocabulary import BOX_WORDS
from seed_multimodal.serving.client import Model, together
from seed_multimodal.serving.dialogue import Kind, Shown, Turn, check_rounds, message, messages

IMAGES = Path(__file__).resolve().parents[3] / "images"  # of the examples
UPLOADS = io.ImageLimits(max_bytes=64 << 20)
STORED_SIDE, WHOLE_SIDE = 512, 1792  # of what `chat_image` makes of an image; four views of 448 pixels (SEED-X)
STILL = "The model is still answering: wait for it, or press Stop."
AGAIN = 0.7  # temperature of a second answer where the first was the likeliest one
WAITING, STOPPED, NO_IMAGE = "Waiting for the model …", "Stopped.", "Choose an image first."
SEEDS = 4  # of the grid of drawings


@dataclass
class Visit:
    """One visitor: the model and the conversation, the requests under way, the codes of two images, and files."""

    model: int = 0
    turns: list[Turn] = field(default_factory=list)
    running: set[asyncio.Task[None]] = field(default_factory=set)
    busy: bool = False
    codes: dict[str, list[int]] = field(default_factory=dict)
    uploads: set[str] = field(default_factory=set)
    folder: str = ""

    def keep(self, image: Image.Image) -> str:
        """Store an image in the visitor's folder; returns its path."""
        self.folder = self.folder or tempfile.mkdtemp(prefix="visit_", dir=os.environ["GRADIO_TEMP_DIR"])
        data = io.image_to_bytes(image)
        path = Path(self.folder, f"{hashlib.md5(data, usedforsecurity=False).hexdigest()}.png")
        path.write_bytes(data)
        return str(path)

    def decode(self, text: str) -> str:
        return self.keep(io.image_from_base64(text, name="the answer's image"))

    def stop(self) -> None:
        """Cancel the requests under way, which cancels them at the backend, too."""
        for task in self.running:
            task.cancel()

    def forget(self) -> None:
        """Start over; the visitor's images are removed."""
        self.stop()
        for path in self.uploads:
            Path(path).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.turns, self.codes, self.uploads, self.folder = [], {}, set(), ""


class Page:
    """The handlers of the page; `models`: the backends that a visitor chooses from."""

    def __init__(self, models: Sequence[Model]) -> None:
        self.models = models
        self.visits: dict[str, Visit] = {}

    def model(self, visit: Visit) -> Model:
        return self.models[visit.model]

    # ---- images

    def take(self, visit: Visit, upload: str | None) -> str:
        """An uploaded image, checked and stored as the model is shown it; returns its path."""
        if not upload:
            raise RequestError(NO_IMAGE)
        whole = self.model(visit).kind.whole
        image = io.open_image(upload, limits=UPLOADS, at_least=WHOLE_SIDE if whole else 2 * STORED_SIDE)
        if not whole:
            image = io.chat_image(image)
        elif max(image.size) > WHOLE_SIDE:
            image = io.fit_longer_side(image, WHOLE_SIDE)
        if not upload.startswith(str(IMAGES)):
            visit.uploads.add(upload)
        return visit.keep(image)

    def encode(self, visit: Visit, path: str) -> str:
        """A stored image as it is sent."""
        image = io.open_image(path)
        return io.image_to_base64(image if self.model(visit).kind.whole else io.request_image(image))

    # ---- the chat

    async def answer(self, visit: Visit, turns: list[Turn], force: bool, ratio: str | None, beams: float, tokens: float,
                     temperature: float, top_p: float, rounds: float) -> AsyncIterator[Turn]:
        """Drafts of the answer to `turns`, and last the answer; stopped, what there is of its text."""
        model = self.model(visit)
        settings: dict[str, Any] = {"ratio": ratio} if force else {}
        if not model.kind.ratios:
            settings = {"num_beams": int(beams), "max_tokens": int(tokens), "temperature": temperature, "top_p": top_p}
        turns = turns[-1:] if model.kind.alone else turns
        check_rounds(turns, int(rounds))
        said = await asyncio.to_thread(messages, turns, model.kind.around, lambda path: self.encode(visit, path))
        body = {"messages": said, **settings, "force_image": bool(force), "seed": random.randrange(2**31),
                "stream": True, "previews": True}
        answer, done, boxes = Turn([]), False, list[dict[str, Any]]()
        async for _, piece in together([model.ask("/v1/chat/completions", json=body)], visit.running):
            if isinstance(piece, SeedError):
                raise piece
            change, done = piece["choices"][0]["delta"], piece["choices"][0]["finish_reason"] is not None
            await asyncio.to_thread(answer.add, change, visit.decode)
            boxes += change.get("boxes", ())
            if not done and (change.get("content") or "images" in change):
                yield answer
        answer.end()
        answer.below += [*await asyncio.to_thread(self.framed, visit, turns, boxes), *([] if done else [STOPPED])]
        if not done and not answer.parts:
            raise RequestError(STOPPED)
        yield answer

    def framed(self, visit: Visit, turns: Sequence[Turn], boxes: Sequence[dict[str, Any]]) -> list[Shown]:
        """The images of a conversation that an answer's boxes lie on, with these boxes."""
        known, on = [image.path for turn in turns for image in turn.images], dict[str, list[list[int]]]()
        for found in boxes:
            path = known[found["image"]]
            size = io.open_image(path).size
            on.setdefault(path, []).append([int(share * side) for share, side in
                                            zip(found["box"], (*size, *size), strict=True)])
        return [Shown(visit.keep(draw_boxes(io.open_image(path), corners))) for path, corners in on.items()]

    async def reply(self, visit: Visit, turns: list[Turn], settings: Sequence[Any], sent: Any = None
                    ) -> AsyncIterator[tuple[Any, ...]]:
        """Conversation, status and message box while `turns` are answered; without an answer all is as before, and
        what was `sent` is in its box again."""
        if visit.busy:
            yield gr.skip(), said(STILL, wrong=True), gr.skip()
            return
        before, visit.turns, visit.busy = visit.turns, turns, True
        trouble, left = "", {} if sent is None else {"value": None}
        try:
            yield shown(turns), said(WAITING), box(asking=True, **left)
            async for answer in self.answer(visit, turns, *settings):
                yield shown([*turns, answer]), gr.skip(), gr.skip()
            before, left = [*turns, answer], {}
        except SeedError as error:
            trouble, left = str(error), {} if sent is None else {"value": sent}
        finally:
            visit.busy = False
            visit.turns = before if visit.turns is turns else visit.turns  # they were cleared meanwhile
        yield shown(visit.turns), said(trouble, wrong=trouble not in ("", STOPPED)), box(asking=False, **left)

    async def on_submit(self, visit: Visit, sent: dict[str, Any], *settings: Any) -> AsyncIterator[tuple[Any, ...]]:
        try:
            paths = [await asyncio.to_thread(self.take, visit, upload) for upload in sent["files"]]
            turn = message((sent["text"] or "").strip(), paths)
        except SeedError as error:
            yield gr.skip(), said(str(error), wrong=True), gr.skip()
            return
        async for update in self.reply(visit, [*visit.turns, turn], settings, sent):
            yield update

    async def on_retry(self, visit: Visit, *settings: Any) -> AsyncIterator[tuple[Any, ...]]:
        """The last answer again, from another seed; where the likeliest words are taken, with some chance."""
        force, ratio, beams, tokens, temperature, *rest = settings
        again = (force, ratio, beams, tokens, temperature or AGAIN, *rest)
        async for update in self.reply(visit, visit.turns[:-1], again):
            yield update

    async def on_edit(self, visit: Visit, edited: gr.EditData, *settings: Any) -> AsyncIterator[tuple[Any, ...]]:
        """An earlier message with other words, its images kept; what followed it is dropped."""
        place = edited.index[0] if isinstance(edited.index, list | tuple) else edited.index
        turns = [*visit.turns[:place], Turn([*visit.turns[place].images, str(edited.value).strip()])]
        async for update in self.reply(visit, turns, settings):
            yield update

    def on_undo(self, visit: Visit) -> tuple[Any, ...]:
        """Take back the last message and its answer; it is in its box again."""
        if visit.busy or not visit.turns:
            return gr.skip(), said(STILL, wrong=True) if visit.busy else gr.skip(), gr.skip()
        *visit.turns, asked, _ = visit.turns
        words = " ".join(part for part in asked.parts if isinstance(part, str))
        value = {"text": words, "files": [image.path for image in asked.images]}
        return shown(visit.turns), said(""), box(asking=False, value=value)

    async def on_choose(self, visit: Visit, sent: dict[str, Any]) -> tuple[Any, ...]:
        """Name a file that is no image at once, and take it out of the message."""
        wrong = dict[str, str]()
        for upload in {*sent["files"]} - visit.uploads:
            try:
                await asyncio.to_thread(io.open_image, upload, limits=UPLOADS, at_least=STORED_SIDE)
                visit.uploads.add(upload)
            except ImageError as error:
                wrong[upload] = str(error)
        left = {**sent, "files": [upload for upload in sent["files"] if upload not in wrong]}
        return (said(" ".join(wrong.values()), wrong=True), left) if wrong else (gr.skip(), gr.skip())

    async def on_example(self, visit: Visit, chosen: gr.SelectData, *settings: Any) -> AsyncIterator[tuple[Any, ...]]:
        sent = {"text": chosen.value["text"], "files": [file["path"] for file in chosen.value.get("files", ())]}
        async for update in self.on_submit(visit, sent, *settings):
            yield update

    async def on_model(self, visit: Visit, place: int, visitor: gr.Request) -> tuple[Any, ...]:
        """Another model, and a new conversation; shows what it can."""
        visit.forget()
        visit.model, self.visits[visitor.session_hash or ""] = place, visit
        trouble = await self.models[place].learn()
        kind = self.models[place].kind
        shapes = gr.update(choices=list(kind.ratios), value=next(iter(kind.ratios), None), visible=bool(kind.ratios))
        settings = [gr.skip(), shapes, gr.skip(), gr.skip(), kind.temperature, gr.skip(), kind.rounds]
        tabs = [gr.update(visible=name in kind.can) for name in ("draw", "edit", "codes", "find")]
        names = gr.update(choices=[(model.kind.title, number) for number, model in enumerate(self.models)])
        return (visit, f"# {kind.title}", names, gr.update(value=[], examples=examples(kind)),
                said(trouble, wrong=bool(trouble)), box(asking=False), *settings, shapes, *tabs)

    def on_leave(self, visitor: gr.Request) -> None:
        """The visitor's tab is closed: nothing more is made for it. Files stay an hour, as he may come back."""
        if visit := self.visits.pop(visitor.session_hash or "", None):
            visit.stop()

    def on_clear(self, visit: Visit) -> tuple[Any, ...]:
        visit.forget()
        return [], said(""), box(asking=False)

    # ---- the other tabs

    async def on_draw(self, visit: Visit, text: str, seed: float, ratio: str | None) -> AsyncIterator[tuple[Any, Any]]:
        """A grid of images of a text, from seeds one after another, each shown when it comes."""
        shape = {"ratio": ratio} if self.model(visit).kind.ratios else {}
        bodies = [{"prompt": text, "seed": int(seed) + number, **shape} for number in range(SEEDS)]
        streams = [self.model(visit).ask("/v1/images/generations", json=body) for body in bodies]
        async for update in self.images(visit, streams, [f"seed {body['seed']}" for body in bodies]):
            yield update

    async def on_change(self, visit: Visit, upload: str | None, text: str, seed: float
                        ) -> AsyncIterator[tuple[Any, Any]]:
        """An image changed as a text says."""
        async for update in self.images(visit, [self.changed(visit, upload, text, int(seed))], [text]):
            yield update

    async def changed(self, visit: Visit, upload: str | None, text: str, seed: int) -> AsyncIterator[Any]:
        file = {"image": Path(await asyncio.to_thread(self.take, visit, upload)).read_bytes()}
        async for piece in self.model(visit).ask("/v1/images/edits", files=file, data={"prompt": text, "seed": seed}):
            yield piece

    async def on_codes(self, visit: Visit, name: str, upload: str | None) -> tuple[Any, Any]:
        """The codes of an uploaded image as a strip of colours."""
        visit.codes.pop(name, None)
        if not upload:
            return "", said("")
        try:
            body = {"images": [self.encode(visit, await asyncio.to_thread(self.take, visit, upload))]}
            async for piece in self.model(visit).ask("/v1/images/tokens", json=body):
                visit.codes[name] = piece["data"][0]["codes"]
        except SeedError as error:
            return "", said(str(error), wrong=True)
        return strip(visit.codes[name]), said("")

    async def on_swap(self, visit: Visit, count: float, start: float, end: float) -> AsyncIterator[tuple[Any, Any]]:
        """Images from the first so many of their codes, a range of which is exchanged if there are two."""
        span, rows = slice(int(start) - 1, int(end)), [[*codes] for _, codes in sorted(visit.codes.items())]
        if len(rows) == 2:
            rows[0][span], rows[1][span] = rows[1][span], rows[0][span]
        bodies = [{"codes": [row], "first": int(count)} for row in rows]
        streams = [self.model(visit).ask("/v1/images/tokens", json=body) for body in bodies]
        async for update in self.images(visit, streams, sorted(visit.codes)):
            yield update

    async def images(self, visit: Visit, streams: Sequence[AsyncIterator[Any]], titles: Sequence[str]
                     ) -> AsyncIterator[tuple[Any, Any]]:
        """A gallery that grows, and a status."""
        made, trouble = dict[int, tuple[str, str]](), "" if streams else NO_IMAGE
        yield [], said(WAITING)
        async for number, piece in together(streams, visit.running):
            if isinstance(piece, SeedError):
                trouble = str(piece)
                continue
            made[number] = (await asyncio.to_thread(visit.decode, piece["data"][0]["b64_json"]), titles[number])
            yield [made[place] for place in sorted(made)], gr.skip()
        yield gr.skip(), said(trouble or ("" if len(made) == len(streams) else STOPPED), wrong=bool(trouble))

    async def on_find(self, visit: Visit, upload: str | None, phrase: str) -> AsyncIterator[tuple[Any, Any]]:
        """The image with boxes around what was asked for."""
        yield [], said(WAITING)
        try:
            path = await asyncio.to_thread(self.take, visit, upload)
            turns = [Turn([Shown(path), self.model(visit).kind.tasks.detect_request(phrase)])]
            async for answer in self.answer(visit, turns, False, None, 1, 256, 0.0, 0.5, 1):
                found = [part.path for part in answer.below if isinstance(part, Shown)]
                yield found, said(" ".join(shown([answer])[0]["content"][:1]))
        except SeedError as error:
            yield [], said(str(error), wrong=str(error) != STOPPED)


def box(asking: bool, **value: Any) -> Any:
    """The message box, with the Stop button while a model is asked."""
    return gr.update(submit_btn=not asking, stop_btn=asking, **value)


def said(sentence: str, wrong: bool = False) -> str:
    """A status that screen readers announce."""
    return f'<p class="status" role="{"alert" if wrong else "status"}">{html.escape(sentence)}</p>'


def strip(codes: Sequence[int]) -> str:
    """Codes as coloured fields, equal codes in equal colours."""
    fields = "".join(f'<span style="background: hsl({code * 137.508 % 360:.0f} 65% {60 + code % 5 * 6}%)" '
                     f'title="code {place} of {len(codes)}">{code}</span>' for place, code in enumerate(codes, 1))
    return f'<div class="strip" role="img" aria-label="codes {", ".join(map(str, codes))}">{fields}</div>'


def shown(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """A conversation as Gradio's Chatbot shows it."""
    messages = []
    for number, turn in enumerate(turns):
        content: list[Any] = []
        for part in [*turn.parts, *turn.below]:
            if isinstance(part, Shown):
                content.append({"path": part.path, "alt_text": "image"})
            elif words := BOX_WORDS.sub(" ", part).strip():
                content.append(words)
        messages.append({"role": ("user", "assistant")[number % 2], "content": content or ["…"]})
    return messages


def examples(kind: Kind) -> list[Any]:
    """The model's examples, as far as their images are there."""
    return [{"text": text, "display_text": text or "Describe it", "files": [str(IMAGES / name)] if name else []}
            for text, name in kind.examples if not name or (IMAGES / name).is_file()]
