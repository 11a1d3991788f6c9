"""The picture half of SEED-X: pictures to features of their views, and features to pictures.

    seen = pictures.read([picture])[0]          # features [views, 256, 4096], positions [views, 2]
    pictures.draw(features, conditions=[picture])

Features of the last pictures are kept, so that those of a conversation's earlier turns are not read again. A picture's
drawing depends on its features, its condition and its seed, never on the rest of the batch.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.diffusion.layout import pooled_tokens
from seed_multimodal.errors import CodesError, ConfigError, ImageError
from seed_multimodal.finite import not_numbers
from seed_multimodal.images.transforms import normalise
from seed_multimodal.seed_x.views import UNIT, AnyResolution, Ratio, drawing_size, patch_positions, with_ratio
from seed_multimodal.seed_x.vision import QwenVit
from seed_multimodal.settings import check_value
from seed_multimodal.systems.picture_half import Picture, PictureHalf, one_seed_each

REMEMBERED = 16  # pictures whose features are kept: about 10 MB each in float16
AT_ONCE = 8  # views in one pass of the tower


@dataclass(frozen=True)
class SeenPicture:
    """A picture as the language model reads it.

    Attributes:
        features: [V, N, K] on the CPU, of the tower. positions: [V, 2].
        picture: itself, as opened.
    """

    features: Tensor
    positions: Tensor
    picture: Image.Image


class FeaturePictures(PictureHalf):
    """Pictures ⇄ features.

    Args:
        tower: the vision tower.
        views: cuts pictures into views, `edit_views` those that are edited.
        options: of `PictureHalf`.
    """

    own_settings = ("ratio",)

    def __init__(self, tower: QwenVit, views: AnyResolution, edit_views: AnyResolution | None = None,
                 **options: Any) -> None:
        super().__init__(tower, **options)
        self.views, self.edit_views = views, edit_views or views
        self._known: OrderedDict[bytes, Tensor] = OrderedDict()  # digest of the views -> features, oldest use first

    # ---- reading

    def read(self, pictures: Sequence[Picture], editing: bool = False) -> list[SeenPicture]:
        """Each picture in its views; `ImageError` names one that cannot be read."""
        views = self.edit_views if editing else self.views
        return [self._read(self.open(picture), views) for picture in pictures]

    def count_views(self, size: tuple[int, int]) -> int:
        """Views of a picture of that width and height, the whole one included."""
        columns, rows = self.views.grid(size)
        return columns * rows + 1

    def _read(self, picture: Image.Image, views: AnyResolution) -> SeenPicture:
        cut = views.cut(picture)
        name = hashlib.blake2b(cut.contiguous().numpy(), digest_size=16).digest()
        with self._lock:
            if name not in self._known:
                self._known[name] = self.features(normalise(cut)).cpu()
            self._known.move_to_end(name)
            features = self._known[name]
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return SeenPicture(features, patch_positions(views.grid(picture.size)), picture)

    @torch.inference_mode()
    def features(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S] → features [B, N, K].

        Raises:
            ImageError: pixels that are not numbers, or of another shape. CheckpointError: weights that are not.
        """
        if not bool(torch.isfinite(pixels).all()):
            raise ImageError("The pixels hold NaN or infinity.")
        with self.reading():
            like = next(self.model.parameters())
            found = torch.cat([self.model(part.to(like)) for part in pixels.split(AT_ONCE)])
            if not bool(torch.isfinite(found).all()):
                raise not_numbers("The vision tower", self.model)
        return found

    def see(self, pictures: Sequence[Any]) -> None:
        """See `PictureHalf`."""
        self.whole([self.open(picture) for picture in pictures])

    def whole(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features [B, N, K] of whole pictures in one view each, squashed to a square (as they are rebuilt from)."""
        alone = AnyResolution(self.views.image_size, ("1x1",), self.views.interpolation)
        return self.features(normalise(torch.stack([alone.cut(picture)[-1] for picture in pictures])))

    # ---- drawing

    @property
    def reads_condition(self) -> bool:
        """Whether the de-tokenizer is of the second stage, which draws beside a condition picture."""
        return bool(self.decoder.adapter.reads_condition)

    def check_drawing(self, *, ratio: Ratio = "restore", **decode: Any) -> None:
        """See `PictureHalf`."""
        check_value(Ratio, ratio, "ratio")
        self.check_keys(decode)
        self._look_at_nothing()
        super().check_drawing(**{name: value for name, value in decode.items() if value is not None})

    def _look_at_nothing(self) -> None:
        """Let the de-tokenizer know what guidance steers away from."""
        if self.decoder.null_embeds is None:
            size = self.views.image_size
            self.decoder.null_embeds = self.features(torch.zeros(1, 3, size, size)).cpu()

    @torch.inference_mode()
    def draw(self, features: Tensor, *, seed: Any = 0,
             conditions: Sequence[Image.Image | None] | None = None, ratio: Ratio = "restore",
             **decode: Any) -> list[Image.Image]:
        """Features [B, N, W] → pictures.

        Args:
            conditions: for a second stage, a picture (or None) for each drawn one, whose aspect ratio it gets.
            ratio: how, see `seed_x.views`; "square" leaves it square.
            seed: one for all pictures, or one each.
            decode: of `SdxlDetokenizer`: `num_inference_steps`, `guidance_scale`, `image_guidance_scale`,
                `height` and `width`, `scheduler`, …

        Raises:
            ConfigError: an unknown setting, a condition for a first stage. CodesError: another number of conditions.
        """
        self.check_keys(decode)
        check_value(Ratio, ratio, "ratio")
        decode = {name: value for name, value in decode.items() if value is not None}  # None: the usual
        given = [None] * len(features) if conditions is None else list(conditions)
        if len(given) != len(features):
            raise CodesError(f"{len(features)} pictures were given with {len(given)} condition pictures.")
        if any(given) and not self.reads_condition:
            raise ConfigError("This system's de-tokenizer is of the first stage and reads no condition picture; the "
                              "second stage (seed_detokenizer/second_stage) does.")
        self._look_at_nothing()
        seeds = one_seed_each(seed, len(features))
        drawn = []
        for row, one, condition in zip(features, seeds, given, strict=True):
            with self.drawing():
                drawn.append(self._one(row[None], one, condition, ratio, decode))
        return drawn

    def rebuild(self, images: Picture | Sequence[Picture], condition: Picture | Sequence[Picture] | None = None,
                seed: Any = 0, *, embeddings: int | None = None, **decode: Any) -> list[Image.Image]:
        """Pictures drawn again from their features.

        Args:
            condition: for a second stage, the picture (or one for each) that shows what it may take over.
            embeddings: means of so many neighbours' features are drawn from (64: as the language model writes them);
                None: all, as the released scripts did.
            decode: as of `draw`.
        """
        pictures = [self.open(picture) for picture in _several(images)]
        given = None if condition is None else [self.open(picture) for picture in _several(condition)]
        if given is not None and len(given) == 1:
            given *= len(pictures)
        if not pictures:
            return []
        features = self.whole(pictures)
        if embeddings is not None:
            if check_value(int, embeddings, "embeddings") < 1 or features.shape[1] % embeddings:
                raise ConfigError(f"embeddings must divide the tower's {features.shape[1]}, not {embeddings}.")
            features = pooled_tokens(features, embeddings)
        return self.draw(features, seed=seed, conditions=given, **decode)

    def _one(self, features: Tensor, seed: int, condition: Image.Image | None, ratio: Ratio,
             decode: dict[str, Any]) -> Image.Image:
        decoder = self.decoder
        if condition is None or {"height", "width"} & set(decode):
            shown: dict[str, Any] = {"condition_images": [condition]} if self.reads_condition else {}
        else:
            side = decoder.size(decoder.defaults)[0]
            unit = UNIT if side % UNIT == 0 else max(8, decoder.factor)
            width, height = drawing_size(condition.size, side, ratio, unit)
            shown = {"condition_images": [condition], "width": width, "height": height}
        picture: Image.Image = decoder(features, seeds=[seed], **shown, **decode)[0]
        if condition is None or ratio == "square" or "height" in decode:
            return picture
        return with_ratio(picture, condition.size)


def _several(pictures: Any) -> list[Any]:
    return list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
