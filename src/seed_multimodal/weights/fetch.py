"""Downloads of the originals' parts (`catalogue`): hub repositories with mirrors, and plain URLs.

    with online():
        problems = fetch_parts([catalogue().parts["unclip"]], Path("."))

Files of the hub come by its client. A file gets its name in the part's folder when its size is
right, and its SHA-256: of `weights.yaml`, else as the hub states it for a large file. Files that
exist are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pkgutil
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from seed_multimodal.disk import flush, folder_lock, read_patiently, status_of
from seed_multimodal.entry import log_line
from seed_multimodal.errors import CheckpointError, ConfigError, SeedError, first_line
from seed_multimodal.settings import nearest
from seed_multimodal.weights.catalogue import CONVERTIBLE, Part, catalogue

MIRRORS = "SEED_MIRRORS"  # environment: NAME=SOURCE pairs, separated by spaces
TIMEOUT = 30  # seconds for the answer of a server
# Files of the hub that nothing here reads: copies of weights in half precision.
IGNORED = "*.fp16.*"
# Torch's copies of weights that are in the same folder as safetensors.
TORCH_COPIES = ("pytorch_model*.bin*", "diffusion_pytorch_model*.bin*")
# Request header: no compression, so that lengths are those of the file.
AS_IT_IS = {"Accept-Encoding": "identity"}
LOCK = ".download.lock"  # held in a folder that gets files
UNFINISHED = ".unfinished."  # and the name of a part or file: a folder while it is downloaded


def downloads_allowed() -> bool:
    """Whether `HF_HUB_OFFLINE=0` is set."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE


@contextlib.contextmanager
def online() -> Iterator[None]:
    """Context in which downloads are allowed, for programs whose purpose they are."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = False
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def is_unfinished(part: Part, folder: Path) -> bool:
    """Whether the download of a part into a folder was interrupted, or its conversion."""
    return any((folder / f"{UNFINISHED}{label}").exists() for label in (part.name, *part.urls))


@contextlib.contextmanager
def marked_unfinished(folder: Path, label: str) -> Iterator[Path]:
    """Context that leaves its mark in the folder unless it ends without an error: a folder for
    unfinished files."""
    marker = folder / f"{UNFINISHED}{label}"
    marker.mkdir(parents=True, exist_ok=True)
    yield marker
    shutil.rmtree(marker)


# ---- errors


def failures() -> tuple[type[Exception], ...]:
    """What a failed request or download raises; first the error of a connection or an answer."""
    from huggingface_hub.errors import HfHubHTTPError

    # The hub's errors derive from those of its HTTP client, whose package depends on its version.
    client_error: type[Exception] = HfHubHTTPError.__bases__[0]
    # ValueError: a name that is none, the page of a proxy. ImportError: httpx lacks the package for
    # it. RuntimeError: of hf_xet.
    others = (OSError, ValueError, ImportError, RuntimeError, SeedError)
    return client_error, *others


def failure_reason(error: Exception) -> str:
    """A failed request or download as a part of a sentence."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "the repository is gated: request access on its page, then set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository, or a private one and no HF_TOKEN for it"
    if status_of(error) == 401:
        return "HF_TOKEN is not accepted"
    if isinstance(error, json.JSONDecodeError):
        return "not the answer of a hub, but perhaps that of a proxy"
    if isinstance(error, failures()[0]) and status_of(error) is None:
        server = str(error.request.url).split("/")[2]  # type: ignore[attr-defined]
        return f"no connection to {server} ({first_line(error)})"
    return first_line(error).rstrip(".")


# ---- files of servers


class RemoteFile(NamedTuple):
    """A file on a server.

    name: path in the part's folder.
    size, sha256: if known.
    download: writes the file below the folder `local_dir`, and returns its path.
    """

    name: str
    size: int | None
    sha256: str
    download: Callable[..., str]

    def difference(self, path: Path) -> str:
        """How a file on this disk differs from the server's; "": in nothing that is known."""
        size = path.stat().st_size
        if self.size is not None and size != self.size:
            return f"{size:,} bytes instead of {self.size:,}"
        expected = self.sha256.lower()
        digest = file_sha256(path) if expected else ""
        return "" if digest == expected else f"SHA-256 {digest[:12]}… instead of {expected[:12]}…"


