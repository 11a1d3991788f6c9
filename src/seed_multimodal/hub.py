"""Original weights by name: folder below `pretrained/`, hub repository, local path.

Nothing is downloaded while `HF_HUB_OFFLINE` is set (the default): a hub name is resolved to its
folder below `pretrained/` or its snapshot in the hub client's cache. With `HF_HUB_OFFLINE=0`, parts
of the originals are downloaded to `pretrained/` (`downloads`), other repositories to that cache.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from seed_multimodal.downloads import (
    CONVERTIBLE,
    WantedPart,
    downloads_allowed,
    fetch_parts,
    is_unfinished,
    list_repository,
    network_errors,
)
from seed_multimodal.errors import CheckpointError, first_line
from seed_multimodal.originals import WEIGHT_PATTERNS, OriginalPart, original_parts, part_of_hub

# Systems in the repository: name -> folder.
SHIPPED_SYSTEMS = {name: f"pretrained/{name}" for name in ("nano", "nano-x", "nano-lavit")}
# Shipped parts by family, for messages about missing ones.
SHIPPED_LLMS = (
    "pretrained/nano/seed_llama (SEED-LLaMA), pretrained/nano-x/llm (SEED-X), "
    "pretrained/nano-lavit/llm (LaVIT)"
)
SHIPPED_TOKENIZERS = (
    "shipped are pretrained/nano/seed_tokenizer (SEED-LLaMA), pretrained/nano-x/tokenizer (SEED-X) "
    "and pretrained/nano-lavit/words (LaVIT)"
)
# Files of a language model's checkpoint.
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's
AGENT_CONFIG = "agent.json"  # of a tuned SEED-X: sizes of the resamplers, LoRA
VISUAL_WEIGHTS = "visual_weight.safetensors"  # LaVIT's token merger and projection


def is_hub_name(name: str | Path) -> bool:
    """Whether `name` has the form `owner/name` and `owner` is not a local folder; `pretrained/…` is
    always a folder."""
    owner = re.fullmatch(r"([^./~][^/]*)/[^/]+", str(name))
    return owner is not None and owner[1] != "pretrained" and not os.path.exists(owner[1])


def locate(path: str | Path) -> Path | None:
    """`path` as is, or relative to the repository root if run from a repository; None: neither
    exists."""
    plain = Path(path).expanduser()
    for candidate in (plain, _root() / plain):
        if os.path.exists(candidate):
            return candidate
    return None


def portable_path(path: str | Path) -> str:
    """A path for a record: below the repository relative to its root, as `locate` reads it; else
    absolute."""
    absolute = Path(os.path.abspath(Path(path).expanduser()))
    if not absolute.is_relative_to(_root()):
        return str(absolute)
    return absolute.relative_to(_root()).as_posix()


def _root() -> Path:
    """The repository's root, if this package is in a checkout."""
    return Path(__file__).resolve().parents[2]


def weights_root() -> Path:
    """The folder whose `pretrained/` gets downloads: the working directory or the repository's
    root."""
    if not os.path.isdir("pretrained") and (_root() / "pretrained").is_dir():
        return _root()
    return Path()


def locate_system(name: str | Path) -> Path | None:
    """As `locate`; names of shipped systems are resolved to their folders."""
    return locate(SHIPPED_SYSTEMS.get(str(name).lower(), name))


def original_folder(name: str | Path) -> str:
    """Local folder of an original part's hub name; other names unchanged."""
    part = part_of_hub(name)
    return str(name) if part is None else part.folder


def local_folder(name: str | Path) -> Path | None:
    """`name` as a folder in the working directory or below the repository root (hub names: in
    `pretrained/`), else its hub snapshot; None: neither."""
    folder = locate(name) or locate(original_folder(name))
    part = part_of_hub(name)
    if folder is not None and part is not None and is_unfinished(part, folder):
        return download_part(part) or folder
    if folder is not None or not is_hub_name(name):
        return folder
    if part is None:
        return try_fetch(str(name), WEIGHT_PATTERNS)
    snapshot = cached_snapshot(part.hub)
    if snapshot is not None and holds_weights(snapshot):
        return snapshot
    return download_part(part) or snapshot


def download_part(
    part: OriginalPart, files: tuple[str, ...] | None = None, folder: Path | None = None
) -> Path | None:
    """The folder of an original part after its download; None: downloads are not allowed.

    files, folder: as of `downloads.WantedPart`.

    Raises CheckpointError: a file cannot be downloaded.
    """
    if not downloads_allowed():
        return None
    wanted = WantedPart(part, files, folder)
    problems = fetch_parts([wanted], weights_root())
    if problems:
        raise CheckpointError(" ".join(problems))
    return wanted.target(weights_root())


