"""The shards of a nano set (see `data.nano`) as records: every picture with its captions, questions and split."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from seed_multimodal.data.formats.record import BadRecord, Record
from seed_multimodal.data.formats.tar import OpenFiles, tar_records
from seed_multimodal.data.formats.tar_headers import Damaged
from seed_multimodal.errors import DataError

BUILD_HINT = "build it with: python -m seed_multimodal.data.nano build --out data/nano64"


def find_nano(path: str | Path | None = None) -> Path:
    """Folder of the set: `path`, else $SEED_NANO_DATA, else data/nano64 of the project or the current folder."""
    given = path or os.environ.get("SEED_NANO_DATA")
    project = Path(__file__).resolve().parents[4]
    places = [Path(given)] if given else [project / "data" / "nano64", Path.cwd() / "data" / "nano64"]
    for place in places:
        if (place / "manifest.json").is_file():
            return place
    raise DataError(f"{places[0]}: no nano data set there (no manifest.json); {BUILD_HINT}")


class NanoFile:
    """The records of a set by number, sorted by key; a record has the member `webp`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The set's manifest: `size` of the pictures, number of `records`, `files`.

        Raises:
            DataError: it is no json, or lacks one of these.
        """
        path = self.path / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: not JSON ({error}).") from None
        for key in ("size", "records", "files"):
            if not isinstance(manifest, dict) or key not in manifest:
                raise DataError(f"{path}: no key {key!r}; {BUILD_HINT}")
        return manifest

    @cached_property
    def records(self) -> list[Record]:
        """All of them, read.

        Raises:
            DataError: naming file and sample, when anything is missing, damaged or not as the manifest counts it.
        """
        found = [record for name in self.manifest["files"] if ".tar" in name for record in _read(self.path / name)]
        if len(found) != self.manifest["records"]:
            raise DataError(f"{self.path}: the shards hold {len(found)} samples, the manifest says "
                            f"{self.manifest['records']}; {BUILD_HINT}")
        if len({record.key for record in found}) != len(found):
            raise DataError(f"{self.path}: two samples have the same key.")
        return sorted(found, key=lambda record: record.key)

    @property
    def sizes(self) -> Sequence[int]:
        """All records are one piece."""
        return [len(self.records)]

    def locate(self, row: int) -> Record:
        """A record, read."""
        return replace(self.records[row])


def _read(shard: Path) -> list[Record]:
    found: list[Record] = []
    files = OpenFiles(limit=1)
    try:
        for record in tar_records(shard, ("webp", "json"), unpack=True):
            parsed = record.parsed(files)
            for extension in ("webp", "json"):
                if extension not in record.members:
                    raise BadRecord("missing member", f"{record.where}: has no .{extension} member.")
            parsed.members["webp"] = record.member("webp", files=files) or b""
            found.append(parsed)
    except Damaged as error:
        after = f"after sample {found[-1].key}" if found else "in its first sample"
        raise DataError(f"{shard}: torn or damaged {after} ({error}).") from None
    return found
