"""`Family`: what a model family defines; by default its images are codes between texts.

images ─► codes ─► prompt ids ─► language model ─► answer ids ─► texts and codes ─► images
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from PIL import Image
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError, RequestError
from seed_multimodal.images.io import ImageSource, is_image
from seed_multimodal.inference.backends.torch import embed_prompt, joined
from seed_multimodal.inference.base_engine import GeneratedSequence
from seed_multimodal.inference.prompt import GenerationSettings, ImageFeatures, Prompt
from seed_multimodal.language.answer import Answer, ImagePart
from seed_multimodal.language.llm import check_vocab_size
from seed_multimodal.language.lora import load_llm_or_adapter
from seed_multimodal.language.messages import Message
from seed_multimodal.language.prompts import (
    PromptTemplate,
    TaskPrompts,
    Turn,
    get_template,
    merge_text,
)
from seed_multimodal.language.text_tokenizer import Part, TextTokenizer
from seed_multimodal.models.registry import NEEDS
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.pipelines.images import Encoded, ImageInput, Options, Placement
from seed_multimodal.pipelines.tasks import DRAWING_KINDS, Notes, TaskKind
from seed_multimodal.pipelines.world import PREFACE, open_world, unknown_images_note
from seed_multimodal.settings import check_value, nearest

if TYPE_CHECKING:
    from seed_multimodal.language.llm import LanguageModel

Edges = tuple[float, ...]  # of a box: left, top, right, bottom

SAMPLING = {"temperature", "top_p", "top_k"}
OF_FAMILIES = ("stop_after", "answer_after")  # settings that only families set
OF_BEAMS = ("length_penalty", "early_stopping")


class Family:
    """The parts of a loaded system, and what differs between families.

    The methods are those of systems with images as codes in a prompt template: such a family only
    defines `load`, which ends with `of_parts`.

    llm: None: the engine has it, outside of torch.
    embeddings: of a language model without layers, for prompts of an engine outside of torch.
    max_characters: of a conversation that may fit the engine's context.
    template: of conversations; None: the system answers single messages.
    tasks: sentences of its prompts.
    """

    # Generation settings by task, below those of `system.json`.
    defaults: ClassVar[dict[str, Options]] = {}
    # Tokens of a row of the KV cache at most; None: the model's context.
    context: ClassVar[int | None] = None

    def __init__(
        self,
        config: Any,
        tokenizer: TextTokenizer,
        llm: LanguageModel | None,
        images: Any,
        template: PromptTemplate | None = None,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.llm = llm
        self.max_characters = sys.maxsize
        self.embeddings: nn.Module | None = None
        if llm is not None and getattr(llm.config, "num_hidden_layers", None) == 0:
            self.llm = None
            self.embeddings = llm.get_input_embeddings()
        self.images = images
        self.use_template(template)
        self.tasks: TaskPrompts = config.tasks
        self.world = open_world(config.known_words)

    def use_template(self, template: PromptTemplate | None) -> None:
        """Write conversations in a template, whose texts then end answers."""
        self.template = template
        self.stops = template.stop_sequences if template else ()
        words = (template.user_prefix, template.user_suffix) if template else ()
        self.template_words = [word.strip().lower() for word in words if word.strip()]

    # ---- loading

    @classmethod
    def check_decoder(cls, config: Any) -> None:
        """Raise CheckpointError if the de-tokenizer's folder is there, but lacks a file."""

    @classmethod
    def load(cls, config: Any, placement: Placement) -> Self:
        """Load the parts of a system. Raises CheckpointError, ConfigError: missing or wrong."""
        raise NotImplementedError

    @classmethod
    def of_parts(
        cls, config: Any, tokenizer: TextTokenizer, images: Any, placement: Placement
    ) -> Self:
        """A system of codes in the template of `config`, with its language model."""
        # 1. The image tokenizer and the vocabulary belong together, before the longest part.
        vocabulary = tokenizer.vocabulary
        n_codes, length = images.codebook_size, images.codes_per_image
        if n_codes > vocabulary.n_codes or length != vocabulary.tokens_per_image:
            raise ConfigError(
                f"{config.tokenizer}: the image tokenizer has {n_codes} codes, {length} to an "
                f"image, but the vocabulary has {vocabulary.n_codes} and "
                f"{vocabulary.tokens_per_image}."
            )

        # 2. The language model.
        llm = load_language_model(config, tokenizer, placement)
        if llm is not None:
            check_vocab_size(llm.config.vocab_size, vocabulary, config.name)
        return cls(config, tokenizer, llm, images, get_template(config.template, tokenizer))

    # ---- answers

    def settings(self, task: str) -> Options:
        """Generation settings of a task, with the texts (`stop`) and tokens that end an answer."""
        generation = self.config.generation
        return {**generation, "stop": (*self.stops, *generation.get("stop", ()))}

    def generation_settings(self, kind: str, options: Options) -> GenerationSettings:
        """The defaults of a task, overridden by `options`; `stop` is added to the task's.

        A temperature, top_p or top_k enables sampling (without beams), unless `do_sample` is set. A
        forced image raises `max_new_tokens`, unless the caller sets it; it is all of a drawing.
        Raises ConfigError: a task that the family does not do; an unknown option (with the
        nearest), one that the task does not read; several answers; a limit below a forced image.
        """
        # 1. The task, and names.
        ability = NEEDS.get(kind)
        if ability and not getattr(self.config.abilities, ability):
            self.config.check_ability(ability)
        names = [
            entry.name for entry in fields(GenerationSettings) if entry.name not in OF_FAMILIES
        ]
        drawing_names = self.images.drawing_settings
        for name in options:
            if name in drawing_names:
                raise ConfigError(f"The option {name!r} is of drawing, but nothing is drawn.")
            if name not in names:
                suggestion = nearest(name, [*names, *drawing_names])
                raise ConfigError(f"{self.config.name} takes no option {name!r}{suggestion}.")

        # 2. Values: later mappings override earlier ones.
        given = dict(options)
        if "do_sample" not in given and SAMPLING & given.keys():
            given = {"do_sample": True, "num_beams": 1, **given}
        stop = given.pop("stop", None)
        if stop is None:
            stop = ()
        elif isinstance(stop, str):
            stop = (stop,)
        family_values = self.settings(kind)
        values = {
            "max_new_tokens": 256,
            "do_sample": False,
            "answer_after": self.tasks.answer_after,
            **self.defaults.get(kind, {}),
            **family_values,
            **given,
            "stop": stop,
        }
        settings: GenerationSettings = check_value(GenerationSettings, values, "Generation setting")

        # 3. What this task does not read, or what would contradict another option.
        if "" in settings.stop:
            raise ConfigError("stop: an empty text ends no answer.")
        if settings.num_return_sequences > 1:
            raise ConfigError(
                "num_return_sequences: each request gets one answer; for several, repeat the "
                "request with other seeds (draw and edit: num_images)."
            )
        if settings.images == "never" and not settings.constrain:
            raise ConfigError("images='never' needs constrain: else the model may draw.")
        vocabulary = self.tokenizer.vocabulary
        has_fixed_length = vocabulary.min_codes == vocabulary.tokens_per_image
        unread: dict[str, str] = {}
        if kind in ("describe", "ask", "detect"):
            unread["guidance"] = "it is of answers that are drawn"
        if settings.num_beams == 1:
            unread |= dict.fromkeys(OF_BEAMS, "it is of beams (num_beams)")
        if kind in DRAWING_KINDS and has_fixed_length:
            unread["min_new_tokens"] = f"an image has {vocabulary.tokens_per_image} codes"
        # At its default an option asks for nothing.
        defaults = GenerationSettings()
        for name in unread.keys() & options.keys():
            if options[name] != getattr(defaults, name):
                raise ConfigError(f"The option {name!r} has no effect on {kind}: {unread[name]}.")

        # 4. Texts that end the answer, and tokens of a forced image: its codes and `</img>`.
        stop = (*family_values["stop"], *settings.stop)
        limit = settings.max_new_tokens
        if settings.images == "forced":
            needed = vocabulary.min_codes + 1
            if "max_new_tokens" in given and limit < needed:
                raise ConfigError(
                    f"An image needs {needed} new tokens, but max_new_tokens is {limit}."
                )
            limit = max(limit, needed)
            if kind in DRAWING_KINDS:
                limit = min(limit, vocabulary.tokens_per_image + 1)
        return replace(settings, stop=stop, max_new_tokens=limit)

    def read_chat(self, conversation: list[Message], draws: bool) -> tuple[TaskKind, list[Message]]:
        """A conversation as the model was trained to read it, and its task.

        Images alone are described. draws: whether the answer must be an image.
        """
        *earlier, last = conversation
        is_images_alone = last.role == "user" and not last.is_text and not last.text.strip()
        if is_images_alone and not draws:
            last = replace(last, content=(*last.content, self.tasks.describe))
        return "chat", [*earlier, last]

    def tokens_before_image(self, task: TaskKind) -> int:
        """Tokens in which the model may say what an image will show, before the image is forced."""
        if task == "edit":
            return self.tasks.edit_words
        return self.tasks.draw_words if self.config.tuned else 0

    def negative_ids(self, text: str) -> list[int]:
        """The unconditional prompt of a drawing that shall not show `text`."""
        raise ConfigError(f"{self.config.name} has no negative_prompt; nano-lavit and LaVIT have.")

    def text(self, answer: Answer, task: TaskKind) -> str:
        """The displayed text of an answer."""
        return answer.text

    def boxes(self, answer: Answer) -> tuple[list[Edges], list[str]]:
        """Boxes of an answer, as shares of the image's sides, and notes about malformed ones."""
        return [], []

    def detection(self, image: Any, ids: Sequence[int], opened: bool) -> Any:
        """The boxes of an answer, if it `detects`; `opened`: the prompt ended inside a box."""
        raise NotImplementedError

    def image_inputs(
        self, parts: Sequence[ImagePart], request: GeneratedSequence
    ) -> Sequence[ImageInput]:
        """Input of `images.draw` for images of a request's answer."""
        return [part.codes for part in parts]

    def draw(
        self,
        inputs: Sequence[ImageInput],
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        settings: Options,
    ) -> list[Image.Image]:
        """An image of each input, which answers its prompt; settings: of `images.draw`."""
        images: list[Image.Image] = self.images.draw(inputs, seeds=seeds, **settings)
        return images

    # ---- prompts

    def read_words(
        self, conversation: Sequence[Message], notes: Notes | None = None, drawing: bool = False
    ) -> Sequence[Message]:
        """A conversation in the words that the system learned. What was read stays.

        notes: which get words of the last message that are read otherwise, or were not learned.
        drawing: words count that the system can say, but not draw.
        Raises RequestError: it cannot fit the context. Nothing else reads a text before.
        """
        content = [part for message in conversation for part in message.content]
        n_characters = sum(len(part) for part in content if type(part) is str)  # as written
        if n_characters > self.max_characters:
            raise RequestError(
                f"The prompt has {n_characters} characters, but at most {self.max_characters} fit "
                "into the model's context; make it shorter."
            )
        turns = self.world.read(conversation)
        if notes is not None and turns[-1].text != self.tasks.describe:
            notes.add(*self.world.notes(turns[-1], self.template_words, drawing))
        return turns

    def prompts(
        self,
        conversations: Sequence[Sequence[Message]],
        task: TaskKind,
        seeds: Sequence[int | None] | None = None,
        notes: Sequence[Notes] = (),
        drawing: Options | None = None,
    ) -> list[Prompt]:
        """Conversations as prompts.

        seeds: of stochastic encoders (LaVIT's).
        notes: of each conversation, which get what is unusual about its images.
        drawing: settings of the drawings, of which a family may write some into its prompts.
        """
        # 1. Users' words as the system learned them.
        conversations = [self.read_words(turns) for turns in conversations]

        # 2. All images are encoded together; the prompts use them up in the same order.
        images: list[ImageSource] = []
        image_seeds: list[int | None] = []
        for conversation, seed in zip(
            conversations, seeds or [0] * len(conversations), strict=True
        ):
            for message in conversation:
                images += message.images
                image_seeds += [seed] * len(message.images)
        encoded = self.encode(images, task, image_seeds) if images else []
        values = iter([image.value for image in encoded])
        distances = iter([image.distance for image in encoded])
        prompts = [self.prompt(conversation, task, values) for conversation in conversations]

        # 3. Unknown images of a last message are noted; earlier ones were, when they were the last.
        for conversation, own_notes in zip(conversations, notes, strict=False):
            latest: list[float | None] = []
            for message in conversation:
                inputs = [item for item in message.content if not isinstance(item, str)]
                latest = [next(distances) if is_image(item) else None for item in inputs]
            note = unknown_images_note(latest, self.config.notice)
            own_notes.add(note)
            own_notes.preface = PREFACE if note else ""
        return prompts

    def encode(
        self, images: Sequence[ImageSource], task: TaskKind, seeds: Sequence[int | None]
    ) -> list[Encoded]:
        """Images as `prompt` reads them: codes, or features; and their distances."""
        encoded = self.images.read(images, seed=seeds)
        return [image._replace(value=image.value.tolist()) for image in encoded]

    def prompt(
        self, conversation: Sequence[Message], task: TaskKind, encoded: Iterator[Any]
    ) -> Prompt:
        """A conversation as a prompt; `encoded` yields its images in order."""
        # 1. The turns, and the texts of all system messages.
        turns: list[Turn] = []
        system: list[str] = []
        for message in conversation:
            if message.role == "system":
                system.append(message.text)
            else:
                turns.append((message.role, self._parts(message, encoded)))

        # 2. `<s>` and their ids, up to where the answer begins; a raw message has no template.
        role, content = turns[0]
        if role == "raw":
            parts = merge_text(content)
        else:
            assert self.template is not None
            parts = self.template.render(turns, "\n".join(system))
        return Prompt(self.tokenizer.encode_parts(parts, add_bos=True))

    def embed_features(self, features: Sequence[ImageFeatures]) -> Tensor:
        """Features of a prompt's images → embeddings `[n, D]`; the engine's thread calls it."""
        return joined(features)

    def embed_prompt(self, prompt: Prompt) -> Tensor:
        """A prompt with features as embeddings `[L, D]`, for an engine outside of torch."""
        assert self.embeddings is not None
        return embed_prompt(prompt, self.embeddings, self.embed_features)

    def _parts(self, message: Message, codes: Iterator[list[int]]) -> list[Part]:
        """A message's texts, and its images as codes; those of answers have them already."""
        parts: list[Part] = []
        for item in message.content:
            if isinstance(item, str):
                parts.append(item)
            elif isinstance(item, ImagePart):
                parts.append(list(item.codes))
            elif is_image(item):
                parts.append(next(codes))
            else:
                parts.append(self.images.check_codes([item])[0].tolist())
        return parts


def load_language_model(
    config: SystemConfig,
    tokenizer: TextTokenizer,
    placement: Placement,
) -> LanguageModel | None:
    """The language model of a system, a LoRA with its base; if an engine outside has it, the
    embeddings alone, or None where prompts are ids."""
    if not placement.load_llm and config.abilities.reads_codes:
        return None
    return load_llm_or_adapter(
        config.path("llm"),
        device=placement.load_device("llm"),
        dtype=placement.llm.dtype,
        quantization=placement.quantization,
        tokenizer=tokenizer,
        layers=placement.load_llm,
    )
