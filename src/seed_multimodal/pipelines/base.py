"""`MultimodalSystem`: describe, ask, chat, draw, edit, reconstruct and tokenize, for every family.

messages ─► prompts ─► engine ─► ids ─► parts: texts and images ─► ImageCodec.draw

system = MultimodalSystem.from_pretrained("nano")
system.describe([["cat.png", "dog.png"]])  # two images in one prompt; a single one returns a text
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.device import FP16_WITH_8BIT, choose_device, choose_for_images
from seed_multimodal.entry import MAX_RUNNING
from seed_multimodal.errors import ConfigError, RequestError
from seed_multimodal.images.io import is_image, open_image
from seed_multimodal.inference.base_engine import BaseEngine, Likelihood
from seed_multimodal.inference.engines import (
    COMPLETION_SERVER,
    LLAMA_CPP,
    NO_ENGINE,
    TORCH,
    WITHOUT_WEIGHTS,
    EngineOptions,
    outside_engine,
    torch_engine,
)
from seed_multimodal.inference.prompt import random_seed
from seed_multimodal.language.messages import (
    Images,
    Message,
    flatten_images,
    image_conversations,
    read_messages,
    request_texts,
    user_message,
)
from seed_multimodal.language.prompts import get_template
from seed_multimodal.models.registry import Abilities, find_family
from seed_multimodal.nn.pretrained import HubUpload
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.pipelines.family import Family
from seed_multimodal.pipelines.images import (
    DRAWING_BATCH,
    OFFLOADABLE,
    Log,
    Options,
    Placement,
    Seed,
    seed_per_image,
)
from seed_multimodal.pipelines.run import BATCH, TaskRunner
from seed_multimodal.pipelines.tasks import Drawing, Notes, Task, TaskKind
from seed_multimodal.progress import LOADING
from seed_multimodal.settings import check_settings, check_value

# One result, or a list of them for a list of requests. Types cannot tell which.
TextOrList = Any  # str
ImageOrList = Any  # Image.Image
AnswerOrEvents = Any  # `Answer`, or with `stream` an iterator of `Event`

# What a note about one of several drawings begins with.
IMAGE_NUMBER = re.compile(r"Image \d+ may")
# Decoding of further images of one request where the settings are greedy. The judge finds every
# label right in 0.94 of nano's drawings (greedy: 0.93; temperature 1: 0.89) and in 0.89 of
# nano-lavit's (greedy: 0.93; temperature 1: 0.73).
VARIATION: Options = {
    "do_sample": True,
    "num_beams": 1,
    "temperature": 0.5,
    "top_p": 1.0,
    "top_k": 0,
}


class MultimodalSystem(TaskRunner, HubUpload):
    """A loaded system, see `from_pretrained`.

    Methods accept `GenerationSettings` and settings of the de-tokenizer (`num_inference_steps`, …)
    as keywords. Requests of several threads are batched.
    """

    def __init__(
        self,
        family: Family,
        engine: BaseEngine | EngineOptions = EngineOptions(),  # noqa: B008 (frozen)
        log: Log = None,
    ) -> None:
        super().__init__(family, log)
        # Wrong defaults in system.json are reported early.
        for task in ("describe", "draw", "chat") if self.abilities.writes else ("draw",):
            self.settings(task)
        self.engine = self._open_engine(engine) if isinstance(engine, EngineOptions) else engine
        family.max_characters = self.engine.capacity * self.tokenizer.longest_token

    def _open_engine(self, options: EngineOptions) -> BaseEngine:
        if self.llm is None:
            return outside_engine(
                options, self.tokenizer, self.config.llm, self.family.embed_prompt
            )
        n_rows = max(options.max_running, self._min_rows)
        self.engine_options = replace(options, max_running=n_rows, context=self.family.context)
        return torch_engine(
            self.llm, self.tokenizer, self.engine_options, self.family.embed_features
        )

    @property
    def _min_rows(self) -> int:
        """Rows of the KV cache that one answer of a task needs by default (beams, guidance)."""
        rows = [1]
        for settings in self.family.defaults.values():
            per_beam = 2 if settings.get("guidance", 1) != 1 else 1
            rows.append(per_beam * settings.get("num_beams", 1))
        return max(rows)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | SystemConfig | None = None,
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        quantization: str | None = None,
        image_device: str | None = None,
        image_dtype: str | torch.dtype | None = None,
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
        image_dtype: of both; None: `dtype`.
        offload: each part is on its device only while it works, or these of "llm", "encoder" and
        "decoder".
        load_decoder: False for a system that never draws; else the de-tokenizer is loaded on first
        use.
        compiled: by `torch.compile`.
        engine: "torch", "openai" (a completion server), or of SEED-LLaMA "llama.cpp".
        url: of the server (engine "openai"). gguf: the file (engine "llama.cpp"), if its folder
        holds several.
        max_running: rows of the KV cache, of which each answer takes one (guidance: two, beams: one
        each).
        kv_cache: GiB for it, None: half of a GPU's free memory, 4 GiB on a CPU.
        parts: keys of `SystemConfig`, folders or hub names.
        """
        config = name if isinstance(name, SystemConfig) else SystemConfig.find(name, **parts)
        family_class = pkgutil.resolve_name(find_family(config.system).family)
        if engine in (LLAMA_CPP, NO_ENGINE):
            config.check_ability("reads_codes")
        if engine in (LLAMA_CPP, COMPLETION_SERVER):
            config.check_ability("codes_are_rows")
        options = EngineOptions(engine, url, gguf, max_running, kv_cache, compiled)
        offloaded = set(OFFLOADABLE if offload is True else offload or ())
        check_settings([*offloaded], "offload", {"choices": sorted(OFFLOADABLE)})

        # 1. Missing files are reported before the first weights are loaded.
        required = ["tokenizer"] if engine in WITHOUT_WEIGHTS else ["tokenizer", "llm"]
        config.require(*required)
        if engine == TORCH:
            config.check_language_model()
        if load_decoder:
            family_class.check_decoder(config)

        # 2. The devices; a quantized language model cannot be moved.
        fp16_reason = FP16_WITH_8BIT if quantization == "8bit" else ""
        llm = choose_device(device, dtype, log=log, fp16=fp16_reason, notice=config.notice)
        image_dtype = image_dtype or dtype
        images = choose_for_images(image_device or llm.device, image_dtype, llm, log)
        drawing = choose_for_images(drawing_device or images.device, image_dtype, images, log)
        if quantization:
            offloaded.discard("llm")
        if "llm" in offloaded:
            options = replace(options, offload_device=llm.device)

        # 3. The parts.
        load_llm = engine == TORCH
        placement = Placement(llm, images, drawing, quantization, offloaded, load_llm, load_decoder)
        with LOADING:
            system = cls(family_class.load(config, placement), options, log)
        if compiled:
            system.images.compile()
        return system

    def save_pretrained(self, folder: str | Path, *, force: bool = False) -> Path:
        """Copy the system's files to one folder with a model card; `force` replaces a filled one.

        Weights that were changed in memory are not in them: see the models of transformers.
        """
        from seed_multimodal.pipelines.assemble import save_system

        return save_system(self.config, folder, force=force)

    @property
    def abilities(self) -> Abilities:
        """What the systems of its family do."""
        abilities: Abilities = self.config.abilities
        return abilities

    def forget(self) -> None:
        """Read all images and prompts anew, after a change of the weights that is not noticed (see
        `weights_state`). Raises as the engine's `forget`."""
        self.images.forget()
        self.engine.forget()

    @property
    def dtype_name(self) -> str:
        """The precision of the language model, for reports."""
        return "of the engine" if self.llm is None else str(self.llm.dtype).removeprefix("torch.")

    def use_plain_prompts(self) -> None:
        """Prompts of a pretrained model: texts and images without a template.

        Raises ConfigError: the family has none.
        """
        family = self.family
        self.config.check_ability("reads_codes")
        family.use_template(get_template("plain"))
        family.tasks = replace(
            family.tasks, describe="", qa_suffix="", draw_response="", draw_words=0
        )

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
        texts = self.tasks.describe if prompt is None else prompt
        conversations, single = image_conversations(images, texts)
        return self._texts("describe", conversations, single, batch_size, options)

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
        request_texts(question)
        as_request = self.tasks.question if short else str
        conversations, single = image_conversations(images, question, as_request)
        return self._texts("ask", conversations, single, batch_size, options)

    def likelihoods(
        self,
        images: Images,
        question: str | Sequence[str],
        answers: Sequence[Sequence[str]],
        *,
        batch_size: int = BATCH,
    ) -> list[list[Likelihood]]:
        """How likely each of the `answers` to the question about each image is; see `ask`."""
        conversations, _ = image_conversations(images, question, self.tasks.question)
        return self.answer_likelihoods(conversations, answers, "ask", batch_size=batch_size)

    def detect(
        self,
        images: Images,
        phrase: str | Sequence[str],
        *,
        batch_size: int = BATCH,
        **options: object,
    ) -> Any:
        """Where `phrase` is in an image: a `Detection`; a list of them for a list of images.

        A tuned model gets a request; the base model continues the phrase, so that its last words
        must name what to detect. Raises ConfigError: the system does not answer with boxes.
        """
        self.config.check_ability("detects")
        request_texts(phrase)
        is_tuned = self.config.tuned
        as_request = self.tasks.detect_request if is_tuned else str
        conversations, single = image_conversations(images, phrase, as_request)

        # Boxes are in pixels of the stored images, of which prompts may have smaller copies.
        stored: list[list[Message]] = []
        for (message,) in conversations:
            content = [
                open_image(part).image if is_image(part) else part for part in message.content
            ]
            stored.append([Message(message.role, tuple(content))])
        detections: list[Any] = []
        tasks = self._text_tasks("detect", stored, options)
        for (message,), (task, event) in zip(
            stored, self.run(tasks, batch_size=batch_size), strict=True
        ):
            ids = event["answer"].ids
            detection = self.family.detection(message.images[-1], ids, opened=not is_tuned)
            task.notes.add(*detection.problems)
            detections.append(detection)
        if self.log:
            self._log_notes(tasks)
        return detections[0] if single else detections

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
        options: also `stream` and `previews`, as of `chat`: the previews of all images, then the
        images, whose events have their `index`, their `answer` and its `notes`; and `read_back`:
        the system describes what it drew, in `info["description"]` of the image, and logs what
        contradicts the text (`info["note"]`). By default as in `system.json`.
        Raises GenerationError: no image. RequestError: an empty text.
        """
        single = isinstance(text, str)
        conversations = self._drawing_requests(text, verbatim)
        return self._draw("draw", conversations, single, seed, num_images, batch_size, options)

    def image_likelihoods(
        self,
        images: Images,
        text: str | Sequence[str],
        *,
        verbatim: bool = False,
        batch_size: int = BATCH,
    ) -> list[Likelihood]:
        """How likely the codes of each image, and its end, are as a drawing of its text; see
        `draw`.

        Raises ConfigError: the system's images are features. RequestError: another number of texts.
        """
        # 1. Requests, and the tokens of their answers.
        self.config.check_ability("codes_are_rows")
        conversations = self._drawing_requests(text, verbatim)
        codes = self.tokenize(images)
        if len(codes) != len(conversations):
            raise RequestError(f"{len(codes)} images were given with {len(conversations)} texts.")
        answers = [self.tokenizer.vocabulary.image_ids(row.tolist()) for row in codes]

        # 2. The start of an image is forced, as in `draw`.
        opening = self.tokenizer.encode_parts([self.tasks.draw_response])
        likelihoods: list[Likelihood] = []
        for start in range(0, len(answers), batch_size):
            batch = answers[start : start + batch_size]
            requests = conversations[start : start + batch_size]
            prompts = [
                prompt.answered_with([*opening, boi])
                for prompt, (boi, *_) in zip(
                    self.family.prompts(requests, "draw"), batch, strict=True
                )
            ]
            rows = self.engine.likelihoods(prompts, [[ids[1:]] for ids in batch])
            likelihoods += [likelihood for (likelihood,) in rows]
        return likelihoods

    def _drawing_requests(self, text: str | Sequence[str], verbatim: bool) -> list[list[Message]]:
        """A conversation that asks for a drawing of each text; see `draw`."""
        texts = request_texts(text)
        if not verbatim and self.config.tuned:
            texts = [self.tasks.draw_request(caption) for caption in texts]
        return [user_message([request], index) for index, request in enumerate(texts)]

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
        texts = request_texts(instruction)
        each = instruction if isinstance(instruction, str) else texts
        conversations, single = image_conversations(images, each)
        return self._draw("edit", conversations, single, seed, num_images, batch_size, options)

    def compose(
        self, parts: Sequence[object], seed: Seed = 0, *, num_images: int = 1, **options: object
    ) -> ImageOrList:
        """Generate an image from texts (`str`), images and codes in order; otherwise as `draw`.

        num_images: with more than one the result is a list.
        """
        return self._draw("edit", [user_message(parts)], True, seed, num_images, BATCH, options)

    def reconstruct(
        self, images: Images, seed: Seed = 0, *, batch_size: int = 8, **drawing: Any
    ) -> list[Image.Image]:
        """Reconstruct images, or decode their codes; those of a grid are an array `[h, w]` each."""
        inputs: list[Any] = [*images] if isinstance(images, list | tuple) else [images]
        if self.abilities.codes_are_rows:
            inputs = flatten_images(images)
        seeds = seed_per_image(seed, len(inputs))
        return self.images.reconstruct(inputs, seeds=seeds, batch_size=batch_size, **drawing)

    def tokenize(self, images: Images, *, seed: Seed = 0) -> Sequence[Tensor]:
        """Codes of an image, or of each image of a list.

        seed: of stochastic encoders (LaVIT's).

        An int64 tensor [B, 32], or a list of tensors [n] where the number of codes differs. Raises
        ConfigError: its images are features.
        """
        self.config.check_ability("draws_codes")
        return self.images.encode(flatten_images(images), seed=seed)

    def chat(
        self,
        messages: Sequence[Message | Mapping[str, object]],
        stream: bool = False,
        *,
        images: str = "auto",
        force_image: bool = False,
        previews: Sequence[int] | None = None,
        notes: Iterable[str] = (),
        **options: object,
    ) -> AnswerOrEvents:
        """The `Answer` to the last message of a conversation (form: see `language.messages`).

        stream: yield events (see `language.answer`) while the answer is generated.
        images: "auto", "forced": answer with an image, as by `force_image`; "never": without.
        previews: numbers of codes after which a stream shows an image so far; None: the defaults of
        `system.json`.
        notes: of the caller about this request; they come first.
        options: also `read_back`, see `draw`.
        """
        # 1. The settings.
        if force_image and images == "never":
            raise RequestError("force_image and images='never' ask for opposite things.")
        if force_image:
            images = "forced"
        if images == "never":
            given = {"previews": previews, **options}
            for name in ("previews", "read_back", *self.images.drawing_settings):
                if given.get(name):
                    raise ConfigError(f"The option {name!r} is of drawing, but nothing is drawn.")
        if previews and options.get("num_beams", 1) != 1:
            raise ConfigError(
                "The option 'previews' is not of beams: their tokens come at the end."
            )
        lengths = self._preview_lengths(previews, stream)
        conversation = read_messages(messages, images_first=self.config.tuned)
        kind, conversation = self.family.read_chat(conversation, images == "forced")
        *earlier, last = conversation
        conversation = [*earlier, *self.family.read_words([last])]
        drawing_options, reads_back = self._pop_drawing_options(options)
        # A model of a small world may draw where it is asked a question; unconstrained it may.
        may_draw = images == "auto" and options.get("constrain", True)
        if may_draw and self.family.world.asks_about_picture(conversation):
            images = "never"
        if stream:
            options.setdefault("num_beams", 1)
        settings = self.family.generation_settings(kind, {"images": images, **options})
        if settings.seed is None and settings.samples:
            settings = replace(settings, seed=random_seed())
        drawing = None
        if self.images.can_draw:
            if drawing_options:
                self.images.check_drawing(**drawing_options)
            drawing_options["should_stop"] = settings.should_stop
            drawing = Drawing([settings.seed or 0], drawing_options, lengths, reads_back)

        # 2. The answer; a forced image follows the task's response.
        opening = ""
        if settings.images == "forced":
            is_text = all(message.is_text for message in conversation)
            opening = self.tasks.draw_response if is_text else self.tasks.edit_response
        task = Task(kind, conversation, settings, opening, drawing=drawing)
        task.notes.add(*notes)
        events = (event for _, event in self.run([task], live=True))
        if stream:
            return events
        *_, done = events
        return done["answer"]

    # ---- tasks of methods

    def _texts(
        self,
        kind: TaskKind,
        conversations: Sequence[Sequence[Message]],
        single: bool,
        batch_size: int,
        options: Options,
    ) -> TextOrList:
        """The text of the answer to each conversation; images in it are not drawn."""
        tasks = self._text_tasks(kind, conversations, options)
        events = self.run(tasks, batch_size=batch_size)
        texts = [self.family.text(event["answer"], kind) for _, event in events]
        if self.log:
            self._log_notes(tasks)
        return texts[0] if single else texts

    def _text_tasks(
        self, kind: TaskKind, conversations: Sequence[Sequence[Message]], options: Options
    ) -> list[Task]:
        """Tasks with equal settings, but for a list of seeds."""
        seeds: Seed = None
        if isinstance(options.get("seed"), (list, tuple, range)):
            seeds = options.pop("seed")
        settings = self.family.generation_settings(kind, options)
        tasks = [Task(kind, conversation, settings) for conversation in conversations]
        if seeds is not None:
            for task, seed in zip(tasks, seed_per_image(seeds, len(tasks)), strict=True):
                task.generation = replace(settings, seed=seed)
        for task, conversation in zip(tasks, conversations, strict=True):
            task.request = self.family.read_words(conversation, task.notes)
        return tasks

    def _draw(
        self,
        kind: TaskKind,
        conversations: Sequence[Sequence[Message]],
        single: bool,
        seed: Seed,
        num_images: int,
        batch_size: int,
        options: Options,
    ) -> ImageOrList:
        """`num_images` images of each conversation, one after the other; or with `stream` their
        events."""
        # 1. Settings of the drawing; a missing de-tokenizer is reported before generation.
        check_value(int, num_images, "num_images", minimum=1)
        if "images" in options:
            raise ConfigError("The option 'images' is of chats; a drawing is always an image.")
        stream = options.pop("stream", False)
        lengths = self._preview_lengths(options.pop("previews", None), stream)
        negative_prompt: Any = options.pop("negative_prompt", None) or ""
        negatives = request_texts(negative_prompt, allow_blank=True)
        if isinstance(negative_prompt, str):
            negatives *= len(conversations)
        if len(negatives) != len(conversations):
            raise RequestError(f"negative_prompt: one text, or {len(conversations)} are needed.")
        drawing, reads_back = self._pop_drawing_options(options)
        self.images.check_drawing(**drawing)
        drawing["should_stop"] = options.get("should_stop")
        drawing["batch_size"] = min(batch_size, DRAWING_BATCH)

        # 2. Of greedy settings, further images are sampled.
        options["images"] = "forced"
        settings = self.family.generation_settings(kind, options)
        varied = settings
        if num_images > 1 and not settings.samples and not VARIATION.keys() & options.keys():
            varied = self.family.generation_settings(kind, {**options, **VARIATION})

        # 3. A task for each image; where no answer can vary, one for all images of a request.
        # Sampling changes codes; SEED-X's images depend only on the text before them.
        announces = self.family.tokens_before_image(kind) > 0
        can_vary = varied.samples and (self.abilities.draws_codes or announces)
        seeds = seed_per_image(seed, len(conversations))
        tasks: list[Task] = []
        for conversation, first_seed, negative in zip(conversations, seeds, negatives, strict=True):
            notes = Notes()
            conversation = self.family.read_words(conversation, notes, drawing=True)
            image_seeds = [(first_seed + index) % 2**63 for index in range(num_images)]
            for index in range(num_images if can_vary else 1):
                base = varied if index else settings
                generation = replace(base, seed=image_seeds[index])
                task_seeds = [image_seeds[index]] if can_vary else image_seeds
                task = self.image_task(
                    kind, conversation, generation, options.get("max_new_tokens")
                )
                task.notes = notes
                task.negative = negative
                task.drawing = Drawing(task_seeds, drawing, lengths, reads_back)
                tasks.append(task)

        # 4. The images.
        events = self.run(tasks, batch_size=batch_size)
        if stream:
            return (event for _, event in events if event["type"] != "done")
        images = [event["image"] for _, event in events if event["type"] == "image"]
        if self.log:
            self._log_notes(tasks)
        return images[0] if single and num_images == 1 else images

    def _log_notes(self, tasks: Sequence[Task]) -> None:
        """Log what should be known about requests: once what is true of all."""
        assert self.log is not None
        requests = [*{id(task.notes): task.notes for task in tasks}.values()]
        sentences = dict.fromkeys(sentence for notes in requests for sentence in notes)
        for sentence in sentences:
            of_requests = [index for index, notes in enumerate(requests) if sentence in notes]
            if len(of_requests) == len(requests) or IMAGE_NUMBER.match(sentence):
                self.log(sentence)
                continue
            for index in of_requests:
                self.log(f"Request {index}: {sentence}")

    def _preview_lengths(self, previews: Sequence[int] | None, stream: bool) -> Sequence[int]:
        """Numbers of codes after which a stream shows an unfinished image; `previews`: as of
        `chat`."""
        is_shown = stream and self.abilities.first_codes and self.images.can_draw
        if previews and not is_shown:
            raise ConfigError(
                "The option 'previews' is of streams, of a system that draws from an image's first "
                "codes."
            )
        if previews is None:
            previews = self.config.previews if is_shown else ()
        lengths: Sequence[int] = check_value(Sequence[int], previews, "previews", minimum=1)
        return lengths

    def _pop_drawing_options(self, options: Options) -> tuple[Options, bool]:
        """Take out of `options` the settings of the de-tokenizer, and whether drawings are
        described."""
        names = self.images.drawing_settings
        drawing = {name: options.pop(name) for name in names if name in options}
        read_back = options.pop("read_back", None)
        if read_back is None:
            read_back = self.config.read_back
        return drawing, check_value(bool, read_back, "read_back")