def missing_weights_message(missing: Iterable[tuple[OriginalPart, str | Path]]) -> str:
    """Message, without full stop, about missing parts and the folders or hub names searched."""
    # A repository that holds several of the parts is named once, with all their folders.
    folders_of: dict[str, list[str]] = {}
    for part, name in missing:
        folder = original_folder(name)
        if os.path.isabs(folder):
            folder = portable_path(folder)
        folders_of.setdefault(part.name, []).append(folder)
    downloads = [
        f"{original_parts()[part_name].source} into {', '.join(folders)}"
        for part_name, folders in folders_of.items()
    ]
    return (
        f"the original weights are not on this disk: download {'; '.join(downloads)} "
        f"(seed fetch {' '.join(folders_of)} does so; details in pretrained/README.md)"
    )


def download_advice(name: str) -> str:
    """How to get a part of an original, for messages."""
    part = original_parts()[name]
    return f"seed fetch {name} downloads {part.source} into {part.folder}"


def first_file(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of `names` that is a file in the folder."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def find_file(path_or_id: str | Path, names: Sequence[str], advice: str) -> Path:
    """The file itself, or one of `names` in a folder or hub repository. Raises CheckpointError,
    with `advice`."""
    if os.path.isfile(path_or_id):
        return Path(path_or_id)
    folder = find_folder(path_or_id, names, advice)
    file = first_file(folder, names)
    if file is None:
        raise CheckpointError(f"{folder}: contains no {' or '.join(names)}; {advice}.")
    return file


def find_folder(path_or_id: str | Path, files: Sequence[str], advice: str) -> Path:
    """A local folder, or the snapshot of a hub id that holds `files` (shell patterns); errors as
    `find_file`."""
    path = Path(path_or_id)
    if path.is_dir():
        return path

    # A path that does not exist, or a name of the hub.
    kind = "file" if path.suffix in (".pth", ".pt", ".bin", ".safetensors") else "folder"
    if kind == "file" or not is_hub_name(path_or_id):
        raise CheckpointError(f"{path}: no such {kind}; {advice}.")
    return fetch(str(path_or_id), files, advice)


def cached_snapshot(hub_id: str) -> Path | None:
    """The folder of a hub repository in the hub client's cache, with what was downloaded of it."""
    return try_fetch(hub_id, (), local_files_only=True)


def holds_weights(folder: Path) -> bool:
    """Whether a snapshot has more than the configuration and tokenizer of a model."""
    return any(file.suffix in (".safetensors", *CONVERTIBLE) for file in folder.rglob("*"))


def try_fetch(hub_id: str, files: Sequence[str], *, local_files_only: bool = False) -> Path | None:
    """As `fetch`; None: not reachable, or no repository."""
    if not hub_id:
        return None
    try:
        return fetch(hub_id, files, local_files_only=local_files_only)
    except CheckpointError:
        return None


def fetch(
    hub_id: str, files: Sequence[str], advice: str = "", *, local_files_only: bool = False
) -> Path:
    """Snapshot folder of `files` of a hub repository, cached.

    files: shell patterns, as of `downloads.choose_files`.
    local_files_only: without a download, even where downloads are allowed.

    Raises CheckpointError: not reachable, or none of the files; with `advice`.
    """
    from huggingface_hub import snapshot_download

    # 1. Its files, if the hub can be reached.
    names: list[str] = []
    reason = ""
    failures: tuple[type[Exception], ...] = (CheckpointError, *network_errors())
    if not local_files_only:
        try:
            names = [file.name for file in list_repository(hub_id, files)]
        except failures as error:
            reason = first_line(error)

    # 2. The files, or an earlier snapshot as it is.
    try:
        folder = snapshot_download(hub_id, allow_patterns=names, local_files_only=not names)
    except network_errors() as error:
        reason = reason or first_line(error)
        if not downloads_allowed():
            reason = "downloads are off: set HF_HUB_OFFLINE=0 to allow them"
        raise CheckpointError(
            f"{hub_id}: neither a local folder nor reachable on the hub ({reason}); {advice}."
        ) from error
    return Path(folder)


class HubUpload:
    """Adds `push_to_hub` to a class with `save_pretrained`."""

    save_pretrained: Callable[..., Path]

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Upload the output of `save_pretrained` to a hub repository, created if missing; returns
        its URL."""
        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as temporary:
            address = HfApi().create_repo(repo_id, private=private, exist_ok=True)
            HfApi().upload_folder(
                repo_id=repo_id, folder_path=self.save_pretrained(Path(temporary) / "model")
            )
        return str(address)
