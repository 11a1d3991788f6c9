"""Pictures that a de-tokenizer learns to draw: their pixels, what the vision tower sees of them, their size conditions,
and for edits the picture that was there before.

Both views are of the same part of the picture, so that embeddings say what is to be drawn. With `keep_ratio` the
shorter side is scaled and the centre cut out (as in the nearest published training of such an adapter, SEED-Story's);
else both sides are squashed, as SEED-X's programs do with what they edit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.data.formats.pairs import Pair, PairSource, open_pairs
from seed_multimodal.data.stream.pair_dataset import SourceDataset
from seed_multimodal.detokenizers.sdxl_adapter import size_ids
from seed_multimodal.images.open import open_image
from seed_multimodal.images.transforms import ImageTransform, to_bytes
from seed_multimodal.settings import check_settings, setting


@dataclass(frozen=True)
class DrawnView:
    """What of a picture is drawn and seen.

    Attributes:
        resolution: side of the drawn square in pixels. tower_size: side of what the tower sees.
    """

    resolution: int = setting(1024, least=8)
    tower_size: int = setting(448, least=1)
    keep_ratio: bool = True

    def __post_init__(self) -> None:
        check_settings(self, "view")

    def drawn(self, picture: Image.Image) -> Tensor:
        """uint8 `[3, R, R]`."""
        return to_bytes(ImageTransform(self.resolution, self.keep_ratio, "bicubic").resize(picture))

    def seen(self, picture: Image.Image) -> Tensor:
        """uint8 `[3, S, S]`, resized as the tower's released transform does."""
        return to_bytes(ImageTransform(self.tower_size, self.keep_ratio, "bilinear").resize(picture))

    def time_ids(self, size: tuple[int, int]) -> Tensor:
        """SDXL's size conditions `[6]` of a picture of (width, height): of the file, of the cut, of the drawing."""
        width, height = size
        side, short, long = self.resolution, min(size), max(size)
        cut = round((int(side * long / short) - side) / 2) if self.keep_ratio else 0
        crop = (cut, 0) if height > width else (0, cut)
        return size_ids((side, side), original=(height, width), crop=crop)[0]


class DrawnPairs(SourceDataset):
    """`image` uint8 `[3, R, R]`, `seen` uint8 `[3, S, S]`, `time_ids` `[6]`, `key`, `conditioned` (whether it is an
    edit) and, for a model that reads one, `condition` uint8 `[3, R, R]` (zeros where there is none).

    Args:
        source: pictures (`open_pictures`); those with a condition hold edits.
        reads_condition: whether samples hold `condition`.
    """

    def __init__(self, source: PairSource, view: DrawnView, *, reads_condition: bool = False, seed: int = 0,
                 max_bad_in_a_row: int = 20, log: Callable[[str], None] | None = print) -> None:
        super().__init__(source, seed=seed, max_bad_in_a_row=max_bad_in_a_row, log=log)
        self.view, self.reads_condition = view, reads_condition

    def sample(self, read: Pair, generator: torch.Generator, number: int) -> dict[str, Any]:
        """See `SourceDataset`; nothing is random."""
        picture = open_image(read.image, name=read.name)
        made = {"image": self.view.drawn(picture), "seen": self.view.seen(picture),
                "time_ids": self.view.time_ids(picture.size), "key": read.key,
                "conditioned": read.condition is not None}
        if self.reads_condition:
            made["condition"] = torch.zeros_like(made["image"]) if read.condition is None else self.view.drawn(
                open_image(read.condition, name=f"{read.name} (the picture before the edit)"))
        return made


def open_pictures(spec: Mapping[str, Any]) -> PairSource:
    """Pictures without captions, as `formats.pairs.open_pairs`; with `condition_key` they are edits.

    Raises:
        ConfigError, DataError: as `open_pairs`.
    """
    plain = {"format": "auto", **spec}
    return open_pairs(plain if plain["format"] == "nano" else {"captioned": False, **plain})
