"""The page's chat session: a visitor's conversation and images, and the page's event handlers.

The browser keeps the conversations (texts and codes of images, else small images), of which a tab
shows one and continues it after a reload.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import html
import itertools
import logging
import os
import random
import shutil
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from PIL import Image

from seed_multimodal.disk import JsonObject, writing
from seed_multimodal.errors import RequestError, SeedError
from seed_multimodal.images import io
from seed_multimodal.images.sheet import draw_boxes
from seed_multimodal.language.answer import LEFT_OUT
from seed_multimodal.models.registry import Example
from seed_multimodal.serving.client import ModelClient
from seed_multimodal.serving.conversation_log import ConversationLog
from seed_multimodal.serving.turns import (
    BLANK_INPUT,
    Conversation,
    Picture,
    Turn,
    restored,
    shown_text,
    stored_turns,
    user_turn,
)

logger = logging.getLogger(__name__)

IMAGES = Path(__file__).resolve().parents[3] / "images"  # of the examples
THUMBNAILS = {
    file.stem.replace("_", " "): file for file in sorted((IMAGES / "things").glob("*.webp"))
}
VISITS = "visits"  # the folder of the visitors' folders, beside their uploads
UPLOADS = io.ImageLimits(max_bytes=64 << 20)
DRAWINGS = io.ImageLimits(max_pixels=2048**2)  # also of stored images, which browsers may forge
MAX_UPLOADS = 64  # of a visitor that are kept
MAX_RESTORED = 500  # images of a conversation that a browser sends back
LONGEST_SIDE = 1792  # of an image that is sent: four views of 448 pixels (SEED-X)
RETRY_TEMPERATURE = 0.7  # of a second answer where the first was the likeliest one
DRAWN_AT_ONCE = 4  # images of the Draw tab, from consecutive seeds
TOKENS_AT_ONCE = 16  # images of one request
TABS = ("draw", "edit", "codes", "find")
TOO_LONG = "Error: History exceeds maximum rounds, please clear history and restart."

Stored = JsonObject | None  # the browser's copy of a conversation
Update = Any  # what a handler returns for a component: a value, `gr.update(…)` or `gr.skip()`
Updates = tuple[Update, Update, Update]  # of the browser's copy, the conversation, the message box

NO_UPDATES = (gr.skip(), gr.skip())


@contextlib.contextmanager
def warn_about_errors(no_answer: bool = False) -> Iterator[None]:
    """Display a `SeedError` as a warning of the page, and continue behind the block.

    Other errors, as of a backend or browser that sends something else, are logged.

    no_answer: the event ends, so that no answer follows.
    """
    try:
        yield
        return
    except SeedError as error:
        sentence = html.escape(str(error))
    except Exception:
        logger.exception("An event of the page failed")
        sentence = "The page failed; its log has the details."
    if no_answer:
        raise gr.Error(sentence, title="Not sent", print_exception=False)
    gr.Warning(sentence)


@dataclass
class ChatSession:
    """One visitor's session.

    Attributes:
        model: the chosen one of `models`.
        log: of conversations and votes; None: nothing is logged.
        conversation_id: of the conversation in the browser's storage.
        turns: the conversation; while it is answered, the last turn is the answer so far.
        before: the conversation before that, if it is answered.
        returned: the message that returned to its box when the last answer was taken back.
        uploads: images of the newest uploaded files.
        folder: of the visitor's images; "": none yet.
    """

    models: list[ModelClient]
    model: ModelClient
    log: ConversationLog | None = None
    conversation_id: str = ""
    turns: list[Turn] = field(default_factory=list)
    before: list[Turn] | None = None
    returned: list[Turn] = field(default_factory=list)
    uploads: dict[str, Picture] = field(default_factory=dict)
    folder: str = ""

    # ---- the visitor's images

    def save_image(self, image: Image.Image, url: str = "") -> Picture:
        """Store an image in the visitor's folder; only here images get their path."""
        if not self.folder:
            self.folder = f"{os.environ['GRADIO_TEMP_DIR']}/{VISITS}/{uuid.uuid4().hex}"
            os.makedirs(self.folder)
        picture = Picture(url=url)
        picture.path = f"{self.folder}/{uuid.uuid4().hex}.png"
        with writing(picture.path, RequestError):
            image.save(picture.path)
        return picture

    def save_data(self, data: str) -> Picture:
        """Store an image of base64 or a data URL; in a thread: it takes long."""
        return self.save_image(io.open_image(io.decode_text(data), limits=DRAWINGS).image)

    def store_upload(self, upload: str | None) -> Picture:
        """Check an uploaded image and store it in the model's size; in a thread: it takes long."""
        if not upload:
            raise RequestError("Choose an image first.")
        if upload not in self.uploads:
            image = io.open_image(Path(upload), limits=UPLOADS, at_least=LONGEST_SIDE).image
            # The page shows what the model sees: the image, or a square of it.
            image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            sent = image
            if not self.model.card.keeps_aspect:
                image = io.chat_image(image)
                sent = io.request_image(image)
            url = f"data:image/png;base64,{io.image_to_base64(sent)}"
            self.uploads[upload] = self.save_image(image, url)
            self.forget_uploads(MAX_UPLOADS)
        return self.uploads[upload]

    def forget_uploads(self, n_kept: int = 0) -> None:
        """Remove the files of the oldest uploads, but not of images in the conversation."""
        displayed = {picture.path for turn in self.turns for picture in turn.pictures}
        while len(self.uploads) > n_kept:
            upload = next(iter(self.uploads))
            for path in {upload, self.uploads.pop(upload).path} - displayed:
                if Path(path).is_relative_to(os.environ["GRADIO_TEMP_DIR"]):  # no example's
                    Path(path).unlink(missing_ok=True)

    async def load_codes(self, picture: Picture) -> list[int]:
        """The codes of an uploaded image."""
        if not picture.codes:
            response = await self.model.post("/v1/images/tokens", json={"images": [picture.url]})
            picture.codes = response["data"][0]["codes"]
        return picture.codes or []

    # ---- what is to be answered

    @property
    def draft(self) -> list[Turn]:
        """The new message that is being answered, if there is one."""
        return [] if self.before is None else self.turns[len(self.before) : -1]

    def answer(self, turns: Sequence[Turn]) -> None:
        """Begin the answer to a conversation, which `reply` makes. Raises RequestError: busy."""
        if self.before is not None:
            raise RequestError("An answer is being made: try again when it is complete.")
        self.before = self.turns
        self.turns = [*turns, Turn("assistant")]
        self.returned = []

    def resume(self, stored: Stored) -> None:
        """Continue the browser's conversation, if the page's program was started again since: its
        new session has none. In a thread of Gradio's, as all events that are no coroutines."""
        if stored and not self.conversation_id:
            asyncio.run(self.on_model(self.models.index(self.model), stored))

    @warn_about_errors(no_answer=True)
    def on_submit(self, message: JsonObject, stored: Stored = None) -> None:
        self.resume(stored)
        pictures = [self.store_upload(upload) for upload in message["files"]]
        self.answer([*self.turns, user_turn((message["text"] or "").strip(), pictures)])

    def on_example(self, chosen: gr.SelectData) -> None:
        example = self.examples[int(chosen.index)]
        self.on_submit({"text": example.text, "files": example_files(example)})

    def on_option(self, chosen: gr.SelectData, stored: Stored = None) -> None:
        self.on_submit({"text": chosen.value, "files": []}, stored)

    @warn_about_errors(no_answer=True)
    def on_retry(self, stored: Stored = None) -> None:
        self.resume(stored)
        self.answer(self.turns[:-1])

    @warn_about_errors(no_answer=True)
    def on_edit(self, edited: gr.EditData, stored: Stored = None) -> None:
        """An earlier message with another text; its images stay, what followed it is dropped."""
        self.resume(stored)
        index = self.turn_index(edited)
        turn = user_turn(str(edited.value).strip(), self.turns[index].pictures)
        self.answer([*self.turns[:index], turn])

    # ---- the answer

    async def reply(self, *settings: Any) -> AsyncIterator[Updates]:
        """Updates while the last turn is made.

        settings: as of `request`.
        """
        conversation_id = self.conversation_id
        answer = self.turns[-1] if self.before is not None else None
        if answer:
            async with contextlib.aclosing(self.growing(answer, *settings)) as updates:
                async for update in updates:
                    if not self.shows(answer):
                        break
                    yield update
        # The browser does not cancel an answer that has not begun yet, and may apply its updates
        # after those of *Undo*: the last one is what the conversation is now.
        is_over = self.before is None and not self.shows(answer)
        if is_over and conversation_id == self.conversation_id:
            yield self.updates(self.returned)

    async def growing(self, answer: Turn, *settings: Any) -> AsyncGenerator[Updates]:
        """Updates while the last turn, an answer, is made."""
        # 1. The page shows the message at once, and an empty answer.
        messages = self.turns[:-1]
        box = gr.update(submit_btn=False, stop_btn=True)
        if self.draft:  # it leaves the box
            box["value"] = None
        yield await asyncio.to_thread(self.stored), self.displayed(), box

        # 2. The answer grows with each event; of one that fails nothing stays.
        is_complete = False
        with warn_about_errors():
            if "codes" in self.model.card.tabs:
                for picture in messages[-1].pictures:
                    await self.load_codes(picture)
            request = self.request(messages, *settings)
            answer.settings = {**request}
            del answer.settings["messages"]
            body = {**request, "stream": True, "previews": True}
            async for event in self.model.stream("/v1/chat/completions", json=body):
                for choice in event["choices"]:
                    await self.add_change(answer, choice["delta"])
                yield await asyncio.to_thread(self.stored), self.displayed(), gr.skip()
            is_complete = True
        if not self.shows(answer):
            return
        if not is_complete:
            answer.parts = []
            self.on_stop()
            return
        self.before = None

        # 3. A full disk of the log is the operator's concern, not the visitor's.
        try:
            await self.add_to_log("common", [*messages, answer])
        except SeedError as error:
            logger.warning("%s", error)
        yield await asyncio.to_thread(self.updates)

    def shows(self, answer: Turn | None) -> bool:
        """Whether an answer was not stopped and the visitor did not choose another conversation,
        which an update would change otherwise: Gradio cancels an event some time later."""
        return any(turn is answer for turn in self.turns)

    async def add_change(self, answer: Turn, change: JsonObject) -> None:
        """Add a change of a stream to an answer: images, text, boxes and notes."""
        for image in change.get("images", ()):
            url = image["image_url"]["url"]
            picture = await asyncio.to_thread(self.save_data, url)
            if not image["preview"]:
                picture.codes = image["codes"]
                picture.url = url
                picture.description = image.get("revised_prompt", "")
            answer.parts = [*answer.sent_parts, picture]  # in place of a preview
        answer.reasoning += change.get("reasoning_content", "")
        if change.get("content"):
            answer.add_text(change["content"])
        if change.get("boxes"):
            marked = image_with_boxes(self.turns, change["boxes"])
            answer.parts = [*answer.parts, self.save_image(marked)]
        notes = change.get("notes", [])
        if any(map(LEFT_OUT.match, itertools.chain(*(turn.notes for turn in self.turns[:-1])))):
            notes = [note for note in notes if not LEFT_OUT.match(note)]  # once a conversation
        answer.notes = [*answer.notes, *notes]

    def request(
        self,
        turns: Sequence[Turn],
        force_image: bool,
        ratio: str | None,
        beams: float,
        max_new_tokens: float,
        temperature: float,
        top_p: float,
        max_rounds: float,
    ) -> JsonObject:
        """The body of a chat request, with a new seed. A retry is sampled even at temperature 0.

        max_rounds: 0: any number; the backend drops the oldest turns that are too many for it.
        """
        # 1. The conversation, or the last message in the model's template.
        card = self.model.card
        if card.single_turn_template is not None:
            opening, closing = card.single_turn_template
            turns = [Turn("user", [opening, *turns[-1].parts, closing])]
        if max_rounds and len(turns) > 2 * max_rounds:
            raise RequestError(TOO_LONG)

        # 2. Its settings.
        body = {
            "messages": [turn.message() for turn in turns],
            "force_image": bool(force_image),
            "seed": random.randrange(2**31),
        }
        if card.ratios:  # the model's own settings
            if force_image:
                body["ratio"] = ratio
            return body
        is_retry = len(turns) < len(self.before or ())
        if is_retry and not temperature:
            temperature = RETRY_TEMPERATURE
        return {
            **body,
            "num_beams": int(beams),
            "max_tokens": int(max_new_tokens),
            "top_p": top_p,
            "temperature": temperature,
        }

    def on_stop(self, stored: Stored = None) -> Updates:
        """End an answer that failed or was stopped."""
        self.resume(stored)
        self.returned = []
        if self.before is not None:
            self.turns, self.returned = self.stopped()
            self.before = None
        return self.updates(self.returned)

    def stopped(self) -> tuple[list[Turn], list[Turn]]:
        """What *Stop* or a reload would leave of a running answer: the conversation, and messages
        that return to their box. Without any part of an answer the conversation is as before."""
        *messages, answer = self.turns
        if not answer.sent_parts:
            return self.before or [], self.draft
        answer = copy.copy(answer)
        answer.parts = answer.sent_parts
        answer.notes = [*answer.notes, "Stopped."]
        return [*messages, answer], []

    def on_undo(self, stored: Stored = None) -> Updates:
        """Take back the last message, which returns to its box, and its answer."""
        self.resume(stored)
        self.returned = self.turns[-2:-1]
        self.turns = self.turns[:-2]
        self.before = None
        return self.updates(self.returned)

    def on_new(self) -> Updates:
        """An empty conversation."""
        self.reset()
        return self.updates()

    def updates(self, draft: Sequence[Turn] = ()) -> Updates:
        """The browser's copy, the conversation and the message box, while nothing is answered.

        What is shown is what a reload shows: one update has both.
        draft: a message that returns to its box.
        """
        box = gr.update(submit_btn=True, stop_btn=False)
        for turn in draft:
            files = [picture.path for picture in turn.pictures if picture.path]
            box["value"] = {"text": turn.text, "files": files}
        return self.stored(), self.displayed(), box

    def stored(self) -> JsonObject:
        """The browser's copy. A message without any answer yet is its last turn."""
        turns = self.turns
        if self.before is not None:
            conversation, draft = self.stopped()
            turns = [*conversation, *draft]
        return {
            "id": self.conversation_id,
            "model": self.model.name,
            "turns": stored_turns(turns),
        }

    def follow_ups(self) -> list[str]:
        """What follows in an example whose messages the conversation has."""
        texts = [turn.text for turn in self.turns if turn.role == "user"]
        for example in self.examples:
            script = [example.text, *example.then]
            if texts and texts == script[: len(texts)]:
                return script[len(texts) :][:1]
        return []

    # ---- the conversation

    @property
    def examples(self) -> list[Example]:
        """Those whose images are installed: a wheel has none."""
        return [
            example
            for example in self.model.card.examples
            if all(map(os.path.isfile, example_files(example)))
        ]

    def displayed(self) -> list[JsonObject]:
        """The conversation as messages of Gradio's Chatbot; the last offers what may follow."""
        messages = [message for turn in self.turns for message in turn.displayed()]
        if self.before is None and (texts := self.follow_ups()):
            messages[-1]["options"] = [{"value": text} for text in texts]
        return messages

    def turn_index(self, event: gr.EventData) -> int:
        """The turn of a displayed message; reasoning and notes are messages of their own."""
        index = event.index
        position = int(index[0] if isinstance(index, list | tuple) else index)
        turns = [turn for turn, items in enumerate(self.turns) for _ in items.displayed()]
        return turns[position]

    async def add_to_log(self, kind: str, turns: Sequence[Turn]) -> None:
        """Log a conversation, if there is a log; in a thread. Raises DataError: disk error."""
        if self.log is not None:
            await asyncio.to_thread(self.log.add, kind, self.model.name, turns)

    async def on_vote(self, vote: gr.LikeData) -> None:
        """Log a vote with the conversation up to its answer."""
        kinds = {True: "upvote", False: "downvote"}  # "": taken back
        with warn_about_errors():
            kind = kinds.get(vote.liked, "withdrawn")
            await self.add_to_log(kind, self.turns[: self.turn_index(vote) + 1])

    def reset(self) -> None:
        """A new conversation; the visitor's images and uploaded files are removed."""
        self.conversation_id = uuid.uuid4().hex
        self.turns = []
        self.before = None
        self.forget_uploads()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder = ""

    def on_choose(self, message: JsonObject) -> Update:
        """Warn about a chosen file that is no image, and take it out of the message."""
        files = []
        for upload in message["files"]:
            with warn_about_errors():
                self.store_upload(upload)
                files.append(upload)
        return gr.skip() if files == message["files"] else {**message, "files": files}

    async def on_model(self, index: int, stored: Stored) -> tuple[Update, ...]:
        """Show a conversation that the browser has kept, with its model, or a new one of a model
        that is chosen.

        index: of the model; another one than now: it is chosen, and shows its own conversation.
        stored: the tab's conversation; None: a new one.

        Returns updates of the outputs in `page.build`.
        """
        # 1. The models that the backends serve now.
        self.reset()
        is_choice = self.models[index] is not self.model
        for model in self.models:
            with warn_about_errors():
                await model.load_card()
        names = [model.name for model in self.models]
        conversation = Conversation(model="", turns=[])
        if stored:
            with warn_about_errors():
                conversation = restored(stored)
        if not is_choice and conversation.model in names:
            index = names.index(conversation.model)
        self.model = self.models[index]
        card = self.model.card
        draft: list[Turn] = []
        if conversation.model == self.model.name:
            self.conversation_id = conversation.id
            self.turns = conversation.turns
            await self.draw_again()
            if self.turns[-1:] and self.turns[-1].role == "user":  # a reload ended its answer
                draft = [self.turns.pop()]
        elif conversation.turns and not is_choice:
            gr.Warning(f"No backend serves {html.escape(conversation.model)}, so its chat waits.")
        _, chat, box = self.updates(draft)

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
            self,
            gr.update(
                value=f"# {card.title}\n\n{self.model.notice} {card.about}",
                elem_classes=[] if writes else ["no-chat"],
            ),
            gr.update(choices=titles, value=index),
            gr.update(value=chat, examples=chatbot_examples(self.examples)),
            box,
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

    async def draw_again(self) -> None:
        """Draw the newest images of a restored conversation from their codes; others are stored."""
        pictures = [picture for turn in self.turns for picture in turn.pictures][-MAX_RESTORED:]
        coded = [picture for picture in pictures if picture.codes]
        stored = [picture for picture in pictures if not picture.codes][-MAX_UPLOADS:]
        with warn_about_errors():
            for picture in stored:
                data = picture.url or picture.stored_url
                picture.path = (await asyncio.to_thread(self.save_data, data)).path
            for start in range(0, len(coded), TOKENS_AT_ONCE):
                batch = coded[start : start + TOKENS_AT_ONCE]
                body = {"codes": [picture.codes for picture in batch]}
                drawings, _ = await self.images(batch, "/v1/images/tokens", json=body)
                for path, picture in drawings:
                    picture.path = path

    # ---- the other tabs: images and their captions for a gallery, and notes below it

    async def images(
        self, captions: Sequence[object], route: str, **content: Any
    ) -> tuple[Update, Update]:
        """Images of a route, each with its caption; `content`: as of `ModelClient.stream`."""
        response = await self.model.post(route, **content)
        gallery = []
        lines = [" ".join(response.get("notes", ()))]
        for image, caption in zip(response["data"], captions, strict=False):
            picture = await asyncio.to_thread(self.save_data, image["b64_json"])
            gallery.append((picture.path, caption))
            if "revised_prompt" in image:
                lines.append(f"{caption} – read back: {image['revised_prompt']}")
        return gallery, "\n\n".join(lines)

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
            return await self.images(captions, "/v1/images/generations", json=body)
        return NO_UPDATES

    async def on_change(self, upload: str | None, text: str, seed: float) -> tuple[Update, Update]:
        """An image changed as a text says."""
        with warn_about_errors():
            picture = await asyncio.to_thread(self.store_upload, upload)
            return await self.images(
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
                codes = await self.load_codes(await asyncio.to_thread(self.store_upload, upload))
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
            return await self.images([*rows], "/v1/images/tokens", json=body)
        return NO_UPDATES

    async def on_find(self, upload: str | None, phrase: str) -> tuple[Update, Update]:
        """The image with boxes around what a phrase names."""
        with warn_about_errors():
            # The tuned request, greedy.
            question = self.model.card.tasks.detect_request(not_empty(phrase))
            turn = user_turn(question, [await asyncio.to_thread(self.store_upload, upload)])
            body = {
                "messages": [turn.message()],
                "num_beams": 1,
                "max_tokens": 256,
                "temperature": 0,
            }
            response = await self.model.post("/v1/chat/completions", json=body)
            answer = response["choices"][0]["message"]
            marked = self.save_image(image_with_boxes([turn], answer["boxes"]))
            caption = shown_text(answer["content"]) or phrase
            return [(marked.path, caption)], " ".join(answer["notes"])
        return [], ""


def not_empty(text: str) -> str:
    """The text of a tab. Raises RequestError: empty."""
    if not text.strip(BLANK_INPUT):
        raise RequestError("Write a text first.")
    return text


def example_files(example: Example) -> list[str]:
    return [str(IMAGES / name) for name in example.images]


def chatbot_examples(examples: Sequence[Example]) -> list[JsonObject]:
    """Examples in the form of Gradio's Chatbot."""
    displayed = []
    for example in examples:
        label = example.text or "Describe it"
        if example.then:
            label += " …"
        displayed.append(
            {"text": example.text, "display_text": label, "files": example_files(example)}
        )
    return displayed


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


def image_with_boxes(turns: Sequence[Turn], boxes: Sequence[JsonObject]) -> Image.Image:
    """The last image of turns with the boxes of their answer, which are shares of its sides."""
    pictures = [picture for turn in turns for picture in turn.pictures]
    # Shares of the sides → pixels.
    image = io.open_image(Path(pictures[-1].path)).image
    sides = image.size * 2
    corners = [
        [int(share * side) for share, side in zip(box["box"], sides, strict=True)] for box in boxes
    ]
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
