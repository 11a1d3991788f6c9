"""Input files by patterns with webdataset's braces (`{000..123}`, `{a,b}`) and wildcards, by folder, by format."""

from __future__ import annotations

import difflib
import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from braceexpand import braceexpand

from seed_multimodal.data.formats.pictures import is_picture
from seed_multimodal.data.formats.registry import registered
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.settings import nearest

SUFFIXES = {"tar": (".tar", ".tar.gz", ".tgz"), "jsonl": (".jsonl", ".ndjson", ".jsonl.gz"),
            "json": (".json", ".json.gz"),  # compressed ones are found in order to be refused, not passed over
            "parquet": (".parquet",)}
OF_DOWNLOADS = "_stats.json"  # what img2dataset writes beside its shards
OF_EXTRACTIONS = ("manifest.json", "settings.json")  # what pre-tokenisation writes beside its shards
_WILD = re.compile(r"[*?\[{]")
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
        with _looking(one):
            matches = {name: [path for path in _matches(name) if path.is_file()] for name in expand_braces(one)}
        missing = [name for name, files in matches.items() if not files]
        if len(missing) == len(matches):
            if Path(one).is_dir():
                raise DataError(f"{one}: no file matches this pattern (it is a folder; try {one.rstrip('/')}/*).")
            if Path(one).exists():
                raise DataError(f"{one}: is no file on disk, so it cannot be read at random positions.")
            if Path(one).is_symlink():
                raise DataError(f"{one}: is a link to {os.readlink(one)}, which is not there.")
            if not _WILD.search(one):
                raise DataError(f"{one}: there is no such file or folder{nearest_path(one)}.")
            raise DataError(f"{one}: no file matches this pattern.")
        if missing:
            raise DataError(f"{one}: {len(missing)} of its {len(matches)} files are missing, first {missing[0]}.")
        found.update(dict.fromkeys(file for files in matches.values() for file in files))
    if not found:
        raise DataError("The list of files is empty.")
    return list(found)


def find_files(given: Sequence[str | Path], format: str = "auto", *, pictures: bool = False,
               recursive: bool = True) -> list[tuple[Path, str]]:
    """(file, its format) of each file behind the patterns and folders, each once.

    Args:
        pictures: a folder may hold pictures, too: lists and tables in it name them, and without any it is one input of
            format `folder`.
        recursive: folders are searched at any depth.

    Raises:
        ConfigError: an unknown format. DataError: nothing matches, or a folder holds several kinds of files.
    """
    if format in registered():
        return [(Path(one), format) for one in given]
    known = [*SUFFIXES, *(["folder"] if pictures else []), *registered()]
    if format not in ("auto", *known):
        raise ConfigError(f"{', '.join(map(str, given))}: format must be auto, {', '.join(known)}, not {format!r}"
                          f"{nearest(format, known)}.")
    found: dict[Path, str] = {}
    if not given:
        raise DataError("The list of files is empty.")
    for one in given:
        with _looking(one):
            folders = _folders(str(one))
            for folder in folders:
                found.update(_in_folder(folder, format, pictures, recursive))
            if not folders:
                found.update((path, _format_of(path, format)) for path in expand_pattern(one))
    return list(found.items())


@contextmanager
def _looking(pattern: str | Path) -> Iterator[None]:
    """A folder that may not be entered, or a name too long for a file, becomes a sentence."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{str(pattern)[:200]}: cannot be looked up ({error.strerror}).") from None


def nearest_path(path: str | Path) -> str:
    """` (did you mean data/nano?)` for a path that is not there: the most similar name beside its first missing part;
    an empty string where there is none, or too many to compare."""
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
    """The patterns that a pattern's braces expand to, in the order written; without braces the pattern itself."""
    try:
        yield from braceexpand(pattern, escape=False)
    except ValueError:  # unbalanced: the name of a file may hold one
        yield pattern


def _matches(name: str) -> Iterable[Path]:
    """Existing paths of this name (which may hold brackets) or matching this pattern of wildcards."""
    return [Path(name)] if Path(name).exists() else sorted(map(Path, glob.glob(name, recursive=True)))


def _folders(pattern: str) -> list[Path]:
    """The folders that a path, or a pattern whose every match is a folder, means; an empty list where it means files.

    Raises:
        DataError: some of the folders that braces spell out are missing.
    """
    if Path(pattern).is_dir():
        return [Path(pattern)]
    matches = {one: list(_matches(one)) for one in expand_braces(pattern)}
    places = [match for some in matches.values() for match in some]
    if not places or not all(place.is_dir() for place in places):
        return []
    missing = [one for one, some in matches.items() if not some]
    if missing:
        raise DataError(f"{pattern}: {len(missing)} of its {len(matches)} folders are missing, first {missing[0]}.")
    return places


def _in_folder(folder: Path, format: str, pictures: bool, recursive: bool) -> dict[Path, str]:
    kinds: dict[str, list[Path]] = {}
    notes: set[str] = set()
    shown: set[Path] = set()  # pictures, without their suffixes
    for path in sorted(folder.glob("**/*" if recursive else "*")):
        kind = _suffix_format(path)
        if pictures and is_picture(path):
            shown.add(path.with_suffix(""))
        elif kind and format in ("auto", kind, kind[:4]) and path.is_file() and not path.name.startswith("."):
            if _is_note(path):
                notes.add(path.name)
            else:
                kinds.setdefault(kind, []).append(path)
    if "tar" in kinds:
        kinds.pop("json", None)  # beside shards these are manifests and statistics
    if pictures and "json" in kinds:
        kinds["json"] = [path for path in kinds["json"]
                         if path.with_suffix("") not in shown and not path.name.endswith(OF_DOWNLOADS)]
    kinds = {kind: paths for kind, paths in kinds.items() if paths}
    if pictures and format in ("auto", "folder") and shown and not kinds:
        return {folder: "folder"}
    if not kinds and notes:
        raise DataError(f"{folder}: there are no records in it, only {' and '.join(sorted(notes))}: "
                        "the extraction that made it wrote none.")
    if not kinds:
        wanted = ", ".join(SUFFIXES if format == "auto" else (format,)) + " files"
        wanted = "pictures" if format == "folder" else f"{wanted} or pictures" if pictures else wanted
        raise DataError(f"{folder}: this folder holds no {wanted}{', at any depth' if recursive else ''}.")
    if len(kinds) > 1 and format == "auto":
        raise DataError(f"{folder}: this folder holds {' and '.join(kinds)} files; give the format, or name "
                        "files.")
    return {path: kind for kind, paths in kinds.items() for path in paths}


def _is_note(path: Path) -> bool:
    """Whether a file of a folder is a report of pre-tokenisation; a list of records may have the same name."""
    if path.name not in OF_EXTRACTIONS:
        return False
    try:
        with open(path, "rb") as file:
            return file.read(2) == b"{\n"
    except OSError:
        return False


def _format_of(path: Path, format: str) -> str:
    kind = _suffix_format(path)
    if format != "auto":
        return kind if kind[:4] == format else format  # lines of json are json
    if not kind:
        known = ", ".join(ending for endings in SUFFIXES.values() for ending in endings)
        raise DataError(f"{path}: its suffix tells no format (known: {known}); give the format.")
    return kind


def _suffix_format(path: Path) -> str:
    name = path.name.lower()
    return next((kind for kind, endings in SUFFIXES.items() if name.endswith(endings)), "")
