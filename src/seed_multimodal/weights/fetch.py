"""Downloads of the originals' parts (`catalogue`): hub repositories with mirrors, and plain URLs.

    with online():
        problems = fetch_parts([catalogue().parts["unclip"]], Path("."))

A file is written under a hidden name, from which an interrupted download resumes, and renamed when
its size and checksum are right. Files that exist are kept.

SHA-256: of `weights.yaml`, else as the hub states it for a large file. Small files of the hub have
git's SHA-1, files of other servers only a size and an ETag: of these, a partial file is continued
if it was begun under the same ETag and is shorter than the whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pkgutil
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

from seed_multimodal.disk import BUSY, disk_is_full, flush, folder_lock, status_of
from seed_multimodal.entry import log_line
from seed_multimodal.errors import CheckpointError, ConfigError, first_line
from seed_multimodal.progress import Progress
from seed_multimodal.settings import nearest
from seed_multimodal.weights.catalogue import CONVERTIBLE, Part, catalogue

Result = TypeVar("Result")
MIRRORS = "SEED_MIRRORS"  # environment: NAME=SOURCE pairs, separated by spaces
TIMEOUT = 30  # seconds for the answer of a server
# How often a request to a busy server is repeated without progress, and after how many seconds at
# most (the hub counts requests in windows of five minutes).
N_RETRIES = 4
MAX_PAUSE = 300
CHUNK = 2**23  # bytes
# Files of the hub that nothing here reads: copies of weights in half precision.
IGNORED = "*.fp16.*"
# Torch's copies of weights that are in the same folder as safetensors.
TORCH_COPIES = ("pytorch_model*.bin*", "diffusion_pytorch_model*.bin*")
LOCK = ".download.lock"  # held in a folder that gets files
UNFINISHED = ".unfinished."  # and the name of a part or file: its download has begun


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
    return any((folder / f"{UNFINISHED}{label}").is_file() for label in (part.name, *part.urls))


@contextlib.contextmanager
def marked_unfinished(folder: Path, label: str) -> Iterator[None]:
    """Context that leaves its mark in the folder unless it ends without an error."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / f"{UNFINISHED}{label}"
    marker.touch()
    yield
    marker.unlink()


# ---- errors


def failures() -> tuple[type[Exception], ...]:
    """What a failed request or download raises; first the error of a connection or an answer."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The hub's errors derive from those of its HTTP client, whose package depends on its version.
    client_error: type[Exception] = HfHubHTTPError.__bases__[0]
    # JSONDecodeError: the page of a proxy. ImportError: httpx lacks the package for it.
    others = (HFValidationError, OSError, json.JSONDecodeError, ImportError, CheckpointError)
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


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server.

    name: path in the part's folder.
    size: in bytes, if known.
    sha256, git_sha1: as the hub states them.
    etag: of a server other than the hub.

    Raises CheckpointError: the name is not that of a file below the folder.
    """

    name: str
    url: str
    size: int | None = None
    sha256: str = ""
    git_sha1: str = ""
    etag: str = ""

    def __post_init__(self) -> None:
        # The server chooses the name, which becomes a path on this disk.
        leaves_folder = not {"", ".", ".."}.isdisjoint(self.name.split("/"))
        if leaves_folder or "\\" in self.name or not self.name.isprintable():
            raise CheckpointError(f"lists {self.name!r}, which is no path below its folder")

    @property
    def checksum(self) -> tuple[str, str]:
        """Its kind for `file_digest`, and its value, "" where none is known."""
        return ("SHA-256", self.sha256.lower()) if self.sha256 else ("git SHA-1", self.git_sha1)

    @property
    def version(self) -> str:
        """Short name of its content; "": unknown, so that a partial file cannot be continued."""
        identity = self.etag or self.sha256 or self.git_sha1
        return hashlib.sha256(identity.encode()).hexdigest()[:12] if identity else ""

    def partial_path(self, folder: Path) -> Path:
        """Where the file lies until it is complete."""
        path = folder / self.name
        return path.with_name(f".{path.name}.{self.version}.part")

    def resumed_at(self, folder: Path) -> int:
        """Bytes that earlier attempts have left."""
        path = self.partial_path(folder)
        return path.stat().st_size if path.is_file() else 0

    def difference(self, path: Path) -> str:
        """How a file on this disk differs from the server's; "": in nothing that is known."""
        size = path.stat().st_size
        if self.size is not None and size != self.size:
            return f"{size:,} bytes instead of {self.size:,}"
        kind, expected = self.checksum
        digest = file_digest(path, kind) if expected else ""
        return "" if digest == expected else f"{kind} {digest[:12]}… instead of {expected[:12]}…"


