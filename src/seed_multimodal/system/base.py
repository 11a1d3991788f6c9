"""`MultimodalSystem`: describe, ask, chat, draw, edit, reconstruct and tokenize, for every family.

messages ─► prompts ─► generate ─► ids ─► parts: texts and images ─► ImageCodec.draw

system = MultimodalSystem.from_pretrained("nano")
system.describe([["cat.png", "dog.png"]])  # two images in one prompt; a single one returns a text
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.device import FP16_WITH_8BIT, choose_device, choose_for_images
from seed_multimodal.entry import MAX_RUNNING
from seed_multimodal.errors import ConfigError, GenerationError
from seed_multimodal.hub import HubUpload
from seed_multimodal.images.io import ImageSource
from seed_multimodal.inference.backends.torch import joined
from seed_multimodal.inference.base_engine import BaseEngine
from seed_multimodal.inference.generator import GeneratedAnswer, Generator, Task
from seed_multimodal.inference.opening import (
    COMPLETION_SERVER,
    TORCH,
    EngineOptions,
    torch_engine,
)
from seed_multimodal.inference.prompt import (
    GenerationSettings,
    HiddenStates,
    ImageFeatures,
    Prompt,
    random_seed,
)
from seed_multimodal.language.answer import Answer, Event, ImagePart
from seed_multimodal.language.known_words import read_known_words
from seed_multimodal.language.messages import (
    Images,
    Message,
    flatten_images,
    image_conversations,
    is_image,
    read_messages,
    user_message,
    without_oldest_turn,
)
from seed_multimodal.language.prompts import TaskPrompts
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.progress import Progress
from seed_multimodal.settings import check_value
from seed_multimodal.system.config import SystemConfig
from seed_multimodal.system.images import (
    OFFLOADABLE,
    VARIATION,
    ImageCodec,
    ImageInput,
    Log,
    Options,
    Placement,
    Seed,
    family_class,
    seed_per_image,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# One result, or a list of them for a list of requests. Types cannot tell which.
TextOrList = Any  # str
ImageOrList = Any  # Image.Image
AnswerOrEvents = Any  # `Answer`, or with `stream` an iterator of `Event`

BATCH = 16
DRAWING_BATCH = 8  # at most so many images are decoded at once
BAR_FROM = 32  # number of requests from which a progress bar is shown
PREVIEW_STEPS = 2  # of nano's twelve: nearly as accurate, in a quarter of the time


@dataclass
class _StreamedImages:
    """Decodes the images of one answer while it is generated."""

    system: MultimodalSystem
    prompt: Prompt
    seed: int
    drawing: Options
    states: HiddenStates

    def draw(self, event: Event) -> Image.Image | None:
        """The image of an `image` or `image_preview` event; None: the system cannot draw."""
        images = self.system.images
        if event["type"] == "image_preview":
            codes = event["codes"]
            settings = {
                **self.drawing,
                "codes": len(codes),
                "num_inference_steps": PREVIEW_STEPS,
            }
            return images.draw([codes], seeds=[self.seed], **settings)[0]
        if not images.can_draw:
            return None
        inputs = self.system.image_inputs([event["part"]], self.states, 0)
        return self.system.decode_images(inputs, [self.prompt], [self.seed], 1, self.drawing)[0]


class MultimodalSystem(Generator, HubUpload):
    """A loaded system, see `from_pretrained`.

    Methods accept `GenerationSettings` and settings of the de-tokenizer (`num_inference_steps`, …)
    as keywords. Requests of several threads are batched.
    """

    def __init__(
        self,
        config: SystemConfig,
        tokenizer: MultimodalTokenizer,
        llm: PreTrainedModel | None,
        images: ImageCodec,
        log: Log = None,
        engine: BaseEngine | EngineOptions = EngineOptions(),  # noqa: B008 (frozen)
    ) -> None:
        if isinstance(engine, EngineOptions):
            options = replace(engine, max_running=max(engine.max_running, self.min_rows))
            assert llm is not None  # only a system with an engine outside of torch has none
            engine = torch_engine(llm, tokenizer, options, self.embed_features)
        super().__init__(tokenizer, engine)
        self.config = config
        self.images = images
        self.log = log
        self.llm = llm  # None: the engine has it, outside of torch
        self.tasks: TaskPrompts = config.tasks
        self.drawing_settings = images.drawing_settings
        self.answer_after = config.answer_after
        for task in ("describe", "draw", "chat"):
            self.settings(task)  # reports wrong defaults in system.json early

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | SystemConfig | None = None,
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
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
        """Load nano, nano-x, nano-lavit, 8b, 14b, seed-x, seed-x-i, seed-x-edit, lavit or a folder.

        device, dtype: see `choose_device`.
        quantization: of `load_llm`.
        image_device, drawing_device: of the image encoder and the de-tokenizer.
        offload: each part is on its device only while it works, or these of "llm", "encoder" and
        "decoder".
        load_decoder: False for a system that never draws; else the de-tokenizer is loaded on first
        use.
        compiled: by `torch.compile`.
        engine: "torch", or of SEED-LLaMA "llama.cpp" or "openai".
        url: of the server (engine "openai"). gguf: the file (engine "llama.cpp"), if its folder
        holds several.
        max_running: rows of the KV cache, of which each answer takes one (guidance: two, beams: one
        each).
        kv_cache: GiB for it, None: half of a GPU's free memory, 4 GiB on a CPU.
        parts: keys of `SystemConfig`, folders or hub names.
        """
        config = name if isinstance(name, SystemConfig) else SystemConfig.find(name, **parts)
        system_class = family_class(config.system)
        if not issubclass(system_class, cls):
            raise ConfigError(
                f"{config.name} is a {system_class.__name__}; load it with that class or "
                "MultimodalSystem."
            )
        if engine != TORCH and config.system != "seed_llama":
            raise ConfigError(
                f"{config.name}: --engine {engine} is for SEED-LLaMA only, whose prompts are ids."
            )

        # 1. Missing files are reported before the first weights are loaded.
        required = ["tokenizer"] if engine == COMPLETION_SERVER else ["tokenizer", "llm"]
        config.require(*required)
        if engine == TORCH:
            config.check_language_model()
        if load_decoder:
            system_class.check_decoder(config)

        # 2. The devices; a quantized language model cannot be moved.
        fp16_reason = FP16_WITH_8BIT if quantization == "8bit" else ""
        llm = choose_device(device, dtype, log=log, fp16=fp16_reason)
        images = choose_for_images(image_device or llm.device, dtype, llm, log)
        drawing = choose_for_images(drawing_device or images.device, dtype, images, log)
        offloaded = set(OFFLOADABLE if offload is True else offload or ())
        if quantization:
            offloaded.discard("llm")
        offload_device = llm.device if "llm" in offloaded else None

        # 3. The parts.
        options = EngineOptions(engine, url, gguf, max_running, kv_cache, compiled, offload_device)
        options.check()
        placement = Placement(llm, images, drawing, quantization, offloaded, load_decoder, options)
        system = system_class.load(config, placement, log)
        if compiled:
            system.images.compile()
        system._log_note(config.notice)
        return system

    def save_pretrained(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write the system as one folder with a model card; `force` replaces a filled folder."""
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
        """Conversations as prompts.

        opening: text with which the answers begin. seeds: of stochastic encoders (LaVIT's).
        """
        raise NotImplementedError

    @property
    def min_rows(self) -> int:
        """Rows of the KV cache that one answer of a task needs by default (beams, guidance)."""
        rows = [1]
        for settings in self.defaults.values():
            per_beam = 2 if settings.get("guidance", 1) != 1 else 1
            rows.append(per_beam * settings.get("num_beams", 1))
        return max(rows)

    def embed_features(self, features: Sequence[ImageFeatures]) -> Tensor:
        """Features of a prompt's images → embeddings `[n, D]`; the engine's thread calls it."""
        return joined(features)

    def steered(
        self, conversations: Sequence[Sequence[Message]], options: Options
    ) -> Sequence[Sequence[Message]]:
        """Conversations of drawings with LaVIT's `negative_prompt`, taken out of `options`."""
        return conversations

    def image_inputs(
        self, parts: Sequence[ImagePart], states: HiddenStates, row: int
    ) -> Sequence[ImageInput]:
        """Input of `images.draw` for images of answer `row`."""
        return [part.codes for part in parts]

    def decode_images(
        self,
        image_inputs: Sequence[ImageInput],
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        batch_size: int,
        drawing: Options,
    ) -> list[Image.Image]:
        """An image of each input; `prompts`: those that they answer."""
        return self.images.draw(image_inputs, seeds=seeds, batch_size=batch_size, **drawing)

    def display_text(self, answer: Answer, task: Task) -> str:
        """The displayed text of an answer."""
        return answer.text

    def task_defaults(self, task: str) -> Options:
        return dict(self.config.generation)

    def task_of(self, conversation: Sequence[Message], force_image: bool) -> Task:
        """The task whose settings and prompts apply to a conversation."""
        return "chat"

    def chat_request(self, conversation: list[Message], task: Task) -> list[Message]:
        """The conversation as the model was trained to read it in `task`."""
        return conversation

    # ---- tasks

    def describe(
        self,
        images: Images,
        prompt: str | Sequence[str] | None = None,
        *,
        batch_size: int = BATCH,
        **options: object,
    ) -> TextOrList:
        """Describe an image; a list of texts for a list of images.

        prompt: replaces the default prompt.
        """
        if prompt is None:
            prompt = self.tasks.describe
        return self._answer_texts(images, prompt, "describe", batch_size, options)

    def ask(
        self,
        images: Images,
        question: str | Sequence[str],
        *,
        short: bool = True,
        batch_size: int = BATCH,
        **options: object,
    ) -> TextOrList:
        """The answer to a question about an image; a list of answers for a list of images.

        question: one for all images, or one each.
        short: ask for one word or phrase, as the system was tuned.
        """
        as_request = self.tasks.question if short else str
        return self._answer_texts(images, question, "ask", batch_size, options, as_request)

    def detect(
        self,
        images: Images,
        phrase: str | Sequence[str],
        *,
        batch_size: int = BATCH,
        **options: object,
    ) -> Any:
        """Detect `phrase` in an image, for systems that answer with boxes (SEED-X)."""
        raise ConfigError(f"{self.config.name} does not support detection; SEED-X does.")

    def draw(
        self,
        text: str | Sequence[str],
        seed: Seed = 0,
        *,
        num_images: int = 1,
        verbatim: bool = False,
        batch_size: int = BATCH,
        **options: object,
    ) -> ImageOrList:
        """Generate an image of `text`; a list for a list of texts or `num_images`.

        seed: one for all texts, or one each; image n has `seed` + n, and from the second on sampled
        codes where the settings are greedy (`VARIATION`).
        verbatim: `text` is the complete prompt.
        Raises GenerationError: no image.
        """
        single = isinstance(text, str)
        texts = [text] if isinstance(text, str) else text
        if not verbatim and self.config.tuned:
            texts = [self.tasks.draw_request(caption) for caption in texts]
        conversations = [user_message([request], index) for index, request in enumerate(texts)]
        images = self._draw(conversations, "draw", seed, num_images, batch_size, options)
        return images[0] if single and num_images == 1 else images

    def edit(
        self,
        images: Images,
        instruction: str | Sequence[str],
        seed: Seed = 0,
        *,
        num_images: int = 1,
        batch_size: int = BATCH,
        **options: object,
    ) -> ImageOrList:
        """Edit an image by `instruction`; a list for a list of images. Raises as `draw`."""
        conversations, single = image_conversations(images, instruction)
        edited = self._draw(conversations, "edit", seed, num_images, batch_size, options)
        return edited[0] if single and num_images == 1 else edited

    def reconstruct(
        self, images: Images, seed: Seed = 0, *, batch_size: int = 8, **drawing: Any
    ) -> list[Image.Image]:
        """Reconstruct images, or decode their codes."""
        image_inputs = flatten_images(images)
        seeds = seed_per_image(seed, len(image_inputs))
        # Images become codes (or features); given codes stay.
        rows = [row for row, item in enumerate(image_inputs) if is_image(item)]
        if rows:
            sources = [image_inputs[row] for row in rows]
            encoded = self.codes_of(sources, [seeds[row] for row in rows])
            for row, codes in zip(rows, encoded, strict=True):
                image_inputs[row] = codes
        return self.images.draw(image_inputs, seeds=seeds, batch_size=batch_size, **drawing)

    def tokenize(self, images: Images) -> Sequence[Tensor]:
        """Codes of an image, or of each image of a list.

        An int64 tensor [B, 32], or a list of tensors [n] where the number of codes differs.
        """
        return self.codes_of(flatten_images(images), ())

    def chat(
        self,
        messages: Sequence[Message | Mapping[str, object]],
        stream: bool = False,
        *,
        force_image: bool = False,
        previews: Sequence[int] | None = None,
        should_stop: Callable[[], bool] | None = None,
        **options: object,
    ) -> AnswerOrEvents:
        """The `Answer` to the last message of a conversation (form: see `language.messages`).

        stream: yield events (see `language.answer`) while the answer is generated.
        force_image: answer with an image.
        previews: numbers of codes after which a stream shows an image so far; None: the defaults of
        `system.json`.
        should_stop: called before each token and each drawing; true ends the answer.
        """
        # 1. The settings.
        conversation = read_messages(messages)
        task = self.task_of(conversation, force_image)
        conversation = self.chat_request(conversation, task)
        drawing = self._pop_drawing_settings(options)
        if stream:
            options.setdefault("num_beams", 1)
        settings = self.settings(task, **options)
        if settings.seed is None and settings.samples:
            settings = replace(settings, seed=random_seed())
        if drawing and self.images.can_draw:
            self.images.check_drawing(**drawing)
        drawing["should_stop"] = should_stop
        if previews is None:
            previews = self.config.previews
        previews = check_value(Sequence[int], previews, "previews", minimum=1)
        if not (self.images.progressive and self.images.can_draw):
            previews = ()

        # 2. The prompt; a forced image follows the task's response.
        opening = ""
        if force_image:
            is_text = all(message.is_text for message in conversation)
            opening = self.tasks.draw_response if is_text else self.tasks.edit_response
            settings = self.forced(settings, options)
        prompt = self._fitting_prompt(conversation, task, opening, settings)

        # 3. The answer, whose images are decoded as soon as they are complete.
        images = _StreamedImages(self, prompt, settings.seed or 0, drawing, HiddenStates())
        events = self.events(
            prompt, settings, task, images.draw, previews, should_stop, images.states
        )
        if stream:
            return events
        return next(event["answer"] for event in events if event["type"] == "done")

    def unknown_words_note(self, *messages: Message) -> str:
        """A note about words that the system did not learn, or empty."""
        file = self.config.known_words
        if file is None:
            return ""
        return read_known_words(file).note("\n".join(message.text for message in messages))

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
        check_value(int, batch_size, "batch_size", minimum=1)
        count = len(conversations)
        answers: list[GeneratedAnswer] = []
        log = self.log if count >= BAR_FROM else None
        with Progress(task, count, "answer", log=log) as bar:
            for start in range(0, count, batch_size):
                # 1. The ids of a batch, with the hidden states of its images (SEED-X).
                batch = slice(start, start + batch_size)
                batch_seeds = None if seeds is None else seeds[batch]
                turns = conversations[batch]
                encoder_seeds: Sequence[int | None] = [settings.seed] * len(turns)
                if batch_seeds is not None:
                    encoder_seeds = batch_seeds
                prompts = self.build_prompts(turns, task, opening, encoder_seeds)
                states = HiddenStates()
                answer_ids = self.generate(
                    prompts,
                    settings,
                    task,
                    seeds=batch_seeds,
                    states=states,
                    should_stop=should_stop,
                )

                # 2. Their texts, and the inputs of their images.
                for row, (prompt, ids) in enumerate(zip(prompts, answer_ids, strict=True)):
                    answer = self.read_answer(ids, settings)
                    parts = [part for part in answer.parts if isinstance(part, ImagePart)]
                    image_inputs = self.image_inputs(parts, states, row) if parts else ()
                    answers.append(GeneratedAnswer(answer, image_inputs, prompt))
                bar.update(len(prompts))
        return answers

    def generate_image_answers(
        self,
        conversations: Sequence[Sequence[Message]],
        task: Task,
        *,
        seeds: Sequence[int] | None = None,
        batch_size: int = BATCH,
        should_stop: Callable[[], bool] | None = None,
        **options: object,
    ) -> list[GeneratedAnswer]:
        """Answers with one image, before decoding, after an optional text (`TaskPrompts`)."""
        # 1. The settings of an answer that is nothing but an image.
        settings = self.settings(task, **options)
        forced = self.forced(settings, options)
        image_length = self.tokenizer.vocabulary.tokens_per_image + 1  # codes and `</img>`
        forced = replace(forced, max_new_tokens=min(forced.max_new_tokens, image_length))

        # 2. A model that announces its image answers freely first, with tokens for the text.
        answers: dict[int, GeneratedAnswer] = {}
        text_length = self._text_tokens_before_image(task)
        if text_length:
            limit = forced.max_new_tokens + text_length
            if "max_new_tokens" in options:
                limit = settings.max_new_tokens
            free_answers = self.generate_answers(
                conversations,
                task,
                replace(forced, force_image=False, max_new_tokens=limit),
                seeds=seeds,
                batch_size=batch_size,
                should_stop=should_stop,
            )
            for row, answer in enumerate(free_answers):
                if len(answer.image_inputs) == 1:
                    answers[row] = answer

        # 3. An image is forced where that gave none, or several.
        missing = [row for row in range(len(conversations)) if row not in answers]
        forced_answers = self.generate_answers(
            [conversations[row] for row in missing],
            task,
            forced,
            self.tasks.edit_response if task == "edit" else self.tasks.draw_response,
            seeds=None if seeds is None else [seeds[row] for row in missing],
            batch_size=batch_size,
            should_stop=should_stop,
        )
        answers |= zip(missing, forced_answers, strict=True)
        return [answers[row] for row in sorted(answers)]

    def _text_tokens_before_image(self, task: Task) -> int:
        """Tokens in which the model may say what an image will show, before the image is forced."""
        if task == "edit":
            return self.tasks.edit_words
        return self.tasks.draw_words if self.config.tuned else 0

    def _generate_several(
        self,
        conversations: Sequence[Sequence[Message]],
        task: Task,
        num_images: int,
        seeds: Sequence[int],
        options: Options,
        batch_size: int = BATCH,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[GeneratedAnswer]:
        """`num_images` answers to each conversation, with a seed each.

        With greedy settings the first is greedy and the others are sampled (`VARIATION`), unless
        `options` choose the decoding.
        """

        # 1. The rows of images that are decoded as `options` say, and of those that vary.
        rows = range(len(conversations) * num_images)
        plain_rows: Sequence[int] = rows
        varied_rows: Sequence[int] = ()
        if not self.settings(task, **options).samples:
            plain_rows = rows[::num_images]
            if self._can_vary(task) and not VARIATION.keys() & options.keys():
                varied_rows = [row for row in rows if row % num_images]

        # 2. Their answers.
        answers: dict[int, GeneratedAnswer] = {}
        for part, decoding in ((plain_rows, options), (varied_rows, {**options, **VARIATION})):
            if not part:
                continue
            generated = self.generate_image_answers(
                [conversations[row // num_images] for row in part],
                task,
                seeds=[seeds[row] for row in part],
                batch_size=batch_size,
                should_stop=should_stop,
                **decoding,
            )
            answers |= zip(part, generated, strict=True)

        # 3. Images that cannot vary repeat the greedy answer.
        return [answers.get(row, answers[row - row % num_images]) for row in rows]

    def _can_vary(self, task: Task) -> bool:
        """Whether sampling changes an image; SEED-X's depends only on the text before it."""
        has_codes = not self.tokenizer.vocabulary.fixed_image_order
        return has_codes or self._text_tokens_before_image(task) > 0

    def codes_of(self, images: Sequence[ImageSource], seeds: Sequence[int]) -> Sequence[Tensor]:
        """Codes of images; `seeds`: of stochastic encoders."""
        return self.images.encode(images)

    def _answer_texts(
        self,
        images: Images,
        texts: str | Sequence[str],
        task: Task,
        batch_size: int,
        options: Options,
        as_request: Callable[[str], str] = str,
    ) -> TextOrList:
        """The text of the answer about each image; images in it are not drawn.

        texts: one for all images, or one each. as_request: a text → the request that is sent.
        """
        # 1. The settings; `seed` may be a list with one for each image.
        conversations, single = image_conversations(images, texts, as_request)
        seeds: Seed = None
        if isinstance(options.get("seed"), (list, tuple, range)):
            seeds = options.pop("seed")
        settings = self.settings(task, **options)
        if seeds is None:
            seeds = settings.seed
        if seeds is not None:
            seeds = seed_per_image(seeds, len(conversations))

        # 2. The answers.
        self._log_note(self.unknown_words_note(*(turns[-1] for turns in conversations)))
        answers = self.generate_answers(
            conversations, task, settings, batch_size=batch_size, seeds=seeds
        )
        displayed = [self.display_text(generated.answer, task) for generated in answers]
        return displayed[0] if single else displayed

    def _draw(
        self,
        conversations: Sequence[Sequence[Message]],
        task: Task,
        seed: Seed,
        num_images: int,
        batch_size: int,
        options: Options,
    ) -> list[Image.Image]:
        """`num_images` images of each conversation, one after the other."""
        # 1. The settings; a missing de-tokenizer is reported before generation.
        conversations = self.steered(conversations, options)
        drawing = self._pop_drawing_settings(options, "should_stop")
        self.images.check_drawing(**drawing)
        seeds: list[int] = []
        for first_seed in seed_per_image(seed, len(conversations)):
            seeds += [(first_seed + index) % 2**63 for index in range(num_images)]

        # 2. The answers.
        self._log_note(self.unknown_words_note(*(turns[-1] for turns in conversations)))
        answers = self._generate_several(
            conversations,
            task,
            num_images,
            seeds,
            options,
            batch_size=batch_size,
            should_stop=drawing.get("should_stop"),
        )
        for generated in answers:
            if len(generated.image_inputs) != 1:
                problems = generated.answer.problems
                reason = f": {problems[0]}" if problems else "."
                raise GenerationError(f"The model's answer has no complete image{reason}")

        # 3. Their images.
        return self.decode_images(
            [generated.image_inputs[0] for generated in answers],
            [generated.prompt for generated in answers],
            seeds,
            min(batch_size, DRAWING_BATCH),
            drawing,
        )

    def _pop_drawing_settings(self, options: Options, *further: str) -> Options:
        """Take the settings of the de-tokenizer, and the `further` ones, out of `options`."""
        names = (*self.drawing_settings, *further)
        return {name: options.pop(name) for name in names if name in options}

    def _fitting_prompt(
        self, conversation: list[Message], task: Task, opening: str, settings: GenerationSettings
    ) -> Prompt:
        """The prompt of a conversation; the oldest turns are dropped to fit the context."""
        context = self.engine.capacity
        # Tokens for the answer: a quarter of the context, and at least an image.
        reserved = max(context // 4, self.tokenizer.vocabulary.min_codes + 2)
        reserved = min(settings.max_new_tokens, reserved)

        turns = conversation
        while True:
            prompt = self.build_prompts([turns], task, opening, [settings.seed])[0]
            shorter = without_oldest_turn(turns)
            if len(prompt) + reserved <= context or len(shorter) == len(turns):
                break
            turns = shorter

        prompt.note = self.unknown_words_note(turns[-1])
        n_dropped = len(conversation) - len(turns)
        if n_dropped:
            prompt.note = (
                f"The conversation is longer than the model's context of {context} tokens: its "
                f"first {n_dropped} messages were left out. {prompt.note}"
            ).rstrip()
        return prompt

    def _log_note(self, note: str) -> None:
        if self.log and note:
            self.log(note)
