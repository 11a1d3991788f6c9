"""Downloads of the originals' parts (`originals`): hub repositories with mirrors, and plain URLs.

    with online():
        problems = fetch_parts([WantedPart(original_parts()["unclip"])], Path("."))

A file is written under a hidden name, from which an interrupted download resumes, and renamed when
its size and checksum are right. Files that exist are kept.

SHA-256: of `weights.yaml`, else as the hub states it for a large file. Small files of the hub have
git's SHA-1, files of other servers only a size.
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
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

from seed_multimodal.disk import disk_is_full, flush, folder_lock
from seed_multimodal.entry import log_line
from seed_multimodal.errors import CheckpointError, ConfigError, first_line
from seed_multimodal.originals import OriginalPart, original_parts
from seed_multimodal.progress import Progress
from seed_multimodal.settings import nearest

Result = TypeVar("Result")
MIRRORS = "SEED_MIRRORS"  # environment: NAME=SOURCE pairs, separated by spaces
TIMEOUT = 30  # seconds for the answer of a server
# Answers after which the same request may succeed, how often it is repeated without progress, and
# after how many seconds at most (the hub counts requests in windows of five minutes).
BUSY = (408, 429, 500, 502, 503, 504)
N_RETRIES = 4
MAX_PAUSE = 300
CHUNK = 2**23  # bytes
# Files of the hub that nothing here reads: copies of weights in half precision.
IGNORED = ("*.fp16.*",)
# Torch's copies of weights that are in the same folder as safetensors.
TORCH_COPIES = ("pytorch_model*.bin*", "diffusion_pytorch_model*.bin*")
LOCK = ".download.lock"  # held in a folder that gets files
UNFINISHED = ".unfinished."  # and the name of a part or file: its download has begun
# A `.safetensors` file stands for one of these of the same name, see `seed convert`.
CONVERTIBLE = (".bin", ".pt", ".pth")


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


def is_unfinished(part: OriginalPart, folder: Path) -> bool:
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


def network_errors() -> tuple[type[Exception], ...]:
    """What a failed request or download raises."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The hub's errors derive from those of its HTTP client, whose package depends on its version.
    client_error: type[Exception] = HfHubHTTPError.__bases__[0]
    # JSONDecodeError: the page of a proxy. ImportError: httpx lacks the package for it.
    return client_error, HFValidationError, OSError, json.JSONDecodeError, ImportError


def failure_reason(error: Exception) -> str:
    """A failed request or download as a part of a sentence."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "its page on the hub grants access; then set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository, or a private one and no HF_TOKEN for it"
    if status_of(error) == 401:
        return "HF_TOKEN is not accepted"
    if isinstance(error, json.JSONDecodeError):
        return "not the answer of a hub, but perhaps that of a proxy"
    if isinstance(error, network_errors()[0]) and status_of(error) is None:
        server = str(error.request.url).split("/")[2]  # type: ignore[attr-defined]
        return f"no connection to {server} ({first_line(error)})"
    return first_line(error).rstrip(".")


def status_of(error: Exception) -> int | None:
    """HTTP status of a failed request; None: there was no answer."""
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return status


# ---- what there is to download


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server.

    name: path in the part's folder.
    size: in bytes, if known.
    sha256, git_sha1: as the hub states them.
    etag: of a server other than the hub.
    """

    name: str
    url: str
    size: int | None = None
    sha256: str = ""
    git_sha1: str = ""
    etag: str = ""

    @property
    def version(self) -> str:
        """Short name of its content; "": unknown, so that a partial file cannot be continued."""
        identity = self.sha256 or self.git_sha1 or self.etag
        return hashlib.sha256(identity.encode()).hexdigest()[:12] if identity else ""

    @property
    def is_of_hub(self) -> bool:
        return bool(self.git_sha1)


