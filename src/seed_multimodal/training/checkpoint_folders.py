"""Checkpoint folders: published whole by a rename, verified before they are used, the oldest removed.

A checkpoint is written to `.checkpoint-N.tmp`, every file is flushed to the disk, `manifest.json` (names, sizes,
SHA-256) comes last, and one rename makes it `checkpoint-N`. A folder without a matching manifest is incomplete ("torn")
and never resumed from. Other processes' shards are listed by all of them together, a share each.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from seed_multimodal.disk import disk_reason, flush_folder, lock, replace_folder, replace_text, sha256_of, writing
from seed_multimodal.errors import CheckpointError, first_line
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.failures import TrainingError

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_HIDDEN = re.compile(r"\.checkpoint-\d+\.(tmp|(\d+\.)?old)")  # the number: of the process that replaced it
Entry = dict[str, Any]  # {"size": bytes, "sha256": hex}


@contextlib.contextmanager
def output_folder_lock(folder: Path, group: ProcessGroup, timeout: float = 3.0) -> Iterator[None]:
    """Lock of the output folder: a second run would remove what this one is writing, and mix their logs.

    The first process holds it; it is released however that process ends. Waits up to `timeout` seconds for a run that
    is just ending.

    Raises:
        CheckpointError: another run uses the folder, or it cannot be made.
    """
    with contextlib.ExitStack() as held:
        taken = False
        if group.first:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    held.enter_context(lock(folder / ".run.lock", timeout))
                except TimeoutError:
                    taken = True
        if group.agree(taken)[0]:
            raise CheckpointError(f"{folder}: another run is using this output folder; let it end first, or use "
                                  "another folder.")
        yield


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything named like a checkpoint, the newest first."""
    found = [(int(match[1]), path) for path in (folder.iterdir() if folder.is_dir() else ())
             if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return sorted(found, reverse=True)


def temporary_folder(folder: Path, step: int) -> Path:
    """A new empty folder to write the checkpoint of a step into."""
    place = folder / f".checkpoint-{step}.tmp"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    return place


def describe(folder: Path, name: str, *, flush: bool = True) -> Entry:
    """Size and hash of a file; with `flush` it is on the disk for certain when this returns."""
    if flush:
        with open(folder / name, "rb") as handle:
            os.fsync(handle.fileno())
    return {"size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}


def files_of(folder: Path) -> list[str]:
    """Names of the files in a checkpoint, relative and sorted, without the manifest."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")
                  if path.is_file() and path.name != MANIFEST)


def publish(temporary: Path, step: int, entries: Mapping[str, Entry]) -> None:
    """Write the manifest and give the folder its name, in place of what had it before."""
    replace_text(temporary / MANIFEST, json.dumps({"step": step, "files": dict(sorted(entries.items()))}, indent=1))
    for place in {temporary, *((temporary / name).parent for name in entries)}:
        flush_folder(place)
    target = temporary.parent / f"checkpoint-{step}"
    replace_folder(temporary, target)
    flush_folder(target.parent)


def fault_of(folder: Path, *, part: int = 0, parts: int = 1, hashes: bool = True) -> str:
    """What is wrong with a checkpoint ("": nothing).

    Args:
        part, parts: check one share of the files, so that processes can divide the work.
        hashes: compare contents, too, not only names and sizes.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        int(manifest["step"])
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is damaged"
    for name in sorted(files)[part::parts]:
        place, (size, digest) = folder / name, files[name]
        if not place.is_file():
            return f"{name} is missing"
        if place.stat().st_size != size:
            return f"{name} has {place.stat().st_size} of {size} bytes"
        if hashes and describe(folder, name, flush=False)["sha256"] != digest:
            return f"{name} has another content than when it was saved"
    return ""


def newest(folder: Path, group: ProcessGroup, log: Callable[[str], None]) -> tuple[int, Path] | None:
    """The newest complete checkpoint; torn ones are skipped with a remark. All processes call it.

    Raises:
        CheckpointError: the processes see different folders.
    """
    found = checkpoints(folder)
    listed = [answer["steps"] for answer in group.gather({"steps": [step for step, _ in found]})]
    if any(steps != listed[0] for steps in listed):
        raise CheckpointError(f"{folder}: the processes see different checkpoints in it; the output folder must be on "
                              "a disk that all of them share.")
    for step, path in found:
        fault = _shared_fault(path, group)
        if not fault:
            return step, path
        log(f"{path} is skipped: {fault}.")
    return None


def _shared_fault(path: Path, group: ProcessGroup) -> str:
    """What is wrong with a checkpoint ("": nothing); the processes divide the work."""
    own = fault_of(path, part=group.rank, parts=group.world)
    return next((answer["fault"] for answer in group.gather({"fault": own}) if answer["fault"]), "")


def check_shared(file: Path, group: ProcessGroup, timeout: float = 20.0) -> None:
    """Check that all processes see the folder in which the first one has just written `file`.

    Else every checkpoint of ZeRO's shards would lie torn over the nodes' own disks. A network disk may show a new file
    some seconds late (`timeout`).

    Raises:
        CheckpointError: some process does not see it.
    """
    group.agree(False)  # it is written
    end = time.monotonic() + timeout
    while not file.is_file() and time.monotonic() < end:
        time.sleep(0.2)
    if group.agree(not file.is_file())[0]:
        raise CheckpointError(f"{file.parent}: not all processes see {file.name}, which the first one has written into "
                              "it; the output folder must be on a disk that all of them share.")


def named(path: Path, group: ProcessGroup) -> tuple[int, Path]:
    """A checkpoint that the user named.

    Raises:
        CheckpointError: it is missing, not a checkpoint, or torn.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such checkpoint folder.")
    fault = _shared_fault(path, group)
    if fault:
        raise CheckpointError(f"{path}: cannot be resumed from: {fault}.")
    return int(json.loads((path / MANIFEST).read_text(encoding="utf-8"))["step"]), path


def prune(folder: Path, limit: int | None, step: int) -> None:
    """Keep the `limit` newest checkpoints up to the one of `step`, just written (None: all).

    Later ones are neither counted nor removed: they are torn, or of a run that resumed from the same earlier
    checkpoint, and counting them would remove the one just written.
    """
    present = [path for number, path in checkpoints(folder) if number <= step]
    for path in present[limit:] if limit is not None else []:
        _remove(path)


def clean(folder: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _HIDDEN.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def unwritable(step: int, error: Exception, saved: str) -> TrainingError:
    """The error sentence for a checkpoint that could not be written."""
    reason = disk_reason(error) if isinstance(error, OSError) else _reason(error)
    return TrainingError(f"The checkpoint of step {step} cannot be written: {reason}; {saved}.")


def _reason(error: Exception) -> str:
    first = first_line(error)
    return f"the disk or quota is full ({first})" if "No space" in first or "too large" in first else first


def _remove(path: Path) -> None:
    """First by name, then by content, so that nothing half removed looks like a checkpoint."""
    aside = path.with_name(f".{path.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
    shutil.rmtree(aside, ignore_errors=True)
