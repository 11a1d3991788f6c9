"""Processors: conversations of texts and images ─► prompt ids; generated ids ─► texts and images.

    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    ids = model.generate(**inputs)
    processor.post_process_multimodal_output(ids)     # texts
    processor.post_process_interleaved_output(ids)    # texts and images in order

Images become codes here, not in the model: they are tokens of the prompt.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeAlias

from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from seed_multimodal.disk import read_json_object, writing
from seed_multimodal.errors import ConfigError, RequestError
from seed_multimodal.images.io import is_image
from seed_multimodal.inference.prompt import GenerationSettings, Prompt, PromptImage
from seed_multimodal.language.answer import ImagePart
from seed_multimodal.language.llama_tokenizer import TransformersTokenizer
from seed_multimodal.language.messages import Message, input_images, is_single, read_messages
from seed_multimodal.language.prompts import interleave
from seed_multimodal.language.text_tokenizer import without_space_at_images
from seed_multimodal.language.vocabulary import PLACEHOLDER
from seed_multimodal.pipelines.assemble import PROCESSOR_CONFIG, write_processor
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_multimodal.pipelines.config import SYSTEM
from seed_multimodal.pipelines.tasks import TaskKind
from seed_multimodal.transformers.systems import open_system

Ids: TypeAlias = Tensor | Sequence[Sequence[int]]
Conversation = Sequence[Mapping[str, object]]
MODES = (None, "text", "image")
TENSORS = (None, "pt", "np")
SIZE = ("height", "width")  # part of a prompt for a grid of codes
# Options of transformers for what is done in any case, also in `processor_kwargs`.
ACCEPTED: dict[str, tuple[object, ...]] = {
    "add_generation_prompt": (True,),
    "padding": (True, "longest"),
    "padding_side": ("left",),
    "generation_mode": ("text", "image"),
    "return_tensors": ("pt",),
}


class SeedMultimodalProcessor(ProcessorMixin):
    """Prompts and answers of a system.

    It uses the system of a model that was loaded from the same folder; without one it loads the
    folder when it is first used, of systems of codes without the language model.
    """

    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.chat_template = None  # prompts are built by `Family.prompts`

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: object) -> Self:
        """The processor of a system's folder, or of one that `save_pretrained` wrote.

        Hub arguments are not used: nothing is downloaded.
        """
        folder = Path(pretrained_model_name_or_path)
        file = folder / PROCESSOR_CONFIG
        if file.is_file() and not (folder / SYSTEM).is_file():
            folder = read_json_object(file, ConfigError).get("system", folder)
        return cls(str(folder))

    def save_pretrained(self, save_directory: str | Path, **kwargs: object) -> None:
        """Write what `AutoProcessor.from_pretrained` reads, with the path of the system's folder.

        A system's own folder stays as it is. Raises ConfigError: it cannot be written.
        """
        folder = Path(save_directory)
        if (folder / SYSTEM).is_file():
            return
        system = os.path.abspath(self.folder) if os.path.isdir(self.folder) else self.folder
        with writing(folder, ConfigError):
            folder.mkdir(parents=True, exist_ok=True)
            write_processor(type(self).__name__, folder, system=system)

    def __getstate__(self) -> dict[str, object]:
        """For workers and copies, which open the folder again when they need it."""
        return {"folder": self.folder, "chat_template": None}

    def to_dict(self) -> dict[str, str]:
        return {"processor_class": type(self).__name__, "folder": self.folder}

    @cached_property
    def system(self) -> MultimodalSystem:
        """The system, shared with a model of the same folder."""
        return open_system(self.folder)

    @cached_property
    def tokenizer(self) -> TransformersTokenizer:
        return TransformersTokenizer(self.system.tokenizer, padding_side="left")

    # ---- prompts

    def apply_chat_template(
        self,
        conversation: Conversation | Sequence[Conversation],
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        continue_final_message: bool = False,
        generation_mode: str | None = None,
        return_tensors: str | None = "pt",
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: object,
    ) -> Any:
        """Prompts of a conversation, or of several: a batch (form: see `language.messages`).

        tokenize: False for the prompts' text, with `<image>` in place of input images; the
        processor makes the same prompt of it and these images, which the conversation may lack
        (`{"type": "image"}`). What users type can be the name of a control token there: texts that
        are not trusted need tokenize=True.
        return_dict: `BatchFeature` with `input_ids` and `attention_mask`, padded at the left, and
        of systems that read features the `prompts` with them; False: `input_ids`.
        continue_final_message: the last message, a text of the assistant, begins the answer; with a
        blank at its end, if the next word is another one.
        generation_mode: "image" if an image will be generated. LaVIT needs it where a message has
        images, and SEED-X then cuts them in the views of its edits.
        return_tensors: "pt" or "np".
        kwargs: `height` and `width` of the drawing, where they are part of the prompt (GLM-Image).
        """
        # 1. One conversation, or several.
        drawing = self._read_options({**kwargs, **(processor_kwargs or {})})
        is_single = isinstance(conversation[0], Mapping | Message)
        conversations: Any = [conversation] if is_single else conversation
        mode = (processor_kwargs or {}).get("generation_mode", generation_mode)

        # 2. Their prompts.
        prompts: list[Prompt] = []
        tasks: list[TaskKind] = []
        texts: list[str] = []
        for messages in conversations:
            # The text with which the answer begins.
            opening = ""
            if continue_final_message:
                *messages, last = messages
                answer = read_messages([{**last, "role": "user"}])[0]
                if not answer.is_text:
                    raise RequestError("Only a text of the assistant can be continued.")
                opening = answer.text.rstrip()  # a token begins with its blank
            is_tuned = self.system.config.tuned
            parsed = read_messages(messages, images_first=is_tuned, placeholders=not tokenize)
            task, request = self._read_chat(parsed, mode)
            tasks.append(task)
            (prompt,) = self.system.family.prompts([request], task, [0], drawing=drawing)
            prompts.append(prompt.answered_with(self.system.tokenizer.encode_parts([opening])))
            if not tokenize:
                texts.append(self._prompt_text(prompts[-1], request))

        # 3. In the form that is asked for.
        if not tokenize:
            return texts[0] if is_single else texts
        features = self._features(prompts, tasks, return_tensors)
        return features if return_dict else features["input_ids"]

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        *,
        generation_mode: str | None = None,
        add_special_tokens: bool = True,
        return_tensors: str | None = "pt",
        **kwargs: object,
    ) -> BatchFeature:
        """Texts that are continued, without a template; `<image>` in them marks their images.

        Names of control tokens are these tokens. Images of a text without `<image>` stand before
        it. images: one, a list for one text, or a list of lists.
        add_special_tokens: put `<s>` before a text without it.
        Systems that write no text read each text as a request. kwargs: see `apply_chat_template`.
        """
        drawing = self._read_options(kwargs)
        texts = [text or ""] if text is None or isinstance(text, str) else list(text)
        groups: Sequence[Any] = [[]] * len(texts)
        if images is not None:
            is_nested = isinstance(images, list) and images != [] and not is_single(images[0])
            groups = images if is_nested or len(texts) > 1 else [images]
        if len(groups) != len(texts):
            raise RequestError(f"{len(texts)} texts were given with {len(groups)} lists of images.")
        prompts: list[Prompt] = []
        tasks: list[TaskKind] = []
        for single_text, group in zip(texts, groups, strict=True):
            inputs = input_images(group)
            task, _ = self._read_chat([Message("raw", (single_text, *inputs))], generation_mode)
            tasks.append(task)
            if self.system.abilities.writes:
                prompts.append(self._continued(single_text, inputs, task, add_special_tokens))
                continue
            request = [Message("user", tuple(interleave(single_text, inputs)))]
            prompts += self.system.family.prompts([request], task, [0], drawing=drawing)
        return self._features(prompts, tasks, return_tensors)

    def _read_options(self, options: dict[str, object]) -> dict[str, object]:
        """The size of a drawing. Raises ConfigError: an option that would have no effect."""
        drawing: dict[str, object] = {}
        if not self.system.abilities.codes_are_rows:
            drawing = {name: options.pop(name) for name in SIZE if name in options}
        for name, value in options.items():
            if value and value not in ACCEPTED.get(name, ()):
                raise ConfigError(f"The processor does not follow the option {name}={value!r}.")
        return drawing

    def _read_chat(
        self, conversation: list[Message], mode: str | None
    ) -> tuple[TaskKind, list[Message]]:
        """The task of a conversation, and how the model reads it, as of the system's methods."""
        if mode not in MODES:
            raise ConfigError(f"generation_mode is {mode!r}; use 'text' or 'image'.")
        # Some systems can only draw from texts alone.
        is_text = all(message.is_text for message in conversation)
        is_drawing = mode == "image" or (is_text and not self.system.abilities.converses)
        task, request = self.system.family.read_chat(conversation, is_drawing)
        if is_drawing and task == "chat":
            task = "draw" if is_text else "edit"
        return task, request

    def _prompt_text(self, prompt: Prompt, conversation: Sequence[Message]) -> str:
        """The text of a prompt, with `<image>` in place of input images."""
        # 1. Text tokens, and image tokens up to the end of each image.
        vocabulary = self.system.tokenizer.vocabulary
        runs: list[list[int]] = []
        for previous, id in itertools.pairwise([vocabulary.eoi_id, *prompt.ids]):
            was_image = vocabulary.is_image_token(previous)
            if previous == vocabulary.eoi_id or was_image != vocabulary.is_image_token(id):
                runs.append([])
            runs[-1].append(id)

        # 2. The images of the conversation in order; those of earlier answers stay tokens.
        contents = [item for message in conversation for item in message.content]
        images = iter([item for item in contents if not isinstance(item, str)])
        texts: list[str] = []
        for run in runs:
            is_input = vocabulary.is_image_token(run[0]) and is_image(next(images, None))
            texts.append(PLACEHOLDER if is_input else self.tokenizer.decode(run))
        return "".join(texts)

    def _continued(
        self, text: str, images: Sequence[Any], task: TaskKind, add_special_tokens: bool
    ) -> Prompt:
        """The prompt of a text and its images, without a template."""
        # 1. The tokens and features of each image.
        requests = [[Message("raw", (image,))] for image in images]
        seeds = [0] * len(images)
        image_prompts = self.system.family.prompts(requests, task, seeds) if images else []

        # 2. Texts and images in order, each image without the start of its own prompt.
        tokenizer = self.system.tokenizer
        start = list(tokenizer.start_ids)
        parts = interleave(text, image_prompts)
        if tokenizer.strips_at_images:
            parts = without_space_at_images(parts)
        ids = list(start) if add_special_tokens else []
        prompt_images: list[PromptImage] = []
        for index, part in enumerate(parts):
            if isinstance(part, str):
                text_ids = tokenizer.encode(part)
                if index == 0 and text_ids[: len(ids)] == ids:
                    text_ids = text_ids[len(ids) :]
                ids += text_ids
                continue
            offset = len(ids) - len(start)
            for image in part.images:
                positions = [position + offset for position in image.positions]
                prompt_images.append(PromptImage(image.features, positions))
            ids += part.ids[len(start) :]
        source = image_prompts[-1].source if image_prompts else None
        return Prompt(ids, prompt_images, source=source)

    def _features(
        self, prompts: Sequence[Prompt], tasks: Sequence[TaskKind], return_tensors: str | None
    ) -> BatchFeature:
        """Prompts as tensors, padded at the left."""
        if return_tensors not in TENSORS:
            raise ConfigError(f"return_tensors is {return_tensors!r}; use 'pt' or 'np'.")
        rows = {"input_ids": [list(prompt.ids) for prompt in prompts]}
        features = BatchFeature(self.tokenizer.pad(rows, return_tensors=return_tensors or "pt"))
        # Features of images, and where they stand.
        if not self.system.abilities.reads_codes:
            features["prompts"] = list(prompts)
        # What the prompts were built for, if not for a conversation.
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

    def post_process_interleaved_output(
        self, generated_ids: Ids, seed: int = 0, **drawing: object
    ) -> list[list[dict[str, Any]]]:
        """The texts and images of each answer in order, as the content of an assistant's message:
        parts with the type "text", or "image" with its `image` and `codes`.

        transformers has no such method: its pipeline returns either a text or one image.

        drawing: settings of the de-tokenizer. Raises ConfigError: images are not made of codes
        (SEED-X); BrokenImage parts are left out.
        """
        if not self.system.abilities.draws_codes:
            raise ConfigError(
                f"{self.system.config.name} draws images from hidden states, which ids do not "
                "hold; use generation_mode='image', or `MultimodalSystem.chat`."
            )
        answers: list[list[dict[str, Any]]] = []
        for ids in generated_ids:
            content: list[dict[str, Any]] = []
            for part in self._read(ids).shown:
                if isinstance(part, str):
                    content.append({"type": "text", "text": part})
                elif isinstance(part, ImagePart):
                    image = self.system.images.draw([part.codes], seeds=[seed], **drawing)[0]
                    content.append({"type": "image", "image": image, "codes": part.codes})
            answers.append(content)
        return answers

    def _read(self, ids: Tensor | Sequence[int]) -> Any:
        """The answer of a row of generated ids, which `generate` has cut at its end."""
        return self.system.read_answer([*map(int, ids)], GenerationSettings())
