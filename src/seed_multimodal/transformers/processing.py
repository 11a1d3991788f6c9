"""Processors: conversations of texts and images ─► prompt ids; generated ids ─► texts and images.

    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    ids = model.generate(**inputs)
    processor.post_process_multimodal_output(ids)     # texts
    processor.post_process_interleaved_output(ids)    # texts and images in order

Images become codes here, not in the model: they are tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Self, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from seed_multimodal.errors import ConfigError, RequestError
from seed_multimodal.inference.generator import Task
from seed_multimodal.inference.prompt import GenerationSettings, Prompt
from seed_multimodal.language.answer import ImagePart
from seed_multimodal.language.messages import Message, input_images, read_messages
from seed_multimodal.language.prompts import without_verdict
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.language.vocabulary import BOI, PLACEHOLDER
from seed_multimodal.models.registry import find_family
from seed_multimodal.pipelines.base import DRAWING_BATCH, MultimodalSystem
from seed_multimodal.transformers.systems import open_system

Ids: TypeAlias = Tensor | Sequence[Sequence[int]]
Conversation = Sequence[Mapping[str, object]]
MODES = (None, "text", "image")


class ProcessorTokenizer:
    """What transformers' pipelines use of a tokenizer."""

    padding_side = "left"

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.pad_token_id = tokenizer.pad_token_id
        self.eos_token_id = tokenizer.eos_token_id

    def __len__(self) -> int:
        return self.tokenizer.vocabulary.size

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """A text → ids; names of special and image tokens in it become these tokens."""
        return self.tokenizer.encode(text, add_bos=add_special_tokens)

    def decode(self, ids: Sequence[int] | Tensor, skip_special_tokens: bool = False) -> str:
        """Ids → text, with names of image tokens."""
        return self.tokenizer.decode(map(int, ids), skip_special_tokens)

    def save_pretrained(self, *args: object, **kwargs: object) -> tuple[str, ...]:
        """Nothing to write: see the processor's."""
        return ()

    def batch_decode(self, sequences: Ids, skip_special_tokens: bool = False) -> list[str]:
        """`decode` of each row."""
        return [self.decode(ids, skip_special_tokens) for ids in sequences]


