"""The picture half of a system with codes: pictures to codes and codes to pictures.

Every picture gets its own random generator from the same seed, so a drawing depends on its codes and the seed, never on
the rest of the batch. Parts that are seldom used can be kept on the CPU (`offload_*`, as the released demo does on 16
GB cards).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.errors import CodesError, ConfigError, ImageError, first_line
from seed_multimodal.finite import damaged_tensor, not_numbers
from seed_multimodal.images.io import DETAIL, is_file
from seed_multimodal.seed.modeling import Seed2Tokenizer
from seed_multimodal.settings import check_value
from seed_multimodal.system.domain import load_domain
from seed_multimodal.systems.picture_half import Picture, PictureHalf, one_seed_each

if TYPE_CHECKING:
    from seed_multimodal.language.vocabulary import ImageVocabulary
    from seed_multimodal.system.config import SystemConfig

Codes = Tensor | Sequence[int]
PREVIEW_STEPS = 2  # of nano's twelve: nearly as near to the whole picture as twelve, at a quarter of their time
REMEMBERED = 1024  # pictures whose codes `encode_once` keeps, about 0.5 KB each


class PictureCodec(PictureHalf):
    """Pictures ⇄ codes.

    Args:
        model: SEED-2 tokenizer.
        transform: PIL picture -> float32 [3, S, S].
        options: of `PictureHalf`.
    """

    has_codes = True

    def __init__(self, model: Seed2Tokenizer, transform: Callable[[Image.Image], Tensor], **options: Any) -> None:
        super().__init__(model, **options)
        self.transform = transform
        self._sound = False  # all weights were looked at
        self._known: OrderedDict[bytes, list[int]] = OrderedDict()  # digest of the pixels -> codes, oldest use first

    @property
    def section(self) -> int:
        """Codes of one section of the codebook."""
        return self.model.config.codebook_size // self.model.config.codebook_sections

    @property
    def encoder(self) -> nn.Module:
        """The vision tower."""
        return self.model.visual_encoder

    def open(self, picture: Picture, name: str | None = None) -> Image.Image:
        """As `PictureHalf.open`; a large one is reduced to three times the tower's size or more."""
        size = getattr(self.transform, "image_size", None)
        self.at_least = None if size is None else DETAIL * size
        return super().open(picture, name)

    def see(self, pictures: Sequence[Any]) -> None:
        """See `PictureHalf`."""
        pixels = [one if isinstance(one, Tensor) else self.transform(self.open(one)) for one in pictures]
        self.encoder(torch.stack(pixels).to(self.device, self.model.dtype))

    def tokenize(self, pictures: Picture | Sequence[Picture], *, once: bool = False) -> Tensor:
        """One picture or several -> codes [B, 32] int64 on the CPU; `once`: by `encode_once`."""
        several: list[Any] = list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
        if not several:
            return torch.empty(0, self.model.config.num_query, dtype=torch.long)
        pixels = torch.stack([self.transform(self.open(picture)) for picture in several])
        return self.encode_once(pixels) if once else self.encode(pixels)

    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S] -> codes [B, 32] int64 on the CPU.

        Raises:
            ImageError: pixels of another size, or NaN. CheckpointError: weights that are NaN.
        """
        with self.reading():
            codes = self.model.encode(pixels.to(self.device)).cpu()
            if bool((codes == codes[:, :1]).all(dim=1).any()):  # NaN features have one code in all 32 places
                self._check_features(pixels)
        return codes

    @torch.no_grad()
    def _check_features(self, pixels: Tensor) -> None:
        if not bool(torch.isfinite(pixels).all()):
            raise ImageError("The pixels hold NaN or infinity.")
        self._sound = self._sound or damaged_tensor(self.model) is None
        features = self.model.pre_quant(pixels.to(self.model.device, self.model.dtype))
        if not (self._sound and bool(torch.isfinite(features).all())):
            raise not_numbers("The image tokenizer", self.model)

    def encode_once(self, pixels: Tensor) -> Tensor:
        """As `encode`, but pictures seen lately are not encoded again, such as those of a conversation's earlier turns.

        The codes of the last `REMEMBERED` different pictures are kept by the content of their pixels.
        """
        names = [hashlib.blake2b(row.contiguous().numpy(), digest_size=16).digest() for row in pixels.float().cpu()]
        with self._lock:
            new = {name: row for name, row in zip(names, pixels, strict=True) if name not in self._known}
            if new:
                self._known.update(zip(new, self.encode(torch.stack([*new.values()])).tolist(), strict=True))
            for name in names:
                self._known.move_to_end(name)
            codes = torch.tensor([self._known[name] for name in names], dtype=torch.long)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return codes

    def check_codes(self, codes: Codes | Sequence[Sequence[int]]) -> Tensor:
        """Codes of one picture or several -> [B, 32] int64.

        Raises:
            CodesError: wrong number of codes, or one outside the codebook.
        """
        return self._rows(codes, self.model.config.num_query)

    def _rows(self, codes: Any, shortest: int) -> Tensor:
        count, size = self.model.config.num_query, self.model.config.codebook_size
        try:
            codes = torch.as_tensor(codes)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise CodesError(f"Codes must be rows of {count} whole numbers ({first_line(error)}).") from error
        if codes.dtype.is_floating_point and codes.numel():
            raise CodesError(f"Codes must be whole numbers, got {str(codes.dtype).removeprefix('torch.')}.")
        codes = codes[None] if codes.ndim == 1 else codes
        if codes.ndim != 2 or not shortest <= codes.shape[1] <= count:
            raise CodesError(f"An image has {count} codes, got an array of shape {list(codes.shape)}.")
        outside = (codes < 0) | (codes >= size)
        if bool(outside.any()):
            row, column = outside.nonzero()[0].tolist()
            raise CodesError(f"Code {int(codes[row, column])} (image {row}, position {column}) is outside the "
                             f"codebook 0..{size - 1}.")
        return torch.nn.functional.pad(codes.long(), (0, count - codes.shape[1]))

    def check_counts(self, first: Any) -> list[int]:
        """Numbers of codes to draw from as a list, empty for None."""
        if first is None:
            return []
        if not isinstance(self.model, Seed2Tokenizer):
            raise ConfigError("SEED-1 makes no picture from its first codes alone; SEED-2 does.")
        first = first.tolist() if hasattr(first, "tolist") else first
        return [check_value(int, one, "The number of codes to draw from", least=1, most=self.model.config.num_query)
                for one in (first if isinstance(first, list | tuple | range) else [first])]

    def check_drawing(self, *, negative_codes: Codes | Sequence[Sequence[int]] | None = None, **decode: Any) -> None:
        """See `PictureHalf`."""
        if negative_codes is not None:
            self.check_codes(negative_codes)
        super().check_drawing(**decode)

    def draw(
        self, codes: Codes | Sequence[Sequence[int]], *, seed: int | Sequence[int] = 0, batch_size: int = 8,
        first: Any = None, negative_codes: Codes | Sequence[Sequence[int]] | None = None, **decode: Any,
    ) -> list[Image.Image]:
        """Codes -> pictures.

        Args:
            codes: [B, 32], or the 32 codes of one picture.
            first: draw from so many of the codes only; one number for all pictures, one each, or several for one
                picture, which is then drawn from each number (see `SeedTokenizer.decode`).
            negative_codes: codes of what to steer away from: one row for all pictures, or one for each.
            seed: one for all pictures, or one each.
            batch_size: pictures per pass through the U-Net.
            decode: passed to the de-tokenizer (`num_inference_steps`, `guidance_scale`, `noise_level`, `scheduler`).

        Raises:
            CodesError: codes outside the codebook, or not as many seeds or negatives as pictures.
            ConfigError: a seed that is no whole number of 64 bits, a batch size below 1, an unknown option.
        """
        check_value(int, batch_size, "batch_size", least=1)
        counts = self.check_counts(first)
        rows = self._rows(codes, max(counts, default=self.model.config.num_query))
        rows = rows.expand(len(counts), -1) if len(rows) == 1 and counts else rows
        if counts and len(counts) not in (1, len(rows)):
            raise ConfigError(f"{len(rows)} pictures were given with {len(counts)} numbers of codes; give one for "
                              f"all, or one each.")
        wanted = torch.tensor(counts).expand(len(rows)) if counts else None
        seeds = one_seed_each(seed, len(rows))
        avoided = None if negative_codes is None else self.check_codes(negative_codes)
        if avoided is not None and len(avoided) not in (1, len(rows)):
            raise CodesError(f"{len(rows)} pictures were given with {len(avoided)} rows of negative codes; give one "
                             f"for all, or one each.")
        decoder, pictures = self.decoder, []
        self.check_keys(decode)
        with self.drawing():
            for start in range(0, len(rows), batch_size):
                embeds = self.model.decode(rows[start:start + batch_size],
                                           None if wanted is None else wanted[start:start + batch_size])
                if not bool(torch.isfinite(embeds).all()):
                    raise not_numbers("The image tokenizer", self.model)
                if avoided is not None:
                    own = avoided.expand(len(rows), -1)[start:start + len(embeds)]
                    decode["negative_embeds"] = self.model.decode(own)
                pictures += decoder(embeds, seeds=seeds[start:start + batch_size], **decode)
        return pictures

    def preview(self, codes: Sequence[int], seed: int | None = None, **decode: Any) -> Image.Image:
        """What the first codes of a picture show, as `draw` draws it, in `PREVIEW_STEPS` steps or a smaller number."""
        given = decode.pop("num_inference_steps", None)
        steps = check_value(int, given or PREVIEW_STEPS, "num_inference_steps")
        draw = partial(self.draw, [list(codes)], seed=seed or 0, first=len(codes), **decode)
        try:
            return draw(num_inference_steps=min(steps, PREVIEW_STEPS))[0]
        except ValueError:  # of a scheduler that needs more steps (PNDM, four)
            return draw(num_inference_steps=given)[0]


def is_picture(value: object) -> bool:
    """Whether `value` is a picture that `PictureCodec.open` may read; a `str` is a text rather than a file's name."""
    return isinstance(value, (Image.Image, Path, bytes, bytearray, memoryview)) or is_file(value) or (
        isinstance(value, np.ndarray) and not is_codes(value))


