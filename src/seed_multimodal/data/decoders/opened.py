"""Sequences with pictures that are opened beside their record, as pixels: what SEED-X's and LaVIT's decoders share.

A record's pictures are opened before its decoder is called (`picture_fields` names them): anything with `size`, (width,
height) in pixels. In the sequence each takes a run of places, whose contents (features or codes) follow on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from seed_multimodal.data.decoders.base import Decoder, DecoderOptions
from seed_multimodal.data.decoders.sequence import IGNORED, Draws, TokenSequence
from seed_multimodal.data.formats.conversations import NO_IMAGE
from seed_multimodal.data.formats.record import BadRecord, shorten
from seed_multimodal.seed_x.views import Grid, patch_positions
from seed_multimodal.settings import setting


@dataclass(frozen=True)
class UsedPicture:
    """A picture of a sequence: as the record holds it, its grid of parts (None: the whole alone), read or written;
    `seed`: for what is drawn when it is looked at."""

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
        """The centre of each view."""
        found: list[list[float]] = patch_positions(self.grid or (1, 1)).tolist()
        return found[-self.views:]

    @property
    def uses(self) -> tuple[list[bool], list[bool]]:
        """Of each view, whether it is read and whether it is written (of a written picture the whole alone is)."""
        last = [False] * (self.views - 1) + [self.written]
        return [not self.written] * self.views, last


@dataclass
class PictureSequence(TokenSequence):
    """A sequence with its pictures in order, and where their words stand: `read`, `written` (indices of `ids`); `cut`:
    how many tokens were cut off at its end."""

    pictures: list[UsedPicture] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    cut: int = 0


@dataclass(frozen=True)
class OpenedOptions(DecoderOptions):
    """Options of these decoders. Args: base_resolution: side of a view in pixels."""

    base_resolution: int = setting(224, least=1)


class OpenedDecoder(Decoder):
    """Base of these decoders. Note: `Decoder.codes` and its like have no use here, but for pictures given as codes.

    Attributes:
        interpolation: of a picture that is seen as a whole.
    """

    Options: ClassVar[type[DecoderOptions]] = OpenedOptions
    reads_pictures = False  # as codes
    interpolation: ClassVar[str] = "bilinear"

    def picture_fields(self, fields: Mapping[str, Any]) -> list[str]:
        """The fields that name pictures to be opened before the call."""
        names = [name for name in ("image", "source_image", "target_image") if name in fields]
        return [name for name in names if not self.no_picture(fields[name])]

    def opened(self, fields: Mapping[str, Any], open_picture: Callable[[Any, str], Any]) -> dict[str, Any]:
        """The fields with their pictures opened by `open_picture(value, name)`, in `messages` too where these count."""
        found = {**fields, **{name: open_picture(fields[name], name) for name in self.picture_fields(fields)}}
        if "messages" not in self.needs or not isinstance(fields.get("messages"), list):
            return found

        def part(value: Any, name: str) -> Any:
            shown = isinstance(value, Mapping) and value.get("image") is not None
            return {"image": open_picture(value["image"], name)} if shown else value

        found["messages"] = [
            {**message, "content": [part(one, f"messages[{place}].content[{number}]")
                                    for number, one in enumerate(message["content"])]}
            if isinstance(message, Mapping) and isinstance(message.get("content"), list) else message
            for place, message in enumerate(fields["messages"])]
        return found

    def no_picture(self, value: Any) -> bool:
        """Whether a field says that there is none. Note: the released code also takes any path with `null` for that."""
        if isinstance(value, str) and not self.validate:
            return value in ("", "none") or "null" in value
        return value is None or (isinstance(value, str) and value in NO_IMAGE)

    def check_picture(self, picture: Any, name: str) -> None:
        """Raises BadRecord: there is none, or it was not opened."""
        size = getattr(picture, "size", None)
        if picture is None:
            raise BadRecord("missing key", f"{name}: is missing; decoder {self.name} needs it.")
        if not isinstance(size, tuple) or len(size) != 2:
            raise BadRecord("wrong type", f"{name}: must be an opened picture, not {shorten(picture)}.")

    # ------------------------------------------------------------------------------------------ the sequence

    def decode(self, fields: Mapping[str, Any], draws: Draws, max_length: int | None = None) -> PictureSequence:
        """See `Decoder`."""
        draft = self.draft(fields, draws)
        sequence = PictureSequence([], [], draft.extra, draft.dropped)
        if draft.dropped:
            return sequence
        self._check_content(draft)
        self._fill(sequence, draft, None)
        self.limit(sequence, max_length)
        if not sequence.dropped and self.validate and set(sequence.labels) == {IGNORED}:
            sequence.dropped = f"nothing to learn within {max_length} tokens"
        return sequence

    def limit(self, sequence: PictureSequence, max_length: int | None) -> None:
        """Cut an over-long sequence on the right; it is dropped where that would cut a picture."""
        if max_length is None or len(sequence) <= max_length:
            return
        last = max([*sequence.read, *sequence.written], default=-2) + 1  # its closing bracket
        if last >= max_length:
            sequence.dropped = f"a picture ends behind the {max_length} tokens of a sequence"
            return
        sequence.cut = len(sequence) - max_length
        sequence.ids, sequence.labels = sequence.ids[:max_length], sequence.labels[:max_length]
