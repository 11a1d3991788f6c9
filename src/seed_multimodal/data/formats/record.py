"""One training record of the language model, and json read so that what is broken is named.

Every source (tar, jsonl, json, parquet) gives `LlmRecord`s; decoders turn their `fields` into token sequences.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seed_multimodal.errors import DataError


@dataclass(frozen=True)
class LlmRecord:
    """One record as stored.

    Args:
        key: unique within its source: the file (relative to the source's folder, without suffix) and the place in it,
            such as `part-0000/0000007/3f2a…`, `train/line12`.
        where: `FILE: line 12`, `FILE: sample KEY`, `FILE: item 3` or `FILE: row 3`, as errors show it.
        fields: names of the released shards (`image_ids`, `text`, `question`, …), and `messages` for conversations
            (see `data.formats.conversations`).
    """

    key: str
    where: str
    fields: dict[str, Any]


class BadRecord(DataError):
    """A record that cannot be used; `kind` is what is wrong in a word or two, for counting."""

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.kind = kind

    def __reduce__(self) -> tuple[type[BadRecord], tuple[str, str]]:  # survives the way back from a worker process
        return BadRecord, (self.kind, str(self))


def parse_object(data: bytes | str, where: str) -> dict[str, Any]:
    """A json object from its bytes.

    Raises:
        BadRecord: no json, no object, or text with half of a surrogate pair (which no tokenizer can encode).
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # also undecodable bytes
        reason = f"{error.msg}, at character {error.pos}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise BadRecord("malformed json", f"{where}: is not json ({reason}).") from None
    if not isinstance(value, dict):
        raise BadRecord("malformed json", f"{where}: holds a {type(value).__name__}, not an object.")
    refuse_half_pairs(value, data, where)
    return value


def refuse_half_pairs(value: Any, data: bytes | str, where: str) -> None:
    """Refuse texts with half of a surrogate pair, escaped or (json's reader lets them pass) as bytes of their own.

    Args:
        value: what `data`, json, holds.

    Raises:
        BadRecord: there is one.
    """
    small = data.lower() if isinstance(data, bytes) else data.lower().encode("utf-8", "surrogatepass")
    if b"\\ud" in small or b"\xed" in small:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadRecord("malformed json", f"{where}: a text holds half of a surrogate pair.") from None


def find_image(path: str, root: str | Path | None = None, beside: str | Path | None = None) -> Path | None:
    """Where the picture of a record lies, or None.

    Args:
        path: as the record names it. A leading slash may mean `root`, as in SEED-X's lists.
        root: the folder of pictures. Without it: relative to the folder of the file `beside`, then to the current one.
    """
    folders = [Path(root)] if root is not None else [Path(beside).parent if beside else Path(), Path()]
    places = [Path(path)] if Path(path).is_absolute() else []
    places += [folder / path.lstrip("/") for folder in folders]
    return next((place for place in places if _is_file(place)), None)


def _is_file(place: Path) -> bool:
    try:
        return place.is_file()
    except OSError:  # the name is too long for a file, such as a picture written out as base64; or a closed folder
        return False