def choose_files(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The files of a repository that match shell patterns, without copies of the same weights.

    If no pattern has a "/", files of the root folder only.
    """
    only_root = not any("/" in pattern for pattern in patterns)
    chosen: list[str] = []
    for name in names:
        is_below_root = "/" in name
        is_wanted = any(fnmatch(name, pattern) for pattern in patterns)
        is_ignored = any(fnmatch(name, pattern) for pattern in IGNORED)
        if is_wanted and not is_ignored and not (only_root and is_below_root):
            chosen.append(name)

    # Of two formats in a folder, safetensors.
    converted_folders = {
        PurePosixPath(name).parent for name in chosen if name.endswith(".safetensors")
    }

    def is_copy(name: str) -> bool:
        path = PurePosixPath(name)
        matches = any(fnmatch(path.name, pattern) for pattern in TORCH_COPIES)
        return matches and path.parent in converted_folders

    return [name for name in chosen if not is_copy(name)]


def list_repository(name: str, patterns: Sequence[str]) -> list[RemoteFile]:
    """Files of a hub repository, or of one of its folders ("owner/name/folder").

    Raises as `network_errors`. Raises CheckpointError: it has none that match the patterns.
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
    entries = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    # 2. Those that are needed.
    files: list[RemoteFile] = []
    prefix = f"{folder}/" if folder else ""
    names = [path.removeprefix(prefix) for path in entries]
    for file_name in choose_files(names, patterns):
        entry = entries[prefix + file_name]
        url = hf_hub_url(repo_id, entry.path, revision=revision)
        sha256 = entry.lfs.sha256 if entry.lfs is not None else ""
        files.append(RemoteFile(file_name, url, entry.size, sha256, entry.blob_id))
    if not files:
        raise CheckpointError(f"has no files {' '.join(patterns)}")
    return files


def look_up_url(name: str, url: str) -> RemoteFile:
    """A file of any server, with what its headers state. Raises as `network_errors`."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    response = get_session().head(
        url, headers={"Accept-Encoding": "identity"}, follow_redirects=True, timeout=TIMEOUT
    )
    hf_raise_for_status(response)
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise CheckpointError("a web page instead of a file, perhaps of a proxy")
    length = response.headers.get("Content-Length")
    size = int(length) if length else None
    return RemoteFile(name, url, size, etag=response.headers.get("ETag", ""))


# ---- parts


@dataclass(frozen=True)
class WantedPart:
    """A part to download.

    files: of its hub repository, as shell patterns; None: all that the part names.
    folder: where to; None: the part's own.
    """

    part: OriginalPart
    files: tuple[str, ...] | None = None
    folder: Path | None = None

    def target(self, root: Path) -> Path:
        """The folder to download to."""
        return self.folder or root / self.part.folder


@dataclass(kw_only=True)
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
    files: list[RemoteFile] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # of earlier sources

    @property
    def source(self) -> str:
        """The current one."""
        return self.sources[0]

    def try_sources(self, work: Callable[[], Result]) -> Result:
        """The result of `work` with the current source, else with the first later one that has it.

        Raises CheckpointError: no source does; a full disk.
        """
        failures: tuple[type[Exception], ...] = (CheckpointError, *network_errors())
        n_retries = 0
        n_bytes = self.bytes_to_download()
        while True:
            try:
                return work()
            except failures as error:
                if disk_is_full(error):
                    reason = "the disk or quota is full"
                    raise CheckpointError(f"{self.folder}: {reason}.") from error
                reason = failure_reason(error)
                is_temporary = self.is_temporary(error)
                pause = pause_before_retry(error, n_retries)

            # 1. The same source again, after progress as often as at first.
            if n_bytes != self.bytes_to_download():
                n_bytes = self.bytes_to_download()
                n_retries = 0
            if is_temporary and n_retries < N_RETRIES:
                n_retries += 1
                log_line(f"{self.source}: {reason}; again in {pause} s")
                time.sleep(pause)
                continue

            # 2. The next source.
            self.problems.append(f"{self.source}: {reason}")
            del self.sources[0]
            self.files = []
            n_retries = 0
            if not self.sources:
                raise CheckpointError(
                    f"{self.label}: not downloaded into {self.folder} ({'; '.join(self.problems)})."
                )

    def is_temporary(self, error: Exception) -> bool:
        """Whether the same source may succeed soon: a busy server, or a connection that broke in a
        download."""
        status = status_of(error)
        if status is not None:
            return status in BUSY
        return bool(self.files) and isinstance(error, network_errors()[0])

    def look_up(self) -> None:
        """List the files of the current source, unless they are listed already."""
        if self.files:
            return
        if self.patterns:
            self.files = list_repository(self.source, self.patterns)
        else:
            self.files = [look_up_url(self.label, self.source)]

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
                temporary = partial_path(file, self.folder / file.name)
                n_resumed = temporary.stat().st_size if temporary.is_file() else 0
                total += max(0, (file.size or 0) - n_resumed)
        return total

    def missing(self, force: bool) -> list[RemoteFile]:
        """The files that are not there; with `force`, also those that differ from the server's.

        Raises CheckpointError: one differs, without `force`.
        """
        missing: list[RemoteFile] = []
        for file in self.files:
            path = self.folder / file.name
            if not self.is_there(file):
                missing.append(file)
                continue
            difference = self.difference(file, path) if path.is_file() else ""
            if difference and not force:
                raise CheckpointError(
                    f"{path} is another file ({difference}) and was kept; seed fetch --force "
                    "replaces it"
                )
            if difference:
                missing.append(file)
        return missing

    def difference(self, file: RemoteFile, path: Path) -> str:
        """How a file on this disk differs from the server's; "": in nothing that is known."""
        size = path.stat().st_size
        if file.size is not None and size != file.size:
            return f"{size:,} bytes instead of {file.size:,}"
        sha256 = self.sha256.get(file.name) or file.sha256
        if sha256:
            return _compare("SHA-256", file_digest(path, "sha256"), sha256)
        if file.git_sha1:
            return _compare("git SHA-1", file_digest(path, "git"), file.git_sha1)
        return ""

    def download(self, force: bool) -> int:
        """Download the missing files; returns their number.

        Raises as `network_errors`. Raises CheckpointError: a file that is not what it should be.
        """
        self.look_up()
        waiting = f"{self.folder}: waits for another download into it"
        with folder_lock(
            self.folder, CheckpointError, timeout=-1, name=LOCK, on_wait=partial(log_line, waiting)
        ):
            missing = self.missing(force)
            with marked_unfinished(self.folder, self.label):
                for file in missing:
                    self.download_one(file)
        return len(missing)

    def download_one(self, file: RemoteFile) -> None:
        """Download a file and check it; errors as of `download`."""
        path = self.folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = download_file(file, path)
        difference = self.difference(file, temporary)
        if difference:
            temporary.unlink()
            raise CheckpointError(f"{file.name}: {difference}")
        flush(temporary)
        os.replace(temporary, path)


def pause_before_retry(error: Exception, n_retries: int) -> int:
    """Seconds: what the server asks for, else twice as many each time."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    asked = str(headers.get("Retry-After", ""))
    return min(MAX_PAUSE, int(asked) if asked.isdecimal() else 2**n_retries)


def _compare(kind: str, actual: str, expected: str) -> str:
    if actual == expected.lower():
        return ""
    return f"{kind} {actual[:12]}… instead of {expected[:12]}…"


def file_digest(path: Path, kind: str) -> str:
    """SHA-256 of a file, or SHA-1 of git's object of it ("git")."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    if kind == "git":
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


def partial_path(file: RemoteFile, path: Path) -> Path:
    """Where a file lies until it is complete."""
    return path.with_name(f".{path.name}.{file.version}.part")


def download_file(file: RemoteFile, path: Path) -> Path:
    """Download a file next to `path`, continuing an earlier attempt; returns its temporary path.

    Raises as `network_errors`: also if fewer bytes arrive than were announced.
    """
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    # 1. What an earlier attempt has left, of this version of the file.
    temporary = partial_path(file, path)
    for old in path.parent.glob(f".{path.name}.*.part"):
        is_too_long = file.size is not None and old.stat().st_size > file.size
        if old != temporary or not file.version or is_too_long:
            old.unlink()
    resumed_at = temporary.stat().st_size if temporary.is_file() else 0

    # 2. The rest. A file that has changed on its server is sent from the start.
    headers = {"Accept-Encoding": "identity"}
    if file.is_of_hub:
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


# ---- all parts of a model


def fetch_parts(
    wanted: Sequence[WantedPart],
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
    if mirrors is None:
        mirrors = read_mirrors(os.environ.get(MIRRORS, "").split())
    wanted = with_needed(wanted, root)
    problems: list[str] = []
    failed: set[str] = set()  # labels of groups

    # 1. Which files there are, and how much space they need.
    groups: list[FileGroup] = []
    for item in wanted:
        for group in file_groups(item, root, mirrors):
            try:
                group.try_sources(group.look_up)
                groups.append(group)
            except CheckpointError as error:
                problems.append(str(error))
                failed.add(group.label)
    check_space(groups)

    # 2. The files.
    for group in groups:
        try:
            n_files = group.try_sources(partial(group.download, force))
        except CheckpointError as error:
            problems.append(str(error))
            failed.add(group.label)
            continue
        n_kept = len(group.files) - n_files
        log_line(f"{group.folder}: {n_files} files of {group.source} downloaded, {n_kept} kept")

    # 3. Parts that are made of others, once these are complete.
    for item in wanted:
        if item.part.convert and failed.isdisjoint(item.part.needs):
            make_part(item, root)

    # 4. Files that no program can download.
    for item in wanted:
        for name, source in item.part.by_hand.items():
            path = item.target(root) / name
            if not path.is_file():
                problems.append(f"{path}: download it by hand ({source}).")
    return problems


def make_part(item: WantedPart, root: Path) -> None:
    """Make a part of those that it needs."""
    folder = item.target(root)
    sources = [root / original_parts()[name].folder for name in item.part.needs]
    with marked_unfinished(folder, item.part.name):
        pkgutil.resolve_name(item.part.convert)(folder, *sources)
    log_line(f"{folder}: made of {', '.join(item.part.needs)}")


def with_needed(wanted: Sequence[WantedPart], root: Path) -> list[WantedPart]:
    """The parts, each after those that it needs; those that were made of others already are left
    out."""
    ordered: list[WantedPart] = []
    for item in wanted:
        folder = item.target(root)
        is_filled = folder.is_dir() and any(folder.iterdir())
        if item.part.convert and is_filled and not is_unfinished(item.part, folder):
            continue
        needed = [WantedPart(original_parts()[name]) for name in item.part.needs]
        for part in (*with_needed(needed, root), item):
            if part not in ordered:
                ordered.append(part)
    return ordered


def file_groups(item: WantedPart, root: Path, mirrors: Mapping[str, str]) -> list[FileGroup]:
    """What is downloaded for a part: the files of its repository, and each file with a URL."""
    part = item.part
    folder = item.target(root)
    groups: list[FileGroup] = []
    if part.hub:
        groups.append(
            FileGroup(
                label=part.name,
                folder=folder,
                sources=_sources(part.name, mirrors, part.hub, *part.mirrors),
                patterns=item.files or part.files,
                sha256=part.sha256,
            )
        )
    return groups + [url_group(part, name, folder, mirrors) for name in part.urls]


def url_group(part: OriginalPart, name: str, folder: Path, mirrors: Mapping[str, str]) -> FileGroup:
    """A file of a part with a URL."""
    return FileGroup(
        label=name,
        folder=folder,
        sources=_sources(name, mirrors, part.urls[name]),
        patterns=(),
        sha256=part.sha256,
    )


def _sources(name: str, mirrors: Mapping[str, str], *published: str) -> list[str]:
    """The sources of a part or file, the user's mirror first."""
    return [mirrors[name], *published] if name in mirrors else list(published)


def read_mirrors(pairs: Sequence[str]) -> dict[str, str]:
    """Sources by name, of NAME=SOURCE pairs.

    The name of a part has a hub repository ("owner/name", or "owner/name/folder"), the name of a
    file a URL. Raises ConfigError: neither.
    """
    # 1. The names that there are.
    parts = original_parts()
    files: list[str] = []
    for part in parts.values():
        files += part.urls

    # 2. The pairs.
    mirrors: dict[str, str] = {}
    for pair in pairs:
        name, _, source = pair.partition("=")
        if name not in parts and name not in files:
            names = [*parts, *dict.fromkeys(files)]
            raise ConfigError(
                f"mirror {pair}: there is no part {name!r}{nearest(name, names)}; "
                f"there are {', '.join(names)}."
            )
        is_url = source.startswith(("http://", "https://"))
        is_repository = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)+", source) is not None
        if is_url != (name in files) or not (is_url or is_repository):
            expected = "a URL" if name in files else "a hub repository (owner/name)"
            raise ConfigError(f"mirror {pair}: {name} needs {expected}.")
        mirrors[name] = source
    return mirrors


def check_space(groups: Sequence[FileGroup]) -> None:
    """Log how much will be downloaded. Raises CheckpointError: a file system has too little
    space."""
    needed: dict[int, int] = {}  # bytes by file system
    folders: dict[int, Path] = {}
    for group in groups:
        # The nearest folder that exists.
        folder = group.folder.absolute()
        while not folder.is_dir():
            folder = folder.parent
        device = folder.stat().st_dev
        needed[device] = needed.get(device, 0) + group.bytes_to_download()
        folders[device] = folder
    for device, n_bytes in needed.items():
        n_free = shutil.disk_usage(folders[device]).free
        if n_bytes > n_free:
            raise CheckpointError(
                f"{folders[device]}: the download needs {n_bytes / 1e9:.1f} GB, but its disk has "
                f"{n_free / 1e9:.1f} GB free."
            )
        if n_bytes:
            log_line(
                f"{folders[device]}: {n_bytes / 1e9:.2f} GB to download, {n_free / 1e9:.1f} GB free"
            )


def fetch_file(name: str, folder: Path) -> Path:
    """Download a file that a part has by its URL, unless it is there.

    Raises CheckpointError: it cannot be downloaded.
    """
    mirrors = read_mirrors(os.environ.get(MIRRORS, "").split())
    part = next(part for part in original_parts().values() if name in part.urls)
    group = url_group(part, name, folder, mirrors)
    group.try_sources(group.look_up)
    check_space([group])
    group.try_sources(partial(group.download, False))
    return folder / name
