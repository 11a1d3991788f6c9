"""The picture half of LaVIT: pictures to codes, or to the rows that the language model reads; codes to pictures.

    codes = pictures.tokenize([picture], seed=1)[0]      # as many as there is to see, 1 … 256
    pictures.draw([codes], ratio="3:2", seed=1)

The model draws which patches it keeps. Each picture's draw comes from a generator of its own, so that its tokens depend
on the picture and the seed, never on the rest of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.errors import CheckpointError, CodesError, ConfigError, ImageError, RequestError
from seed_multimodal.finite import not_numbers
from seed_multimodal.images.io import DETAIL
from seed_multimodal.language.lavit import several
from seed_multimodal.lavit.modeling import DynamicTokenizer
from seed_multimodal.progress import Progress
from seed_multimodal.settings import check_value
from seed_multimodal.systems.chat import as_text
from seed_multimodal.systems.picture_half import Picture, PictureHalf, one_seed_each
from seed_multimodal.systems.pictures import is_codes, is_picture

AT_ONCE = 16  # pictures in one pass of the tower
WRITER, READER = "writer", "reader"


class LavitPictures(PictureHalf):
    """Pictures ⇄ codes.

    Args:
        writer: the tokenizer whose codes are drawn; None: a system that reads pictures only.
        reader: the tokenizer that the language model sees with; None: a system that draws only.
        selection: "draw" or "threshold", see `lavit.modeling.choose`.
        options: of `PictureHalf`.

    Attributes:
        log: shows the steps of a drawing that takes long.
    """

    has_codes = True
    log: Callable[[str], None] | None = None

    def __init__(self, writer: DynamicTokenizer | None, reader: DynamicTokenizer | None, *, selection: str = "draw",
                 **options: Any) -> None:
        models = {name: model for name, model in ((WRITER, writer), (READER, reader)) if model is not None}
        super().__init__(nn.ModuleDict(models), **options)
        self.writer, self.reader, self.selection = writer, reader, selection
        some = writer or reader
        self.at_least = None if some is None else DETAIL * some.config.vit.image_size

    @property
    def section(self) -> int:
        """As of `PictureCodec`: the codebook is in one piece."""
        return self._writing().config.codebook_size

    # ---- reading

    def read(self, pictures: Picture | Sequence[Picture], *, seed: Any = 0,
             selection: str | None = None) -> list[Tensor]:
        """Each picture's rows for the language model, `[n, llm_width]`.

        Args:
            seed: of the choice of patches, one for all pictures or one each; None: torch's global generator, as the
                released model does.
            selection: "draw" or "threshold"; None: the system's.

        Raises:
            ImageError: a picture that cannot be read. CheckpointError: a system without the second stage's weights.
        """
        model = self.reading_model()
        return self._encoded(model.continuous, model, pictures, seed, selection)

    @property
    def tower(self) -> nn.Module:
        some = self.writer or self.reader
        assert some is not None
        return some.encoder

    def see(self, pictures: Sequence[Any]) -> None:
        """See `PictureHalf`."""
        self.kept(pictures)

    def tokenize(self, pictures: Picture | Sequence[Picture], *, seed: Any = 0,
                 selection: str | None = None) -> list[Tensor]:
        """Each picture's codes `[n]` int64, on the CPU; arguments and errors as of `read`."""
        model = self._writing()
        return [codes.cpu() for codes in self._encoded(model.encode, model, pictures, seed, selection)]

    def kept(self, pictures: Picture | Sequence[Picture], *, seed: Any = 0,
             selection: str | None = None) -> list[Tensor]:
        """Which patches of each picture are kept, `[g, g]` bool, on the CPU; arguments as of `read`."""
        model = self.writer or self.reader
        assert model is not None

        def choose(pixels: Tensor, **choice: Any) -> list[Tensor]:
            keep_BN = model.select(model.patch_features(pixels), **choice).keep_BN
            return list(keep_BN.bool().unflatten(1, (model.config.vit.grid, -1)).cpu())

        return self._encoded(choose, model, pictures, seed, selection)

    @torch.inference_mode()
    def _encoded(self, encode: Callable[..., list[Tensor]], model: DynamicTokenizer, pictures: Any, seed: Any,
                 selection: str | None) -> list[Tensor]:
        several: list[Any] = list(pictures) if isinstance(pictures, (list, tuple, Tensor)) else [pictures]
        size = model.config.vit.image_size
        generators: list[torch.Generator] | None = None
        if seed is not None:
            generators = [torch.Generator().manual_seed(one) for one in one_seed_each(seed, len(several))]
        found: list[Tensor] = []
        for start in range(0, len(several), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            pixels = torch.stack([_checked_pixels(one, size) if isinstance(one, Tensor) else
                                  model.transform(self.open(one)) for one in several[part]])
            with self.reading():
                rows = encode(pixels.to(model.device), mode=selection or self.selection,
                              generator=None if generators is None else generators[part])
                if any(row.is_floating_point() and not bool(torch.isfinite(row).all()) for row in rows):
                    raise not_numbers("The image tokenizer", model)
            found += rows
        return found

    def reading_model(self) -> DynamicTokenizer:
        """The tokenizer that the language model sees with; `CheckpointError` without it."""
        if self.reader is None:
            raise CheckpointError("This system was opened without the weights that read pictures (merger and projector "
                                  "of the second stage), so it cannot describe pictures or answer.")
        return self.reader

    def _writing(self) -> DynamicTokenizer:
        if self.writer is None:
            raise CheckpointError("This system was opened without the tokenizer of the first stage, so its pictures "
                                  "have no codes.")
        return self.writer

    # ---- drawing

    def check_codes(self, codes: Any) -> list[Tensor]:
        """Codes of one picture or several → of each `[n]` int64.

        Raises:
            CodesError: no codes, more than the decoder takes, or one outside the codebook.
        """
        config = self._writing().config
        given = codes.tolist() if isinstance(codes, Tensor) else codes
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise CodesError(f"Codes are rows of whole numbers, not {type(given).__name__}.")
        rows = [given] if given and isinstance(given[0], int) else given
        checked = []
        for number, row in enumerate(rows, start=1):
            try:
                values = torch.as_tensor(row)
            except (TypeError, ValueError, RuntimeError):
                raise CodesError(f"Picture {number} must be a row of codes, which are whole numbers.") from None
            if values.ndim != 1 or values.is_floating_point() or not 0 < len(values) <= config.patches:
                raise CodesError(f"Picture {number} must be a row of 1 to {config.patches} codes, got "
                                 f"{list(values.shape)}.")
            if not 0 <= int(values.min()) <= int(values.max()) < config.codebook_size:
                wrong = int(values.min() if values.min() < 0 else values.max())
                raise CodesError(f"Picture {number} holds the code {wrong}, but the codebook has 0 to "
                                 f"{config.codebook_size - 1}.")
            checked.append(values.long())
        return checked

    def codes_of(self, part: Any, seed: int | None, selection: str | None = None) -> list[int]:
        """The codes of a picture, or given ones, checked."""
        rows = self.check_codes([part]) if is_codes(part) else self.tokenize(part, seed=seed, selection=selection)
        if len(rows) != 1:
            raise RequestError(f"A part of a prompt is one picture, not {len(rows)}.")
        return [int(code) for code in rows[0]]

    def refuse_first(self, first: Any) -> None:
        """Refuse progressive drawing (`ConfigError`)."""
        if first is not None:
            raise ConfigError("LaVIT's codes are a picture's patches in order, so there is no picture of the first of "
                              "them.")

    @torch.inference_mode()
    def draw(self, codes: Any, *, seed: Any = 0, batch_size: int = 4, first: None = None,
             **decode: Any) -> list[Image.Image]:
        """Codes → pictures.

        Args:
            codes: of one picture or several, see `check_codes`.
            seed: one for all pictures or one each; None: torch's global generator.
            batch_size: pictures per pass through the U-Net.
            first: refused.
            decode: of `LavitDetokenizer`: `ratio` ("3:2") or `height` and `width`, `num_inference_steps`,
                `guidance_scale`, `scheduler`, …; None for the usual.

        Raises:
            CodesError: codes that are no picture. ConfigError: a setting that is unknown or out of range.
        """
        self.refuse_first(first)
        check_value(int, batch_size, "batch_size", least=1)
        rows = self.check_codes(codes)
        seeds = None if seed is None else one_seed_each(seed, len(rows))
        self.check_keys(decode)
        pictures: list[Image.Image] = []
        for start in range(0, len(rows), batch_size):
            part = slice(start, start + batch_size)
            with self.drawing(), Progress("drawing", None, log=self.log) as bar:
                pictures += self.decoder(self.rows_of(rows[part]), seeds=None if seeds is None else seeds[part],
                                         callback=partial(_tell, bar), **decode)
        return pictures

    def rows_of(self, codes: Sequence[Tensor]) -> list[Tensor]:
        model = self._writing()
        return [model.embed_codes(row.to(model.quantize.embedding.weight.device)) for row in codes]


def drawn_texts(texts: Any) -> list[list[str]]:
    """Each of a list of texts to draw as a prompt, checked (`RequestError`)."""
    return [[as_text(text, "The text to draw")] for text in several(texts, "The texts to draw")]


def composed_parts(parts: Any) -> list[Any]:
    """Texts, pictures and codes of a prompt, checked (`RequestError`)."""
    if isinstance(parts, (str, bytes)) or not isinstance(parts, Sequence) or not len(parts):
        raise RequestError("A list of texts and pictures is composed, with at least one of them.")
    for part in parts:
        if not (isinstance(part, str) or is_picture(part) or is_codes(part)):
            raise RequestError(f"Texts, pictures and codes are composed, not {type(part).__name__}.")
    if all(isinstance(part, str) and not part.strip() for part in parts):
        raise RequestError("What is to be composed is empty: there is no picture and no word.")
    return list(parts)


def _tell(bar: Progress, done: int, total: int) -> None:
    bar.update(step=f"{done} of {total}")


def _checked_pixels(pixels: Tensor, size: int) -> Tensor:
    """Ready pixels of one picture in float32; `ImageError` for other tensors, or what is no number."""
    if pixels.shape != (3, size, size) or not pixels.is_floating_point():
        raise ImageError(f"Pixels must be a floating tensor [B, 3, {size}, {size}]; of one picture there are "
                         f"{list(pixels.shape)}, {str(pixels.dtype).removeprefix('torch.')}.")
    if not bool(torch.isfinite(pixels).all()):
        raise ImageError("The pixels hold NaN or infinity.")
    return pixels.float()
