"""`MultimodalSystem`: describe, ask, chat, draw, edit, reconstruct and tokenize, for every family.

    messages ─► requests: prompts ─► generate ─► ids ─► parts: texts and images ─► ImageCodec.draw

    system = MultimodalSystem.from_pretrained("nano")
    system.describe("cat.png")                     # one image: a text
    system.describe(["cat.png", "dog.png"])        # a list is a batch: a list of texts
    system.describe([["cat.png", "dog.png"]])      # two images in one prompt
    system.draw("a blue fish", num_images=4)

A family says how conversations become prompts (`requests`) and what its images are drawn from (`values`), and brings an
`ImageCodec`.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from PIL import Image

from seed_multimodal.errors import ConfigError, GenerationError
from seed_multimodal.language.answer import ImagePart, split_answer
from seed_multimodal.language.generation import GenerationSettings, HiddenStates, Prompt, Stopped, generate
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.progress import Progress
from seed_multimodal.settings import check_value, nearest, read_settings
from seed_multimodal.system.config import SystemConfig
from seed_multimodal.system.domain import read_known_words
from seed_multimodal.system.images import ImageCodec, on_device, one_seed_each
from seed_multimodal.system.loading import Log, Runtimes, choose_runtimes, family
from seed_multimodal.system.messages import (
    Answer,
    DrawnPart,
    Message,
    grouped,
    is_image,
    read_messages,
    require_text,
    texts_for,
    user_message,
)
from seed_multimodal.system.requests import Request, Task, Written
from seed_multimodal.system.streaming import AnswerReader, Event, TokenStreamer, tokens_from_thread

BATCH = 16
BAR_FROM = 32  # requests from which there is a progress bar
PREVIEW_STEPS = 2  # of nano's twelve: nearly as near to the whole image as twelve, at a quarter of their time


class MultimodalSystem:
    """A loaded system; make one with `from_pretrained`.

    Methods take generation settings (`GenerationSettings`) and those of the de-tokenizer (`num_inference_steps`,
    `guidance_scale`, `height`, `width`, … where it has them) as keywords; defaults are the system's own. A system may
    be used from several threads: its language model and its codec each serve one of them at a time.
    """

    defaults: ClassVar[dict[str, dict[str, Any]]] = {}  # generation settings by task

    def __init__(self, config: SystemConfig, tokenizer: MultimodalTokenizer, llm: Any, images: ImageCodec,
                 log: Log = None, *, llm_device: torch.device | None = None) -> None:
        """`llm_device`: where an off-loaded language model computes; None: it stays where it is."""
        self.config, self.tokenizer, self.llm, self.images, self.log = config, tokenizer, llm, images, log
        self.tasks: Any = config.tasks
        self._llm_device, self._turn = llm_device, threading.Lock()
        for task in ("describe", "ask", "draw", "edit", "chat"):
            self.settings(task)  # wrong defaults in system.json are reported now

    @classmethod
    def from_pretrained(cls, name: str | Path | SystemConfig | None = None, *, device: str = "auto",
                        dtype: Any = "auto", quantization: str | None = None, image_device: str | None = None,
                        drawing_device: str | None = None, offload: bool | Collection[str] = False, log: Log = print,
                        load_decoder: bool = True, **parts: Any) -> Self:
        """Load a system; its de-tokenizer is loaded when the first image is drawn.

        Args:
            name: nano, nano-x, nano-lavit, 8b, 14b, seed-x, seed-x-i, seed-x-edit, lavit, or a folder.
            device, dtype: see `choose_device`; the choice goes to `log`.
            quantization: "8bit" or "4bit" for the language model.
            image_device, drawing_device: where images are encoded and drawn, if not on `device`.
            offload: each part is on its device only while it works, or these of "llm", "encoder" and "decoder".
            load_decoder: False: a system that never draws.
            parts: single parts (folders or hub names), as keys of `SystemConfig`.

        Raises:
            CheckpointError: a part that is missing or damaged: one sentence, with what to put where.
        """
        config = name if isinstance(name, SystemConfig) else SystemConfig.find(name, **parts)
        kind: type[Self] = family(config.system)
        if not issubclass(kind, cls):
            raise ConfigError(f"{config.name} is a {kind.__name__}; load it with MultimodalSystem or {kind.__name__}.")
        config.require("llm", "tokenizer")
        runtimes = choose_runtimes(device, dtype, image_device, drawing_device, quantization, offload, log)
        return kind.load(config, replace(runtimes, load_decoder=load_decoder), log)

    def save_pretrained(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write the system as one folder with a model card; `from_pretrained`, `seed --model` and the servers load it.

        Raises:
            ConfigError: the folder is not empty (`force` replaces it), or the parts have an original's file layout.
        """
        from seed_multimodal.system.assemble import save_system

        return save_system(self.config, folder, force=force)

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Upload what `save_pretrained` writes to a repository of the Hugging Face hub; returns its address."""
        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as place:
            folder = self.save_pretrained(Path(place) / "system")
            address = HfApi().create_repo(repo_id, private=private, exist_ok=True)
            HfApi().upload_folder(repo_id=repo_id, folder_path=folder)
        return str(address)

    # ---- a family defines

    @classmethod
    def load(cls, config: SystemConfig, runtimes: Runtimes, log: Log) -> Self:
        raise NotImplementedError

    def requests(self, conversations: Sequence[Sequence[Message]], task: Task, opening: str = "",
                 seeds: Sequence[int | None] | None = None) -> list[Request]:
        """Conversations as prompts; all their images are encoded together.

        Args:
            opening: text of a forced answer, at the end of the prompt. seeds: of encoders that draw (LaVIT's).

        Raises:
            RequestError, ImageError: content that cannot be read.
        """
        raise NotImplementedError

    def values(self, parts: Sequence[ImagePart], states: HiddenStates, row: int) -> Sequence[Any]:
        """What `images.draw` takes for images of answer `row`."""
        return [part.codes for part in parts]

    def draw_values(self, values: Sequence[Any], requests: Sequence[Request | None], seeds: Sequence[int],
                    batch_size: int, drawing: dict[str, Any]) -> list[Image.Image]:
        return self.images.draw(values, seeds=seeds, batch_size=batch_size, **drawing)

    def said(self, answer: Answer, task: Task) -> str:
        """The text of an answer, for people."""
        return answer.text

    def stops(self, task: Task) -> Sequence[str]:
        """Text that ends an answer."""
        return ()

    def ends(self, task: Task) -> Sequence[int] | None:
        """Tokens that end an answer; None: `</s>`."""
        return None

    def after(self, task: Task) -> str:
        """Characters that end a verdict at the beginning of an answer."""
        return str(self.tasks.answer_after)

    def reader(self, task: Task, previews: Sequence[int] = ()) -> AnswerReader:
        """What cuts an answer at its end, and into events."""
        return AnswerReader(self.tokenizer, self.stops(task), previews)

    def own_defaults(self, task: str) -> dict[str, Any]:
        """Generation settings of `system.json` for a task."""
        return dict(self.config.generation)

    def image_tokens(self, settings: GenerationSettings) -> int:
        """New tokens of one image, its `<img>` given."""
        return self.tokenizer.vocabulary.tokens_per_image + 1

    def question(self, question: str, short: bool) -> str:
        """The request that asks a question; `short`: as the system was tuned to be asked."""
        return str(self.tasks.question(question)) if short else question

    # ---- tasks

    def describe(self, images: Any, prompt: str | Sequence[str] | None = None, *, batch_size: int = BATCH,
                 **options: Any) -> Any:
        """What an image shows: a text; a list of texts for a list of images. `prompt` replaces the usual request."""
        return self._say(images, self.tasks.describe if prompt is None else prompt, "describe", batch_size, options)

    def ask(self, images: Any, question: str | Sequence[str], *, short: bool = True, batch_size: int = BATCH,
            **options: Any) -> Any:
        """The answer to a question about an image: a text; a list of texts for a list of images.

        Args:
            question: one for all images, or one each. short: ask as the system was tuned to be asked.
        """
        several = [question] if isinstance(question, str) else question
        asked = [self.question(require_text(one, "The question"), short) for one in several]
        return self._say(images, asked[0] if isinstance(question, str) else asked, "ask", batch_size, options)

    def detect(self, images: Any, phrase: str | Sequence[str], *, batch_size: int = BATCH, **options: Any) -> Any:
        """Where `phrase` is in an image, for systems that answer with boxes (SEED-X)."""
        raise ConfigError(f"{self.config.name} answers without boxes, so it cannot say where things are; SEED-X can.")

    def draw(self, text: str | Sequence[str], seed: Any = 0, *, num_images: int = 1, verbatim: bool = False,
             batch_size: int = BATCH, **options: Any) -> Any:
        """An image of `text`; a list of images for a list of texts, or where `num_images` is given.

        Args:
            seed: one for all texts, or one each; image n of a text has `seed` + n.
            verbatim: `text` is the whole request.

        Raises:
            GenerationError: no whole image.
        """
        texts = [text] if isinstance(text, str) else list(text)
        conversations = [user_message([self.drawing_request(one, verbatim)]) for one in texts]
        images = self._draw(conversations, "draw", seed, num_images, batch_size, options)
        return images[0] if isinstance(text, str) and num_images == 1 and len(images) == 1 else images

    def edit(self, images: Any, instruction: str | Sequence[str], seed: Any = 0, *, num_images: int = 1,
             batch_size: int = BATCH, **options: Any) -> Any:
        """An image after `instruction`; a list of images for a list of images. Raises as `draw`."""
        groups, single = grouped(images)
        conversations = [user_message([*group, require_text(one, "The instruction")])
                         for group, one in zip(groups, texts_for(instruction, groups), strict=True)]
        edited = self._draw(conversations, "edit", seed, num_images, batch_size, options)
        return edited[0] if single and num_images == 1 else edited

    def reconstruct(self, images: Any, seed: Any = 0, *, batch_size: int = 8, **drawing: Any) -> list[Image.Image]:
        """Images, or their codes, drawn again: a list."""
        items = [item for group in grouped(images)[0] for item in group]
        seeds = one_seed_each(seed, len(items))
        rows = [row for row, item in enumerate(items) if is_image(item)]
        codes = iter(self._codes_of([items[row] for row in rows], [seeds[row] for row in rows]) if rows else ())
        values = [next(codes) if is_image(item) else item for item in items]
        return self.images.draw(values, seeds=seeds, batch_size=batch_size, **drawing)

    def tokenize(self, images: Any) -> Any:
        """Codes of an image, or of each image of a list: int64 [B, 32], or a list of [n] where their number differs."""
        return self._codes_of([item for group in grouped(images)[0] for item in group], ())

    def chat(self, messages: Sequence[Any], stream: bool = False, *, force_image: bool = False,
             previews: Sequence[int] | None = None, should_stop: Callable[[], bool] | None = None,
             **options: Any) -> Any:
        """The `Answer` to the last message of a conversation (see `system.messages` for its form).

        Args:
            stream: yield events (see `system.streaming`) while the answer is made.
            force_image: make the model answer with an image.
            previews: after how many codes a stream shows an image, where first codes are one; None: as `system.json`.
            should_stop: called before each token and each drawing; true ends the answer there.
        """
        conversation = read_messages(messages)
        task = self.task_of(conversation, force_image)
        drawing = self._drawing(options)
        if stream:
            options.setdefault("num_beams", 1)
        settings = self.settings(task, **options).with_seed()
        opening = ""
        if drawing and self.images.can_draw:
            self.images.check_drawing(**drawing)
        if force_image:
            seen = any(not isinstance(item, str) for one in conversation for item in one.content)
            opening = self.forced_opening(seen)
            settings = self._forced(settings, options)
        request = self._fitting(conversation, task, opening, settings)
        due = check_value(Sequence[int], self.config.previews if previews is None else previews, "previews", least=1)
        due = due if self.images.progressive and self.images.can_draw else ()
        events = self._events(request, settings, task, drawing, due, should_stop)
        return events if stream else next(event["answer"] for event in events if event["type"] == "done")

    # ---- building blocks

    def settings(self, task: str = "chat", **options: Any) -> GenerationSettings:
        """The system's defaults for a task with `options` over them.

        A given temperature, top_p or top_k switches sampling on (without beams), unless `do_sample` is given too.

        Raises:
            ConfigError: an unknown option (names the nearest) or a value out of range.
        """
        known = [entry.name for entry in fields(GenerationSettings)]
        for name in options:
            if name not in known:
                raise ConfigError(f"Unknown option {name!r}{nearest(name, [*known, *self.drawing_settings])}.")
        if "do_sample" not in options and {"temperature", "top_p", "top_k"} & options.keys():
            options = {"do_sample": True, "num_beams": 1, **options}
        values = {"max_new_tokens": 256, "do_sample": False, **self.defaults.get(task, {}),
                  **self.own_defaults(task), **options}
        return read_settings(GenerationSettings, values, "Generation setting")

    @property
    def drawing_settings(self) -> tuple[str, ...]:
        return self.images.drawing_settings

    def drawing_request(self, text: str, verbatim: bool = False) -> str:
        """The message that asks for an image of `text`; raises RequestError for an empty text."""
        text = require_text(text, "The text to draw")
        return text if verbatim else str(self.tasks.draw_request(text))

    def forced_opening(self, seen: bool) -> str:
        """The words before a forced image in a conversation with an image (`seen`), or without."""
        return str(self.tasks.edit_response if seen else self.tasks.draw_response)

    def free_tokens(self, task: Task) -> int:
        """Tokens in which the model may say something before an image; only where none follows, it is forced."""
        return int(getattr(self.tasks, f"{task}_words"))

    def task_of(self, conversation: Sequence[Message], force_image: bool) -> Task:
        """Which task's settings and prompts a conversation is answered with."""
        return "chat"

    def note(self, message: Message) -> str:
        """What there is to say of a message's words and images that are unlike those of the training, or nothing."""
        known = self.config.known_words
        words = read_known_words(known).note(message.text) if known else ""
        return " ".join(filter(None, (words, self.images.note(message.images))))

    def write(self, conversations: Sequence[Sequence[Message]], task: Task, settings: GenerationSettings,
              opening: str = "", *, seeds: Sequence[int] | None = None, batch_size: int = BATCH) -> list[Written]:
        """Answers to conversations, in batches; their images are not drawn yet."""
        written: list[Written] = []
        log = self.log if len(conversations) >= BAR_FROM else None
        with Progress(task, len(conversations), "answer", log=log) as bar:
            for start in range(0, len(conversations), batch_size):
                rows = slice(start, start + batch_size)
                own = None if seeds is None else seeds[rows]
                requests, states = self.requests(conversations[rows], task, opening, own), HiddenStates()
                answers = self.generate([one.prompt for one in requests], settings, task, seeds=own, states=states)
                for row, (request, ids) in enumerate(zip(requests, answers, strict=True)):
                    answer = self.read_answer(ids, task, request.note)
                    images = [part for part in answer.parts if isinstance(part, ImagePart)]
                    written.append(Written(answer, self.values(images, states, row) if images else (), request))
                bar.update(len(requests))
        return written

    def write_images(self, conversations: Sequence[Sequence[Message]], task: Task, *,
                     seeds: Sequence[int] | None = None, batch_size: int = BATCH, **options: Any) -> list[Written]:
        """Answers to conversations that ask for one image, not drawn yet. The model may say something first
        (`free_tokens`, or up to `max_new_tokens`); the image is forced where none follows."""
        forced = self._forced(self.settings(task, **options), options)
        forced = replace(forced, max_new_tokens=self.image_tokens(forced))
        written: dict[int, Written] = {}
        if free := self.free_tokens(task):
            most = options.get("max_new_tokens", forced.max_new_tokens + free)
            settings = replace(forced, force_image=False, max_new_tokens=most)
            written = dict(enumerate(self.write(conversations, task, settings, seeds=seeds, batch_size=batch_size)))
        rest = [row for row in range(len(conversations)) if row not in written or len(written[row].values) != 1]
        if rest:
            again = self.write([conversations[row] for row in rest], task, forced, self.forced_opening(task == "edit"),
                               seeds=None if seeds is None else [seeds[row] for row in rest], batch_size=batch_size)
            written |= zip(rest, again, strict=True)
        return [written[row] for row in range(len(conversations))]

    def generate(self, prompts: Sequence[Prompt], settings: GenerationSettings, task: Task = "chat",
                 **how: Any) -> list[list[int]]:
        """The ids of each answer; `how`: further arguments of `language.generation.generate`."""
        with self._turn, on_device(self.llm, self._llm_device or torch.device("cpu"), self._llm_device is not None):
            return generate(self.llm, self.tokenizer, prompts, settings, ends=self.ends(task), **how)

    # ---- inside

    def _codes_of(self, images: Sequence[Any], seeds: Sequence[int]) -> Any:
        """Codes of images; `seeds`: of encoders that draw."""
        self._log_note(self.images.note(images))
        return self.images.encode(images)

    def _say(self, images: Any, texts: str | Sequence[str], task: Task, batch_size: int,
             options: dict[str, Any]) -> Any:
        """The text of the answer about each image; images in it are not drawn."""
        groups, single = grouped(images)
        conversations = [user_message([*group, *filter(None, [text])])
                         for group, text in zip(groups, texts_for(texts, groups), strict=True)]
        seeds = None
        if isinstance(options.get("seed"), (list, tuple, range)):
            seeds = one_seed_each(options.pop("seed"), len(groups))
        settings = self.settings(task, **options)
        seeds = seeds or (None if settings.seed is None else [settings.seed] * len(groups))
        self._log_note(self.note(conversations[0][-1]) if single else "")
        written = self.write(conversations, task, settings, batch_size=batch_size, seeds=seeds)
        said = [self.said(one.answer, task) for one in written]
        return said[0] if single else said

    def _draw(self, conversations: Sequence[Sequence[Message]], task: Task, seed: Any, num_images: int, batch_size: int,
              options: dict[str, Any]) -> list[Image.Image]:
        drawing = self._drawing(options)
        self.images.check_drawing(**drawing)  # a missing de-tokenizer is reported before generation
        first = one_seed_each(seed, len(conversations))
        seeds = [(one + place) % 2**63 for one in first for place in range(num_images)]
        self._log_note(self.note(conversations[0][-1]) if len(conversations) == 1 else "")
        if self.settings(task, **options).samples:
            conversations = [one for one in conversations for _ in range(num_images)]
            written = self.write_images(conversations, task, seeds=seeds, batch_size=batch_size, **options)
        else:  # the same codes for all drawings of a text
            once = self.write_images(conversations, task, seeds=seeds[::num_images], batch_size=batch_size, **options)
            written = [one for one in once for _ in range(num_images)]
        for one in written:
            if len(one.values) != 1:
                raise GenerationError("The model's answer holds no whole image"
                                      + (f": {one.answer.problems[0]}" if one.answer.problems else "."))
        return self.draw_values([one.values[0] for one in written], [one.request for one in written], seeds,
                                min(batch_size, 8), drawing)

    def _drawing(self, options: dict[str, Any]) -> dict[str, Any]:  # removes them from the options
        return {key: options.pop(key) for key in self.drawing_settings if key in options}

    def _forced(self, settings: GenerationSettings, given: dict[str, Any]) -> GenerationSettings:
        """Settings that force an image; the system's own limit is raised to leave room for it, a given one is kept,
        or refused (`ConfigError`) if no image fits into it."""
        needed = self.tokenizer.vocabulary.least_codes + 1
        if "max_new_tokens" in given and settings.max_new_tokens < needed:
            raise ConfigError(f"An image needs {needed} new tokens: max_new_tokens {settings.max_new_tokens} is too "
                              f"small for a request that must be answered with one.")
        return replace(settings, force_image=True, max_new_tokens=max(settings.max_new_tokens, needed))

    def _fitting(self, conversation: list[Message], task: Task, opening: str, settings: GenerationSettings) -> Request:
        """The request of a conversation; where it is longer than the context, its oldest turns are left out."""
        context = int(self.llm.config.max_position_embeddings)
        room = min(settings.max_new_tokens, max(context // 4, self.tokenizer.vocabulary.least_codes + 2))
        left_out = 0
        while True:
            request = self.requests([conversation], task, opening, [settings.seed])[0]
            users = [place for place, message in enumerate(conversation) if message.role == "user"]
            if len(request.prompt) + room <= context or len(users) < 2:
                break
            start = next(place for place, message in enumerate(conversation) if message.role != "system")
            conversation = [*conversation[:start], *conversation[users[1]:]]
            left_out += users[1] - start
        request.note = self.note(conversation[-1])
        if left_out:
            request.note = (f"The conversation is longer than the model's context of {context} tokens: its first "
                            f"{left_out} messages were left out. {request.note}").rstrip()
        return request

    def _events(self, request: Request, settings: GenerationSettings, task: Task, drawing: dict[str, Any],
                previews: Sequence[int], should_stop: Callable[[], bool] | None) -> Iterator[Event]:
        """Events of one answer, its images drawn; the last is `done` with the whole `Answer`."""
        words, states = self.tokenizer.vocabulary, HiddenStates()
        reader = self.reader(task, previews if settings.num_beams == 1 else ())
        images: list[Image.Image | None] = []

        def show(events: Sequence[Event]) -> Iterator[Event]:
            for event in events:
                if event["type"] == "image_preview":
                    event = {**event, "image": self.preview(event["codes"], settings.seed or 0, drawing)}
                elif event["type"] == "image":
                    if should_stop is not None and should_stop():
                        raise Stopped
                    part = event.pop("part")
                    images.append(self._drawn(part, request, states, settings.seed or 0, drawing))
                    event = {**event, "image": images[-1]}
                yield event

        with contextlib.suppress(Stopped):
            first = [*request.prompt.answered, *([words.boi_id] if settings.force_image else [])]
            for token in first:
                yield from show(reader.read(token))
            tokens = self._tokens(request, settings, task, states, len(first), should_stop)
            with contextlib.closing(tokens):  # leaving early ends the thread
                for token in tokens:
                    yield from show(reader.read(token))
                    if reader.finished:
                        break
            yield from show(reader.close())
        rest = iter(images)
        answer = self.read_answer(reader.ids, task, request.note)
        parts = [DrawnPart(part.codes, next(rest, None), place=part.place) if isinstance(part, ImagePart) else part
                 for part in answer.parts]
        yield {"type": "done", "answer": replace(answer, parts=tuple(parts))}

    def _tokens(self, request: Request, settings: GenerationSettings, task: Task, states: HiddenStates, given: int,
                should_stop: Callable[[], bool] | None) -> Generator[int, None, None]:
        """New tokens of one answer as they come; with beams all at the end, when the best one is known."""
        def produce(streamer: TokenStreamer | None) -> list[list[int]]:
            return self.generate([request.prompt], settings, task, states=states, streamer=streamer,
                                 should_stop=should_stop)

        if settings.num_beams > 1:
            return (token for token in produce(None)[0][given:])
        return tokens_from_thread(produce)

    def _drawn(self, part: ImagePart, request: Request, states: HiddenStates, seed: int,
               drawing: dict[str, Any]) -> Image.Image | None:
        if not self.images.can_draw:
            return None
        return self.draw_values(self.values([part], states, 0), [request], [seed], 1, drawing)[0]

    def preview(self, codes: Sequence[int], seed: int, drawing: dict[str, Any]) -> Image.Image:
        """What the first codes of an image show, drawn in a few steps."""
        steps = min(drawing.get("num_inference_steps") or PREVIEW_STEPS, PREVIEW_STEPS)
        few = {**drawing, "codes": len(codes), "num_inference_steps": steps}
        return self.images.draw([codes], seeds=[seed], **few)[0]

    def read_answer(self, ids: Sequence[int], task: Task, note: str = "") -> Answer:
        ids = self.reader(task).read_all(ids)
        return Answer(tuple(split_answer(ids, self.tokenizer)), tuple(ids), note, self.after(task))

    def _log_note(self, note: str) -> None:
        self.log(note) if self.log and note else None
