"""Millions of short strings in two arrays.

A list of Python strings costs about 60 bytes each on top of the text, and forked data workers copy every page whose
reference counts they touch; arrays have no such counts, so all workers share one copy.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class PackedStrings:
    """An immutable sequence of strings: UTF-8 bytes (uint8 [total]) and where each ends (uint32 or int64 [N])."""

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> PackedStrings:
        """Pack strings; undecodable file names are kept, halves of surrogate pairs (of json) become question marks."""
        data, ends = bytearray(), []
        for string in strings:
            try:
                data += string.encode("utf-8", "surrogateescape")
            except UnicodeEncodeError:
                data += string.encode("utf-8", "replace")
            ends.append(len(data))
        return cls(np.frombuffer(bytes(data), np.uint8), np.array(ends, np.uint32 if len(data) < 1 << 32 else np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return self.data[start:int(self.ends[index])].tobytes().decode("utf-8", "surrogateescape")
