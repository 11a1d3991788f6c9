"""SEED-LLaMA: a language model over text tokens and images of 32 codes.

images ─► Seed2Tokenizer ─► codes ─► prompt ids ─► LLaMA ─► answer ids ─► texts and codes ─► unCLIP ─► images
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.errors import CheckpointError, CodesError, ConfigError
from seed_multimodal.images.io import MIN_OVERSAMPLING
from seed_multimodal.images.transforms import get_transform
from seed_multimodal.inference.base_engine import BaseEngine
from seed_multimodal.inference.batching import ResultCache
from seed_multimodal.inference.generator import Task
from seed_multimodal.inference.opening import (
    COMPLETION_SERVER,
    TORCH,
    EngineOptions,
    outside_engine,
)
from seed_multimodal.inference.prompt import Prompt
from seed_multimodal.language.answer import ImagePart
from seed_multimodal.language.lora import load_language_model
from seed_multimodal.language.messages import Message, is_codes, is_image
from seed_multimodal.language.prompts import get_template, merge_text
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.seed.checkpoints import saved_config
from seed_multimodal.seed.diffusion import UnclipDetokenizer, UnclipSettings
from seed_multimodal.seed.modeling import Seed1Tokenizer, Seed2Tokenizer, SeedTokenizer
from seed_multimodal.settings import check_value
from seed_multimodal.system.base import MultimodalSystem
from seed_multimodal.system.config import DETOKENIZER_FOLDER, SystemConfig
from seed_multimodal.system.images import ImageCodec, Log, Placement

REMEMBERED = 1024  # images in the cache of codes, about 0.5 KB each


class SeedImageCodec(ImageCodec):
    """Images ⇄ 32 codes each.

    Args:
        transform: PIL image → float32 [3, S, S]. options: of `ImageCodec`.
    """

    progressive = True
    decoder_folder: Path | None = None
    codec_settings = ("codes", "negative_codes")
    drawing_settings = (*(entry.name for entry in fields(UnclipSettings)), *codec_settings)

    def __init__(
        self, model: SeedTokenizer, transform: Callable[[Image.Image], Tensor], **options: Any
    ) -> None:
        super().__init__(model, min_side=MIN_OVERSAMPLING * model.config.vit.image_size, **options)
        self.transform = transform
        self._known = ResultCache(REMEMBERED)

    @property
    def section(self) -> int:
        """Codes of one section of the codebook."""
        return int(self.model.config.codebook_size // self.model.config.codebook_sections)

    def pixels(self, images: Sequence[Any]) -> Tensor:
        """Normalised pixels [B, 3, S, S]."""
        return torch.stack([self.transform(self.open(image)) for image in images])

    def encode(self, images: Sequence[Any]) -> Tensor:
        """Images → codes [B, 32] int64 on the CPU, with a cache by content."""
        if not len(images):
            return torch.empty(0, self.model.config.num_query, dtype=torch.long)
        return self.encode_pixels(self.pixels(images))

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S] → codes [B, 32] int64 on the CPU."""
        return torch.tensor(self._encoded(None, list(pixels.float())), dtype=torch.long)

    def encode_batch(self, key: Any, rows: Sequence[Tensor]) -> list[list[int]]:
        def encode(new: list[Tensor]) -> list[list[int]]:
            with self.encoding():
                codes: list[list[int]] = self.model.encode(
                    torch.stack(new).to(self.device)
                ).tolist()
            return codes

        return self._known.of(rows, encode)

    def check_codes(self, codes: Any, length: int | None = None) -> Tensor:
        """Codes of images → [B, n] int64; `length`: the first ones are enough.

        Raises:
            CodesError: another number of codes, or one outside the codebook.
        """
        whole, size = self.model.config.num_query, self.model.config.codebook_size
        rows = [torch.as_tensor(row) for row in codes]
        for number, row in enumerate(rows):
            if (
                row.ndim != 1
                or row.is_floating_point()
                or not (length or whole) <= len(row) <= whole
            ):
                raise CodesError(
                    f"Image {number} must be a row of {whole} codes, got {list(row.shape)}."
                )
            if not 0 <= int(row.min()) <= int(row.max()) < size:
                raise CodesError(f"Image {number} holds a code outside 0 to {size - 1}.")
        return torch.stack([nn.functional.pad(row.long(), (0, whole - len(row))) for row in rows])

    def draw(
        self,
        values: Sequence[Any],
        *,
        seeds: Sequence[int],
        batch_size: int = 8,
        codes: int | Sequence[int] | None = None,
        negative_codes: Any = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Codes → images.

        Args:
            codes: use only this many of the codes: one number for all images, or one each.
            negative_codes: negative condition for guidance, one for all or one each. settings: of `UnclipDetokenizer`.

        Raises:
            CodesError: codes outside the codebook.
        """
        if not len(values):
            return []
        count, whole = len(values), self.model.config.num_query
        codes = whole if codes is None else codes
        each = [codes] * count if isinstance(codes, int) else list(codes)
        if len(each) != count:
            raise CodesError(f"{count} images were given with {len(each)} numbers of codes.")
        lengths = torch.tensor(
            [check_value(int, one, "codes", minimum=1, maximum=whole) for one in each]
        )
        rows, away = self.check_codes(values, int(lengths.min())), [None] * count
        if negative_codes is not None:
            negatives = self.check_codes(
                [negative_codes] if is_codes(negative_codes) else negative_codes
            )
            away = negatives.expand(count, -1)
        return self.draw_batched(
            {**settings, "steered": negative_codes is not None},
            batch_size,
            rows,
            lengths,
            away,
            seeds,
        )

    @torch.inference_mode()
    def draw_batch(self, key: Any, rows: Sequence[Any]) -> list[Image.Image]:
        codes, lengths, away, seeds = zip(*rows, strict=True)
        settings, negative = dict(key), None
        with self.encoding():
            embeds = self.model.decode(torch.stack(codes).to(self.device), torch.stack(lengths))
            if settings.pop("steered"):
                negative = self.model.decode(torch.stack(away).to(self.device))
        images: list[Image.Image] = self.decoder(
            embeds, negative_embeds=negative, seeds=seeds, **settings
        )
        return images


class SeedLlama(MultimodalSystem):
    """SEED-LLaMA; settings of drawing: `num_inference_steps`, `guidance_scale`, `noise_level`, `preset` ("fast" or
    "original"), `height`, `width`, `codes` (draw from the first so many), `negative_codes`."""

    images: SeedImageCodec

    def __init__(
        self,
        config: SystemConfig,
        tokenizer: MultimodalTokenizer,
        llm: Any,
        images: SeedImageCodec,
        log: Log = None,
        **options: Any,
    ) -> None:
        self.template = get_template(config.template)
        super().__init__(config, tokenizer, llm, images, log, **options)
        if llm is not None and llm.config.vocab_size != tokenizer.vocabulary.size:
            raise CheckpointError(
                f"{config.name}: the language model has {llm.config.vocab_size} words, but the "
                f"tokenizer has {tokenizer.vocabulary.size}; they do not belong together."
            )

    @classmethod
    def check_decoder(cls, config: SystemConfig) -> None:
        check_unclip(config.detokenizer)

    @classmethod
    def load(cls, config: SystemConfig, placement: Placement, log: Log = None) -> Self:
        options = placement.engine
        needs_llm = options.name != COMPLETION_SERVER
        parts: Any = config.require("tokenizer", *(("llm",) if needs_llm else ()))
        words = MultimodalTokenizer.from_pretrained(parts.tokenizer)
        images = load_images(config, placement)  # before the language model, which takes longest
        llm = None
        engine: BaseEngine | EngineOptions = options
        if options.name == TORCH:
            llm = load_language_model(
                parts.llm,
                device=placement.llm_load_device,
                dtype=placement.llm.dtype,
                quantization=placement.quantization,
                vocabulary=words.vocabulary,
            )
        else:
            engine = outside_engine(options, words, parts.llm)
        sizes = images.model.config
        if (sizes.codebook_size, sizes.num_query) != (
            words.vocabulary.n_codes,
            words.vocabulary.tokens_per_image,
        ):
            raise ConfigError(
                f"{config.tokenizer}: the image tokenizer has {sizes.codebook_size} codes, "
                f"{sizes.num_query} to an image, but the vocabulary has {words.vocabulary.n_codes} and "
                f"{words.vocabulary.tokens_per_image}."
            )
        return cls(config, words, llm, images, log, engine=engine)

    def stop_sequences(self, task: str) -> tuple[str, ...]:
        return self.template.stop_sequences

    def prompt_ids(self, turns: Sequence[Any], system: str = "") -> list[int]:
        """`<s>` and a conversation (turns of texts and codes) up to where the answer begins."""
        return self.tokenizer.encode_parts(self.template.render(turns, system), add_bos=True)

    def build_prompts(
        self,
        conversations: Sequence[Sequence[Message]],
        task: Task,
        opening: str = "",
        seeds: Sequence[int | None] | None = None,
    ) -> list[Prompt]:
        images = [
            image
            for conversation in conversations
            for message in conversation
            for image in message.images
        ]
        codes = iter(self.images.encode(images).tolist())
        end = self.tokenizer.encode_parts([opening]) if opening else []
        requests = []
        for conversation in conversations:
            if conversation[0].role == "raw":
                spans = merge_text([self._span(item, codes) for item in conversation[0].content])
                ids = self.tokenizer.encode_parts(spans, add_bos=True)
                requests.append(Prompt([*ids, *end], answered=end))
                continue
            system = "\n".join(message.text for message in conversation if message.role == "system")
            turns = [
                (message.role, [self._span(item, codes) for item in message.content])
                for message in conversation
                if message.role != "system"
            ]
            requests.append(Prompt([*self.prompt_ids(turns, system), *end], answered=end))
        return requests

    def _span(self, item: Any, codes: Any) -> Any:
        if isinstance(item, str):
            return item
        if isinstance(item, ImagePart):
            return list(item.codes)
        return next(codes) if is_image(item) else self.images.check_codes([item])[0].tolist()


def check_unclip(folder: Path | None) -> None:
    """Raise CheckpointError if a stable-unCLIP folder is there, but lacks a file."""
    if folder is not None and folder.is_dir():
        UnclipDetokenizer.check_parts(folder, *UnclipDetokenizer.folders)


def load_images(config: SystemConfig, placement: Placement) -> SeedImageCodec:
    """The image tokenizer of a system, or one alone, with the resizing that it was trained on (to its own size, if none
    is given).

    Raises:
        CheckpointError: weights that are missing or damaged. ConfigError: of another image size.
    """
    config.require("tokenizer")
    assert config.tokenizer is not None
    is_seed1 = (
        saved_config(Seed1Tokenizer, config.tokenizer) is not None
    )  # its images are drawn by `original.Seed1`
    model = (Seed1Tokenizer if is_seed1 else Seed2Tokenizer).from_pretrained(
        config.tokenizer,
        vision=config.vision,
        dtype=placement.images.dtype,
        device="cpu" if "encoder" in placement.offload else placement.images.device,
    )
    size = model.config.vit.image_size
    if config.image_size not in (None, size):
        raise ConfigError(
            f"{config.name}: image_size is {config.image_size}, but the image tokenizer reads {size} "
            f"pixels."
        )
    load = None
    if config.detokenizer is not None and placement.load_decoder and not is_seed1:
        load = partial(
            UnclipDetokenizer.from_pretrained, config.detokenizer, dtype=placement.drawing.dtype
        )
    codec = SeedImageCodec(
        model,
        get_transform(**{"image_size": size, **config.transform}),
        load_decoder=load,
        device=placement.images.device,
        drawing_device=placement.drawing.device,
        offload=placement.offload,
    )
    codec.decoder_folder = config.detokenizer if load is not None else None
    codec.name, codec.advice = (
        str(config.tokenizer),
        (
            f": put a stable-unCLIP folder that draws its embeddings at {config.tokenizer}/{DETOKENIZER_FOLDER}"
        ),
    )
    return codec
