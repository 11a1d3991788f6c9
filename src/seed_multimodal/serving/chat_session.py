"""The page's chat session: what a visitor's events do.

The browser owns the list of conversations (texts and codes of images, else small images), which of
them is open, and the message box. An event names its conversation; an update is a snapshot of one
(`Chat.snapshot`), which the browser keeps, and shows if that conversation is open.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import itertools
import logging
import os
import re
import shutil
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from PIL import Image

from seed_multimodal.disk import JsonObject, writing
from seed_multimodal.errors import RequestError, SeedError, short_name
from seed_multimodal.images import io
from seed_multimodal.language.answer import LEFT_OUT
from seed_multimodal.serving.chat import (
    IMAGES,
    Chat,
    chatbot_examples,
    example_files,
    installed_examples,
    unread,
)
from seed_multimodal.serving.client import ModelClient
from seed_multimodal.serving.conversation_log import ConversationLog
from seed_multimodal.serving.turns import (
    BLANK_INPUT,
    Conversation,
    Picture,
    Turn,
    check_input,
    escaped,
    image_with_boxes,
    restored,
    user_turn,
    without_boxes,
)

logger = logging.getLogger(__name__)

THUMBNAILS = {
    file.stem.replace("_", " "): file for file in sorted((IMAGES / "things").glob("*.webp"))
}
VISITS = "visits"  # the folder of the visitors' folders, beside their uploads
UPLOADS = io.ImageLimits(max_bytes=64 << 20)
DRAWINGS = io.ImageLimits(max_pixels=2048**2)  # also of stored images, which browsers may forge
MAX_CHATS = 8  # conversations of a visit that are at hand
MAX_UPLOADS = 64  # images that were read and are remembered
MAX_RESTORED = 500  # images of a conversation that a browser sends back
LONGEST_SIDE = 1792  # of an image that is sent: four views of 448 pixels (SEED-X)
DRAWN_AT_ONCE = 4  # images of the Draw tab, from consecutive seeds
TOKENS_AT_ONCE = 16  # images of one request
NOT_SHOWN = (".tif", ".tiff")  # by most browsers
TABS = ("draw", "edit", "codes", "find")

Stored = JsonObject | None  # the browser's copy of a conversation, which `turns.restored` checks
Update = Any  # what a handler returns for a component: a value, `gr.update(…)` or `gr.skip()`

NO_UPDATES = (gr.skip(), gr.skip())


@contextlib.contextmanager
def warn_about_errors(title: str = "Warning") -> Iterator[None]:
    """Display a `SeedError` as a warning of the page, and continue behind the block.

    Other errors, as of a backend or browser that sends something else, are logged.
    """
    try:
        yield
    except SeedError as error:
        gr.Warning(escaped(str(error)), title=title)
    except Exception:
        logger.exception("An event of the page failed")
        gr.Warning("The page failed; its log has the details.", title=title)


@dataclass
class ChatSession:
    """A visit. Its events change it in the page's event loop alone; images are read, stored and
    drawn in threads and by the model.

    Attributes:
        models: those that can be chosen. model: the chosen one.
        log: of conversations and votes; None: nothing is logged.
        chats: the newest conversations that events were about, by their IDs, the last one last.
        uploads: images of the newest uploaded files, by their model and path.
        refused: chosen files that are no images and that the browser still has.
        folder: of the visitor's images, which stay as long as the visit.
    """

    models: list[ModelClient]
    model: ModelClient
    log: ConversationLog | None = None
    chats: dict[str, Chat] = field(default_factory=dict, init=False)
    uploads: dict[tuple[str, str], asyncio.Future[Picture]] = field(
        default_factory=dict, init=False
    )
    refused: set[str] = field(default_factory=set, init=False)
    folder: str = field(default_factory=lambda: uuid.uuid4().hex, init=False)

    def __post_init__(self) -> None:
        self.add(Chat(self.model))

    def __deepcopy__(self, _memo: object) -> ChatSession:
        """The session of another visitor: Gradio copies the page's first one."""
        return replace(self)

    # ---- the visitor's images

    def path_of(self, name: str = "") -> Path:
        """A path in the visitor's folder."""
        return Path(os.environ["GRADIO_TEMP_DIR"], VISITS, self.folder, name)

    def close(self) -> None:
        """The visit is over."""
        shutil.rmtree(self.path_of(), ignore_errors=True)

    def save_image(self, image: Image.Image, url: str = "") -> Picture:
        """Store an image in the visitor's folder."""
        picture = Picture(url=url)
        picture.path = str(self.path_of(f"{uuid.uuid4().hex}.png"))
        with writing(picture.path, RequestError):
            self.path_of().mkdir(parents=True, exist_ok=True)
            image.save(picture.path)
        return picture

    def save_data(self, data: str) -> Picture:
        """Store an image of base64 or a data URL."""
        return self.save_image(io.open_image(io.decode_text(data), limits=DRAWINGS).image)

    def store_upload(self, model: ModelClient, upload: str) -> Picture:
        """Check an uploaded image and store it in the model's size."""
        if not Path(upload).is_file():  # a sentence without the machine's path
            raise RequestError(f"{short_name(Path(upload).name)} is gone: choose it again.")
        image = io.open_image(Path(upload), limits=UPLOADS, at_least=LONGEST_SIDE).image
        # The page shows what the model sees: the image, or a square of it.
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        sent = image
        if not model.card.keeps_aspect:
            image = io.chat_image(image)
            sent = io.request_image(image)
        picture = self.save_image(image, f"data:image/png;base64,{io.image_to_base64(sent)}")
        picture.make_small()
        return picture

    async def read_upload(self, model: ModelClient, upload: str | None) -> Picture:
        """An uploaded image, read once. Raises RequestError: none, or no image."""
        if not upload:
            raise RequestError("Choose an image first.")
        key = (model.address, upload)
        if key not in self.uploads:
            reading = asyncio.to_thread(self.store_upload, model, upload)
            self.uploads[key] = asyncio.ensure_future(reading)
            while len(self.uploads) > MAX_UPLOADS:
                del self.uploads[next(iter(self.uploads))]
        try:
            # An event that ends leaves the reading to others.
            return await asyncio.shield(self.uploads[key])
        except SeedError:
            self.uploads.pop(key, None)
            raise

    async def read_pictures(self, model: ModelClient, turn: Turn) -> None:
        """Read the uploads of a message, also where one of them is no image, which is raised."""
        errors = []
        for index, part in enumerate(turn.parts):
            if isinstance(part, Picture) and not part.is_read:
                try:
                    turn.parts[index] = await self.read_upload(model, part.path)
                except SeedError as error:
                    errors.append(error)
        if errors:
            raise errors[0]

    async def load_codes(self, model: ModelClient, picture: Picture) -> list[int]:
        """The codes of an uploaded image."""
        if not picture.codes:
            response = await model.post("/v1/images/tokens", json={"images": [picture.url]})
            picture.codes = response["data"][0]["codes"]
        return picture.codes or []

    async def on_choose(self, message: JsonObject) -> JsonObject:
        """Which chosen files are no images, of each of which one warning says so, and images in
        place of those that browsers do not show."""
        files = message["files"]
        self.refused &= {*files}
        images: JsonObject = {}
        for upload in files:
            if upload in self.refused:
                continue
            with warn_about_errors():
                try:
                    picture = await self.read_upload(self.model, upload)
                except SeedError:
                    if upload in self.refused:  # another event said so meanwhile
                        continue
                    self.refused.add(upload)
                    raise
                if Path(upload).suffix.lower() in NOT_SHOWN:
                    images[upload] = gr.FileData(path=picture.path).model_dump()
        return {"refused": [*self.refused], "images": images}

    # ---- the conversation of an event

    @property
    def chat(self) -> Chat:
        """The conversation that the last event was about."""
        return next(reversed(self.chats.values()))

    def add(self, chat: Chat) -> Chat:
        """Keep a conversation as the last one; of many the oldest without a running answer is
        forgotten."""
        self.chats.pop(chat.id, None)
        self.chats[chat.id] = chat
        self.model = chat.model
        ended = [
            other for other in self.chats.values() if other.before is None and other is not chat
        ]
        for other in ended[: max(0, len(self.chats) - MAX_CHATS)]:
            del self.chats[other.id]
        return chat

    async def chat_of(self, sent: Stored) -> Chat:
        """The conversation that an event names; of one that cannot be shown, a new one in its
        place, with a warning.

        sent: the browser's copy, which is read if the session does not know it: it is opened, or
            the program was started again. None: the last one.
        """
        if sent is None:
            return self.chat
        replaces = str(sent.get("id")) if isinstance(sent, dict) else ""
        with warn_about_errors():
            conversation = restored(sent)
            if conversation.turns and not self.model.name:
                await self.load_cards()
            if known := self.chats.get(conversation.id):
                # Those that the browser has.
                known.returned = [
                    message for message in known.returned if message["id"] > conversation.revision
                ]
                return self.add(known)
            return await self.open(conversation)
        return self.add(Chat(self.model, replaces=replaces))

    async def open(self, conversation: Conversation) -> Chat:
        """A conversation of the browser. Raises RequestError: its model is gone."""
        # "": it was begun before a backend told its model.
        models = [
            model for model in (self.model, *self.models) if conversation.model in ("", model.name)
        ]
        if conversation.turns and not models:
            raise RequestError(f"No backend serves {conversation.model}, so its chat waits.")
        chat = self.add(
            Chat((models or [self.model])[0], conversation.id, revision=conversation.revision)
        )
        # A message whose answer a reload ended returns to its box.
        turns = conversation.turns
        unanswered = [turn for turn in turns[-1:] if turn.role == "user"]
        chat.turns = turns[: len(turns) - len(unanswered)]
        await self.draw_again(chat.model, turns)
        chat.give_back(unanswered)
        return chat

    def updates(self, chat: Chat) -> list[JsonObject]:
        """A conversation as it is now, behind the last one: of two updates that arrive together the
        browser may miss one."""
        others = [] if chat is self.chat else [self.chat.snapshot()]
        return [*others, chat.snapshot()]

    async def load_cards(self) -> None:
        """Ask the backends for their models."""
        for model in self.models:
            with warn_about_errors():
                await model.load_card()

    async def draw_again(self, model: ModelClient, turns: Sequence[Turn]) -> None:
        """Draw the newest images of a restored conversation from their codes; others are stored."""
        pictures = [picture for turn in turns for picture in turn.pictures][-MAX_RESTORED:]
        coded = [picture for picture in pictures if picture.codes]
        stored = [picture for picture in pictures if not picture.codes][-MAX_UPLOADS:]
        with warn_about_errors():
            for picture in stored:
                data = picture.url or picture.stored_url
                picture.path = (await asyncio.to_thread(self.save_data, data)).path
            for start in range(0, len(coded), TOKENS_AT_ONCE):
                batch = coded[start : start + TOKENS_AT_ONCE]
                body = {"codes": [picture.codes for picture in batch]}
                drawings, _ = await self.images(model, batch, "/v1/images/tokens", json=body)
                for path, picture in drawings:
                    picture.path = path

    async def on_select(self, sent: Stored) -> list[JsonObject]:
        """Show a conversation of the browser's list, or a new one."""
        return self.updates(await self.chat_of(sent))

    # ---- what is to be answered

    async def on_submit(
        self, message: JsonObject, sent: Stored = None, *settings: Any
    ) -> AsyncIterator[list[JsonObject]]:
        """Answer a message; one that cannot be sent returns to its box.

        settings: as of `Chat.request`.
        """
        chat = await self.chat_of(sent)
        turn = Turn("user", [*map(unread, message["files"]), message["text"].strip()])
        with warn_about_errors("Not sent"):
            check_input(turn)
            async for update in self.answered(chat, [*chat.turns, turn], settings):
                yield update
            return
        with contextlib.suppress(SeedError):
            await self.read_pictures(chat.model, turn)  # for the browser's storage
        chat.give_back([turn])
        yield self.updates(chat)

    async def on_example(
        self, chosen: gr.SelectData, sent: Stored = None, *settings: Any
    ) -> AsyncIterator[list[JsonObject]]:
        chat = await self.chat_of(sent)
        example = installed_examples(chat.model.card)[int(chosen.index)]
        pictures = [unread(file) for file in example_files(example)]
        turns = [*chat.turns, Turn("user", [*pictures, example.text])]
        async for update in self.answered_once(chat, sent, turns, settings):
            yield update

    async def on_option(
        self, chosen: gr.SelectData, sent: Stored = None, *settings: Any
    ) -> AsyncIterator[list[JsonObject]]:
        chat = await self.chat_of(sent)
        turns = [*chat.turns, Turn("user", [str(chosen.value)])]
        async for update in self.answered_once(chat, sent, turns, settings):
            yield update

    async def on_retry(
        self, sent: Stored = None, *settings: Any
    ) -> AsyncIterator[list[JsonObject]]:
        chat = await self.chat_of(sent)
        async for update in self.answered_once(chat, sent, chat.turns[:-1], settings):
            yield update

    async def on_edit(
        self, edited: gr.EditData, sent: Stored = None, *settings: Any
    ) -> AsyncIterator[list[JsonObject]]:
        """An earlier message with another text; its images stay, what followed it is dropped."""
        chat = await self.chat_of(sent)
        with warn_about_errors("Not sent"):
            index = chat.turn_index(edited, sent)
            turn = Turn("user", [*chat.turns[index].pictures, str(edited.value).strip()])
            check_input(turn)
            async for update in self.answered(chat, [*chat.turns[:index], turn], settings):
                yield update
            return
        chat.give_back([Turn("user", [str(edited.value)])])
        yield self.updates(chat)

    async def on_stop(self, sent: Stored = None) -> list[JsonObject]:
        chat = await self.chat_of(sent)
        chat.stop()
        return self.updates(chat)

    async def on_undo(self, sent: Stored = None) -> list[JsonObject]:
        chat = await self.chat_of(sent)
        if chat.may_be_named(sent):
            chat.undo()
        return self.updates(chat)

    # ---- the answer

    async def answered_once(
        self, chat: Chat, sent: Stored, turns: Sequence[Turn], settings: Sequence[Any]
    ) -> AsyncIterator[list[JsonObject]]:
        """Updates while turns are answered that a click chose, once."""
        if not chat.is_shown(sent):
            yield self.updates(chat)
            return
        with warn_about_errors("Not sent"):
            async for update in self.answered(chat, turns, settings):
                yield update

    async def answered(
        self, chat: Chat, turns: Sequence[Turn], settings: Sequence[Any]
    ) -> AsyncIterator[list[JsonObject]]:
        """Updates while turns are answered. Raises RequestError: another answer is being made.

        settings: as of `Chat.request`.
        """
        answer = chat.begin(turns)
        work = chat.work = asyncio.create_task(self.make_answer(chat, answer, settings))
        try:
            # Whoever ends the answer takes the work away.
            while chat.work is work:
                chat.changed.clear()
                yield self.updates(chat)
                await chat.changed.wait()
            yield self.updates(chat)
            await asyncio.wait([work])  # for the log
        finally:
            if chat.work is work:  # the tab was closed
                chat.stop()

    async def make_answer(self, chat: Chat, answer: Turn, settings: Sequence[Any]) -> None:
        """Make the answer to all turns but the last, which is the answer; of one that fails nothing
        stays."""
        *messages, _ = chat.turns
        is_complete = False
        with warn_about_errors():
            # 1. The images of the message.
            await self.read_pictures(chat.model, messages[-1])
            if "codes" in chat.model.card.tabs:
                for picture in messages[-1].pictures:
                    await self.load_codes(chat.model, picture)

            # 2. The answer grows with each event.
            request = chat.request(messages, *settings)
            answer.settings = {**request}
            del answer.settings["messages"]
            body = {**request, "stream": True, "previews": True}
            async for event in chat.model.stream("/v1/chat/completions", json=body):
                for choice in event["choices"]:
                    await self.add_change(chat, answer, choice["delta"])
                chat.change()
            is_complete = True
        if not is_complete:
            answer.parts = []
            chat.stop()
            return
        chat.end()

        # 3. A full disk of the log is the operator's concern, not the visitor's.
        try:
            await self.add_to_log("common", chat.model, [*messages, answer])
        except SeedError as error:
            logger.warning("%s", error)

    async def add_change(self, chat: Chat, answer: Turn, change: JsonObject) -> None:
        """Add a change of a stream to an answer: images, text, boxes and notes."""
        *earlier, _ = chat.turns
        for image in change.get("images", ()):
            url = image["image_url"]["url"]
            picture = await asyncio.to_thread(self.save_data, url)
            if not image["preview"]:
                picture.codes = image["codes"]
                picture.url = url
                picture.description = image.get("revised_prompt", "")
                if not picture.codes:
                    await asyncio.to_thread(picture.make_small)
            answer.parts = [*answer.sent_parts, picture]  # in place of a preview
        answer.reasoning += change.get("reasoning_content", "")
        if change.get("content"):
            answer.add_text(change["content"])
        if change.get("boxes"):
            marked = await asyncio.to_thread(self.save_marked, earlier, change["boxes"])
            answer.parts = [*answer.parts, marked]
        notes = change.get("notes", [])
        if any(map(LEFT_OUT.match, itertools.chain(*(turn.notes for turn in earlier)))):
            notes = [note for note in notes if not LEFT_OUT.match(note)]  # once a conversation
        answer.notes = [*answer.notes, *notes]

    # ---- the log

    async def add_to_log(self, kind: str, model: ModelClient, turns: Sequence[Turn]) -> None:
        """Log a conversation, if there is a log. Raises DataError: disk error."""
        if self.log is not None:
            await asyncio.to_thread(self.log.add, kind, model.name, turns)

    async def on_vote(self, vote: gr.LikeData, sent: Stored = None) -> None:
        """Log a vote with the conversation up to its answer."""
        chat = await self.chat_of(sent)
        kinds = {True: "upvote", False: "downvote"}  # "": taken back
        with warn_about_errors():
            turns = chat.turns[: chat.turn_index(vote, sent) + 1]
            await self.add_to_log(kinds.get(vote.liked, "withdrawn"), chat.model, turns)

    # ---- the model

    async def on_model(self, index: int, sent: Stored) -> tuple[Update, ...]:
        """Show a conversation of the browser with its model, or a new one of a model that is
        chosen.

        index: of the model. sent: the tab's conversation.

        Returns updates of the outputs in `page.build`.
        """
        # 1. The models that the backends serve now, and the conversation.
        model = self.models[index]
        is_chosen = model is not self.model  # before another event's conversation has another one
        await self.load_cards()
        if is_chosen:
            chat = self.add(Chat(model, replaces=self.chat.id))
        else:
            chat = await self.chat_of(sent)
        card = self.model.card

        # 2. What differs between them.
        panel = ""
        with warn_about_errors():
            panel = known_panel(self.model.known)
        titles = [(model.card.title, position) for position, model in enumerate(self.models)]
        ratios = gr.update(
            choices=list(card.ratios),
            value=next(iter(card.ratios), None),
            visible=bool(card.ratios),
        )
        # Of the sliders in their order; LaVIT has its own settings.
        values: Sequence[JsonObject] = (
            {},
            {},
            {"value": card.temperature},
            {},
            {"value": card.max_rounds},
        )
        n_codes = self.model.codes_per_image
        most_codes = max(2, n_codes)  # a slider needs a range, hidden ones too
        writes = self.model.abilities.writes
        return (
            self.updates(chat),
            gr.update(
                value=page_title(card.title, f"{self.model.notice} {card.about}"),
                elem_classes=[] if writes else ["no-chat"],
            ),
            gr.update(choices=titles, value=self.models.index(self.model)),
            gr.update(examples=chatbot_examples(card)),
            gr.update(value=panel, visible=bool(panel)),
            False,
            ratios,
            *(gr.update(visible=not card.ratios, **value) for value in values),
            {**ratios},  # Gradio empties an update
            gr.update(maximum=most_codes, value=most_codes),
            gr.update(maximum=most_codes, value=n_codes // 2),
            gr.update() if writes else gr.update(selected="draw"),
            *(gr.update(visible=tab in card.tabs) for tab in TABS),
        )

    def save_marked(self, turns: Sequence[Turn], boxes: Sequence[JsonObject]) -> Picture:
        """The last image of turns with the boxes of their answer, only to be shown."""
        picture = self.save_image(image_with_boxes(turns, boxes))
        picture.make_small()
        return picture

    # ---- the other tabs: images and their captions for a gallery, and notes below it

    async def images(
        self, model: ModelClient, captions: Sequence[object], route: str, **content: Any
    ) -> tuple[Update, Update]:
        """Images of a route, each with its caption; `content`: as of `ModelClient.stream`."""
        response = await model.post(route, **content)
        gallery = []
        lines = [" ".join(response.get("notes", ()))]
        for image, caption in zip(response["data"], captions, strict=False):
            picture = await asyncio.to_thread(self.save_data, image["b64_json"])
            gallery.append((picture.path, caption))
            if "revised_prompt" in image:
                lines.append(f"{caption} – read back: {image['revised_prompt']}")
        return gallery, escaped("\n".join(lines))

    async def on_draw(self, text: str, seed: float, ratio: str | None) -> tuple[Update, Update]:
        """Images of a text, from consecutive seeds."""
        first_seed = int(seed or 0)
        # Notes count images from 0.
        captions = [f"Image {index}, seed {first_seed + index}" for index in range(DRAWN_AT_ONCE)]
        with warn_about_errors():
            body = {
                "prompt": not_empty(text),
                "seed": first_seed,
                "n": DRAWN_AT_ONCE,
                "ratio": ratio,
            }
            return await self.images(self.model, captions, "/v1/images/generations", json=body)
        return NO_UPDATES

    async def on_change(self, upload: str | None, text: str, seed: float) -> tuple[Update, Update]:
        """An image changed as a text says."""
        with warn_about_errors():
            picture = await self.read_upload(self.model, upload)
            return await self.images(
                self.model,
                [text],
                "/v1/images/edits",
                files={"image": Path(picture.path).read_bytes()},
                data={"prompt": not_empty(text), "seed": int(seed or 0)},
            )
        return NO_UPDATES

    async def on_codes(self, upload: str | None) -> tuple[str, list[int]]:
        """The codes of an uploaded image, as a strip of colours and as numbers."""
        if upload:
            with warn_about_errors():
                picture = await self.read_upload(self.model, upload)
                codes = await self.load_codes(self.model, picture)
                return code_strip(codes), codes
        return "", []

    async def on_swap(
        self, first: list[int], second: list[int], count: float, n_exchanged: float
    ) -> tuple[Update, Update]:
        """Images of the first `count` codes of each image.

        first, second: codes of an image, or none.
        n_exchanged: with two images, so many of their first codes change places.
        """
        # 1. The exchange.
        if first and second:
            n = int(n_exchanged)
            first, second = [*second[:n], *first[n:]], [*first[:n], *second[n:]]

        # 2. Images of the codes that there are.
        rows = {name: codes for name, codes in (("first", first), ("second", second)) if codes}
        with warn_about_errors():
            if not rows:
                raise RequestError("Choose an image first.")
            body = {"codes": [*rows.values()], "first": int(count)}
            return await self.images(self.model, [*rows], "/v1/images/tokens", json=body)
        return NO_UPDATES

    async def on_find(self, upload: str | None, phrase: str) -> tuple[Update, Update]:
        """The image with boxes around what a phrase names."""
        with warn_about_errors():
            # The tuned request, greedy.
            question = self.model.card.tasks.detect_request(not_empty(phrase))
            turn = user_turn(question, [await self.read_upload(self.model, upload)])
            body = {
                "messages": [turn.message()],
                "num_beams": 1,
                "max_tokens": 256,
                "temperature": 0,
            }
            response = await self.model.post("/v1/chat/completions", json=body)
            answer = response["choices"][0]["message"]
            marked = await asyncio.to_thread(self.save_marked, [turn], answer["boxes"])
            caption = without_boxes(answer["content"]) or phrase
            return [(marked.path, caption)], escaped(" ".join(answer["notes"]))
        return [], ""


def not_empty(text: str) -> str:
    """The text of a tab. Raises RequestError: empty."""
    if not text.strip(BLANK_INPUT):
        raise RequestError("Write a text first.")
    return text


def page_title(title: str, text: str) -> str:
    """The page's title, and a text with `code` below it."""
    text = re.sub("`([^`]*+)`", r"<code>\1</code>", escaped(text))
    return f"<h1>{escaped(title)}</h1><p>{text}</p>"


def known_panel(known: JsonObject) -> str:
    """What a model learned to draw, as a button for each word, those of things with a drawing; ""
    for a model without known words."""
    if not known:
        return ""
    rows = []
    for kind in sorted(known, key=lambda kind: -len(known[kind])):  # things first
        buttons = []
        for word in known[kind]:
            name = html.escape(word)
            drawing = ""
            if kind == "things" and word in THUMBNAILS:
                address = f"gradio_api/file={quote(str(THUMBNAILS[word]))}"
                drawing = f'<img src="{address}" alt="" loading="lazy">'
            buttons.append(f"<button>{drawing}{name}</button>")
        rows.append(f'<h3>{html.escape(kind)}</h3><div class="words">{"".join(buttons)}</div>')
    return f"<details><summary>What can I draw?</summary><div>{''.join(rows)}</div></details>"


def code_strip(codes: Sequence[int]) -> str:
    """Codes as coloured fields, equal codes in equal colours."""
    fields = []
    for code in codes:
        hue = code * 137.508 % 360  # the golden angle: neighbours differ
        lightness = 70 + code % 5 * 5
        fields.append(f'<span style="background: hsl({hue:.0f} 65% {lightness}%)">{code}</span>')
    label = f"codes {', '.join(map(str, codes))}"
    return f'<div class="strip" role="img" aria-label="{label}">{"".join(fields)}</div>'
