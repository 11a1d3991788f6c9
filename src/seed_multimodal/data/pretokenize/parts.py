"""Output of one unit: `part-0003/0000000.tar`, … and, last of all, `part-0003/manifest.json`, which says it is done.

Tars hold one KEY.json per record. A part without manifest is an unfinished one and is made again. Equal records give
equal bytes: no times, owners or random keys. A key is the unit's number, its file's name, and the sample's number in
that file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from seed_multimodal.data.formats.writer import ShardWriter, open_shard
from seed_multimodal.data.pretokenize.units import Unit
from seed_multimodal.disk import lock, replace_text, sha256_of, writing
from seed_multimodal.errors import DataError

MANIFEST = "manifest.json"
LOCK = ".lock"
PROBES, PROBE = 32, 4096  # places of an input that are hashed, bytes at each
CHANGED = "the inputs have changed (new ones belong at the end of the list): choose another --save_dir."


def part_folder(save_dir: Path, unit: Unit) -> Path:
    """Where a unit's output lies."""
    return save_dir / f"part-{unit.number:04d}"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a json object whole or not at all, flushed to the disk.

    Raises:
        DataError: the disk refuses.
    """
    with writing(path, DataError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Half a surrogate pair (a file name that is no UTF-8) becomes the escape that json has for it.
        replace_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n", errors="backslashreplace")


def read_json(path: Path) -> dict[str, Any] | None:
    """A json object, or None where there is none or it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


class PartWriter:
    """Writes a unit's records; a context manager that leaves nothing behind after a failure.

    Args:
        limit: records per tar.

    Raises:
        DataError: the disk refuses, or another run is writing this part.
    """

    def __init__(self, save_dir: Path, unit: Unit, limit: int) -> None:
        self.folder, self.unit, self.limit = part_folder(save_dir, unit), unit, limit
        self.tars: list[dict[str, Any]] = []
        self._mark = content_mark(unit)
        self._held, self._open = contextlib.ExitStack(), contextlib.ExitStack()  # the lock; the tar being written
        self._shard: ShardWriter | None = None

    def __enter__(self) -> PartWriter:
        with writing(self.folder, DataError):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._held.enter_context(lock(self.folder / LOCK, timeout=0, remove=True))
            except TimeoutError:
                raise DataError(f"{self.folder}: another run is writing this part; let it end first.") from None
            self._clear()  # of a run that was killed, or of an input that has changed
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        with self._held:
            if kind is not None:
                with contextlib.suppress(OSError):  # a full disk refuses once more what is still in the buffer
                    self._open.__exit__(kind, error, trace)
                with contextlib.suppress(OSError):
                    self._clear()

    def add(self, number: int, record: Mapping[str, Any]) -> None:
        """Write the record of sample `number` of the unit."""
        key = f"{self.unit.number:05d}-{self.unit.stem}-{self.unit.start + number:07d}"
        with writing(self.folder, DataError):
            if self._shard is None or self._shard.count >= self.limit:
                self._close_tar()
                self._shard = self._open.enter_context(open_shard(self.folder / f"{len(self.tars):07d}.tar"))
            self._shard.add(key, {"json": _encoded(record)})

    def finish(self, counts: Mapping[str, Any]) -> None:
        """Write the manifest with these counts, which makes the part a finished one."""
        with writing(self.folder, DataError):
            self._close_tar()
        source = {**self.unit.identity(), "mark": self._mark}
        write_json(self.folder / MANIFEST, {"unit": self.unit.number, "source": source, **counts, "tars": self.tars})

    def _close_tar(self) -> None:
        if self._shard is not None:
            self._open.close()
            path = self.folder / f"{len(self.tars):07d}.tar"
            self.tars.append({"file": path.name, "samples": self._shard.count, "bytes": path.stat().st_size,
                              "sha256": sha256_of(path)})
            self._shard = None

    def _clear(self) -> None:
        for left in self.folder.iterdir():
            if left.suffix in (".tar", ".tmp") or left.name == MANIFEST:
                left.unlink()


def check_part(save_dir: Path, unit: Unit) -> tuple[dict[str, Any] | None, str]:
    """A finished part's manifest, or None and why the part must be made (again); "" when there is none at all.

    Raises:
        DataError: the part belongs to another input: the list of inputs has changed.
    """
    folder = part_folder(save_dir, unit)
    manifest = read_json(folder / MANIFEST)
    if manifest is None:
        return None, f"{folder} was not finished" if folder.is_dir() and any(folder.iterdir()) else ""
    source, wanted = manifest.get("source", {}), unit.identity()
    if (source.get("file"), source.get("start")) != (wanted["file"], wanted["start"]):
        raise DataError(f"{folder}: holds {source.get('file')} from record {source.get('start')} on, but now the unit "
                        f"of this number is {wanted['file']} from {wanted['start']} on; {CHANGED}")
    if source != {**wanted, "mark": content_mark(unit)}:
        return None, f"{unit.path} has changed since {folder} was made"
    for tar in manifest.get("tars", []):
        path = folder / str(tar.get("file"))
        if not path.is_file() or path.stat().st_size != tar.get("bytes") or sha256_of(path) != tar.get("sha256"):
            return None, f"{path} differs from its manifest"
    return manifest, ""


def is_of(manifest: Mapping[str, Any], unit: Unit) -> bool:
    """Whether a part's manifest says that it was made of this unit, as far as names and sizes tell."""
    return unit.identity().items() <= manifest.get("source", {}).items()


def content_mark(unit: Unit) -> str:
    """A hash of the unit's file at `PROBES` places over its length ("" of a folder), which tells another file of equal
    size (tars come in steps of 10 KiB) without reading all of it."""
    path = Path(unit.path)
    if not path.is_file():
        return ""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            last = max(0, path.stat().st_size - PROBE)
            for place in sorted({last * number // (PROBES - 1) for number in range(PROBES)}):
                file.seek(place)
                digest.update(file.read(PROBE))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    return digest.hexdigest()[:16]


def _encoded(record: Mapping[str, Any]) -> bytes:
    """A record as json; what json has no word for (NaN, as in LAION's metadata) becomes null."""
    try:
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(record), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
