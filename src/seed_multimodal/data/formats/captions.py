"""The captions of a record: of its .txt, or under a key of its fields; one rule for every reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seed_multimodal.data.formats.pictures import CAPTION_FIELDS, PICTURE_ENDINGS, other_keys
from seed_multimodal.data.formats.record import BadRecord, FileReader, Record, shorten


def has_caption(fields: Mapping[str, Any], key: str = "") -> bool:
    """Whether something stands where captions do: under `key`, or without one under one of `CAPTION_FIELDS`."""
    return any(fields.get(one) is not None for one in ((key,) if key else CAPTION_FIELDS))


def captions(fields: Mapping[str, Any], key: str, where: str) -> list[str]:
    """The captions of a record: a text or a list of texts under `key`, or without one under the first of
    `CAPTION_FIELDS` that holds something.

    Raises:
        BadRecord: there is none, one is blank, or it is something else.
    """
    if not key:
        there = [one for one in CAPTION_FIELDS if one in fields] or CAPTION_FIELDS[:1]
        key = next((one for one in there if fields.get(one) is not None), there[0])
    if fields.keys() == {"image"} and where.lower().endswith(PICTURE_ENDINGS):
        raise BadRecord("missing member", f"{where}: has no .txt beside it with its caption.")
    if key not in fields:
        null = " or null there" if ": row " in where else ""  # tables do not tell the two apart
        raise BadRecord("missing key", f"{where}: has no caption key {key!r}{null}{other_keys(key, fields)}.")
    value = fields[key]
    found = [value] if isinstance(value, str) else value
    if value is None or found == []:
        raise BadRecord("missing key", f"{where}: has no caption, its {key!r} is {'null' if value is None else '[]'}.")
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise BadRecord("wrong type", f"{where}: its {key!r} is {shorten(value)}, not a text or a list of texts.")
    if not all(text.strip() for text in found):
        raise BadRecord("empty text", f"{where}: its {key!r} is empty.")
    return [_whole_letters(text) for text in found]


def text_member(record: Record, files: FileReader, *, whole: bool = False) -> str | None:
    """The text of a record's .txt, without blanks around it unless `whole`; None without one.

    Raises:
        BadRecord: it is blank, or not UTF-8.
    """
    data = record.member("txt", files=files)
    if data is None:
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecord("malformed text", f"{record.where}: its .txt is not UTF-8 ({error.reason}).") from None
    if not text.strip():
        raise BadRecord("empty text", f"{record.where}: its .txt is empty.")
    return text if whole else text.strip()


def _whole_letters(text: str) -> str:
    """The text with `?` for half a surrogate pair: captions cut inside an emoji end in one, and no tokenizer accepts
    it."""
    return text.encode("utf-8", "replace").decode("utf-8")
