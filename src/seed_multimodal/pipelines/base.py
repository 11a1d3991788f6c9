"""`MultimodalSystem`: describe, ask, chat, draw, edit, reconstruct and tokenize, for every family.

messages ─► prompts ─► generate ─► ids ─► parts: texts and images ─► ImageCodec.draw

system = MultimodalSystem.from_pretrained("nano")
system.describe([["cat.png", "dog.png"]])  # two images in one prompt; a single one returns a text
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.device import FP16_WITH_8BIT, choose_device, choose_for_images
from seed_multimodal.entry import MAX_RUNNING
from seed_multimodal.errors import ConfigError, RequestError
from seed_multimodal.images.io import ImageSource, is_image
from seed_multimodal.inference.backends.torch import joined
from seed_multimodal.inference.base_engine import BaseEngine
from seed_multimodal.inference.generator import GeneratedAnswer, Task
from seed_multimodal.inference.likelihood import Likelihood
from seed_multimodal.inference.opening import (
    TORCH,
    WITHOUT_WEIGHTS,
    EngineOptions,
    torch_engine,
)
from seed_multimodal.inference.prompt import (
    HiddenStates,
    ImageFeatures,
    Prompt,
    random_seed,
)
from seed_multimodal.language.answer import Answer, Event
from seed_multimodal.language.messages import (
    Images,
    Message,
    flatten_images,
    image_conversations,
    images_before_question,
    read_messages,
    user_message,
)
from seed_multimodal.language.prompts import PromptTemplate
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.language.vocabulary import BLANK
from seed_multimodal.models.registry import find_family
from seed_multimodal.nn.pretrained import HubUpload
from seed_multimodal.pipelines.answers import BATCH, ConversationGenerator
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.pipelines.images import (
    OFFLOADABLE,
    ImageCodec,
    ImageInput,
    Log,
    Options,
    Placement,
    Seed,
    seed_per_image,
)
from seed_multimodal.settings import check_value

if TYPE_CHECKING:
    from seed_multimodal.language.llm import LanguageModel

# One result, or a list of them for a list of requests. Types cannot tell which.
TextOrList = Any  # str
ImageOrList = Any  # Image.Image
AnswerOrEvents = Any  # `Answer`, or with `stream` an iterator of `Event`

Edges = tuple[float, ...]  # of a box: left, top, right, bottom

DRAWING_BATCH = 8  # at most so many images are decoded at once


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
            settings = {**self.drawing, "codes": len(codes)}
            steps = self.system.config.preview_inference_steps
            if steps is not None:
                settings["num_inference_steps"] = steps
            return images.draw([codes], seeds=[self.seed], **settings)[0]
        if not images.can_draw:
            return None
        inputs = self.system.image_inputs([event["part"]], self.states, 0)
        return self.system.decode_images(inputs, [self.prompt], [self.seed], 1, self.drawing)[0]


class MultimodalSystem(ConversationGenerator, HubUpload):
    """A loaded system, see `from_pretrained`.

    Methods accept `GenerationSettings` and settings of the de-tokenizer (`num_inference_steps`, …)
    as keywords. Requests of several threads are batched.
    """

    engine_options: EngineOptions  # of a torch engine
    # Whether prompts are ids without features of images, so that other engines can run them.
    prompts_are_ids: ClassVar[bool] = False
    # Whether texts without images can only be drawn (LaVIT).
    answers_only_about_images: ClassVar[bool] = False
    # Of conversations; None: the system answers single messages.
    template: PromptTemplate | None = None

    def __init__(
        self,
        config: SystemConfig,
        tokenizer: TextTokenizer,
        llm: LanguageModel | None,
        images: ImageCodec,
        log: Log = None,
        engine: BaseEngine | EngineOptions = EngineOptions(),  # noqa: B008 (frozen)
    ) -> None:
        if isinstance(engine, EngineOptions):
            options = replace(engine, max_running=max(engine.max_running, self.min_rows))
            assert llm is not None  # only a system with an engine outside of torch has none
            engine = torch_engine(llm, tokenizer, options, self.embed_features)
            self.engine_options = options
        super().__init__(tokenizer, engine)
        self.config = config
        self.images = images
        self.log = log
        self.llm = llm  # None: the engine has it, outside of torch
        self.tasks = config.tasks
        self.drawing_settings = images.drawing_settings
        self.answer_after = config.tasks.answer_after
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
        """Load a system by its name (`pipelines.config.system_names`) or folder.

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
        system_class = find_family(config.system).system_class()
        if not issubclass(system_class, cls):
            raise ConfigError(
                f"{config.name} is a {system_class.__name__}; load it with that class or "
                "MultimodalSystem."
            )
        if engine != TORCH and not system_class.prompts_are_ids:
            raise ConfigError(
                f"{config.name}: --engine {engine} needs prompts of ids, as SEED-LLaMA's."
            )

        # 1. Missing files are reported before the first weights are loaded.
        required = ["tokenizer"] if engine in WITHOUT_WEIGHTS else ["tokenizer", "llm"]
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
        """Copy the system's files to one folder with a model card; `force` replaces a filled one.

        Weights that were changed in memory are not in them: see the models of transformers.
        """
        from seed_multimodal.pipelines.assemble import save_system

        return save_system(self.config, folder, force=force)

    @property
    def dtype_name(self) -> str:
        """The precision of the language model, for reports."""
        return "of the engine" if self.llm is None else str(self.llm.dtype).removeprefix("torch.")

    # ---- defined by families (`config`: of the family's class)

    @classmethod
    def check_decoder(cls, config: Any) -> None:
        """Raise CheckpointError if the de-tokenizer's folder is there, but lacks a file."""

    @classmethod
    def load(cls, config: Any, placement: Placement, log: Log) -> Self:
        """The system of a config of the family's class."""
        raise NotImplementedError

    def use_plain_prompts(self) -> None:
        """Prompts of a pretrained model: texts and images without a template.

        Raises ConfigError: the family has none.
        """
        raise ConfigError(
            f"{self.config.name}: plain prompts are of systems of codes, as SEED-LLaMA."
        )

    def find_boxes(self, answer: Answer) -> tuple[list[Edges], list[str]]:
        """Boxes of an answer, as shares of the image's sides, and notes about malformed ones."""
        return [], []

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
        if not self.config.tuned:
            return conversation
        return [images_before_question(message) for message in conversation]

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
        Raises RequestError: an empty question.
        """
        texts = _check_texts(question)
        each = question if isinstance(question, str) else texts
        as_request = self.tasks.question if short else str
        return self._answer_texts(images, each, "ask", batch_size, options, as_request)

    def likelihoods(
        self,
        images: Images,
        question: str | Sequence[str],
        answers: Sequence[Sequence[str]],
        *,
        short: bool = True,
        batch_size: int = BATCH,
    ) -> list[list[Likelihood]]:
        """How likely each of the `answers` to the question about each image is; see `ask`."""
        as_request = self.tasks.question if short else str
        conversations, _ = image_conversations(images, question, as_request)
        return self.answer_likelihoods(conversations, answers, "ask", batch_size=batch_size)

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
        options: also `stream` and `previews`, as of `chat`: events of one image after the other.
        Raises GenerationError: no image. RequestError: an empty text.
        """
        single = isinstance(text, str)
        texts = _check_texts(text)
        if not verbatim and self.config.tuned:
            texts = [self.tasks.draw_request(caption) for caption in texts]
        conversations = [user_message([request], index) for index, request in enumerate(texts)]
        return self._draw(conversations, single, "draw", seed, num_images, batch_size, options)

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
        """Edit an image by `instruction`; a list for a list of images. Otherwise as `draw`."""
        texts = _check_texts(instruction)
        each = instruction if isinstance(instruction, str) else texts
        conversations, single = image_conversations(images, each)
        return self._draw(conversations, single, "edit", seed, num_images, batch_size, options)

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
        images: str = "auto",
        force_image: bool = False,
        previews: Sequence[int] | None = None,
        should_stop: Callable[[], bool] | None = None,
        **options: object,
    ) -> AnswerOrEvents:
        """The `Answer` to the last message of a conversation (form: see `language.messages`).

        stream: yield events (see `language.answer`) while the answer is generated.
        images: "auto", "forced": answer with an image, as by `force_image`; "never": without.
        previews: numbers of codes after which a stream shows an image so far; None: the defaults of
        `system.json`.
        should_stop: called before each token and each drawing; true ends the answer.
        """
        # 1. The settings.
        conversation = read_messages(messages)
        if force_image and images == "never":
            raise RequestError("force_image and images='never' ask for opposite things.")
        if force_image:
            images = "forced"
        task = self.task_of(conversation, images == "forced")
        conversation = self.chat_request(conversation, task)
        drawing = self._pop_drawing_settings(options)
        if stream:
            options.setdefault("num_beams", 1)
        settings = self.settings(task, images=images, **options)
        if settings.seed is None and settings.samples:
            settings = replace(settings, seed=random_seed())
        if drawing and self.images.can_draw:
            self.images.check_drawing(**drawing)
        drawing["should_stop"] = should_stop
        preview_lengths = self._preview_lengths(previews)

        # 2. The prompt; a forced image follows the task's response.
        opening = ""
        if settings.forces_image:
            is_text = all(message.is_text for message in conversation)
            opening = self.tasks.draw_response if is_text else self.tasks.edit_response
            settings = self.forced(settings, options)
        prompt = self.fitting_prompt(conversation, task, opening, settings)

        # 3. The answer, whose images are decoded as soon as they are complete.
        decoder = _StreamedImages(self, prompt, settings.seed or 0, drawing, HiddenStates())
        events = self.events(
            prompt, settings, task, decoder.draw, preview_lengths, should_stop, decoder.states
        )
        if stream:
            return events
        return next(event["answer"] for event in events if event["type"] == "done")

    def _preview_lengths(self, previews: Sequence[int] | None) -> Sequence[int]:
        """Numbers of codes after which an unfinished image is shown; `previews`: as of `chat`."""
        if previews is None:
            previews = self.config.previews
        lengths: Sequence[int] = check_value(Sequence[int], previews, "previews", minimum=1)
        return lengths if self.images.progressive and self.images.can_draw else ()

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
        single: bool,
        task: Task,
        seed: Seed,
        num_images: int,
        batch_size: int,
        options: Options,
    ) -> ImageOrList:
        """`num_images` images of each conversation, one after the other.

        single: whether the caller gave one request, not a list of one.
        """
        # 1. The settings; a missing de-tokenizer is reported before generation.
        check_value(int, num_images, "num_images", minimum=1)
        stream = options.pop("stream", False)
        previews = self._preview_lengths(options.pop("previews", None))
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

        # 3. Their images.
        if stream:
            return self._drawing_events(answers, seeds, drawing, previews)
        images = self.decode_images(
            [generated.single_image() for generated in answers],
            [generated.prompt for generated in answers],
            seeds,
            min(batch_size, DRAWING_BATCH),
            drawing,
        )
        return images[0] if single and num_images == 1 else images

    def _drawing_events(
        self,
        answers: Sequence[GeneratedAnswer],
        seeds: Sequence[int],
        drawing: Options,
        preview_lengths: Sequence[int],
    ) -> Iterator[Event]:
        """The image of each answer, behind what its first codes show."""
        for generated, seed in zip(answers, seeds, strict=True):
            prompt = generated.prompt
            image_input = generated.single_image()
            decoder = _StreamedImages(self, prompt, seed, drawing, HiddenStates())
            for length in preview_lengths:
                preview: Event = {"type": "image_preview", "codes": list(image_input[:length])}
                yield {**preview, "image": decoder.draw(preview)}
            (image,) = self.decode_images([image_input], [prompt], [seed], 1, drawing)
            answer = replace(generated.answer, prompt_tokens=len(prompt) - len(prompt.answered))
            yield {"type": "image", "image": image, "answer": answer}

    def _pop_drawing_settings(self, options: Options, *further: str) -> Options:
        """Take the settings of the de-tokenizer, and the `further` ones, out of `options`."""
        names = (*self.drawing_settings, *further)
        return {name: options.pop(name) for name in names if name in options}

    def _log_note(self, note: str) -> None:
        if self.log and note:
            self.log(note)


def _check_texts(texts: str | Sequence[str]) -> list[str]:
    """The texts of requests, as a list. Raises RequestError: an empty one."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    for index, text in enumerate(texts):
        if not text.strip(BLANK):
            raise RequestError(f"Text {index} is empty.")
    return texts