def choose_files(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The files of a repository that match shell patterns, without copies of the same weights.

    If no pattern has a "/", files of the root folder only.
    """

    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    if not any("/" in pattern for pattern in patterns):
        names = [name for name in names if "/" not in name]
    chosen = [*filter_repo_objects(names, allow_patterns=[*patterns], ignore_patterns=IGNORED)]
    # Of two formats in a folder, safetensors.
    copies: list[str] = []
    for name in chosen:
        if name.endswith(".safetensors"):
            copies += [str(PurePosixPath(name).with_name(pattern)) for pattern in TORCH_COPIES]
    return [*filter_repo_objects(chosen, ignore_patterns=copies)]


def list_repository(name: str, patterns: Sequence[str]) -> list[RemoteFile]:
    """Files of a hub repository, or of one of its folders ("owner/name/folder").

    Raises as `failures`: also if it has none that match the patterns.
    """
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.hf_api import RepoFile

    # 1. The current commit, and its files.
    owner, repository, *inner = name.split("/", 2)
    repo_id = f"{owner}/{repository}"
    folder = inner[0].strip("/") if inner else ""
    api = HfApi()
    revision = api.repo_info(repo_id, timeout=TIMEOUT).sha
    tree = api.list_repo_tree(repo_id, folder or None, recursive=True, revision=revision)
    prefix = f"{folder}/" if folder else ""
    entries = {
        entry.path.removeprefix(prefix): entry for entry in tree if isinstance(entry, RepoFile)
    }

    # 2. Those that are needed.
    files: list[RemoteFile] = []
    for file_name in choose_files([*entries], patterns):
        entry = entries[file_name]
        url = hf_hub_url(repo_id, entry.path, revision=revision)
        sha256 = entry.lfs.sha256 if entry.lfs is not None else ""
        files.append(RemoteFile(file_name, url, entry.size, sha256, entry.blob_id))
    if not files:
        raise CheckpointError(f"has no files {' '.join(patterns)}")
    return files


def look_up_url(name: str, url: str) -> RemoteFile:
    """A file of any server, with what its headers state. Raises as `failures`."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    # The first byte instead of HEAD, which presigned links and some mirrors refuse.
    headers = {"Accept-Encoding": "identity", "Range": "bytes=0-0"}
    with get_session().stream(
        "GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT
    ) as response:
        hf_raise_for_status(response)
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise CheckpointError("a web page instead of a file, perhaps of a proxy")
    length = response.headers.get("Content-Length", "")
    if response.status_code == 206:
        length = response.headers.get("Content-Range", "").rpartition("/")[2]
    size = int(length) if length.isdecimal() else None
    return RemoteFile(name, url, size, etag=response.headers.get("ETag", ""))


def file_digest(path: Path, kind: str) -> str:
    """Checksum of a file: "SHA-256", or "git SHA-1" of git's object of it."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    if kind == "git SHA-1":
        digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with (
        open(path, "rb") as file,
        Progress(f"checking {path.name}", size, "byte", delay=2, unit_scale=True) as progress,
    ):
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            progress.update(len(chunk))
    return digest.hexdigest()


class DownloadProgress(Progress):
    """The progress of one file, with the keywords that the hub's client passes."""

    def __init__(self, *, desc: str, total: float | None, initial: float, **_: object) -> None:
        super().__init__(desc, total, "byte", start=initial, unit_scale=True)


def download_file(file: RemoteFile, folder: Path) -> Path:
    """Download a file, continuing an earlier attempt; returns its temporary path.

    Raises as `failures`: also if fewer bytes arrive than were announced.
    """
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    # 1. What an earlier attempt has left, of this version of the file. (The hub's client deletes
    # its partial files.) A complete one is only as good as its checksum.
    path = folder / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.partial_path(folder)
    for old in path.parent.glob(f".{path.name}.*.part"):
        n_missing = (file.size or 0) - old.stat().st_size
        is_proven = n_missing == 0 and file.checksum[1]
        if old != temporary or not file.version or not (n_missing > 0 or is_proven):
            old.unlink()
    resumed_at = file.resumed_at(folder)

    # 2. The rest. A file that has changed on its server is sent from the start.
    headers = {"Accept-Encoding": "identity"}
    if file.git_sha1:  # of the hub
        headers |= build_hf_headers()
    elif resumed_at:
        headers["If-Range"] = file.etag
    if resumed_at:
        log_line(f"{path}: resumed at {resumed_at / 1e9:.2f} GB")
    with open(temporary, "ab") as stream:
        http_get(
            file.url,
            stream,
            resume_size=resumed_at,
            headers=headers,
            expected_size=file.size,
            displayed_filename=path.name,
            tqdm_class=DownloadProgress,
        )
    return temporary


# ---- files with several sources


@dataclass
class FileGroup:
    """Files that come from the same sources.

    label: name of the part or file, as mirrors name it.
    sources: hub names or URLs, in the order in which they are tried; those that failed are removed.
    patterns: of the files of a hub repository; empty: one file with a URL.
    sha256: known checksums by file.
    """

    label: str
    folder: Path
    sources: list[str]
    patterns: tuple[str, ...]
    sha256: Mapping[str, str]
    files: list[RemoteFile] = field(default_factory=list)  # of the current source
    problems: list[str] = field(default_factory=list)  # of earlier sources

    def try_sources(self, work: Callable[[], Result]) -> Result:
        """The result of `work` on the files of the first source with which it succeeds.

        Raises CheckpointError: it does with none; a full disk.
        """
        n_retries = 0
        n_bytes = 0
        while self.sources:
            try:
                self.files = self.files or self._look_up()
                return work()
            except failures() as error:
                reason = failure_reason(error)
                if disk_is_full(error):
                    message = f"{self.folder}: the disk or quota is full."
                    raise CheckpointError(message) from error
                # A busy server, or a broken connection in a download, gets more attempts; after
                # progress as many again.
                if n_bytes != self.bytes_to_download():
                    n_bytes = self.bytes_to_download()
                    n_retries = 0
                status = status_of(error)
                is_broken = bool(self.files) and isinstance(error, failures()[0])
                is_temporary = is_broken if status is None else status in BUSY
                if is_temporary and n_retries < N_RETRIES:
                    # Seconds that the server asks for, else twice as many each time.
                    headers = getattr(getattr(error, "response", None), "headers", {})
                    asked = str(headers.get("Retry-After", ""))
                    pause = min(MAX_PAUSE, int(asked) if asked.isdecimal() else 2**n_retries)
                    log_line(f"{self.sources[0]}: {reason}; again in {pause} s")
                    n_retries += 1
                    time.sleep(pause)
                    continue
                # The next source.
                self.problems.append(f"{self.sources.pop(0)}: {reason}")
                self.files = []
                n_retries = 0
        raise CheckpointError(
            f"{self.label}: not downloaded into {self.folder} ({'; '.join(self.problems)})."
        )

    def _look_up(self) -> list[RemoteFile]:
        """The files of the current source."""
        if self.patterns:
            files = list_repository(self.sources[0], self.patterns)
        else:
            files = [look_up_url(self.label, self.sources[0])]
        return [replace(file, sha256=self.sha256.get(file.name, file.sha256)) for file in files]

    def is_there(self, file: RemoteFile) -> bool:
        """Whether a file is on this disk, as it is or converted to safetensors."""
        path = self.folder / file.name
        is_converted = path.suffix in CONVERTIBLE and path.with_suffix(".safetensors").is_file()
        return path.is_file() or is_converted

    def bytes_to_download(self) -> int:
        """Size of the files that are not there, without what earlier attempts have left."""
        total = 0
        for file in self.files:
            if not self.is_there(file):
                total += max(0, (file.size or 0) - file.resumed_at(self.folder))
        return total

    def missing(self, force: bool) -> list[RemoteFile]:
        """The files that are not there; with `force`, also those that differ from the server's.

        Raises CheckpointError: one differs, without `force`.
        """
        missing: list[RemoteFile] = []
        for file in self.files:
            path = self.folder / file.name
            difference = file.difference(path) if path.is_file() else ""
            if difference and not force:
                raise CheckpointError(
                    f"{path} is another file ({difference}) and was kept; seed fetch --force "
                    "replaces it"
                )
            if difference or not self.is_there(file):
                missing.append(file)
        return missing

    def download(self, force: bool = False) -> int:
        """Download the missing files and check them; returns their number.

        Raises as `failures`: also for a file that is not what it should be.
        """
        waiting = f"{self.folder}: waits for another download into it"
        with folder_lock(
            self.folder, CheckpointError, timeout=-1, name=LOCK, on_wait=partial(log_line, waiting)
        ):
            missing = self.missing(force)
            with marked_unfinished(self.folder, self.label):
                for file in missing:
                    temporary = download_file(file, self.folder)
                    difference = file.difference(temporary)
                    if difference:
                        temporary.unlink()
                        raise CheckpointError(f"{file.name}: {difference}")
                    flush(temporary)
                    os.replace(temporary, self.folder / file.name)
        return len(missing)


# ---- all parts of a model


def fetch_parts(
    parts: Sequence[Part],
    root: Path,
    *,
    mirrors: Mapping[str, str] | None = None,
    force: bool = False,
) -> list[str]:
    """Download what is missing of some parts, and of the parts that they need.

    root: the folder with `pretrained/`.
    mirrors: sources that are tried first, as of `read_mirrors`; None: those of the environment.
    force: replace files that differ from the servers'.

    Returns a sentence for each problem; the other files are complete.

    Raises CheckpointError: the disk has not enough space, checked before anything is downloaded.
    """
    mirrors = read_mirrors() if mirrors is None else mirrors
    parts = with_needed(parts, root)
    problems: dict[str, str] = {}  # by label of a group, or by file

    # 1. Which files there are, and how much space they need.
    groups: list[FileGroup] = []
    for part in parts:
        for group in file_groups(part, root, mirrors):
            try:
                group.try_sources(lambda: None)
                groups.append(group)
            except CheckpointError as error:
                problems[group.label] = str(error)
    check_space(groups)

    # 2. The files.
    for group in groups:
        try:
            n_files = group.try_sources(partial(group.download, force))
        except CheckpointError as error:
            problems[group.label] = str(error)
            continue
        n_kept = len(group.files) - n_files
        log_line(f"{group.folder}: {n_files} files of {group.sources[0]} downloaded, {n_kept} kept")

    # 3. Parts that are made of others, once these are complete; files that no program can download.
    for part in parts:
        folder = root / part.folder
        if part.convert and problems.keys().isdisjoint(part.needs):
            sources = [root / catalogue().parts[name].folder for name in part.needs]
            with marked_unfinished(folder, part.name):
                pkgutil.resolve_name(part.convert)(folder, *sources)
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


def file_groups(part: Part, root: Path, mirrors: Mapping[str, str]) -> list[FileGroup]:
    """What is downloaded for a part: the files of its repository, and each file with a URL; the
    user's mirrors come first."""
    published = {part.name: (part.hub, *part.mirrors)} if part.hub else {}
    published |= {name: (url,) for name, url in part.urls.items()}
    groups: list[FileGroup] = []
    for name, sources in published.items():
        own_sources = [mirrors[name]] if name in mirrors else []
        patterns = () if name in part.urls else part.files
        folder = root / part.folder
        groups.append(FileGroup(name, folder, [*own_sources, *sources], patterns, part.sha256))
    return groups


def read_mirrors(pairs: Sequence[str] = ()) -> dict[str, str]:
    """Sources by name, of the environment's NAME=SOURCE pairs and these.

    The name of a part has a hub repository ("owner/name", or "owner/name/folder"), the name of a
    file a URL. Raises ConfigError: neither.
    """
    parts = catalogue().parts
    files = dict.fromkeys(name for part in parts.values() for name in part.urls)
    mirrors: dict[str, str] = {}
    for pair in (*os.environ.get(MIRRORS, "").split(), *pairs):
        name, _, source = pair.partition("=")
        if name not in parts and name not in files:
            names = [*parts, *files]
            raise ConfigError(
                f"mirror {pair}: there is no part {name!r}{nearest(name, names)}; "
                f"there are {', '.join(names)}."
            )
        pattern = r"https?://.+" if name in files else r"\w[\w.-]*(/[\w.-]+)+"
        if not re.fullmatch(pattern, source):
            expected = "a URL" if name in files else "a hub repository (owner/name)"
            raise ConfigError(f"mirror {pair}: {name} needs {expected}.")
        mirrors[name] = source
    return mirrors


def check_space(groups: Sequence[FileGroup]) -> None:
    """Log how much will be downloaded. Raises CheckpointError: a file system has too little
    space."""
    folders: dict[int, Path] = {}  # by file system
    needed: dict[Path, int] = {}  # bytes
    for group in groups:
        # The nearest folder that exists, one for each file system.
        folder = group.folder.absolute()
        while not folder.is_dir():
            folder = folder.parent
        folder = folders.setdefault(folder.stat().st_dev, folder)
        needed[folder] = needed.get(folder, 0) + group.bytes_to_download()
    for folder, n_bytes in needed.items():
        n_free = shutil.disk_usage(folder).free
        amounts = f"{n_bytes / 1e9:.2f} GB to download, {n_free / 1e9:.1f} GB free"
        if n_bytes > n_free:
            raise CheckpointError(f"{folder}: its disk has too little space ({amounts}).")
        if n_bytes:
            log_line(f"{folder}: {amounts}")
