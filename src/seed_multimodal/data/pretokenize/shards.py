"""Output of one unit: `part-0003/0000000.tar`, … and, last of all, `part-0003/manifest.json`, which says it is done.

Tars hold one KEY.json per record; they are written beside their place, flushed, and renamed when the whole unit is
encoded, so a part without manifest is an unfinished one and is made again. Equal records give equal bytes: no times,
owners or random keys. A key is the unit's number, its file's name, and the sample's number in that file.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from seed_multimodal.data.pretokenize.units import Unit
from seed_multimodal.disk import flush_folder, replace_text, sha256_of
from seed_multimodal.errors import DataError

MANIFEST = "manifest.json"
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Half a surrogate pair (a file name that is no UTF-8) becomes the escape that json has for it.
        replace_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n", errors="backslashreplace")
        flush_folder(path.parent)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}).") from None


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
    """

    def __init__(self, save_dir: Path, unit: Unit, limit: int) -> None:
        self.folder, self.unit, self.limit = part_folder(save_dir, unit), unit, limit
        self.tars: list[dict[str, Any]] = []
        self._scratch: list[Path] = []
        self._mark = content_mark(unit)
        self._archive: tarfile.TarFile | None = None
        self._file: BinaryIO | None = None

    def __enter__(self) -> PartWriter:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder, os.O_RDONLY)  # held until this process lets go, however it ends
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in self.folder.iterdir():  # of a run that was killed, or of an input that has changed
                if left.suffix in (".tar", ".tmp") or left.name == MANIFEST:
                    left.unlink()
        except BlockingIOError:
            raise DataError(f"{self.folder}: another run is writing this part; let it end first.") from None
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be written to ({error.strerror}).") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if kind is not None:
            if self._file is not None:
                with contextlib.suppress(OSError):  # a full disk refuses once more what is still in the buffer
                    self._file.close()
            for path in self._scratch:
                path.unlink(missing_ok=True)
        os.close(self._lock)

    def add(self, number: int, record: Mapping[str, Any]) -> None:
        """Write the record of sample `number` of the unit.

        Raises:
            DataError: the disk refuses.
        """
        if not self.tars or self.tars[-1]["samples"] >= self.limit:
            self._next_tar()
        assert self._archive is not None
        data = _encoded(record)
        key = f"{self.unit.number:05d}-{self.unit.stem}-{self.unit.start + number:07d}"
        info = tarfile.TarInfo(f"{key}.json")
        info.size, info.mode = len(data), 0o644
        try:
            self._archive.addfile(info, io.BytesIO(data))
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be written ({error.strerror}).") from None
        self.tars[-1]["samples"] += 1

    def finish(self, counts: Mapping[str, Any]) -> dict[str, Any]:
        """Rename the tars, write the manifest with these counts, and return it."""
        self._close_tar()
        try:
            for tar, scratch in zip(self.tars, self._scratch, strict=True):
                tar["bytes"], tar["sha256"] = scratch.stat().st_size, sha256_of(scratch)
                os.replace(scratch, self.folder / tar["file"])
            flush_folder(self.folder)
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be written ({error.strerror}).") from None
        source = {**self.unit.identity(), "mark": self._mark}
        manifest = {"unit": self.unit.number, "source": source, **counts, "tars": self.tars}
        write_json(self.folder / MANIFEST, manifest)
        return manifest

    def _next_tar(self) -> None:
        self._close_tar()
        name = f"{len(self.tars):07d}.tar"
        scratch = self.folder / f".{name}.tmp"
        try:
            self._file = open(scratch, "wb")
        except OSError as error:
            raise DataError(f"{scratch}: cannot be written ({error.strerror}).") from None
        self._archive = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        self._scratch.append(scratch)
        self.tars.append({"file": name, "samples": 0, "bytes": 0, "sha256": ""})

    def _close_tar(self) -> None:
        if self._archive is None or self._file is None:
            return
        try:
            self._archive.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be written ({error.strerror}).") from None
        self._archive = self._file = None


def is_of(manifest: Mapping[str, Any], unit: Unit) -> bool:
    """Whether a part's manifest says that it was made of this unit, as far as names and sizes tell."""
    source = manifest.get("source")
    return isinstance(source, Mapping) and {key: source.get(key) for key in unit.identity()} == unit.identity()


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
    if not is_of(manifest, unit) or source.get("mark", "") not in ("", content_mark(unit)):
        return None, f"{unit.path} has changed since {folder} was made"
    for tar in manifest.get("tars", []):
        path = folder / str(tar.get("file"))
        if not path.is_file() or path.stat().st_size != tar.get("bytes") or sha256_of(path) != tar.get("sha256"):
            return None, f"{path} differs from its manifest"
    return manifest, ""
