"""LaVIT: images with a variable number of tokens; generation in six ratios, of texts and images.

    describe, ask  image ─► token selector, token merger ─► rows ─► LLaMA ─► text
    draw, edit     texts and codes of images ─► LLaMA, guided ─► codes ─► decoder ─► U-Net ─► image

It is not trained for conversations: `chat` answers single messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.config import read_table
from seed_multimodal.errors import CheckpointError, RequestError
from seed_multimodal.images.io import ImageSource, code_row
from seed_multimodal.inference.prompt import Prompt
from seed_multimodal.language.answer import Answer, ImagePart
from seed_multimodal.language.messages import Message, user_message
from seed_multimodal.models.lavit.checkpoints import load_tokenizer_pair
from seed_multimodal.models.lavit.decoder import CodeDecoder
from seed_multimodal.models.lavit.diffusion import LavitDetokenizer, LavitSettings
from seed_multimodal.models.lavit.modeling import DynamicCodes, DynamicTokenizer
from seed_multimodal.models.lavit.processing import (
    ANSWER_ENDS,
    CAPTION_ENDS,
    HubLavitTokenizer,
    LavitTokenizer,
    LavitVocabulary,
    Lemmatizer,
    load_lavit_tokenizer,
    read_prompt,
)
from seed_multimodal.models.lavit.spec import LavitConfig
from seed_multimodal.pipelines.family import Family, load_language_model
from seed_multimodal.pipelines.images import CodeCodec, Encoded, Placement, Seed, seed_per_image
from seed_multimodal.pipelines.tasks import TaskKind
from seed_multimodal.pipelines.world import open_familiarity

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


MAX_BATCH = 16  # images in one pass of the vision encoder
DRAWING_TASKS = ("draw", "edit")

Encode = Callable[..., list[Any]]  # pixels, `mode` and `generator` → what it computes of each


# ---- images


class LavitImageCodec(CodeCodec):
    """Images ⇄ codes, 1 to 256 each; and images → rows for the language model.

    `seed` determines which patches are kept; None: torch's global generator gives one.

    code_tokenizer: computes codes.
    understanding_tokenizer: computes the language model's input; None: no image input.
    selection: "draw" patches by the seed, or those above the "threshold".
    selection_seed: seed of `network`.
    """

    drawing_settings = tuple(entry.name for entry in fields(LavitSettings))

    def __init__(
        self,
        code_tokenizer: DynamicTokenizer,
        understanding_tokenizer: DynamicTokenizer | None,
        placement: Placement,
        selection: Literal["draw", "threshold"] = "draw",
        selection_seed: int = 0,
    ) -> None:
        models = {"code_tokenizer": code_tokenizer}
        if understanding_tokenizer is not None:
            models["understanding_tokenizer"] = understanding_tokenizer
        super().__init__(
            nn.ModuleDict(models),
            placement,
            transform=code_tokenizer.transform,
            codebook_size=code_tokenizer.config.codebook_size,
            codes_per_image=code_tokenizer.n_patches,
            min_codes=1,
        )
        self.code_tokenizer = code_tokenizer
        self.understanding_tokenizer = understanding_tokenizer
        self.selection = selection
        self.selection_seed = selection_seed
        self.familiarity_decoder: CodeDecoder | None = None  # of `familiarity`, on the CPU

    @property
    def network(self) -> DynamicCodes:
        return DynamicCodes(self.code_tokenizer, self.selection, self.selection_seed)

    def encode(self, images: Sequence[ImageSource], *, seed: Seed = 0) -> list[Tensor]:
        """Codes `[n]` int64 of each image, on the CPU."""
        return [codes.cpu() for codes in self.encode_by(self.code_tokenizer.encode, images, seed)]

    def read(
        self, images: Sequence[ImageSource], *, seed: Seed = 0, features: bool = False
    ) -> list[Encoded]:
        """Codes, or rows `[n, D]` for the language model, with the images' distances.

        Raises:
            CheckpointError: no weights of the second stage.
        """
        if not features:
            return self.encode_by(self._read_codes, images, seed)
        if self.understanding_tokenizer is None:
            raise CheckpointError(
                "This system has no weights for image input (token merger and projector of the "
                "second stage), so it cannot describe images or answer."
            )
        return self.encode_by(self._read_features, images, seed)

    def features(self, images: Sequence[ImageSource], *, seed: Seed = 0) -> list[Tensor]:
        """Rows `[n, D]` of each image for the language model; raises as `read`."""
        return [image.value for image in self.read(images, seed=seed, features=True)]

    def _read_codes(self, pixels: Tensor, **selection: Any) -> list[Encoded]:
        codes = self.code_tokenizer.encode(pixels, **selection)
        return self.measured(codes, pixels, lambda: self.embed(codes))

    def _read_features(self, pixels: Tensor, **selection: Any) -> list[Encoded]:
        # Both tokenizers share the vision encoder and the selector.
        assert self.understanding_tokenizer is not None
        tokenizer = self.code_tokenizer
        patches = tokenizer.patch_features(pixels)
        keep = tokenizer.select(patches, **selection).keep_BN
        features = self.understanding_tokenizer.project(patches, keep)
        return self.measured(features, pixels, lambda: self.embed(tokenizer.codes(patches, keep)))

    def embed(self, codes: Sequence[Tensor]) -> Tensor:
        assert self.familiarity_decoder is not None
        rows = [self.code_tokenizer.embed_codes(row).cpu().float() for row in codes]
        return self.familiarity_decoder.features(rows)

    def encode_by(self, encode: Encode, images: Sequence[ImageSource], seed: Seed) -> list[Any]:
        """Results of `encode(pixels, mode=…, generator=…)`, batched with those of other threads."""
        # Without a seed torch's global generator gives one, as it draws in the original.
        per_image = seed if isinstance(seed, Sequence) else [seed] * len(images)
        global_seeds = (int(torch.randint(2**62, (), device="cpu")) for _ in images)
        seeds = [next(global_seeds) if row is None else row for row in per_image]
        seeds = seed_per_image(seeds, len(images))
        pixels = [self.transform(self.open(image)) for image in images]
        return self._encode_batcher(encode, [*zip(pixels, seeds, strict=True)])

    @torch.inference_mode()
    def encode_batch(self, key: Encode, rows: Sequence[tuple[Tensor, int]]) -> list[Any]:
        """Pixels and seed of each image → what the key computes."""
        results: list[Any] = []
        with self.encoding():
            for start in range(0, len(rows), MAX_BATCH):
                pixels, seeds = zip(*rows[start : start + MAX_BATCH], strict=True)
                generators = [torch.Generator().manual_seed(seed) for seed in seeds]
                batch = torch.stack(pixels).to(self.device)
                results += key(batch, mode=self.selection, generator=generators)
        return results

    def decoder_inputs(self, codes: Sequence[Tensor]) -> list[Tensor]:
        rows = [image_codes[image_codes >= 0].to(self.device) for image_codes in codes]
        return [self.code_tokenizer.embed_codes(row) for row in rows]

    @torch.inference_mode()
    def draw_batch(
        self, key: Mapping[str, object], rows: Sequence[tuple[Tensor, int]]
    ) -> list[Image.Image]:
        """Codes and seed of each image → images; the key holds the settings."""
        codes, seeds = zip(*rows, strict=True)
        with self.encoding():
            embedded = self.decoder_inputs(codes)
        return self.decoder(embedded, seeds=seeds, **key)


# ---- the system


class LavitFamily(Family):
    """What differs in LaVIT: single messages, answered about images' features or by an image.

    `chat` answers one message: with a caption of its image, an answer to the question about it, or
    (`images="forced"`) an image of the message's content.

    Settings of drawing: `ratio` (one of six, "3:2") or `height` and `width`, `num_inference_steps`,
    `guidance_scale` (of the U-Net), `preset` ("fast" or "original"); `guidance` and
    `negative_prompt` steer the language model.
    """

    tokenizer: LavitTokenizer | HubLavitTokenizer
    defaults = read_table(__file__)

    # Of short answers; None: spaCy's, loaded with the first answer.
    lemmatizer: Callable[[str], str] | None = None

    @classmethod
    def check_decoder(cls, config: LavitConfig) -> None:
        LavitDetokenizer.check_folder(config.pixels)

    @classmethod
    def load(cls, config: LavitConfig, placement: Placement) -> Self:
        tokenizer = load_lavit_tokenizer(config.words or config.path("llm"))
        images = load_images(config, placement)  # before the language model, which takes longest
        decoder = config.pixels
        images.familiarity = open_familiarity(config.known_images, decoder, decoder)
        if images.familiarity.measures:
            folder = config.path("decoder")
            images.familiarity_decoder = CodeDecoder.from_pretrained(folder, head=config.head)
        llm = load_language_model(config, tokenizer, placement)
        assert llm is not None  # its embeddings at least
        check_sizes(config, images, tokenizer.vocabulary, llm.config)
        return cls(config, tokenizer, llm, images)

    # ---- answers

    def settings(self, task: str) -> dict[str, Any]:
        settings = dict(self.config.generation.get("compose" if task == "edit" else task, {}))
        settings["stop"] = {"describe": CAPTION_ENDS, "ask": ANSWER_ENDS}.get(task, ())
        if task == "ask":
            settings["stop_after"] = self.tasks.answer_after
        if task in DRAWING_TASKS:
            vocabulary = self.tokenizer.vocabulary
            settings["stop_token_ids"] = (vocabulary.eoi_id,)
            # The images of a small model may have fewer codes than the original's minimum.
            if {**self.defaults[task], **settings}["min_new_tokens"] > vocabulary.tokens_per_image:
                settings["min_new_tokens"] = 1
        return settings

    def text(self, answer: Answer, task: TaskKind) -> str:
        if task != "ask":
            return answer.text
        self.lemmatizer = self.lemmatizer or Lemmatizer()
        return self.lemmatizer(answer.text)

    def read_chat(self, conversation: list[Message], draws: bool) -> tuple[TaskKind, list[Message]]:
        if len(conversation) > 1:
            raise RequestError(
                "LaVIT answers single messages, it was not trained to converse: start over "
                "(/reset) and send one message."
            )
        message = conversation[0]
        request = user_message(message.content)  # with its check for content
        # Drawings of texts alone and of other content have their own guidance.
        if draws:
            return "draw" if message.is_text else "edit", request
        if any(code_row(item) or isinstance(item, ImagePart) for item in message.content):
            raise RequestError(
                "LaVIT reads images to answer; codes can only be part of what is drawn."
            )
        if not message.text.strip():
            return "describe", request
        # A question follows its images, in the template.
        return "ask", user_message([*message.images, self.tasks.question(message.text)])

    def negative_ids(self, text: str) -> list[int]:
        return [*self.tokenizer.text_ids(text), self.tokenizer.vocabulary.boi_id]

    # ---- prompts

    def encode(
        self, images: Sequence[ImageSource], task: TaskKind, seeds: Sequence[int | None]
    ) -> list[Encoded]:
        if task in DRAWING_TASKS:
            return super().encode(images, task, seeds)
        return self.images.read(images, seed=seeds, features=True)

    def prompt(
        self, conversation: Sequence[Message], task: TaskKind, encoded: Iterator[Any]
    ) -> Prompt:
        vocabulary = self.tokenizer.vocabulary
        message = conversation[-1]

        # 1. Prompts for a text hold features.
        if task not in DRAWING_TASKS:
            if not message.images:
                raise RequestError(
                    "LaVIT answers about images: show one with the message, or ask for an image as "
                    'the answer (force_image, /draw, or "Answer with an image" on the page).'
                )
            features = [next(encoded) for _ in message.images]
            return read_prompt(vocabulary, features, self.tokenizer.text_ids(message.text.strip()))

        # 2. Prompts for an image hold codes.
        ids: list[int] = []
        for part in self._parts(message, encoded):
            if isinstance(part, str):
                ids += self.tokenizer.text_ids(part.strip())
            else:
                ids += vocabulary.code_to_id(part)
        return Prompt(ids)


# ---- loading


def check_sizes(
    config: LavitConfig,
    images: LavitImageCodec,
    vocabulary: LavitVocabulary,
    llm_config: PreTrainedConfig,
) -> None:
    """Raise CheckpointError if image tokenizer and language model have different sizes."""
    # Embeddings of the language model behind those of the vocabulary are padding.
    n_words = min(vocabulary.size, llm_config.vocab_size)
    pairs = {
        "codes": (images.codebook_size, vocabulary.n_codes),
        "patches": (images.codes_per_image, vocabulary.tokens_per_image),
        "words": (vocabulary.size, n_words),
    }
    understanding = images.understanding_tokenizer
    if understanding is not None and understanding.vit_proj is not None:
        pairs["rows of width"] = (understanding.vit_proj.out_features, llm_config.hidden_size)
    for name, (size, llm_size) in pairs.items():
        if size != llm_size:
            raise CheckpointError(
                f"{config.tokenizer} and {config.llm} do not belong together: {size} {name} "
                f"and {llm_size}."
            )


def load_images(config: LavitConfig, placement: Placement) -> LavitImageCodec:
    """The tokenizers of a system now, its decoders when they are first needed."""
    code_tokenizer, understanding_tokenizer = load_tokenizer_pair(
        config.path("tokenizer"),
        config.llm,
        device=placement.load_device("encoder"),
        dtype=placement.images.dtype,
    )
    codec = LavitImageCodec(code_tokenizer, understanding_tokenizer, placement, config.selection)
    if placement.load_decoder:
        codec.load_decoder = partial(_load_decoder, config, placement)
    return codec


def _load_decoder(config: LavitConfig, placement: Placement) -> LavitDetokenizer:
    config.require("decoder", "pixels")
    dtype = placement.drawing.dtype
    decoder = CodeDecoder.from_pretrained(config.path("decoder"), head=config.head, dtype=dtype)
    return LavitDetokenizer.from_pretrained(
        config.path("pixels"), decoder, dtype=dtype, safety=config.safety
    )
