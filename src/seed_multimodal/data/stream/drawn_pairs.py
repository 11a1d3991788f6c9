"""Images that a pixel decoder learns to draw: their pixels, the vision encoder's view of the same part, their size
conditions, and for edits the image before.

With `keep_ratio` the shorter side is scaled and the centre cut out (as in SEED-Story's training of such an adapter);
else both sides are squashed, as in SEED-X's editing. With several `sizes` each image has one: that of the nearest
ratio, or if squashed one that its key chooses; `by_size` batches such samples.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from seed_multimodal.data.formats.pairs import Pair, Pairs, open_pairs
from seed_multimodal.data.formats.sources import registered
from seed_multimodal.data.stream.pairs_dataset import SourceDataset
from seed_multimodal.diffusion.training import size_ids
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.io import open_image
from seed_multimodal.images.transforms import INTERPOLATIONS, plain_rgb, resize_passes, to_bytes
from seed_multimodal.settings import check_settings, setting

Size = tuple[int, int]  # height and width in pixels


@dataclass(frozen=True)
class DrawnView:
    """What of an image is drawn (a square of `resolution`, or one of `sizes`), and the vision encoder's square view of
    `tower_size`, resized by `seen_by`."""

    resolution: int = setting(1024, least=8)
    tower_size: int = setting(448, least=1)
    keep_ratio: bool = True
    sizes: tuple[Size, ...] = ()
    seen_by: str = setting("bilinear", choices=tuple(INTERPOLATIONS))

    def __post_init__(self) -> None:
        check_settings(self, "view")
        if any(min(size) < 8 for size in self.sizes):
            raise ConfigError(f"view: sizes are heights and widths of at least 8 pixels, not {list(self.sizes)}.")

    def size_of(self, picture: Image.Image, key: str = "") -> Size:
        """The size in which a picture is drawn."""
        sizes = self.sizes or ((self.resolution, self.resolution),)
        if not self.keep_ratio:
            return sizes[zlib.crc32(key.encode()) % len(sizes)]
        wanted = math.log(picture.width / picture.height)
        return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - wanted))

    def drawn(self, picture: Image.Image, size: Size) -> Tensor:
        """uint8 `[3, H, W]`, in a size of `size_of`."""
        return self._part(picture, size, size, "bicubic")

    def seen(self, picture: Image.Image, size: Size) -> Tensor:
        """uint8 `[3, S, S]`: of the part that is drawn in a size of `size_of`."""
        return self._part(picture, size, (self.tower_size, self.tower_size), self.seen_by)

    def time_ids(self, picture: Size, size: Size) -> Tensor:
        """SDXL's size conditions `[6]` of a picture of (width, height): of the file, of the cut, of the drawing."""
        (width, height), (tall, wide) = picture, size
        across, down = int(tall * width / height) - wide, int(wide * height / width) - tall
        crop = (0, 0) if not self.keep_ratio else (0, round(across / 2)) if across >= 0 else (round(down / 2), 0)
        return size_ids(size, original=(height, width), crop=crop)[0]

    def _part(self, picture: Image.Image, ratio: Size, size: Size, by: str) -> Tensor:
        """The largest centred part of a ratio, or without `keep_ratio` all, resized: uint8 `[3, H, W]`."""
        picture = plain_rgb(picture)
        (width, height), (tall, wide) = picture.size, ratio
        if self.keep_ratio and width * tall != height * wide:
            kept = min(width, height * wide / tall), min(height, width * tall / wide)
            left, top = (width - kept[0]) / 2, (height - kept[1]) / 2
            box = (left, top, left + kept[0], top + kept[1])
            return to_bytes(picture.resize(size[::-1], INTERPOLATIONS[by], box=box))
        return to_bytes(resize_passes(picture, size[::-1], INTERPOLATIONS[by]))


class DrawnPairs(SourceDataset):
    """`image` uint8 `[3, H, W]`, `seen` uint8 `[3, S, S]`, `time_ids` `[6]`, `key`, `conditioned` (whether it is an
    edit) and with `reads_condition` the image before, `condition` uint8 `[3, H, W]` (zeros where there is none)."""

    def __init__(self, source: Pairs, view: DrawnView, *, reads_condition: bool = False, **options: Any) -> None:
        super().__init__(source, **options)
        self.view, self.reads_condition = view, reads_condition

    def sample(self, read: Pair, generator: torch.Generator, number: int) -> dict[str, Any]:
        """See `SourceDataset`; nothing is random."""
        picture = open_image(read.image, name=read.name)
        size = self.view.size_of(picture, read.key)
        made = {"image": self.view.drawn(picture, size), "seen": self.view.seen(picture, size),
                "time_ids": self.view.time_ids(picture.size, size), "key": read.key,
                "conditioned": read.condition is not None}
        if self.reads_condition:
            made["condition"] = torch.zeros_like(made["image"]) if read.condition is None else self.view.drawn(
                open_image(read.condition, name=f"{read.name} (the picture before the edit)"), size)
        return made


def by_size(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Samples of `DrawnPairs` as batches of one size each, in the order in which the sizes appear."""
    groups: dict[torch.Size, list[Mapping[str, Any]]] = {}
    for sample in samples:
        groups.setdefault(sample["image"].shape, []).append(sample)
    return [default_collate(group) for group in groups.values()]


def open_pictures(spec: Mapping[str, Any]) -> Pairs:
    """Images without captions, as `formats.pairs.open_pairs`; with `condition_key` they are edits."""
    plain = {"format": "auto", **spec}
    return open_pairs(plain if plain["format"] in registered() else {"captioned": False, **plain})
