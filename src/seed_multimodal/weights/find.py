"""Paths of weights by name: a path, or the name of a repository on the hub.

Nothing is downloaded while `HF_HUB_OFFLINE` is set (the default): a hub name is resolved to its
folder below `pretrained/` or its snapshot in the hub client's cache. With `HF_HUB_OFFLINE=0`, parts
of the originals are downloaded to `pretrained/` (`fetch`), other repositories to that cache.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from seed_multimodal.errors import CheckpointError
from seed_multimodal.weights.catalogue import (
    SHIPPED_SYSTEMS,
    WEIGHT_PATTERNS,
    WEIGHT_SUFFIXES,
    Part,
    part_of,
    weight_files,
)
from seed_multimodal.weights.fetch import (
    downloads_allowed,
    failure_reason,
    failures,
    fetch_parts,
    is_unfinished,
    list_repository,
)

REPOSITORY = Path(__file__).resolve().parents[3]  # if this package is in a checkout


def is_hub_name(name: str | Path) -> bool:
    """Whether `name` has the form `owner/name` and `owner` is not a local folder; `pretrained/…` is
    always a folder."""
    owner = re.fullmatch(r"([^./~][^/]*)/[^/]+", str(name))
    return owner is not None and owner[1] != "pretrained" and not os.path.exists(owner[1])


def locate(path: str | Path) -> Path | None:
    """`path` as is, or relative to the repository root if run from a repository; `.safetensors` may
    replace `.bin`. None: neither exists."""
    plain = Path(path).expanduser()
    paths = [plain, plain.with_suffix(".safetensors")] if plain.suffix == ".bin" else [plain]
    for candidate in (*paths, *(REPOSITORY / path for path in paths)):
        if str(path) and os.path.exists(candidate):
            return candidate
    return None


def locate_or_same(path: str | Path) -> Path:
    """As `locate`; a path that does not exist stays."""
    return locate(path) or Path(path)


def locate_system(name: str | Path) -> Path | None:
    """As `locate`; names of shipped systems are resolved to their folders."""
    return locate(SHIPPED_SYSTEMS.get(str(name).lower(), name))


def portable_path(path: str | Path) -> str:
    """A path for a record: below the repository relative to its root, as `locate` reads it; else
    absolute."""
    absolute = Path(os.path.abspath(Path(path).expanduser()))
    if not absolute.is_relative_to(REPOSITORY):
        return str(absolute)
    return absolute.relative_to(REPOSITORY).as_posix()


def recorded_path(path: Path, folder: Path) -> Path:
    """A path in a record: relative to the record's folder, else to the repository."""
    is_of_repository = locate(folder / path) is None and (REPOSITORY / path).exists()
    return (REPOSITORY if is_of_repository else folder) / path


def weights_root() -> Path:
    """The folder whose `pretrained/` gets downloads: the working directory or the repository's
    root."""
    if not os.path.isdir("pretrained") and (REPOSITORY / "pretrained").is_dir():
        return REPOSITORY
    return Path()


# ---- folders and files


def find_path(name: str | Path, files: Sequence[str] = ()) -> Path | None:
    """Weights in the working directory or the repository, in the hub client's cache, or after a
    download; None: nowhere.

    files: shell patterns of what is needed of a hub repository; (): of a model.

    Raises CheckpointError: a file of an original cannot be downloaded.
    """
    path = locate(name)
    known = part_of(name)
    if known is None:
        if path is None and is_hub_name(name):
            path, _ = _snapshot(str(name), files or WEIGHT_PATTERNS)
        return path

    # An original's, complete on this disk or in the cache.
    part, inner = known
    path = path or locate(Path(part.folder) / inner)
    if path is not None:
        depth = len(Path(inner).parts)
        if not is_unfinished(part, (path, *path.parents)[depth]):
            return path
    elif part.hub:
        snapshot, _ = _snapshot(part.hub)
        path = None if snapshot is None else locate(snapshot / inner)
        # A snapshot may have only the configuration and tokenizer.
        if path is not None and weight_files(path):
            return path

    # Its download; without one, what there is.
    downloaded = download_part(replace(part, files=tuple(files) or part.files_at(inner)))
    return path if downloaded is None else locate(downloaded / inner)


def find_folder(name: str | Path, files: Sequence[str], advice: str) -> Path:
    """As `find_path`. Raises CheckpointError, with `advice`: nowhere."""
    path = find_path(name, files)
    if path is not None:
        return path
    is_file = Path(name).suffix in WEIGHT_SUFFIXES
    reason = f"no such {'file' if is_file else 'folder'}"
    if is_hub_name(name) and not is_file:
        _, why = _snapshot(str(name), files)
        reason = f"no folder in {Path.cwd()}, nor reachable on the hub ({why})"
    raise CheckpointError(f"{name}: {reason}; {advice}.")


def find_file(name: str | Path, files: Sequence[str], advice: str) -> Path:
    """The file itself, or one of `files` in a folder or hub repository. Raises CheckpointError,
    with `advice`."""
    path = find_folder(name, files, advice)
    file = path if path.is_file() else first_file(path, files)
    if file is None:
        raise CheckpointError(f"{path}: contains no {' or '.join(files)}; {advice}.")
    return file


def first_file(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of `names` that is a file in the folder."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def download_part(part: Part) -> Path | None:
    """The folder of an original part after its download; None: downloads are not allowed.

    Raises CheckpointError: a file cannot be downloaded.
    """
    if not downloads_allowed():
        return None
    problems = fetch_parts([part], weights_root())
    if problems:
        raise CheckpointError(" ".join(problems))
    return weights_root() / part.folder


def _snapshot(hub_id: str, files: Sequence[str] = ()) -> tuple[Path | None, str]:
    """The folder of a hub repository in the hub client's cache, else why there is none.

    files: shell patterns of what is downloaded if that is allowed; otherwise, and if the hub cannot
    be reached, an earlier snapshot stays as it is.
    """
    from huggingface_hub import snapshot_download

    reason = "" if downloads_allowed() else "downloads are off: set HF_HUB_OFFLINE=0 to allow them"
    names: list[str] = []
    try:
        if files and not reason:
            names = [file.name for file in list_repository(hub_id, files)]
    except failures() as error:
        reason = failure_reason(error)
    try:
        folder = snapshot_download(hub_id, allow_patterns=names, local_files_only=not names)
    except failures() as error:
        return None, reason or failure_reason(error)
    return Path(folder), ""


# ---- messages


def missing_weights_message(names: Iterable[str | Path]) -> str:
    """Message, without full stop, about missing weights of originals: their paths or hub names."""
    # A repository that holds several of them is named once.
    parts = {known[0].name: known[0] for known in map(part_of, names) if known is not None}
    downloads = [f"{part.source} into {part.folder}" for part in parts.values()]
    return (
        f"the original weights are not on this disk: download {'; '.join(downloads)} "
        f"(seed fetch {' '.join(parts)} does so; details in pretrained/README.md)"
    )
