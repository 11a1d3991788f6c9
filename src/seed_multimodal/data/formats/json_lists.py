"""Positions of the items in a .json list, found by a walk through windows of its text."""

from __future__ import annotations

import codecs
import io
import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.errors import DataError, first_line

BLOCK = 1 << 24
LISTS = ("annotations",)  # keys whose list is meant, in a file that holds one object around it (COCO captions)
BOM = b"\xef\xbb\xbf"
_BLANK = " \t\r\n"


def index_array(path: Path, keys: Sequence[str] = LISTS) -> tuple[np.ndarray, np.ndarray]:
    """(first byte, end) of each item of a json list, each int64 [N]; the list may stand under one of these keys.

    Raises:
        DataError: no json list; the sentence names the line and the item where it breaks off.
    """
    with opened(path) as file:
        return _Scanner(path, file, keys).items()


class _Scanner:
    """Walks through the list of a json file, a window of text at a time."""

    def __init__(self, path: Path, file: io.BufferedReader, keys: Sequence[str]) -> None:
        self.path, self.file, self.keys = path, file, keys
        self.bom = file.peek(3).startswith(BOM)
        self.decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")  # an item that is not UTF-8 is bad
        self.parse = json.JSONDecoder().raw_decode
        self.text, self.place = "", 0  # the window, and the position in it
        self.byte = 0  # the byte in the file of `text[place]`
        self.line = 1
        self.item = -1
        self.ended = False

    def items(self) -> tuple[np.ndarray, np.ndarray]:
        """See `index_array`."""
        self._more()
        if self.bom:
            self.byte = len(BOM)
        opening = self._next()
        if opening == "{":
            opening = self._enter()
        if "\udc80" <= opening <= "\udcff":
            raise self._broken("it is not UTF-8")
        if opening != "[":
            raise self._broken("must hold a list of records, or one object per line" if self.keys == LISTS else
                               f"must hold a list of records, by itself or under {' or '.join(map(repr, self.keys))}")
        self._step(1)
        starts, ends = array("q"), array("q")
        if self._next() == "]":
            self._finish()
            return np.empty(0, np.int64), np.empty(0, np.int64)
        while True:
            self._next()
            self.item += 1
            starts.append(self.byte)
            self._value()
            ends.append(self.byte)
            after = self._next()
            if after == "]":
                self._finish()
                return np.array(starts, np.int64), np.array(ends, np.int64)
            if after != ",":
                raise self._broken(f"',' or ']' is missing after item {self.item}")
            self._step(1)

    def _enter(self) -> str:
        """Enter the list under one of `keys` of the object that opens here; returns "[" when it is found."""
        self._step(1)
        while self._next() == '"':
            key = self._value()
            if self._next() != ":":
                break
            self._step(1)
            if key in self.keys:
                return self._next()
            self._next()
            self._value()
            if self._next() != ",":
                break
            self._step(1)
        return ""

    def _finish(self) -> None:
        """Check that nothing follows a bare list; what follows a list under a key is ignored."""
        self._step(1)
        rest = self._next()
        if rest and rest not in ",}":
            raise self._broken("there is more after the list's end")

    def _next(self) -> str:
        """The next character that is no blank ("" at the end); `place` stands at it."""
        while True:
            rest = self.text[self.place:self.place + 4096]
            blanks = len(rest) - len(rest.lstrip(_BLANK))
            self._step(blanks)
            if self.place < len(self.text):
                return self.text[self.place]
            if not self._more():
                return ""

    def _value(self) -> Any:
        """Parse one json value and move past it."""
        while True:
            problem: Exception
            try:
                value, end = self.parse(self.text, self.place)
                if end < len(self.text) or self.ended or self.text[end - 1] in '"]}':
                    self._step(end - self.place)
                    return value  # a number may continue past the window's end
                problem = ValueError("breaks off")
            except json.JSONDecodeError as error:
                problem = error
                # Deep inside the window it is an error; at its end, or in an open string, more text may complete it.
                if not error.msg.startswith("Unterminated string") and error.pos < len(self.text) - 16:
                    raise self._broken(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:
                deep = isinstance(error, RecursionError)
                raise self._broken("it is nested too deeply" if deep else first_line(error)) from None
            if not self._more():
                raise self._broken(getattr(problem, "msg", str(problem)), getattr(problem, "pos", self.place)) from None

    def _step(self, count: int) -> None:
        if count:
            passed = self.text[self.place:self.place + count]
            self.byte += count if passed.isascii() else len(passed.encode("utf-8", "surrogateescape"))
            self.line += passed.count("\n")
            self.place += count

    def _more(self) -> bool:
        """Drop the text already parsed and read more: at least as much as is left, so that a huge item is not parsed
        over and over again; False at the end."""
        if self.ended:
            return False
        data = self.file.read(max(BLOCK // 4, len(self.text) - self.place))
        self.ended = not data
        self.text, self.place = self.text[self.place:] + self.decode.decode(data, final=self.ended), 0
        return not self.ended

    def _broken(self, reason: str, position: int | None = None) -> DataError:
        line = self.line + (self.text.count("\n", self.place, position) if position is not None else 0)
        item = f", item {self.item}" if self.item >= 0 else ""
        return BadRecord("malformed json", f"{self.path}: line {line}{item}: is not a json list ({reason}).")


def opened(path: Path) -> io.BufferedReader:
    try:
        file = open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror}).") from None
    if file.peek(2)[:2] == b"\x1f\x8b":
        file.close()
        raise BadRecord("damaged file", f"{path}: compressed files cannot be read at random positions; unpack it with "
                        "gunzip first.")
    return file