def is_codes(value: object) -> bool:
    """Whether `value` is a row of picture codes rather than a picture or text: an integer tensor or a list of ints."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() and value.ndim == 1
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "iu" and value.ndim == 1
    return (isinstance(value, (list, tuple)) and len(value) > 0
            and all(isinstance(code, int) and not isinstance(code, bool) for code in value))


def open_codec(
    tokenizer: str | Path, *, vision: Path | None = None, detokenizer: Path | None = None, transform: dict[str, Any],
    device: torch.device, dtype: torch.dtype,
) -> PictureCodec:
    """A tokenizer with the resizing it was trained on (to its own size, if none is given) and, loaded on first use,
    its de-tokenizer.

    Raises:
        CheckpointError: weights that are missing or damaged.
    """
    from seed_multimodal.images.transforms import get_transform
    from seed_multimodal.seed.diffusion import UnclipDetokenizer

    model = Seed2Tokenizer.from_pretrained(tokenizer, vision=vision, device=device, dtype=dtype)
    load = None
    if detokenizer is not None:
        load = partial(UnclipDetokenizer.from_pretrained, detokenizer, device=device, dtype=dtype)
    transform = {"image_size": model.config.vit.image_size, **transform}
    return PictureCodec(model, get_transform(**transform), load_decoder=load, device=device)


def load_codec(
    spec: SystemConfig, vocabulary: ImageVocabulary, *, device: torch.device, dtype: torch.dtype,
    load_decoder: bool = True,
) -> PictureCodec:
    """The picture half of a system, its de-tokenizer to be loaded on first use.

    Raises:
        CheckpointError: weights that are missing or damaged; `ConfigError`: another codebook than the vocabulary's.
    """
    assert spec.tokenizer is not None
    codec = open_codec(spec.tokenizer, vision=spec.vision, detokenizer=spec.detokenizer if load_decoder else None,
                       transform={**spec.transform, "image_size": spec.image_size}, device=device, dtype=dtype)
    has = (codec.model.config.codebook_size, codec.model.config.num_query)
    if has != (vocabulary.n_codes, vocabulary.tokens_per_image):
        raise ConfigError(f"{spec.tokenizer}: the image tokenizer has {has[0]} codes, {has[1]} to a picture, but the "
                          f"vocabulary has {vocabulary.n_codes} and {vocabulary.tokens_per_image}.")
    size = codec.model.config.vit.image_size
    if spec.image_size != size:
        raise ConfigError(f"{spec.name}: image_size is {spec.image_size}, but the image tokenizer reads {size} pixels.")
    codec.domain = load_domain(spec.domain, spec.domain_threshold)
    return codec
