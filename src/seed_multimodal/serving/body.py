"""A request's body -> its JSON value, in bounded memory.

`json` needs the body, its text and every string of it at once, four bytes a letter as soon as one emoji stands
somewhere: 64 MiB of body can take 600 MB, and a list of numbers more. So long strings are taken out while the body is
read; what remains must be small, and is parsed as usual. A string too long for a text can only be a picture: it stays
as it came (bytes of base64).
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from typing import IO, Any

from seed_multimodal.errors import RequestError
from seed_multimodal.serving.schema import Limits

PIECE = 1 << 16
LONG = 1 << 12  # strings of more bytes are taken out
REST = 1 << 18  # most bytes beside them
OTHER_TEXTS = 8  # long strings beside the pictures
MOST_ESCAPES = 1 << 16  # backslashes right before quotation marks in one string, and the longest row of them looked at
_NO_BASE64 = re.compile(rb"[^\x00-\x7f]|\\u(?!00[2-7])")


def read_body(stream: IO[bytes], limits: Limits) -> Any:
    """The JSON value of a body; strings longer than any text are `bytes`.

    Raises:
        RequestError: not JSON, not UTF-8, nested too deep, or more values than a request has.
    """
    mark = secrets.token_hex(16)
    rest, taken = _without_long_strings(_pieces(stream, limits), mark, limits)
    try:
        value = json.loads(rest.decode("utf-8-sig"))
        return _restored(value, mark, [_text_or_bytes(one, limits) for one in taken])
    except RecursionError as error:
        raise RequestError("The request body is nested too deep; it must be an object of texts, numbers and "
                           "lists.") from error
    except ValueError as error:
        raise RequestError("The request body is not valid JSON.") from error


def _pieces(stream: IO[bytes], limits: Limits) -> Iterator[bytes]:
    read = 0
    while piece := stream.read(PIECE):
        read += len(piece)
        if limits.max_body_bytes is not None and read > limits.max_body_bytes:
            raise BodyTooLong
        yield piece


class BodyTooLong(RequestError):
    """A body over the limit whose header did not say so."""

    def __init__(self) -> None:
        super().__init__("The request body is too long.")


def _without_long_strings(pieces: Iterator[bytes], mark: str, limits: Limits) -> tuple[bytearray, list[bytearray]]:
    """The JSON with `"mark number"` in place of each long string, and those strings as they stand in it."""
    rest = bytearray()
    taken: list[bytearray] = []
    string: bytearray | None = None
    longest = limits.max_image_bytes * 3 // 2 + PIECE
    escapes = 0
    for piece in pieces:
        at = 0
        while at < len(piece):
            quote = piece.find(b'"', at)
            end = len(piece) if quote < 0 else quote
            target = rest if string is None else string
            target += piece[at:end]
            at = end + 1
            if string is not None and len(string) > longest:
                raise RequestError(f"The request holds a text of over {longest >> 20} MiB; a picture has at most "
                                   f"{limits.max_image_bytes >> 20} MiB.")
            if len(rest) > REST:
                raise RequestError(f"The request holds over {REST >> 10} KiB beside its pictures and texts; lists of "
                                   f"codes are shorter.")
            if quote < 0:
                break
            if string is None:
                string, escapes = bytearray(), 0
            elif _is_escaped(string):
                string += b'"'
                escapes += 1
                if escapes > MOST_ESCAPES:
                    raise RequestError("The request holds a text with too many quotation marks.")
            else:
                if len(string) > LONG:
                    if len(taken) == limits.max_images + OTHER_TEXTS:
                        raise RequestError(f"The request holds over {len(taken)} long texts; at most "
                                           f"{limits.max_images} pictures are accepted.")
                    rest += f'"{mark}{len(taken)}"'.encode()
                    taken.append(string)
                else:
                    rest += b'"' + string + b'"'
                string = None
    if string is not None:
        raise RequestError("The request body is not valid JSON.")
    return rest, taken


def _is_escaped(string: bytearray) -> bool:
    """Whether a quotation mark after these bytes belongs to the string: an odd number of backslashes before it."""
    if not string.endswith(b"\\"):
        return False
    tail = bytes(string[-MOST_ESCAPES:])
    return (len(tail) - len(tail.rstrip(b"\\"))) % 2 == 1


def _text_or_bytes(string: bytearray, limits: Limits) -> str | bytes:
    """A string of JSON: its text, or, where it is too long for one, base64 without JSON's escapes."""
    if len(string) <= 12 * limits.max_text_chars:  # a letter takes at most 12 bytes: 😀
        text: str = json.loads(b'"' + string + b'"')
        return text
    if b"\\" not in string or _NO_BASE64.search(string):
        return bytes(string)
    return json.loads(b'"' + string + b'"').encode("ascii")  # type: ignore[no-any-return]


def _restored(value: Any, mark: str, taken: list[str | bytes]) -> Any:
    """The long strings back in their places: values of the object, and of lists in it."""
    if isinstance(value, str) and value.startswith(mark):
        return taken[int(value.removeprefix(mark))]
    if isinstance(value, list):
        return [_restored(one, mark, taken) if isinstance(one, str) else one for one in value]
    if isinstance(value, dict):
        return {_restored(key, mark, taken): _restored(one, mark, taken) for key, one in value.items()}
    return value
