"""Lists of files by pattern: webdataset's braces (`{000..123}`, `{a,b}`) and the shell's `*`, `?`, `[...]`, `**`."""

from __future__ import annotations

import difflib
import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from seed_multimodal.errors import DataError

_BRACE = re.compile(r"\{([^{}]*)\}")
_WILD = re.compile(r"[*?\[{]")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_COMPARED = 2000  # names: a folder of pictures may hold a million, to compare which would take minutes


def expand_pattern(pattern: str | Path | Sequence[str | Path]) -> list[Path]:
    """Files behind a pattern or a list of patterns, in the order written (wildcards sorted), each file once.

    Raises:
        DataError: a pattern matches nothing, a file that braces spell out is missing, or an address is no file.
    """
    patterns = [pattern] if isinstance(pattern, str | Path) else list(pattern)
    found: dict[Path, None] = {}
    for one in map(str, patterns):
        if one.startswith("pipe:") or "://" in one:
            raise DataError(f"{one}: only files on disk can be read at random positions; download them first.")
        matches = {name: _files(name) for name in expand_braces(one)}
        missing = [name for name, files in matches.items() if not files]
        if len(missing) == len(matches):
            if Path(one).is_dir():
                raise DataError(f"{one}: no file matches this pattern (it is a folder; try {one.rstrip('/')}/*).")
            if not _WILD.search(one):
                raise DataError(f"{one}: there is no such file or folder{nearest_path(one)}.")
            raise DataError(f"{one}: no file matches this pattern.")
        if missing:
            raise DataError(f"{one}: {len(missing)} of its {len(matches)} files are missing, first {missing[0]}.")
        found.update(dict.fromkeys(file for files in matches.values() for file in files))
    if not found:
        raise DataError("The list of files is empty.")
    return list(found)


def _files(name: str) -> list[Path]:
    if Path(name).is_file():  # also for names with brackets in them
        return [Path(name)]
    return sorted(path for path in map(Path, glob.glob(name, recursive=True)) if path.is_file())


def nearest_path(path: str | Path) -> str:
    """` (did you mean data/nano64?)` for a path that is not there: what lies beside its first part that is missing and
    has almost its name; an empty string where there is nothing, or too much to compare it all."""
    place = Path(path)
    while not place.parent.is_dir() and place.parent != place:
        place = place.parent
    try:
        with os.scandir(place.parent) as entries:  # `iterdir` would read all of them first
            names = [one.name for one in itertools.islice(entries, _COMPARED + 1)]
    except OSError:  # a folder that may not be listed
        return ""
    close = difflib.get_close_matches(place.name, names, n=1) if len(names) <= _COMPARED else []
    return f" (did you mean {place.with_name(close[0])}?)" if close else ""


def expand_braces(pattern: str) -> Iterator[str]:
    """What a pattern spells out by braces, in the order written; itself without any."""
    match = _BRACE.search(pattern)
    if match is None:
        yield pattern
        return
    span = _RANGE.fullmatch(match[1])
    if span:
        width = len(span[1]) if span[1].startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(int(span[1]), int(span[2]) + 1)]
    else:
        choices = match[1].split(",")
    for choice in choices:
        yield from expand_braces(pattern[:match.start()] + choice + pattern[match.end():])
