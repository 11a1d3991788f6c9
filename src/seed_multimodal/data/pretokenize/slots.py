"""Places in a record for the codes of pictures, filled when the pictures are encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seed_multimodal.language.vocabulary import ImageVocabulary


@dataclass(frozen=True)
class Slot:
    """A place in a record for pictures, by their numbers in the sample.

    `form`: `codes` (one picture after the other), `views` (the codes of each view; the key is left out when there is
    only one), `codes or views` (views only when there are several), or `none` (None). A place in a list whose picture
    could not be read is left out.
    """

    pictures: tuple[int, ...]
    form: str = "codes"


@dataclass(frozen=True)
class Joined:
    """A text with the words of pictures in it: texts, and numbers of pictures between them."""

    pieces: tuple[str | int, ...]


_LEFT_OUT = object()


def filled(
    record: Mapping[str, Any], codes: Sequence[list[list[int]] | None], vocabulary: ImageVocabulary
) -> dict[str, Any]:
    """A record with codes in its slots.

    Args:
        codes: of each picture its views; None: an optional picture that could not be read.
    """

    def put(value: Any) -> Any:
        if isinstance(value, Slot):
            pictures = [codes[number] for number in value.pictures]
            if None in pictures:
                return _LEFT_OUT
            return _in_form(value.form, pictures)  # type: ignore[arg-type]
        if isinstance(value, Joined):
            return "".join(one if isinstance(one, str) else vocabulary.image_text(codes[one][0])  # type: ignore[index]
                           for one in value.pieces)
        if isinstance(value, list):
            return [made for one in value if (made := put(one)) is not _LEFT_OUT]
        if isinstance(value, dict):
            return {key: made for key, one in value.items() if (made := put(one)) is not _LEFT_OUT}
        return value

    own = {"metadata": record["metadata"]} if "metadata" in record else {}  # of any depth, and without slots
    found: dict[str, Any] = put({key: value for key, value in record.items() if key != "metadata"})
    return {**found, **own}


def _in_form(form: str, pictures: list[list[list[int]]]) -> Any:
    if form == "none":
        return None
    several = len(pictures[0]) > 1
    if form == "views" or (form == "codes or views" and several):
        return pictures[0] if several else _LEFT_OUT
    return [code for views in pictures for code in views[0]]
