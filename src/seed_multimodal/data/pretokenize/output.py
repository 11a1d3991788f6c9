"""The output of a run: a folder per unit; for all of them `settings.json` at the start and `manifest.json` at the end.

`part-0003/0000000.tar`, … hold one KEY.json per record; `part-0003/manifest.json` is written last and marks the part as
finished; a part without it is made again. Equal records give equal bytes: no times, owners or random keys. A key is the
unit's number, its file's name, and the sample's number in that file.

A run that continues in a folder must have the same tokenizer, transform, kind, fields and filters; batch size, number
of processes and device may differ. Any number of processes may finish at once: a lock orders them.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from seed_multimodal.data.formats.shards import ShardWriter, open_shard
from seed_multimodal.data.pretokenize.units import Unit
from seed_multimodal.disk import LOCK, folder_lock, read_json_object, replace_text, sampled_hash, sha256_of, writing
from seed_multimodal.errors import DataError, counted
from seed_multimodal.settings import changed_settings

MANIFEST, SETTINGS = "manifest.json", "settings.json"
SUMS = ("read", "samples", "pictures", "bad", "lost_pictures")
CHANGED = "the inputs have changed (new ones belong at the end of the list): choose another --save_dir."


def part_folder(save_dir: Path, unit: Unit) -> Path:
    """Where a unit's output lies."""
    return save_dir / f"part-{unit.number:04d}"


# ---- one part


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
        self._held.enter_context(folder_lock(self.folder, DataError, "writing this part"))
        with writing(self.folder, DataError):
            self._clear()  # of a run that was killed, or of an input that has changed
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        with self._held:
            if kind is not None:
                with contextlib.suppress(OSError):  # a full disk fails again on the rest of the buffer
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
        _write_json(self.folder / MANIFEST, {"unit": self.unit.number, "source": source, **counts, "tars": self.tars})

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
    manifest = _read_json(folder / MANIFEST)
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
    """Whether a part was made of this unit, by the names and sizes in its manifest."""
    return unit.identity().items() <= manifest.get("source", {}).items()


def content_mark(unit: Unit) -> str:
    """The `sampled_hash` of the unit's file ("" of a folder), which tells another file of equal size (tars come in
    steps of 10 KiB)."""
    path = Path(unit.path)
    if not path.is_file():
        return ""
    try:
        return sampled_hash(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None


# ---- the whole


def refuse_other_settings(save_dir: Path, settings: Mapping[str, Any], whole: bool = False) -> None:
    """Refuse a folder that was begun with another of these settings (`whole`: they are all; none may be missing).

    Raises:
        DataError: another setting, named, with both values.
    """
    known = _read_json(save_dir / SETTINGS)
    if known is None:
        return
    keys = dict.fromkeys([*settings, *known] if whole else settings)
    differ = [key for key in keys if settings.get(key) != known.get(key)]
    if "tokenizer" in differ:
        theirs, ours = (str(one.get("tokenizer"))[:12] for one in (known, settings))
        raise DataError(f"{save_dir}: was begun with another tokenizer (weights {theirs}…, now {ours}…); codes of two "
                        "tokenizers do not mix: choose another --save_dir.")
    if "kind" in differ:  # other fields follow from it
        differ = ["kind"]
    changes = changed_settings({key: known[key] for key in differ if key in known},
                               {key: settings[key] for key in differ if key in settings})
    if differ:
        raise DataError(f"{save_dir}: was begun with other settings ({'; '.join(changes or differ)}); choose another "
                        "--save_dir, or the same settings.")


def agree_on_settings(save_dir: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of the folder, or check that they are the same.

    Raises:
        DataError: another setting, named, with both values; or parts without (readable) settings.
    """
    file = save_dir / SETTINGS
    with folder_lock(save_dir, DataError, timeout=-1):
        if _read_json(file) is None:
            if file.exists() or any(save_dir.glob(f"part-*/{MANIFEST}")):
                raise DataError(f"{file}: is missing or damaged, so the settings of the parts beside it are "
                                "unknown; choose another --save_dir.")
            _write_json(file, settings)
    refuse_other_settings(save_dir, settings, whole=True)


def versions() -> dict[str, str]:
    """Versions of the libraries that compute codes and decode pictures."""
    import PIL
    import torch

    from seed_multimodal import __version__

    return {"seed_multimodal": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "pillow": PIL.__version__}


def merge(save_dir: Path, units: Sequence[Unit]) -> dict[str, Any] | None:
    """Write `manifest.json` when every unit's part is finished, and return it; None: some are not yet, or were made of
    inputs that have changed since."""
    with folder_lock(save_dir, DataError, timeout=-1):
        parts = [_read_json(part_folder(save_dir, unit) / MANIFEST) for unit in units]
        finished = [part for unit, part in zip(units, parts, strict=True)
                    if part is not None and is_of(part, unit)]
        if len(finished) < len(units):
            return None
        total: dict[str, Any] = {key: sum(part.get(key, 0) for part in finished) for key in SUMS}
        dropped = Counter[str]()
        for part in finished:
            dropped.update(part["dropped"])
        settings = _read_json(save_dir / SETTINGS) or {}
        manifest = {"settings": settings, **total, "dropped": dict(sorted(dropped.items())), "parts": [
            {"folder": part_folder(save_dir, unit).name, "source": part["source"], "samples": part["samples"],
             "tars": part["tars"], "made": part["made"]} for unit, part in zip(units, finished, strict=True)]}
        _write_json(save_dir / MANIFEST, manifest)
        for unit in units:  # of processes that were killed just before they removed it
            with contextlib.suppress(OSError):
                (part_folder(save_dir, unit) / LOCK).unlink()
        return manifest


def summary(manifest: Mapping[str, Any], save_dir: Path) -> str:
    """A finished folder in one sentence or two."""
    tars = sum(len(part["tars"]) for part in manifest["parts"])
    text = (f"{save_dir}: {counted(manifest['samples'], 'record')} with {counted(manifest['pictures'], 'picture')} in "
            f"{counted(tars, 'tar')}, of {counted(manifest['read'], 'sample')} read")
    left_out = [f"{count:,} {reason}" for reason, count in manifest["dropped"].items()]
    if left_out:
        text += f"; filtered: {', '.join(left_out)}"
    if manifest["lost_pictures"]:
        text += f"; left out of documents: {counted(manifest['lost_pictures'], 'picture')} that cannot be read"
    if manifest["bad"]:
        text += f"; broken: {manifest['bad']:,} (named in the parts' {MANIFEST})"
    return text + "."


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with writing(path, DataError):
        # Half a surrogate pair (a file name that is no UTF-8) becomes the escape that json has for it.
        replace_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n", errors="backslashreplace")


def _read_json(path: Path) -> dict[str, Any] | None:
    """A json object, or None where there is none or it is damaged."""
    try:
        return read_json_object(path, DataError)
    except DataError:
        return None


def _encoded(record: Mapping[str, Any]) -> bytes:
    """A record as json; NaN (as in LAION's metadata), which json lacks, becomes null."""
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
