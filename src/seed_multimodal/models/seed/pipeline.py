"""SEED-LLaMA: a language model over text tokens and images of 32 codes.

images ─► Seed2Tokenizer ─► codes ─► prompt ids ─► LLaMA ─► answer ids
answer ids ─► texts and codes ─► Seed2Tokenizer ─► embeddings ─► unCLIP ─► images
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.errors import CodesError, ConfigError
from seed_multimodal.images.io import code_row
from seed_multimodal.images.transforms import ImageTransform, get_transform, seed_image_processor
from seed_multimodal.inference.batching import ResultCache, weights_state
from seed_multimodal.language.hub_tokenizer import load_text_tokenizer
from seed_multimodal.language.messages import Codes
from seed_multimodal.models.seed.checkpoints import SEED1
from seed_multimodal.models.seed.configuration import Seed2Config
from seed_multimodal.models.seed.diffusion import (
    UnclipDetokenizer,
    UnclipSettings,
    detokenizer_class,
)
from seed_multimodal.models.seed.modeling import Seed1Tokenizer, Seed2Tokenizer, SeedTokenizer
from seed_multimodal.models.seed.spec import BICUBIC, BILINEAR, DETOKENIZER_FOLDER, SeedLlamaConfig
from seed_multimodal.pipelines.family import Family
from seed_multimodal.pipelines.images import CodeCodec, Encoded, Placement
from seed_multimodal.pipelines.world import open_familiarity
from seed_multimodal.settings import check_value

CACHED_IMAGES = 1024  # images in the cache of codes, about 0.5 KB each


class SeedImageCodec(CodeCodec):
    """Images ⇄ 32 codes each."""

    model: SeedTokenizer

    fp16 = True  # as the original
    decoder_folder: Path | None = None
    codec_settings = ("codes", "negative_codes")
    drawing_settings = (*(entry.name for entry in fields(UnclipSettings)), *codec_settings)

    def __init__(
        self, model: SeedTokenizer, transform: ImageTransform, placement: Placement
    ) -> None:
        super().__init__(
            model,
            placement,
            transform=transform,
            codebook_size=model.config.codebook_size,
            codes_per_image=model.config.num_query,
        )
        self._cache: ResultCache[Encoded] = ResultCache(CACHED_IMAGES)

    @property
    def section(self) -> int:
        """Codes of one section of the codebook."""
        return self.codebook_size // self.model.config.codebook_sections

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S] → codes [B, 32] int64 on the CPU."""
        encoded = self._encode_batcher(None, list(pixels.float()))
        return torch.stack([image.value for image in encoded])

    def encode_batch(self, key: object, rows: Sequence[Tensor]) -> Sequence[Encoded]:
        """Pixels [3, S, S] of each image → its codes, with a cache by content."""
        encode = partial(super().encode_batch, key)
        state = (self._n_forgotten, self.familiarity, weights_state(self.model))
        return self._cache.of(rows, encode, state)

    def embed(self, codes: Sequence[Tensor]) -> Tensor:
        return self.model.decode(torch.stack([*codes]).to(self.device))

    def check_codes(
        self, codes: Iterable[Codes], min_lengths: Sequence[int] | None = None
    ) -> Tensor:
        """Codes of images → [B, 32] int64, shorter rows padded with -1."""
        padded: list[Tensor] = []
        for row in super().check_codes(codes, min_lengths):
            n_missing = self.codes_per_image - len(row)
            padded.append(nn.functional.pad(row, (0, n_missing), value=-1))
        return torch.stack(padded)

    def draw(
        self,
        image_codes: Sequence[Codes],
        *,
        seeds: Sequence[int],
        codes: int | Sequence[int] | None = None,
        negative_codes: Codes | Sequence[Codes] | None = None,
        **settings: object,
    ) -> list[Image.Image]:
        """Codes → images.

        codes: use only so many of the codes, one number for all images or one each; None: all.
        negative_codes: negative condition for guidance, one for all images or one each.
        settings: as of `ImageCodec` (of the de-tokenizer: see `detokenizer_class`).

        Raises:
            CodesError: codes outside the codebook.
        """
        n_images = len(image_codes)
        if n_images == 0:
            return []

        # 1. The number of codes of each image.
        n_codes = self.codes_per_image
        if codes is None or isinstance(codes, int):
            codes = [n_codes if codes is None else codes] * n_images
        if len(codes) != n_images:
            raise CodesError(f"{n_images} images were given with {len(codes)} numbers of codes.")
        lengths = [
            check_value(int, length, "codes", minimum=1, maximum=n_codes) for length in codes
        ]

        # 2. Codes, and the negative ones; all images of a batch have them, or none.
        rows = self.check_codes(image_codes, lengths)
        is_left_out = rows.new_tensor(range(n_codes)) >= rows.new_tensor(lengths)[:, None]
        rows = rows.masked_fill(is_left_out, -1)
        negatives: Sequence[Tensor | None] | Tensor = [None] * n_images
        if negative_codes is not None:
            negative_rows = [negative_codes] if code_row(negative_codes) else negative_codes
            negatives = self.check_codes(negative_rows).expand(n_images, -1)
        settings["has_negatives"] = negative_codes is not None
        return self.draw_batched(settings, rows, negatives, seeds)

    def decoder_inputs(self, codes: Sequence[Tensor]) -> Tensor:
        rows = torch.stack([*codes]).to(self.device)
        if self.decoder.reads == "ids":
            return rows
        decode = self.model.decode_tokens if self.decoder.reads == "codes" else self.model.decode
        return decode(rows)

    @torch.inference_mode()
    def draw_batch(
        self, key: Mapping[str, object], rows: Sequence[tuple[Tensor, Tensor | None, int]]
    ) -> list[Image.Image]:
        """Codes, negative codes and seed of each image → images.

        key: settings of the de-tokenizer.
        """
        # 1. What the de-tokenizer reads; all rows have negative codes, or none.
        settings = dict(key)
        has_negatives = settings.pop("has_negatives")
        codes, negatives, seeds = zip(*rows, strict=True)
        negative_embeds = None
        with self.encoding():
            embeds = self.decoder_inputs(codes)
            if has_negatives:
                negative_embeds = self.decoder_inputs(negatives)

        # 2. Images.
        return self.decoder(embeds, negative_embeds=negative_embeds, seeds=seeds, **settings)


