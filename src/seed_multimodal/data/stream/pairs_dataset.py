"""From stored pairs to training samples: the image opened and transformed, one caption chosen and cleaned.

What is random about a sample is a function of (seed, epoch, index). A sample that cannot be used is named once,
counted, and replaced by the next usable one; `max_bad_in_a_row` in a row end the run.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from seed_multimodal.data.formats.pairs import SAMPLE_FAULTS, Pair, Pairs
from seed_multimodal.data.stream.sampler import SHUFFLE_BLOCK
from seed_multimodal.errors import DataError
from seed_multimodal.images.io import open_image


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
                sample = self.sample(self.source.read(place), torch.Generator().manual_seed(number), number)
            except SAMPLE_FAULTS as error:
                self.note_bad(self.source.key(place), str(error))
                last = error
            else:
                return {**sample, "index": place}
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
