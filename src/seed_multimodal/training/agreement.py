"""Handshake of the processes of a training, before anything is built.

Processes with other settings, data, code or another output folder would train on without an error,
with a wrong result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import socket
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

import seed_multimodal
from seed_multimodal.data.formats import manifest
from seed_multimodal.data.formats.contents import expand_pattern
from seed_multimodal.data.formats.storage import is_remote, list_files
from seed_multimodal.disk import JsonObject, replace_text, writing
from seed_multimodal.entry import COMMAND_FAILED
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.settings import changed_settings, leaves
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.weights.find import locate

# Settings that may differ between processes.
OWN_SETTINGS = ("trainer.device", "trainer.dataloader_num_workers", "run.device", "run.num_workers")
PROGRAMS = ("trainer.report_to",)  # whose names are also those of folders that they write
COMPARED_FILES = 20_000  # of a folder
SHOWN_DIFFERENCES = 5
PARTS = 256  # in which lists that differ are compared
FOLDER_SECONDS = 5.0  # in which a new file appears on all nodes of a shared disk


def agree(group: ProcessGroup, config: Mapping[str, object], output_dir: Path) -> None:
    """Check that all processes make the same run: before anything is built, by every training.

    config: the resolved configuration. The files that it names are compared by name and size.

    Raises ConfigError: settings, versions, code or files differ, or the output folder is not the
        same one.
    """
    if group.world == 1:
        return
    settings = {key: value for key, value in leaves(config) if key not in OWN_SETTINGS}
    values = {
        "settings": settings,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "Python": platform.python_version(),
        "code of seed_multimodal": _code_checksum(),
        "files": dict(_file_sizes(settings, output_dir)),
        "output folder": "shared" if _sees_folder(group, output_dir) else "not the same",
    }

    # 1. Usually all are equal, and checksums suffice.
    host = {"host": socket.gethostname()}
    rows = group.gather({"checksum": _checksum(values), **host})
    others = [rank for rank, row in enumerate(rows) if row["checksum"] != rows[0]["checksum"]]
    if not others:
        return

    # 2. Only the first process and the first that differs go on; they compare parts of what they
    # have by checksums, and exchange those that differ: a few of 100,000 names.
    rank = others[0]
    pair = group.pair(rank)
    if pair is None:
        group.sum([0])  # a launcher ends all processes with the first
        raise SystemExit(COMMAND_FAILED)
    parts = _parts(values)
    sums = pair.gather({name: _checksum(part) for name, part in parts.items()})
    differing = [name for name in parts if sums[0][name] != sums[1][name]]
    leaves_of_them: JsonObject = {}
    for name in differing[:SHOWN_DIFFERENCES]:
        leaves_of_them |= parts[name]
    first, other = pair.gather(leaves_of_them)
    changes = changed_settings(first, other)
    is_all = max(len(changes), len(differing)) <= SHOWN_DIFFERENCES
    more = "" if is_all else "; and more"
    group.sum([0])
    if os.environ.get("LOCAL_RANK", "0") != "0":
        raise SystemExit(COMMAND_FAILED)  # the first process of its node prints it
    raise ConfigError(
        f"The processes must make the same run. rank 0 on {rows[0]['host']} -> rank {rank} on "
        f"{rows[rank]['host']}: {'; '.join(changes[:SHOWN_DIFFERENCES])}{more}. "
        f"{len(others)} of {group.world} processes differ from rank 0."
    )


def _parts(values: JsonObject) -> dict[str, JsonObject]:
    """The values as JSON has them, divided into `PARTS` by the checksums of their keys."""
    parts: dict[str, JsonObject] = {str(number): {} for number in range(PARTS)}
    for section, value in json.loads(json.dumps(values, default=str)).items():
        for key, leaf in (value if isinstance(value, dict) else {"": value}).items():
            name = f"{section}.{key}".rstrip(".")
            parts[str(zlib.crc32(name.encode()) % PARTS)][name] = leaf
    return parts


def _checksum(value: object) -> str:
    """Of what JSON has of a value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _sees_folder(group: ProcessGroup, folder: Path) -> bool:
    """Whether this process sees a file that the first one has just written into the folder."""
    name = ""
    if group.first:
        name = f".processes-{uuid.uuid4().hex}"
        with writing(folder, ConfigError):
            folder.mkdir(parents=True, exist_ok=True)
            replace_text(folder / name, "")
    name = group.gather({"name": name})[0]["name"]
    deadline = time.monotonic() + FOLDER_SECONDS
    while not (folder / name).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = (folder / name).exists()
    group.sum([seen])  # all have looked
    if group.first:
        (folder / name).unlink()
    return seen


def _file_sizes(config: Mapping[str, object], output_dir: Path) -> Iterator[tuple[str, int]]:
    """Path and size of each file that a configuration names, also in folders and by patterns.

    Any text that is a path counts, since settings of formats and decoders name files, too.
    """
    texts: list[object] = []
    for key, value in leaves(config):
        if key not in PROGRAMS:
            texts += value if isinstance(value, list) else [value]
    for text in dict.fromkeys(text for text in texts if isinstance(text, str)):
        names: list[str] = []
        for path, is_folder in _paths(text).items():
            is_parent = Path(os.path.abspath(output_dir)).is_relative_to(os.path.abspath(path))
            if not is_folder:
                names.append(path)
            elif not is_parent:
                names += list_files(path)[:COMPARED_FILES]
        known = manifest.read(names)
        for name in names:
            yield name, known[name].size if name in known else os.path.getsize(name)


def _paths(text: str) -> dict[str, bool]:
    """Existing files and folders that a setting may mean, and whether each is a folder."""
    path = locate(text)
    if path is not None:
        return {str(path): path.is_dir()}
    with contextlib.suppress(DataError, OSError, ValueError):  # no pattern of files
        paths = expand_pattern([text])
        return {path: paths[path] for path in paths if not is_remote(path)}
    return {}


def _code_checksum() -> str:
    """Of this package's source files and tables."""
    root = Path(seed_multimodal.__file__).parent
    checksum = hashlib.sha256()
    for file in sorted([*root.rglob("*.py"), *root.rglob("*.yaml")]):
        checksum.update(file.read_bytes())
    return checksum.hexdigest()[:12]
