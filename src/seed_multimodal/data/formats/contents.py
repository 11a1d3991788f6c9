"""What users' files and folders hold.

`find_files`         patterns and folders → files with their formats
`folder_contents`    a folder → its files by format
`sniff`              first bytes of a file → what it is
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path

from braceexpand import braceexpand

from seed_multimodal.config import read_table
from seed_multimodal.data.formats.storage import (
    by_folder,
    entry_types,
    is_remote,
    list_files,
    open_binary,
    read_safely,
    remote_files,
)
from seed_multimodal.disk import path_type
from seed_multimodal.entry import log_line, rank_and_world_size
from seed_multimodal.errors import ConfigError, DataError, foreign_content, pluralize
from seed_multimodal.plugins import registered
from seed_multimodal.settings import nearest

_TABLES = read_table(__file__)
# Image members of shards, and image files.
IMAGE_KEYS: list[str] = _TABLES["images"]
IMAGE_SUFFIXES = tuple(f".{key}" for key in IMAGE_KEYS)
FOLDER = "folder"  # format of a folder of images
FORMATS = ("tar", "jsonl", "json", "parquet", "arrow", "csv")
# Suffix of a file → what it is: a format, an image, or what `CURES` is for.
SUFFIXES: dict[str, str] = {
    **{f".{format}": format for format in FORMATS},
    **dict.fromkeys(IMAGE_SUFFIXES, FOLDER),
    **_TABLES["suffixes"],
}
# Configured format → formats of the files that are read, by their suffixes.
_ACCEPTED = {"auto": FORMATS, **{name: (name,) for name in FORMATS}, "json": ("json", "jsonl")}
# First bytes of a file → what it is.
_CONTENTS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\xff\xff\xff\xff": "arrow",
}
BOM = b"\xef\xbb\xbf"
CURES: dict[str, str] = _TABLES["cures"]  # what is never read → what to do
SIDE_FILES: list[str] = _TABLES["side_files"]  # of other tools
QUESTIONS, ANNOTATIONS = "_questions.json", "_annotations.json"  # of VQA, which are joined
_WILDCARD = re.compile(r"[*?\[]")
# The beginning of a list of images: a field of an image, or the name of a file.
_IMAGE_FIELD = re.compile(
    r'"(images?|image_?(id|path|file|name)s?|img|file_?name|source_image)"\s*:', re.IGNORECASE
)
_IMAGE_NAME = re.compile(rf'[^"/\\,<>\n]+(?:{"|".join(IMAGE_SUFFIXES)})', re.IGNORECASE)
LIST_HEAD = 1 << 16  # bytes
LISTED_FILES = 16  # of a folder, whose types are read from one listing
_SPLIT = re.compile(r"[/_.-](train|test|val|valid|validation|dev)(?=[/_.-])")


def sniff(head: bytes) -> str:
    """What a file is by its first 512 bytes: a format, a key of `CURES`, or ""."""
    for start, content in _CONTENTS.items():
        if head.startswith(start):
            return content
    if head[257:262] == b"ustar":
        return "tar"
    is_json = head.removeprefix(BOM).lstrip()[:1] in (b"{", b"[")
    return "json" if is_json else ""


def check_readable(path: str | Path, head: bytes) -> None:
    """Raise DataError, with the cure, if a file is compressed or its text is not UTF-8."""
    cure = CURES.get(sniff(head))
    if cure is not None:
        raise DataError(f"{path}: {cure}.")


def check_text(path: str | Path, head: bytes) -> None:
    """As `check_readable`; also if a file has come in place of a text."""
    check_readable(path, head)
    content = foreign_content(head)
    if content:
        raise DataError(f"{path}: is {content}.")


@cache
def registered_formats() -> dict[str, EntryPoint]:
    """Formats of other packages."""
    return registered("formats")


# ---- files


def find_files(patterns: Sequence[str | Path], format: str = "auto") -> list[tuple[str, str]]:
    """(file, format) of each distinct file that matches the patterns and folders.

    format: auto: by suffix, else by content.
        A folder of images without shards, lists and tables has format `folder`.

    Raises ConfigError: unknown format; DataError: nothing matches, a folder has files of several
    formats, or a file is not read as it is.
    """
    # 1. The format must be one of these.
    formats = [*FORMATS, FOLDER, *registered_formats()]
    if format not in ("auto", *formats):
        raise ConfigError(
            f"{', '.join(map(str, patterns))}: format must be auto, {', '.join(formats)}, not "
            f"{format!r}{nearest(format, formats)}."
        )
    if not patterns:
        raise DataError("The list of files is empty.")

    # 2. The format of each file; a dictionary, since patterns may overlap.
    format_of: dict[str, str] = {}
    for path, is_folder in expand_pattern(patterns).items():
        if is_folder:
            format_of.update(_in_folder(path, format))
        elif _by_suffix(path) in _ACCEPTED.get(format, ()):
            format_of[path] = _by_suffix(path)
        else:
            format_of[path] = _content_format(path) if format == "auto" else format

    # 3. Questions are read with their annotations.
    if any(path.endswith(ANNOTATIONS) for path in format_of):
        format_of = {path: name for path, name in format_of.items() if not path.endswith(QUESTIONS)}
    return list(format_of.items())


def _content_format(path: str) -> str:
    """The format of a file whose suffix says none. Raises DataError: it is not read."""
    content = _by_suffix(path) or sniff(read_safely(path, lambda: _head(path)))
    if content in FORMATS:
        return content
    reason = f"unknown suffix (known: {', '.join(FORMATS)}); set the format"
    if content == FOLDER:
        reason = "is an image; give the folder of the images, or a list"
    raise DataError(f"{path}: {CURES.get(content, reason)}.")


def _head(path: str, size: int = 512) -> bytes:
    with open_binary(path) as file:
        return file.read(size)


def expand_pattern(patterns: Sequence[str | Path]) -> dict[str, bool]:
    """Distinct files matching patterns, in order (wildcards sorted), and whether each is a folder.

    Folders are there where no file matches.

    Raises DataError: a pattern matches nothing, or a file named by braces is missing.
    """
    # 1. The names that braces stand for; a file or folder whose name has braces is itself.
    names: list[str] = []
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        is_name = "{" not in expanded or os.path.exists(expanded)
        names += [expanded] if is_name else braceexpand(expanded, escape=False)

    # 2. The paths of each.
    types = _path_types([name for name in names if not is_remote(name)])
    matches: dict[str, bool] = {}
    for name in names:
        paths = _matches(name, types)
        if not paths:
            reason = f"no such file or folder{nearest_path(name)}"
            if _WILDCARD.search(name):
                reason = "no file matches this pattern"
            raise DataError(f"{name[:200]}: {reason}.")
        # Folders are used only where no file matches.
        files = [path for path, is_folder in paths.items() if not is_folder]
        matches.update(dict.fromkeys(files, False) if files else paths)
    return matches


def nearest_path(path: str | Path) -> str:
    """` (did you mean 'nano'?)`: the most similar name in the folder of a missing path."""
    folder, name = os.path.split(path)
    folder = folder or "."
    if not os.path.isdir(folder):
        return ""
    return nearest(name, os.listdir(folder)[:2000])


def _matches(name: str, types: Mapping[str, str]) -> dict[str, bool]:
    """Paths with this name or matching its wildcards, and whether each is a folder.

    types: of local names. Whether remote files exist is not checked; URLs are classified by suffix.
    """
    if is_remote(name):
        urls = remote_files(name, "glob") if _WILDCARD.search(name) else [name]
        return {url: not _by_suffix(url) for url in urls}
    # A file whose name has wildcards is itself.
    if types[name]:
        return {name: types[name] == "folder"}
    # Without broken links, sockets and devices.
    paths = sorted(glob.glob(name, recursive=True))
    return {path: type == "folder" for path, type in _path_types(paths).items() if type}


def _path_types(paths: Collection[str]) -> dict[str, str]:
    """Path → `disk.path_type`, of many paths in a folder by one listing."""
    types = {}
    for folder, files in by_folder(paths, LISTED_FILES).items():
        with contextlib.suppress(OSError):  # a folder that may be searched, but not listed
            listed = entry_types(folder or ".")
            types.update({path: listed.get(name) for name, path in files.items()})
    return {path: types.get(path) or path_type(path) for path in paths}


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _by_suffix(path: str) -> str:
    """What a file is by its suffix, or ""."""
    return SUFFIXES.get(_suffix(path), "")


# ---- folders


def folder_contents(folder: str, any_list: bool = False) -> dict[str, list[str]]:
    """The files at any depth below a folder by format, images under `folder`, others by suffix.

    Side files of other tools are left out. Beside images so is, with a line in the log, what
    neither lists images nor lies beside one, unless `any_list`.
    """
    # 1. Each file by its suffix.
    files = list_files(folder)
    contents: dict[str, list[str]] = {}
    for path in files:
        content = _by_suffix(path)
        is_read = content in (*FORMATS, FOLDER)
        contents.setdefault(content if is_read else _suffix(path), []).append(path)

    # 2. What describes others; where most .json files do, the others miss their image.
    stems = {
        format: {os.path.splitext(path)[0] for path in contents.get(format, ())}
        for format in ("tar", "json", FOLDER)
    }
    stems["parent"] = set(map(os.path.dirname, files))
    are_captions = 2 * len(stems["json"] & stems[FOLDER]) > len(stems["json"])
    names = {os.path.basename(path).lower() for path in contents.get(FOLDER, ())}

    # 3. The others.
    kept: dict[str, list[str]] = {}
    left_out: list[str] = []
    for format, paths in contents.items():
        for path in paths:
            if _is_side_file(path, format, stems):
                continue
            is_checked = bool(names) and format in ("json", "jsonl") and not any_list
            if is_checked and (format == "json" and are_captions or not _lists(path, names)):
                left_out.append(os.path.relpath(path, folder))
            else:
                kept.setdefault(format, []).append(path)
    if left_out:
        more = ", …" * (len(left_out) > 3)
        _log(
            f"{folder}: leaves out {', '.join(left_out[:3])}{more}: neither lists of its images, "
            "nor beside one."
        )
    return kept


def _lists(path: str, names: Collection[str]) -> bool:
    """Whether a file begins as a list of images, some of which have these names."""
    head = read_safely(path, lambda: _head(path, LIST_HEAD))
    text = head.decode(errors="replace")
    is_named = any(name.lower() in names for name in _IMAGE_NAME.findall(text))
    return is_named or _IMAGE_FIELD.search(text) is not None or sniff(head) in CURES


def _is_side_file(path: str, format: str, stems: Mapping[str, set[str]]) -> bool:
    """Whether a file describes others.

    stems: paths without suffix of tars and images, and all folders.
    """
    stem, name = os.path.splitext(path)[0], os.path.basename(path)
    if format == "json":
        # Beside shards: counts, settings and statistics; beside an image: its caption.
        is_listed = any(fnmatch(name, pattern) for pattern in SIDE_FILES)
        return is_listed or bool(stems["tar"]) or stem in stems[FOLDER]
    if format == "parquet":  # img2dataset's list of a shard, or of a folder of images
        return stem in stems["tar"] or stem in stems["parent"]
    # Beside records a table is a log or the like.
    has_records = bool(stems["tar"] or stems[FOLDER])
    return format == "csv" and name != "metadata.csv" and has_records


def _in_folder(folder: str, format: str) -> dict[str, str]:
    """The format of each data file below a folder; or of the folder, if it has only images."""
    contents = folder_contents(folder, any_list=format != "auto")
    paths_of = {name: contents[name] for name in _ACCEPTED.get(format, ()) if name in contents}
    if format in ("auto", FOLDER) and FOLDER in contents and not paths_of:
        _warn_of_splits(folder, contents[FOLDER])
        return {folder: FOLDER}
    if not paths_of:
        formats = ", ".join(FORMATS) if format == "auto" else format
        raise DataError(
            f"{folder}: contains no {formats} files or images, at any depth"
            f"{_other_contents(contents)}."
        )
    # They must have one format; with `json` some may be .jsonl.
    if len(paths_of) > 1 and format == "auto":
        raise DataError(
            f"{folder}: contains {' and '.join(paths_of)} files; set the format or list the files."
        )
    if FOLDER in contents and paths_of.keys().isdisjoint(("json", "jsonl", "csv")):
        n_images = pluralize(len(contents[FOLDER]), "image")
        formats = " and ".join(paths_of)
        _log(f"{folder}: its {formats} files are read; of its {n_images} those that they name.")
    format_of = {path: name for name, paths in paths_of.items() for path in paths}
    _warn_of_splits(folder, format_of)
    return format_of


def _warn_of_splits(folder: str, paths: Iterable[str]) -> None:
    """Log that several splits of a data set are read together."""
    names: dict[str, None] = {}
    for path in paths:
        names.update(dict.fromkeys(_SPLIT.findall(path.removeprefix(folder).lower())))
    if len(names) > 1:
        _log(
            f"{folder}: holds {' and '.join(names)} files, which are read together; name those of "
            "one split."
        )


def _log(line: str) -> None:
    """Log a line, of several processes once."""
    if rank_and_world_size()[0] == 0:
        log_line(line)


def _other_contents(contents: Mapping[str, list[str]]) -> str:
    """What a folder holds instead, and what to do."""
    for name, paths in contents.items():
        held = pluralize(len(paths), "image" if name == FOLDER else f"{name} file")
        if name in (*FORMATS, FOLDER):
            return f"; it holds {held}: set format: {name}"
        if name in SUFFIXES:
            return f"; it holds {held}, each of which {CURES[SUFFIXES[name]]}"
    return ""