def choose_files(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The files of a repository that match shell patterns, without copies of the same weights.

    If no pattern has a "/", files of the root folder only.
    """

    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    if not any("/" in pattern for pattern in patterns):
        names = [name for name in names if "/" not in name]
    chosen = [*filter_repo_objects(names, allow_patterns=[*patterns], ignore_patterns=IGNORED)]
    # Of two formats in a folder, safetensors.
    copies = [
        str(PurePosixPath(name).with_name(pattern))
        for name in chosen
        if name.endswith(".safetensors")
        for pattern in TORCH_COPIES
    ]
    return [*filter_repo_objects(chosen, ignore_patterns=copies)]


def list_repository(name: str, patterns: Sequence[str]) -> list[RemoteFile]:
    """Files of a hub repository, or of one of its folders ("owner/name/folder").

    Raises as `failures`: also if it has none that match the patterns.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    # 1. The files of its current commit; a busy hub is asked again.
    owner, repository, *inner = name.split("/", 2)
    repo_id = f"{owner}/{repository}"
    folder = PurePosixPath(*inner)
    request = partial(HfApi().model_info, repo_id, files_metadata=True, timeout=TIMEOUT)
    info = read_patiently("the list of files", request, HfHubHTTPError)
    files: dict[str, RemoteFile] = {}
    for entry in info.siblings or ():
        # The server chooses the name, which becomes a path on this disk.
        full_name = entry.rfilename
        leaves_folder = not {"", ".", ".."}.isdisjoint(full_name.split("/"))
        if leaves_folder or "\\" in full_name or not full_name.isprintable():
            raise CheckpointError(f"lists {full_name!r}, which is no path below its folder")
        path = PurePosixPath(full_name)
        if path.is_relative_to(folder):
            file_name = str(path.relative_to(folder))
            sha256 = entry.lfs.sha256 if entry.lfs is not None else ""
            download = partial(hf_hub_download, repo_id, full_name, revision=info.sha)
            files[file_name] = RemoteFile(file_name, entry.size, sha256, download)

    # 2. Those that are needed.
    chosen = [files[file_name] for file_name in choose_files([*files], patterns)]
    if not chosen:
        raise CheckpointError(f"has no files {' '.join(patterns)}")
    return chosen


def look_up_url(name: str, url: str) -> RemoteFile:
    """A file of any server, with what its headers state. Raises as `failures`."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        hf_raise_for_status,
        http_stream_backoff,
    )

    # GET without reading the body: presigned links and some mirrors refuse HEAD.
    with http_stream_backoff(
        "GET", url, headers=AS_IT_IS, timeout=TIMEOUT, retry_on_exceptions=()
    ) as response:
        hf_raise_for_status(response)
    headers = response.headers
    if headers.get("Content-Type", "").startswith("text/html"):
        raise CheckpointError("a web page instead of a file, perhaps of a proxy")
    if "Content-Length" not in headers:
        raise CheckpointError("states no length, so that half a file would look like a whole one")
    size = int(headers["Content-Length"])
    download = partial(download_url, url, size, headers.get("ETag", ""))
    return RemoteFile(name, size, "", download)


def download_url(url: str, size: int, etag: str, *, local_dir: Path) -> str:
    """Download a file, continuing an earlier attempt at the same version; returns its path.

    Raises as `failures`: also if fewer bytes arrive than were announced.
    """
    from huggingface_hub.file_download import http_get

    # A complete one is begun again, since nothing proves it.
    version = hashlib.sha256(f"{url} {etag}".encode()).hexdigest()
    path = local_dir / version
    n_bytes = path.stat().st_size if etag and path.is_file() else 0
    if n_bytes >= size:
        n_bytes = 0
    # A file that changes on its server meanwhile is sent from the start.
    headers = AS_IT_IS | ({"If-Range": etag} if etag else {})
    with open(path, "ab" if n_bytes else "wb") as stream:
        http_get(url, stream, resume_size=n_bytes, headers=headers, expected_size=size)
    return str(path)


def file_sha256(path: Path) -> str:
    """Checksum of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- files of a folder


def missing_files(files: Sequence[RemoteFile], folder: Path, force: bool) -> list[RemoteFile]:
    """The files that are not in a folder, as they are or converted to safetensors; with `force`,
    also those that differ from the server's.

    Raises CheckpointError: one differs, without `force`; too little space for the others.
    """
    missing: list[RemoteFile] = []
    for file in files:
        path = folder / file.name
        difference = file.difference(path) if path.is_file() else ""
        if difference and not force:
            raise CheckpointError(
                f"{path} is another file ({difference}) and was kept; seed fetch --force replaces "
                "it"
            )
        is_converted = path.suffix in CONVERTIBLE and path.with_suffix(".safetensors").is_file()
        if difference or not (path.is_file() or is_converted):
            missing.append(file)

    n_bytes = sum(file.size or 0 for file in missing)
    n_free = shutil.disk_usage(folder).free
    amounts = f"{n_bytes / 1e9:.2f} GB to download, {n_free / 1e9:.1f} GB free"
    if n_bytes > n_free:
        raise CheckpointError(f"the disk of {folder} has too little space ({amounts})")
    if n_bytes:
        log_line(f"{folder}: {amounts}")
    return missing


def download(part: Part, label: str, source: str, folder: Path, force: bool) -> None:
    """Download and check what is missing of a part's repository, or of its file with this label.

    Raises as `failures`: also for a file that is not what it should be.
    """
    is_url = label in part.urls
    files = [look_up_url(label, source)] if is_url else list_repository(source, part.files)
    files = [file._replace(sha256=part.sha256.get(file.name, file.sha256)) for file in files]
    waiting = f"{folder}: waits for another download into it"
    with folder_lock(
        folder, CheckpointError, timeout=-1, name=LOCK, on_wait=partial(log_line, waiting)
    ):
        missing = missing_files(files, folder, force)
        with marked_unfinished(folder, label) as scratch:
            for old in scratch.rglob("*.incomplete"):
                old.unlink()  # which the hub's client does not continue
            for file in missing:
                downloaded = Path(file.download(local_dir=scratch))
                difference = file.difference(downloaded)
                if difference:
                    downloaded.unlink()
                    raise CheckpointError(f"{file.name}: {difference}")
                path = folder / file.name
                path.parent.mkdir(parents=True, exist_ok=True)
                flush(downloaded)
                os.replace(downloaded, path)
    n_kept = len(files) - len(missing)
    log_line(f"{folder}: {len(missing)} files of {source} downloaded, {n_kept} kept")


# ---- all parts of a model


def fetch_parts(
    parts: Sequence[Part], root: Path, *, mirrors: Sequence[str] = (), force: bool = False
) -> list[str]:
    """Download what is missing of some parts, and of the parts that they need.

    root: the folder with `pretrained/`.
    mirrors: NAME=SOURCE pairs of sources that are tried first, besides those of the environment.
    force: replace files that differ from the servers'.

    Returns a sentence for each problem; the other files are complete. Raises ConfigError: a mirror
    for something else.
    """
    own_sources = read_mirrors(mirrors)
    problems: dict[str, str] = {}  # by part or file
    for part in with_needed(parts, root):
        # 1. The files of its repository, and each file with a URL.
        folder = root / part.folder
        published = {part.name: (part.hub, *part.mirrors)} if part.hub else {}
        published |= {name: (url,) for name, url in part.urls.items()}
        for label, sources in published.items():
            if label in own_sources:
                sources = (own_sources[label], *sources)
            failed: list[str] = []
            for source in sources:
                try:
                    download(part, label, source, folder, force)
                    break
                except failures() as error:
                    failed.append(f"{source}: {failure_reason(error)}")
            else:
                problems[label] = f"{label}: not downloaded into {folder} ({'; '.join(failed)})."

        # 2. What is made of other parts, once these are complete; files that no program can
        #    download.
        if part.convert and problems.keys().isdisjoint(part.needs):
            needed = [root / catalogue().parts[name].folder for name in part.needs]
            with marked_unfinished(folder, part.name):
                pkgutil.resolve_name(part.convert)(folder, *needed)
            log_line(f"{folder}: made of {', '.join(part.needs)}")
        for name, source in part.by_hand.items():
            if not (folder / name).is_file():
                problems[name] = f"{folder / name}: download it by hand ({source})."
    return [*problems.values()]


def with_needed(parts: Sequence[Part], root: Path) -> list[Part]:
    """The parts, each after those that it needs; those that were made of others already are left
    out."""
    ordered: list[Part] = []
    for part in parts:
        folder = root / part.folder
        is_filled = folder.is_dir() and any(folder.iterdir())
        if part.convert and is_filled and not is_unfinished(part, folder):
            continue
        needed = [catalogue().parts[name] for name in part.needs]
        ordered += [item for item in (*with_needed(needed, root), part) if item not in ordered]
    return ordered


def read_mirrors(pairs: Sequence[str]) -> dict[str, str]:
    """Sources by name, of the environment's NAME=SOURCE pairs and these.

    The name of a part has a hub repository ("owner/name", or "owner/name/folder"), the name of a
    file a URL. Raises ConfigError: neither.
    """
    patterns = dict.fromkeys(catalogue().parts, r"\w[\w.-]*(/[\w.-]+)+")
    for part in catalogue().parts.values():
        patterns |= dict.fromkeys(part.urls, r"https?://.+")
    mirrors: dict[str, str] = {}
    for pair in (*os.environ.get(MIRRORS, "").split(), *pairs):
        name, _, source = pair.partition("=")
        if name not in patterns or not re.fullmatch(patterns[name], source):
            raise ConfigError(
                f"mirror {pair}: is neither PART=owner/name nor FILE=URL"
                f"{nearest(name, patterns)}; there are {', '.join(patterns)}."
            )
        mirrors[name] = source
    return mirrors
