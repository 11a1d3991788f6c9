"""From stored pairs to training samples: an image with one of its captions, or what a pixel decoder learns from.

What is random about a sample is a function of (seed, epoch, index). A sample that cannot be used is named once,
counted, and replaced by the next usable one; `max_bad_in_a_row` in a row end the run.
"""

from __future__ import annotations

import bisect
import itertools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from seed_multimodal.data.formats.pairs import SAMPLE_FAULTS, Pair, Pairs, open_pairs
from seed_multimodal.data.formats.sources import registered
from seed_multimodal.data.stream.sampler import SHUFFLE_BLOCK
from seed_multimodal.diffusion.training import size_ids
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.images.io import open_image
from seed_multimodal.images.transforms import INTERPOLATIONS, plain_rgb, resize_passes, to_bytes


class SourceDataset:
    """Training samples by (index, epoch), of anything that is read by number; a subclass has `sample`.

    `source`: `read(index)` gives what `sample` takes, or raises one of `SAMPLE_FAULTS`; `key(index)` names it. Where it
    has shards, `shard_sizes` (int64) are those, and `shuffle_block` samples are shuffled among each other. `bad` has
    (key, reason) of each unusable sample, once; `log` gets one line each, but not in data workers, whose finds
    `StepBatches` adds to the training process's.
    """

    def __init__(self, source: Any, *, seed: int = 0, max_bad_in_a_row: int = 20,
                 log: Callable[[str], None] | None = print) -> None:
        self.source, self.seed, self.max_bad_in_a_row, self.log = source, seed, max_bad_in_a_row, log
        self.shard_sizes: np.ndarray | None = getattr(source, "shard_sizes", None)
        self.shuffle_block = max(10, min(SHUFFLE_BLOCK, getattr(source, "shuffle_block", None) or SHUFFLE_BLOCK))
        self.bad: dict[tuple[str, str], None] = {}

    def note_bad(self, key: str, reason: str) -> None:
        """Count and log a bad sample, unless already counted."""
        if (key, reason) not in self.bad:
            self.bad[key, reason] = None
            if self.log is not None and get_worker_info() is None:
                self.log(f"skipped: {reason}")

    def state_dict(self) -> dict[str, Any]:
        """The bad samples so far, JSON-able."""
        return {"bad": [list(pair) for pair in self.bad]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Add the bad samples of an earlier run, without logging them again."""
        self.bad.update(dict.fromkeys((key, reason) for key, reason in state["bad"]))

    def __len__(self) -> int:
        return len(self.source)

    def get(self, index: int, epoch: int = 0) -> dict[str, Any]:
        """One sample: what `sample` gives, and `index` of the sample really used. Raises DataError: the next
        `max_bad_in_a_row` samples cannot be used."""
        # Seeded by the index asked for: a replacement is another view than the one drawn for it in this epoch.
        number, last = sample_seed(self.seed, epoch, index), None
        tries = min(self.max_bad_in_a_row, len(self.source))
        for place in ((index + more) % len(self.source) for more in range(tries)):
            try:
                return {**self.sample(self.source.read(place), torch.Generator().manual_seed(number), number),
                        "index": place}
            except SAMPLE_FAULTS as error:
                self.note_bad(self.source.key(place), str(error))
                last = error
        raise DataError(f"{tries} samples in a row, from number {index} on, cannot be used; the last is {last}"
                        ) from last

    def sample(self, read: Any, generator: torch.Generator, number: int) -> dict[str, Any]:
        """A sample of what was read; everything random about it comes from `generator` or, seeded, `number`."""
        raise NotImplementedError


class PairDataset(SourceDataset):
    """Image and caption: `image` (what the transform gives), `caption`, `key`.

    `image_transform`: one of ours, whose `read` gives uint8 to be normalised on the device, or any image -> tensor,
    with torch's global generator seeded around the call. `text_transform`: caption -> caption; None keeps it.
    """

    def __init__(self, source: Pairs, image_transform: Callable[..., Tensor],
                 text_transform: Callable[[str], str] | None = None, **options: Any) -> None:
        super().__init__(source, **options)
        self.image_transform, self.text_transform = image_transform, text_transform

    def sample(self, read: Pair, generator: torch.Generator, number: int) -> dict[str, Any]:
        """See `SourceDataset`."""
        captions = read.captions or [""]  # of a source that is not captioned
        caption = captions[int(torch.randint(len(captions), (), generator=generator))]
        if hasattr(self.image_transform, "read"):
            image = self.image_transform.read(read.image, name=read.name, generator=generator)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(number)
                image = self.image_transform(open_image(read.image, name=read.name))
        return {"image": image, "caption": self.text_transform(caption) if self.text_transform else caption,
                "key": read.key}


class JoinedPairs(SourceDataset):
    """Data sets one after the other, with one list of bad samples."""

    def __init__(self, parts: Sequence[SourceDataset]) -> None:
        super().__init__(None, log=parts[0].log)
        self.parts, self._ends = parts, list(itertools.accumulate(map(len, parts)))
        for part in parts:
            part.bad = self.bad
        self.shuffle_block = min(part.shuffle_block for part in parts)
        if any(part.shard_sizes is not None for part in parts):  # a set without shards counts as one
            self.shard_sizes = np.concatenate(
                [[len(part)] if part.shard_sizes is None else part.shard_sizes for part in parts])

    def __len__(self) -> int:
        return self._ends[-1]

    def get(self, index: int, epoch: int = 0) -> dict[str, Any]:
        """As `SourceDataset.get`."""
        number = bisect.bisect_right(self._ends, index)
        return self.parts[number].get(index - self._ends[number] + len(self.parts[number]), epoch)


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """A 63-bit number for one visit of one sample; neighbouring arguments give unrelated numbers."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0] >> np.uint64(1))


# ---- images that a pixel decoder learns to draw

Size = tuple[int, int]  # height and width in pixels


@dataclass(frozen=True)
class DrawnView:
    """What of an image is drawn (a square of `resolution`, or one of `sizes`), and the vision encoder's square view of
    `tower_size`, resized by `seen_by`.

    With `keep_ratio` the centre is cut out, in the size of the nearest ratio (as in SEED-Story's training of such an
    adapter); else both sides are squashed, as in SEED-X's editing, into a size that the image's key chooses.
    """

    resolution: int = 1024
    tower_size: int = 448
    keep_ratio: bool = True
    sizes: tuple[Size, ...] = ()
    seen_by: str = "bilinear"

    def __post_init__(self) -> None:
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
