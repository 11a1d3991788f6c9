"""`CodeSystem`: systems that read and write images as codes, between texts of a template.

images ─► codes ─► prompt ids ─► language model ─► answer ids ─► texts and codes ─► images
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from seed_multimodal.images.io import ImageSource
from seed_multimodal.inference.base_engine import BaseEngine
from seed_multimodal.inference.generator import Task
from seed_multimodal.inference.opening import TORCH, EngineOptions, outside_engine
from seed_multimodal.inference.prompt import Prompt
from seed_multimodal.language.answer import ImagePart
from seed_multimodal.language.llm import check_vocab_size
from seed_multimodal.language.lora import load_llm_or_adapter
from seed_multimodal.language.messages import Codes, Message, is_image
from seed_multimodal.language.prompts import PromptTemplate, Turn, get_template, merge_text
from seed_multimodal.language.text_tokenizer import Part, TextTokenizer
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_multimodal.pipelines.config import CodeSystemConfig
from seed_multimodal.pipelines.images import ImageCodec, Log, Placement

if TYPE_CHECKING:
    from seed_multimodal.language.llm import LanguageModel


class CodeCodec(ImageCodec):
    """An `ImageCodec` whose `encode` returns the codes `[n]` int64 of each image."""

    def check_codes(self, codes: Sequence[Codes]) -> Sequence[Tensor]:
        """Codes of images → `[n]` int64 each. Raises CodesError: not the codes of one image."""
        raise NotImplementedError


class CodeSystem(MultimodalSystem):
    """Prompts and loading of systems whose images are codes.

    A family defines its codec, and `load`.
    """

    prompts_are_ids = True
    images: CodeCodec
    template: PromptTemplate

    def __init__(
        self,
        config: CodeSystemConfig,
        tokenizer: TextTokenizer,
        llm: LanguageModel | None,
        images: CodeCodec,
        log: Log = None,
        engine: BaseEngine | EngineOptions = EngineOptions(),  # noqa: B008 (frozen)
    ) -> None:
        self.template = get_template(config.template, tokenizer)
        super().__init__(config, tokenizer, llm, images, log, engine)
        if llm is not None:
            check_vocab_size(llm.config.vocab_size, tokenizer.vocabulary, config.name)

    @staticmethod
    def load_language_model(
        config: CodeSystemConfig, tokenizer: TextTokenizer, placement: Placement
    ) -> tuple[LanguageModel | None, BaseEngine | EngineOptions]:
        """The language model, with the options of its engine; or the engine that has it."""
        options = placement.engine
        if options.name != TORCH:
            return None, outside_engine(options, tokenizer, config.llm)
        llm = load_llm_or_adapter(
            config.path("llm"),
            device=placement.llm_load_device,
            dtype=placement.llm.dtype,
            quantization=placement.quantization,
            tokenizer=tokenizer,
        )
        return llm, options

    def use_plain_prompts(self) -> None:
        self.template = get_template("plain")
        self.tasks = replace(self.tasks, describe="", qa_suffix="", draw_response="", draw_words=0)

    def stop_sequences(self, task: str) -> tuple[str, ...]:
        return self.template.stop_sequences

    def prompt_ids(self, turns: Sequence[Turn], system: str = "") -> list[int]:
        """`<s>` and a conversation, turns of texts and codes, up to where the answer begins."""
        return self.tokenizer.encode_parts(self.template.render(turns, system), add_bos=True)

    def build_prompts(
        self,
        conversations: Sequence[Sequence[Message]],
        task: Task,
        opening: str = "",
        seeds: Sequence[int | None] | None = None,
    ) -> list[Prompt]:
        # 1. All images are encoded together; the codes are used up in the same order.
        images: list[ImageSource] = []
        for conversation in conversations:
            for message in conversation:
                images += message.images
        rows = self.images.encode(images) if images else ()
        codes = (row.tolist() for row in rows)

        # 2. The ids of each conversation, and of the text with which its answer begins.
        answered = self.tokenizer.encode_parts([opening]) if opening else []
        prompts: list[Prompt] = []
        for conversation in conversations:
            ids = self._conversation_ids(conversation, codes)
            prompts.append(Prompt([*ids, *answered], answered=answered))
        return prompts

    def _conversation_ids(
        self, conversation: Sequence[Message], codes: Iterator[list[int]]
    ) -> list[int]:
        """A conversation as ids; `codes` yields those of its input images in order."""
        # 1. A raw message has no template.
        first = conversation[0]
        if first.role == "raw":
            return self.tokenizer.encode_parts(merge_text(self._parts(first, codes)), add_bos=True)

        # 2. Texts of all system messages, and the turns.
        system: list[str] = []
        turns: list[Turn] = []
        for message in conversation:
            if message.role == "system":
                system.append(message.text)
            else:
                turns.append((message.role, self._parts(message, codes)))
        return self.prompt_ids(turns, "\n".join(system))

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
