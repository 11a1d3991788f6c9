"""`CodeSystem`: systems that read and write images as codes, between texts of a template.

images ─► codes ─► prompt ids ─► language model ─► answer ids ─► texts and codes ─► images
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.errors import CodesError
from seed_multimodal.images.io import MIN_OVERSAMPLING, ImageSource, is_image
from seed_multimodal.images.transforms import ImageTransform
from seed_multimodal.inference.base_engine import BaseEngine
from seed_multimodal.inference.generator import Task
from seed_multimodal.inference.opening import TORCH, EngineOptions, outside_engine
from seed_multimodal.inference.prompt import Prompt
from seed_multimodal.language.answer import ImagePart
from seed_multimodal.language.llm import check_vocab_size
from seed_multimodal.language.lora import load_llm_or_adapter
from seed_multimodal.language.messages import Codes, Message
from seed_multimodal.language.prompts import PromptTemplate, Turn, get_template, merge_text
from seed_multimodal.language.text_tokenizer import Part, TextTokenizer
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_multimodal.pipelines.config import CodeSystemConfig
from seed_multimodal.pipelines.images import ImageCodec, Log, Placement

if TYPE_CHECKING:
    from seed_multimodal.language.llm import LanguageModel


class CodeCodec(ImageCodec):
    """An `ImageCodec` whose `encode` returns the codes `[n]` int64 of each image.

    A family defines `draw_batch`, and the network `model` with this method:

    model.encode(pixels): normalised pixels `[B, 3, S, S]` → codes `[B, n]` int64, the rows of
        images with fewer codes padded with -1.

    transform: an image → its pixels `[3, S, S]`.
    codebook_size: codes are below it.
    codes_per_image, min_codes: the largest and the least number of codes of an image; by default
        equal.
    """

    fp16: bool = False  # whether codes of data sets are computed in float16 on CUDA

    def __init__(
        self,
        model: nn.Module,
        placement: Placement,
        *,
        transform: ImageTransform,
        codebook_size: int,
        codes_per_image: int,
        min_codes: int | None = None,
    ) -> None:
        super().__init__(model, placement, min_side=MIN_OVERSAMPLING * transform.image_size)
        self.transform = transform
        self.codebook_size = codebook_size
        self.codes_per_image = codes_per_image
        self.min_codes = codes_per_image if min_codes is None else min_codes

    @property
    def network(self) -> nn.Module:
        """The module with `encode`, for the images of whole data sets; it moves with `model`."""
        return self.model

    def encode(self, images: Sequence[ImageSource]) -> Sequence[Tensor]:
        """Images → their codes, on the CPU."""
        pixels = [self.transform(self.open(image)) for image in images]
        codes: list[Tensor] = self._encode_batcher(None, pixels)
        return codes

    @torch.inference_mode()
    def encode_batch(self, key: object, rows: Sequence[Tensor]) -> Sequence[object]:
        """Pixels `[3, S, S]` of each image → its codes."""
        with self.encoding():
            codes = self.network.encode(torch.stack([*rows]).to(self.device)).cpu()
        return [row[row >= 0] for row in codes]

    def check_codes(
        self, codes: Iterable[Codes], min_lengths: Sequence[int] | None = None
    ) -> Sequence[Tensor]:
        """Codes of images → `[n]` int64 each.

        min_lengths: the least number of codes of each image; None: `min_codes`.

        Raises:
            CodesError: too few or too many codes, or one outside the codebook.
        """
        most = self.codes_per_image
        rows: list[Tensor] = []
        for index, image_codes in enumerate(codes):
            row = torch.as_tensor(image_codes)
            # 1. A row of integers, of a sufficient length.
            is_row = row.ndim == 1 and not row.is_floating_point()
            least = self.min_codes if min_lengths is None else min_lengths[index]
            if not is_row or not least <= len(row) <= most:
                allowed = str(most) if least == most else f"{least} to {most}"
                raise CodesError(
                    f"Image {index} must be a row of {allowed} codes, got {list(row.shape)}."
                )
            # 2. All in the codebook.
            if not 0 <= int(row.min()) <= int(row.max()) < self.codebook_size:
                last = self.codebook_size - 1
                raise CodesError(f"Image {index} holds a code outside 0 to {last}.")
            rows.append(row.long())
        return rows

    def draw(
        self,
        image_codes: Sequence[Codes],
        *,
        seeds: Sequence[int],
        batch_size: int = 4,
        **settings: Any,
    ) -> list[Image.Image]:
        """Codes → images. settings: `drawing_settings`."""
        self.check_drawing(**settings)
        return self.draw_batched(settings, batch_size, self.check_codes(image_codes), seeds)


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
