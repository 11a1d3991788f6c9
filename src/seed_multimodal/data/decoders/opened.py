"""Sequences with images that are opened with their record: what SEED-X's and LaVIT's decoders share.

In a sequence an image has a run of places, whose contents (features or codes) are made on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from seed_multimodal.data.decoders.base import IGNORED, Decoder, DecoderOptions, Draft, SeededDraws, TokenSequence
from seed_multimodal.data.formats.conversations import NO_IMAGE
from seed_multimodal.data.formats.record import BadRecord, shorten
from seed_multimodal.seed_x.views import Grid, patch_positions
from seed_multimodal.settings import setting


@dataclass(frozen=True)
class UsedPicture:
    """An opened image, its grid of parts (None: the whole alone), and the `seed` of random choices at its encoding."""

    picture: Any
    grid: Grid | None
    written: bool = False
    seed: int = 0

    @property
    def views(self) -> int:
        """The parts and the whole."""
        return 1 if self.grid is None else self.grid[0] * self.grid[1] + 1

    @property
    def positions(self) -> list[list[float]]:
        """The centre (x, y) of each view."""
        found: list[list[float]] = patch_positions(self.grid or (1, 1)).tolist()
        return found[-self.views:]


@dataclass
class PictureSequence(TokenSequence):
    """A sequence with its images, and the indices of their words in `ids`."""

    pictures: list[UsedPicture] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    written: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class OpenedOptions(DecoderOptions):
    base_resolution: int = setting(224, least=1)  # side of a view in pixels


class OpenedDecoder(Decoder):
    """Base of these decoders; `interpolation` is that of an image seen as a whole."""

    Options: ClassVar[type[DecoderOptions]] = OpenedOptions
    interpolation: ClassVar[str] = "bilinear"
    image_fields: ClassVar[tuple[str, ...]] = ("image", "source_image", "target_image")

    def opened(self, fields: Mapping[str, Any], open_picture: Callable[[Any, str], Any]) -> dict[str, Any]:
        """The fields with their images opened by `open_picture(value, name)`."""
        return {**fields, **{name: open_picture(fields[name], name) for name in self.image_fields
                             if fields.get(name, "") not in NO_IMAGE}}

    def opened_image(self, fields: Mapping[str, Any], name: str) -> Any:
        """The opened image of a field."""
        image: Any = self.need(fields, name, object)
        if not hasattr(image, "size"):
            raise BadRecord("wrong type", f"{name}: must be an opened image, not {shorten(image)}.")
        return image

    def decode(self, fields: Mapping[str, Any], draws: SeededDraws, max_length: int | None = None) -> PictureSequence:
        """As of `Decoder`, but images are never cut."""
        draft = self._draft(fields, draws)
        sequence = PictureSequence([], [], draft.extra, draft.dropped or self._nothing_learned(draft))
        if not sequence.dropped:
            self._fill(sequence, draft)
            self._limit(sequence, max_length)
        if not sequence.dropped and set(sequence.labels) == {IGNORED}:
            sequence.dropped = f"there is nothing to learn within {max_length} tokens"
        return sequence

    def _fill(self, sequence: PictureSequence, draft: Draft) -> None:
        """Put the ids and labels of the segments into the sequence."""
        raise NotImplementedError

    def add(self, sequence: PictureSequence, ids: Sequence[int], labels: Sequence[int], image: UsedPicture | None = None
            ) -> None:
        """Add a text, or the words of an image."""
        if image is not None:
            places = sequence.written if image.written else sequence.read
            places += [len(sequence) + place for place, id in enumerate(ids) if self.vocabulary.is_code_id(id)]
            sequence.pictures.append(image)
        sequence.ids += ids
        sequence.labels += labels

    def _limit(self, sequence: PictureSequence, max_length: int | None) -> None:
        """Cut an over-long sequence on the right; it is dropped where that would cut an image, or ends in one."""
        if max_length is None or len(sequence) <= max_length:
            return
        last = max([*sequence.read, *sequence.written], default=-2) + 1  # its closing bracket
        if last >= max_length or self.vocabulary.eoi_id in sequence.ids[-2:]:
            sequence.dropped = f"its images do not fit into {max_length} tokens"
            return
        sequence.cut = len(sequence) - max_length
        sequence.ids, sequence.labels = sequence.ids[:max_length], sequence.labels[:max_length]