class SeedMultimodalProcessor(ProcessorMixin):
    """Prompts and answers of a system.

    It uses the system of a model that was loaded from the same folder; without one it loads the
    folder when it is first used, of systems of codes without the language model.
    """

    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.chat_template = None  # prompts are built by `MultimodalSystem.build_prompts`

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: object) -> Self:
        """The processor of a system's folder; hub arguments are not used: nothing is downloaded."""
        return cls(str(pretrained_model_name_or_path))

    def save_pretrained(self, save_directory: str | Path, **kwargs: object) -> None:
        """Nothing to write: the model's `save_pretrained` writes the whole system."""

    def to_dict(self) -> dict[str, str]:
        return {"processor_class": type(self).__name__, "folder": self.folder}

    @cached_property
    def system(self) -> MultimodalSystem:
        """The system, shared with a model of the same folder."""
        return open_system(self.folder)

    @cached_property
    def tokenizer(self) -> ProcessorTokenizer:
        return ProcessorTokenizer(self.system.tokenizer)

    # ---- prompts

    def apply_chat_template(
        self,
        conversation: Conversation | Sequence[Conversation],
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        continue_final_message: bool = False,
        generation_mode: str | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: object,
    ) -> Any:
        """Prompts of a conversation, or of several: a batch (form: see `language.messages`).

        tokenize: False for the prompts' text, to be read: its ids may differ from the prompts'.
        return_dict: `BatchFeature` with `input_ids` and `attention_mask`, padded at the left, and
        of systems that read features their embeddings; False: `input_ids`.
        continue_final_message: the last message, a text of the assistant, begins the answer; with a
        blank at its end, if the next word is another one.
        generation_mode: "image" if an image will be generated. LaVIT needs it where a message has
        images, and SEED-X then cuts them in the views of its edits.
        """
        # 1. One conversation, or several.
        is_single = isinstance(conversation[0], Mapping | Message)
        conversations: Any = [conversation] if is_single else conversation
        mode = (processor_kwargs or {}).get("generation_mode", generation_mode)

        # 2. Their prompts.
        prompts: list[Prompt] = []
        tasks: list[Task] = []
        for messages in conversations:
            task, prompt = self._prompt(messages, mode, continue_final_message)
            tasks.append(task)
            prompts.append(prompt)

        # 3. In the form that is asked for.
        if not tokenize:
            texts = [self.tokenizer.decode(prompt.ids) for prompt in prompts]
            return texts[0] if is_single else texts
        features = self._features(prompts, tasks)
        return features if return_dict else features["input_ids"]

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        *,
        generation_mode: str | None = None,
        **kwargs: object,
    ) -> BatchFeature:
        """Texts that are continued, without a template; `<image>` in them marks their images.

        Images of a text without `<image>` stand before it. images: one, a list for one text, or a
        list of lists. Raises RequestError: a text that has images already, as names of tokens.
        """
        texts = [text or ""] if text is None or isinstance(text, str) else list(text)
        groups: Sequence[Any] = [[]] * len(texts)
        if images is not None:
            groups = [images] if len(texts) == 1 else images
        prompts: list[Prompt] = []
        tasks: list[Task] = []
        for single_text, group in zip(texts, groups, strict=True):
            inputs = input_images(group)
            if inputs and BOI in single_text:
                raise RequestError(
                    "The text has its images already: pass tokenize=True and return_dict=True to "
                    "apply_chat_template, and what it returns to generate."
                )
            message = Message("raw", _interleaved(single_text, inputs))
            task, prompt = self._prompt([message], generation_mode, False)
            tasks.append(task)
            prompts.append(prompt)
        return self._features(prompts, tasks)

    def _prompt(self, messages: Any, mode: str | None, is_prefilled: bool) -> tuple[Task, Prompt]:
        """The task of a conversation, and its prompt."""
        if mode not in MODES:
            raise ConfigError(f"generation_mode is {mode!r}; use 'text' or 'image'.")

        # 1. The messages, and the text with which the answer begins.
        opening = ""
        if is_prefilled:
            *messages, last = messages
            answer = read_messages([{**last, "role": "user"}])[0]
            if not answer.is_text:
                raise RequestError("Only a text of the assistant can be continued.")
            opening = answer.text.rstrip()  # a token begins with its blank
        conversation = read_messages(messages)

        # 2. The task, as of the system's methods; texts alone can only be drawn by some systems.
        is_text = all(message.is_text for message in conversation)
        is_drawing = mode == "image" or (is_text and self.system.answers_only_about_images)
        task = self.system.task_of(conversation, is_drawing)
        if is_drawing and task == "chat":
            task = "draw" if is_text else "edit"
        conversation = self.system.chat_request(conversation, task)

        # 3. The prompt.
        return task, self.system.build_prompts([conversation], task, opening, [0])[0]

    def _features(self, prompts: Sequence[Prompt], tasks: Sequence[Task]) -> BatchFeature:
        """Prompts as tensors, padded at the left."""
        # 1. Ids.
        length = max(map(len, prompts))
        input_ids = torch.full((len(prompts), length), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, length - len(prompt) :] = torch.tensor(list(prompt.ids))
            attention_mask[row, length - len(prompt) :] = 1
        features = BatchFeature({"input_ids": input_ids, "attention_mask": attention_mask})

        # 2. Embeddings of images, and where they stand.
        if not self.system.prompts_are_ids:
            llm = self.system.llm
            assert llm is not None
            embeds = [torch.zeros(0, llm.config.hidden_size)]
            image_mask = torch.zeros_like(input_ids, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                for image in prompt.images:
                    positions = torch.tensor(list(image.positions)) + length - len(prompt)
                    image_mask[row, positions] = True
                    with torch.no_grad():
                        embeds.append(self.system.embed_features([image.features]).cpu())
            features["image_embeds"] = torch.cat([rows.to(embeds[-1]) for rows in embeds])
            features["image_mask"] = image_mask
            features["sources"] = [prompt.source for prompt in prompts]

        # 3. What the prompts were built for, if not for a conversation.
        if set(tasks) != {"chat"}:
            features["task"] = list(tasks)
        return features

    # ---- answers

    def post_process_multimodal_output(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **kwargs: object,
    ) -> list[Any]:
        """Texts of generated ids; with `generation_mode="image"` PIL images of the pixels that
        `decode_image_tokens` of the model returns.

        skip_special_tokens: leave out special tokens, image tokens, and a verdict (`TaskPrompts`).
        """
        if generation_mode == "image":
            return [Image.fromarray(pixels.cpu().numpy()) for pixels in generated_outputs]
        if not skip_special_tokens:
            return self.tokenizer.batch_decode(generated_outputs)
        return [self._read(ids).text for ids in generated_outputs]

    def post_process_image_text_to_text(
        self, generated_outputs: Ids, skip_special_tokens: bool = True, **kwargs: object
    ) -> list[str]:
        """Texts of generated ids."""
        return self.post_process_multimodal_output(generated_outputs, skip_special_tokens)

    def post_process_interleaved_output(
        self, generated_ids: Ids, seed: int = 0, **drawing: object
    ) -> list[list[dict[str, Any]]]:
        """The texts and images of each answer in order, as the content of an assistant's message:
        parts with the type "text", or "image" with its `image` and `codes`.

        transformers has no such method: its pipeline returns either a text or one image.

        drawing: settings of the de-tokenizer. Raises ConfigError: images are not made of codes
        (SEED-X); BrokenImage parts are left out.
        """
        if self.system.tokenizer.vocabulary.fixed_image_order:
            raise ConfigError(
                f"{self.system.config.name} draws images from hidden states, which ids do not "
                "hold; use generation_mode='image', or `MultimodalSystem.chat`."
            )
        answer_after = self.system.answer_after
        answers: list[list[dict[str, Any]]] = []
        for ids in generated_ids:
            content: list[dict[str, Any]] = []
            for part in self._read(ids).parts:
                if isinstance(part, str):
                    text = without_verdict(part.strip(), answer_after)
                    content.append({"type": "text", "text": text})
                elif isinstance(part, ImagePart):
                    image = self.system.images.draw(
                        [part.codes], seeds=[seed], batch_size=DRAWING_BATCH, **drawing
                    )[0]
                    content.append({"type": "image", "image": image, "codes": part.codes})
            answers.append(content)
        return answers

    def _read(self, ids: Tensor | Sequence[int]) -> Any:
        """The answer of a row of generated ids, which `generate` has cut at its end."""
        return self.system.read_answer([int(id) for id in ids], GenerationSettings())

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """`tokenizer.decode`."""
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """`tokenizer.batch_decode`."""
        return self.tokenizer.batch_decode(*args, **kwargs)


def _interleaved(text: str, images: Sequence[Any]) -> tuple[Any, ...]:
    """Texts and images in order; images replace `<image>`, or come first in a text without it."""
    pieces = text.split(PLACEHOLDER)
    if len(pieces) == 1:
        return (*images, text) if text else tuple(images)
    if len(pieces) != len(images) + 1:
        raise RequestError(
            f"The text holds {len(pieces) - 1} {PLACEHOLDER} placeholders for {len(images)} images."
        )
    content: list[Any] = [pieces[0]]
    for image, piece in zip(images, pieces[1:], strict=True):
        content += [image, piece]
    return tuple(part for part in content if not isinstance(part, str) or part)


@cache
def class_of(family: str) -> type[SeedMultimodalProcessor]:
    """The processor of a family, as `SeedLlamaProcessor`."""
    spec = find_family(family)
    return type(
        f"{spec.system_name}Processor",
        (SeedMultimodalProcessor,),
        {"__module__": __package__, "__doc__": f"Of {spec.title}."},
    )


def register(family: str, auto: ModuleType) -> None:
    """Register a family in transformers' module of `AutoProcessor`."""
    from seed_multimodal.transformers import configuration

    auto.AutoProcessor.register(configuration.class_of(family), class_of(family), exist_ok=True)
