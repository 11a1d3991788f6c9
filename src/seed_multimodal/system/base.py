"""`MultimodalSystem`: describe, ask, chat, draw, edit, reconstruct and tokenize, for every family.

messages ─► prompts ─► generate ─► ids ─► parts: texts and images ─► ImageCodec.draw

system = MultimodalSystem.from_pretrained("nano")
system.describe([["cat.png", "dog.png"]])      # two images in one prompt; a single image returns a text
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from PIL import Image
from torch import Tensor

from seed_multimodal.device import FP16_WITH_8BIT, choose_device, choose_for_images
from seed_multimodal.entry import MAX_RUNNING
from seed_multimodal.errors import ConfigError, GenerationError
from seed_multimodal.hub import HubUpload
from seed_multimodal.inference.backends.torch import joined
from seed_multimodal.inference.base_engine import BaseEngine
from seed_multimodal.inference.generator import Generator, Task
from seed_multimodal.inference.opening import EngineOptions, torch_engine
from seed_multimodal.inference.prompt import GenerationSettings, HiddenStates, Prompt, random_seed
from seed_multimodal.language.answer import ImagePart
from seed_multimodal.language.known_words import read_known_words
from seed_multimodal.language.messages import (
    Answer,
    Message,
    flatten_images,
    image_conversations,
    is_image,
    read_messages,
    user_message,
    without_oldest_turn,
)
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.progress import Progress
from seed_multimodal.settings import check_value
from seed_multimodal.system.config import SystemConfig
from seed_multimodal.system.images import (
    OFFLOADED,
    ImageCodec,
    Log,
    Placement,
    family_class,
    seed_per_image,
)

BATCH = 16
BAR_FROM = 32  # number of requests that shows a progress bar
# Decoding of further images of one request where the settings are greedy. The judge finds every label right in 0.94 of
# nano's drawings (greedy: 0.93; temperature 1: 0.89) and in 0.89 of nano-lavit's (greedy: 0.93; temperature 1: 0.73).
VARIATION: dict[str, Any] = {
    "do_sample": True,
    "num_beams": 1,
    "temperature": 0.5,
    "top_p": 1.0,
    "top_k": 0,
}
PREVIEW_STEPS = 2  # of nano's twelve: nearly as accurate, in a quarter of the time


@dataclass
class GeneratedAnswer:
    """An answer before image decoding; `image_inputs`: codes, or features [N, W], of each complete image."""

    answer: Answer
    image_inputs: Sequence[Any]
    prompt: Prompt


class MultimodalSystem(Generator, HubUpload):
    """A loaded system, see `from_pretrained`. Methods accept `GenerationSettings` and settings of the de-tokenizer
    (`num_inference_steps`, …) as keywords. Requests of several threads are batched."""

    def __init__(
        self,
        config: SystemConfig,
        tokenizer: MultimodalTokenizer,
        llm: Any,
        images: ImageCodec,
        log: Log = None,
        engine: BaseEngine | EngineOptions = EngineOptions(),  # noqa: B008 (frozen)
    ) -> None:
        if isinstance(engine, EngineOptions):
            options = replace(engine, max_running=max(engine.max_running, self.min_rows))
            engine = torch_engine(llm, tokenizer, options, self.embed_features)
        super().__init__(tokenizer, engine)
        self.config, self.images, self.log = config, images, log
        self.llm = llm  # None: the engine has it, outside of torch
        self.tasks: Any = config.tasks
        self.drawing_settings, self.answer_after = images.drawing_settings, config.answer_after
        for task in ("describe", "draw", "chat"):
            self.settings(task)  # reports wrong defaults in system.json early

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | SystemConfig | None = None,
        *,
        device: str = "auto",
        dtype: Any = "auto",
        quantization: str | None = None,
        image_device: str | None = None,
        drawing_device: str | None = None,
        offload: bool | Collection[str] = False,
        log: Log = print,
        load_decoder: bool = True,
        compiled: bool = False,
        engine: str = "torch",
        url: str | None = None,
        gguf: str | Path | None = None,
        max_running: int = MAX_RUNNING,
        kv_cache: float | None = None,
        **parts: Any,
    ) -> Self:
        """Load nano, nano-x, nano-lavit, 8b, 14b, seed-x, seed-x-i, seed-x-edit, lavit or a folder; the de-tokenizer is
        loaded on first use.

        `device`, `dtype`: see `choose_device`; `quantization`: of `load_llm`; `offload`: each part is on its device
        only while it works, or these of "llm", "encoder" and "decoder"; `load_decoder`: False for a system that never
        draws; `compiled`: by `torch.compile`; `engine`: "torch", or of SEED-LLaMA "llama.cpp" (`gguf`: the file, if its
        folder holds several) or "openai" (`url`: of the server); `max_running`: rows of the KV cache, of which each
        answer takes one (guidance: two, beams: one each); `kv_cache`: GiB for it, None: half of a GPU's free memory, 4
        GiB on a CPU; `parts`: keys of `SystemConfig`, folders or hub names.
        """
        config = name if isinstance(name, SystemConfig) else SystemConfig.find(name, **parts)
        kind: type[Self] = family_class(config.system)
        if not issubclass(kind, cls):
            raise ConfigError(
                f"{config.name} is a {kind.__name__}; load it with that class or MultimodalSystem."
            )
        if engine != "torch" and config.system != "seed_llama":
            raise ConfigError(
                f"{config.name}: --engine {engine} is for SEED-LLaMA only, whose prompts are ids."
            )
        offloaded = (OFFLOADED if offload is True else set(offload or ())) - (
            {"llm"} if quantization else set()
        )
        # Missing files are reported before the first weights are loaded.
        config.require("tokenizer", *(() if engine == "openai" else ("llm",)))
        if engine == "torch":
            config.check_language_model()
        if load_decoder:
            kind.check_decoder(config)
        llm = choose_device(
            device, dtype, log=log, fp16=FP16_WITH_8BIT if quantization == "8bit" else ""
        )
        images = choose_for_images(image_device or llm.device, dtype, llm, log)
        drawing = choose_for_images(drawing_device or images.device, dtype, images, log)
        offload_device = llm.device if "llm" in offloaded else None
        options = EngineOptions(engine, url, gguf, max_running, kv_cache, compiled, offload_device)
        options.check()
        placement = Placement(llm, images, drawing, quantization, offloaded, load_decoder, options)
        system = kind.load(config, placement, log)
        if compiled:
            system.images.compile()
        system._log_note(config.notice)
        return system

    def save_pretrained(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write the system as one folder with a model card; `force` replaces a folder that is not empty."""
        from seed_multimodal.system.assemble import save_system

        return save_system(self.config, folder, force=force)

    @property
    def dtype_name(self) -> str:
        """The precision of the language model, for reports."""
        return "of the engine" if self.llm is None else str(self.llm.dtype).removeprefix("torch.")

    # ---- defined by families

    @classmethod
    def check_decoder(cls, config: SystemConfig) -> None:
        """Raise CheckpointError if the de-tokenizer's folder is there, but lacks a file."""
        raise NotImplementedError

    @classmethod
    def load(cls, config: SystemConfig, placement: Placement, log: Log) -> Self:
        raise NotImplementedError

    def build_prompts(
        self,
        conversations: Sequence[Sequence[Message]],
        task: Task,
        opening: str = "",
        seeds: Sequence[int | None] | None = None,
    ) -> list[Prompt]:
        """Conversations as prompts that end with `opening`; `seeds`: of stochastic encoders (LaVIT's)."""
        raise NotImplementedError

    @property
    def min_rows(self) -> int:
        """Rows of the KV cache that one answer of a task needs by default (beams, guidance)."""
        rows = [1]
        for settings in self.defaults.values():
            per_beam = 2 if settings.get("guidance", 1) != 1 else 1
            rows.append(per_beam * settings.get("num_beams", 1))
        return max(rows)

    def embed_features(self, features: Sequence[Any]) -> Tensor:
        """Features of a prompt's images → embeddings `[n, D]`; the engine's thread calls it."""
        return joined(features)

    def image_inputs(
        self, parts: Sequence[ImagePart], states: HiddenStates, row: int
    ) -> Sequence[Any]:
        """Input of `images.draw` for images of answer `row`."""
        return [part.codes for part in parts]

    def decode_images(
        self,
        values: Sequence[Any],
        requests: Sequence[Prompt],
        seeds: Sequence[int],
        batch_size: int,
        drawing: dict[str, Any],
    ) -> list[Image.Image]:
        return self.images.draw(values, seeds=seeds, batch_size=batch_size, **drawing)

    def display_text(self, answer: Answer, task: Task) -> str:
        """The displayed text of an answer."""
        return answer.text

    def own_defaults(self, task: str) -> dict[str, Any]:
        return dict(self.config.generation)

    def task_of(self, conversation: Sequence[Message], force_image: bool) -> Task:
        """The task whose settings and prompts apply to a conversation."""
        return "chat"

    # ---- tasks

    def describe(
        self,
        images: Any,
        prompt: str | Sequence[str] | None = None,
        *,
        batch_size: int = BATCH,
        **options: Any,
    ) -> Any:
        """Describe an image; a list of texts for a list of images. `prompt` replaces the default prompt."""
        return self._answer_texts(
            images,
            self.tasks.describe if prompt is None else prompt,
            "describe",
            batch_size,
            options,
        )

    def ask(
        self,
        images: Any,
        question: str | Sequence[str],
        *,
        short: bool = True,
        batch_size: int = BATCH,
        **options: Any,
    ) -> Any:
        """The answer to a question (one for all images, or one each); `short`: as the system was tuned to be asked."""
        return self._answer_texts(
            images, question, "ask", batch_size, options, self.tasks.question if short else str
        )

    def detect(
        self, images: Any, phrase: str | Sequence[str], *, batch_size: int = BATCH, **options: Any
    ) -> Any:
        """Detect `phrase` in an image, for systems that answer with boxes (SEED-X)."""
        raise ConfigError(f"{self.config.name} does not support detection; SEED-X does.")

    def draw(
        self,
        text: str | Sequence[str],
        seed: Any = 0,
        *,
        num_images: int = 1,
        verbatim: bool = False,
        batch_size: int = BATCH,
        **options: Any,
    ) -> Any:
        """Generate an image of `text`; a list for a list of texts or `num_images`. Raises GenerationError: no image.

        `seed`: one for all texts, or one each; image n has `seed` + n, and from the second on sampled codes where the
        settings are greedy (`VARIATION`). `verbatim`: `text` is the complete prompt.
        """
        plain = verbatim or not self.config.tuned
        texts = [text] if isinstance(text, str) else text
        conversations = [
            user_message([one if plain else self.tasks.draw_request(one)]) for one in texts
        ]
        images = self._draw(conversations, "draw", seed, num_images, batch_size, options)
        return images[0] if isinstance(text, str) and num_images == 1 else images

    def edit(
        self,
        images: Any,
        instruction: str | Sequence[str],
        seed: Any = 0,
        *,
        num_images: int = 1,
        batch_size: int = BATCH,
        **options: Any,
    ) -> Any:
        """Edit an image by `instruction`; a list for a list of images. Raises as `draw`."""
        conversations, single = image_conversations(images, instruction)
        edited = self._draw(conversations, "edit", seed, num_images, batch_size, options)
        return edited[0] if single and num_images == 1 else edited

    def reconstruct(
        self, images: Any, seed: Any = 0, *, batch_size: int = 8, **drawing: Any
    ) -> list[Image.Image]:
        """Reconstruct images, or decode their codes."""
        items = flatten_images(images)
        seeds = seed_per_image(seed, len(items))
        rows = [row for row, item in enumerate(items) if is_image(item)]
        codes = iter(
            self.codes_of([items[row] for row in rows], [seeds[row] for row in rows])
            if rows
            else ()
        )
        values = [next(codes) if is_image(item) else item for item in items]
        return self.images.draw(values, seeds=seeds, batch_size=batch_size, **drawing)

    def tokenize(self, images: Any) -> Any:
        """Codes of an image, or of each image of a list: int64 [B, 32], or a list of [n] where their number differs."""
        return self.codes_of(flatten_images(images), ())

    def chat(
        self,
        messages: Sequence[Any],
        stream: bool = False,
        *,
        force_image: bool = False,
        previews: Sequence[int] | None = None,
        should_stop: Callable[[], bool] | None = None,
        **options: Any,
    ) -> Any:
        """The `Answer` to the last message of a conversation (see `language.messages` for its form).

        `stream`: yield events (see `language.answer`) while the answer is made; `force_image`: answer with an image;
        `previews`: after how many codes a stream shows what there is of an image, None: as `system.json` says;
        `should_stop`: called before each token and each drawing, true ends the answer there.
        """
        conversation = read_messages(messages)
        task = self.task_of(conversation, force_image)
        drawing = {key: options.pop(key) for key in self.drawing_settings if key in options}
        if stream:
            options.setdefault("num_beams", 1)
        settings = self.settings(task, **options)
        if settings.seed is None and settings.samples:
            settings = replace(settings, seed=random_seed())
        if drawing and self.images.can_draw:
            self.images.check_drawing(**drawing)
        drawing["should_stop"], opening = should_stop, ""
        if force_image:
            seen = any(not isinstance(item, str) for one in conversation for item in one.content)
            opening = str(self.tasks.edit_response if seen else self.tasks.draw_response)
            settings = self.forced(settings, options)
        request = self._fitting(conversation, task, opening, settings)
        due = check_value(
            Sequence[int],
            self.config.previews if previews is None else previews,
            "previews",
            minimum=1,
        )
        due = due if self.images.progressive and self.images.can_draw else ()
        states, seeds = HiddenStates(), [settings.seed or 0]

        def draw(event: dict[str, Any]) -> Image.Image | None:
            if "part" not in event:
                few = {
                    **drawing,
                    "codes": len(event["codes"]),
                    "num_inference_steps": PREVIEW_STEPS,
                }
                return self.images.draw([event["codes"]], seeds=seeds, **few)[0]
            if not self.images.can_draw:
                return None
            return self.decode_images(
                self.image_inputs([event["part"]], states, 0), [request], seeds, 1, drawing
            )[0]

        events = self.events(request, settings, task, draw, due, should_stop, states=states)
        return (
            events
            if stream
            else next(event["answer"] for event in events if event["type"] == "done")
        )

    def unknown_words_note(self, *messages: Message) -> str:
        """A note about unknown words, or empty."""
        known = self.config.known_words
        return (
            read_known_words(known).note("\n".join(one.text for one in messages)) if known else ""
        )

    def generate_answers(
        self,
        conversations: Sequence[Sequence[Message]],
        task: Task,
        settings: GenerationSettings,
        opening: str = "",
        *,
        seeds: Sequence[int] | None = None,
        batch_size: int = BATCH,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[GeneratedAnswer]:
        """Answers to conversations, in batches, before image decoding."""
        written: list[GeneratedAnswer] = []
        check_value(int, batch_size, "batch_size", minimum=1)
        with Progress(
            task, count := len(conversations), "answer", log=self.log if count >= BAR_FROM else None
        ) as bar:
            for start in range(0, count, batch_size):
                rows = slice(start, start + batch_size)
                own = None if seeds is None else seeds[rows]
                requests, states = (
                    self.build_prompts(conversations[rows], task, opening, own),
                    HiddenStates(),
                )
                answers = self.generate(
                    requests, settings, task, seeds=own, states=states, should_stop=should_stop
                )
                for row, (request, ids) in enumerate(zip(requests, answers, strict=True)):
                    answer = self.read_answer(ids, settings)
                    images = [part for part in answer.parts if isinstance(part, ImagePart)]
                    written.append(
                        GeneratedAnswer(
                            answer,
                            self.image_inputs(images, states, row) if images else (),
                            request,
                        )
                    )
                bar.update(len(requests))
        return written

    def generate_image_answers(
        self,
        conversations: Sequence[Sequence[Message]],
        task: Task,
        *,
        seeds: Sequence[int] | None = None,
        batch_size: int = BATCH,
        should_stop: Callable[[], bool] | None = None,
        **options: Any,
    ) -> list[GeneratedAnswer]:
        """Answers with one image, before decoding, after an optional text (`TaskPrompts`); forced if missing."""
        forced = self.forced(self.settings(task, **options), options)
        whole = self.tokenizer.vocabulary.tokens_per_image + 1
        forced = replace(forced, max_new_tokens=min(forced.max_new_tokens, whole))
        free = self._free_words(task)
        written, how = (
            list[GeneratedAnswer](),
            dict[str, Any](batch_size=batch_size, should_stop=should_stop),
        )
        if free:
            most = options.get("max_new_tokens", forced.max_new_tokens + free)
            settings = replace(forced, force_image=False, max_new_tokens=most)
            written = self.generate_answers(conversations, task, settings, seeds=seeds, **how)
        rest = [
            row
            for row in range(len(conversations))
            if not written or len(written[row].image_inputs) != 1
        ]
        opening = self.tasks.edit_response if task == "edit" else self.tasks.draw_response
        again = iter(
            self.generate_answers(
                [conversations[row] for row in rest],
                task,
                forced,
                opening,
                **how,
                seeds=None if seeds is None else [seeds[row] for row in rest],
            )
        )
        return [next(again) if row in rest else written[row] for row in range(len(conversations))]

    def _free_words(self, task: Task) -> int:
        """Tokens in which the model may say what an image will show, before the image is forced."""
        words = {"draw": self.tasks.draw_words, "edit": self.tasks.edit_words}[task]
        return words if self.config.tuned or task == "edit" else 0

    def _generate_several(
        self,
        conversations: Sequence[Sequence[Message]],
        task: Task,
        num_images: int,
        seeds: Sequence[int],
        options: dict[str, Any],
        **how: Any,
    ) -> list[GeneratedAnswer]:
        """`num_images` answers to each conversation, with a seed each.

        With greedy settings the first is greedy and the others are sampled (`VARIATION`), unless `options` choose
        the decoding.
        """
        rows = [conversation for conversation in conversations for _ in range(num_images)]
        if self.settings(task, **options).samples:
            return self.generate_image_answers(rows, task, seeds=seeds, **options, **how)
        first = self.generate_image_answers(
            conversations, task, seeds=seeds[::num_images], **options, **how
        )
        written = [answer for answer in first for _ in range(num_images)]
        # SEED-X's features depend on nothing but the text before them.
        can_vary = not self.tokenizer.vocabulary.fixed_image_order or self._free_words(task)
        if num_images == 1 or not can_vary or VARIATION.keys() & options.keys():
            return written
        further = [row for row in range(len(rows)) if row % num_images]
        varied = self.generate_image_answers(
            [rows[row] for row in further],
            task,
            seeds=[seeds[row] for row in further],
            **options,
            **VARIATION,
            **how,
        )
        for row, answer in zip(further, varied, strict=True):
            written[row] = answer
        return written

    def codes_of(self, images: Sequence[Any], seeds: Sequence[int]) -> Any:
        """Codes of images; `seeds`: of stochastic encoders."""
        return self.images.encode(images)

    def _answer_texts(
        self,
        images: Any,
        texts: str | Sequence[str],
        task: Task,
        batch_size: int,
        options: dict[str, Any],
        request: Callable[[str], str] = str,
    ) -> Any:
        """The text of the answer about each image; images in it are not drawn."""
        conversations, single = image_conversations(images, texts, request)
        several = (
            options.pop("seed") if isinstance(options.get("seed"), (list, tuple, range)) else None
        )
        settings = self.settings(task, **options)
        seed = settings.seed if several is None else several
        seeds = None if seed is None else seed_per_image(seed, len(conversations))
        self._log_note(self.unknown_words_note(*(one[-1] for one in conversations)))
        written = self.generate_answers(
            conversations, task, settings, batch_size=batch_size, seeds=seeds
        )
        said = [self.display_text(one.answer, task) for one in written]
        return said[0] if single else said

    def _draw(
        self,
        conversations: Sequence[Sequence[Message]],
        task: Task,
        seed: Any,
        num_images: int,
        batch_size: int,
        options: dict[str, Any],
    ) -> list[Image.Image]:
        drawing = {
            key: options.pop(key)
            for key in (*self.drawing_settings, "should_stop")
            if key in options
        }
        self.images.check_drawing(**drawing)  # a missing de-tokenizer is reported before generation
        seeds = [
            (one + place) % 2**63
            for one in seed_per_image(seed, len(conversations))
            for place in range(num_images)
        ]
        self._log_note(self.unknown_words_note(*(one[-1] for one in conversations)))
        written = self._generate_several(
            conversations,
            task,
            num_images,
            seeds,
            options,
            batch_size=batch_size,
            should_stop=drawing.get("should_stop"),
        )
        for one in written:
            if len(one.image_inputs) != 1:
                raise GenerationError(
                    "The model's answer has no complete image"
                    + (f": {one.answer.problems[0]}" if one.answer.problems else ".")
                )
        return self.decode_images(
            [one.image_inputs[0] for one in written],
            [one.prompt for one in written],
            seeds,
            min(batch_size, 8),
            drawing,
        )

    def _fitting(
        self, conversation: list[Message], task: Task, opening: str, settings: GenerationSettings
    ) -> Prompt:
        """The prompt of a conversation; the oldest turns are dropped to fit the context."""
        context, rest = self.engine.capacity, conversation
        needed = min(
            settings.max_new_tokens, max(context // 4, self.tokenizer.vocabulary.min_codes + 2)
        )
        while True:
            request = self.build_prompts([rest], task, opening, [settings.seed])[0]
            shorter = without_oldest_turn(rest)
            if len(request) + needed <= context or len(shorter) == len(rest):
                break
            rest = shorter
        request.note = self.unknown_words_note(rest[-1])
        if left_out := len(conversation) - len(rest):
            request.note = (
                f"The conversation is longer than the model's context of {context} tokens: its first "
                f"{left_out} messages were left out. {request.note}"
            ).rstrip()
        return request

    def _log_note(self, note: str) -> None:
        self.log(note) if self.log and note else None