class SeedLlamaFamily(Family):
    """What differs in SEED-LLaMA: how its parts are loaded.

    Settings of drawing:

    num_inference_steps, guidance_scale, height, width: of `DrawingSettings`.
    noise_level: of `UnclipSettings`.
    preset: "fast" or "original".
    codes: draw from the first so many codes.
    negative_codes: negative condition for guidance.
    """

    @classmethod
    def check_decoder(cls, config: SeedLlamaConfig) -> None:
        if config.detokenizer is not None:
            detokenizer_class(config.detokenizer).check_folder(config.detokenizer)

    @classmethod
    def load(cls, config: SeedLlamaConfig, placement: Placement) -> Self:
        tokenizer = load_text_tokenizer(config.path("tokenizer"))
        images = load_images(config, placement)
        decoder = config.detokenizer
        images.familiarity = open_familiarity(config.known_images, decoder, decoder)
        return cls.of_parts(config, tokenizer, images, placement)


def image_transform(model: SeedTokenizer, config: SeedLlamaConfig) -> ImageTransform:
    """The transform of `system.json`, with the vision encoder's mean and deviation.

    Its defaults are the original encoder's; another encoder then uses its own transform.
    """
    preprocessing = model.visual_encoder.preprocessing
    size = preprocessing.image_size
    is_original = preprocessing == seed_image_processor(size)
    if not is_original and config.transform in (BILINEAR, BICUBIC):
        return preprocessing
    transform = get_transform(**{"image_size": size, **config.transform})
    return preprocessing.with_resizing_of(transform)


def load_images(config: SeedLlamaConfig, placement: Placement) -> SeedImageCodec:
    """The image tokenizer of a system, or of a folder that has no language model.

    Images are resized as the tokenizer was trained, by default to its own size.

    Raises:
        CheckpointError: weights that are missing or damaged.
        ConfigError: weights of another image size.
    """
    # 1. The network.
    folder = config.path("tokenizer")
    is_seed1 = SEED1.saved_config(folder) is not None
    tokenizer_class = Seed1Tokenizer if is_seed1 else Seed2Tokenizer
    model = tokenizer_class.from_pretrained(
        folder,
        vision=config.vision,
        dtype=placement.images.dtype,
        device=placement.load_device("encoder"),
    )
    size = model.visual_encoder.image_size
    if config.image_size not in (None, size):
        raise ConfigError(
            f"{config.name}: image_size is {config.image_size}, but the image tokenizer reads "
            f"{size} pixels."
        )

    # 2. The de-tokenizer, loaded on first use; SEED-1's images are drawn by `original.Seed1`.
    decoder_folder = config.detokenizer if placement.load_decoder and not is_seed1 else None
    advice = "put a stable-unCLIP folder that draws its embeddings"
    sizes = model.config
    if isinstance(sizes, Seed2Config) and sizes.alignment_target == "encoder":
        advice = "train a decoder of its embeddings (docs/how-to/train-a-tokenizer.md), put it"
        if decoder_folder is not None and detokenizer_class(decoder_folder) is UnclipDetokenizer:
            decoder_folder = None  # unCLIP reads a CLIP's embeddings

    # 3. The codec.
    codec = SeedImageCodec(model, image_transform(model, config), placement)
    if decoder_folder is not None:
        codec.load_decoder = partial(
            detokenizer_class(decoder_folder).from_pretrained,
            decoder_folder,
            dtype=placement.drawing.dtype,
        )
    codec.decoder_folder = decoder_folder
    codec.name = str(folder)
    codec.advice = f": {advice} at {folder}/{DETOKENIZER_FOLDER}"
    return codec
