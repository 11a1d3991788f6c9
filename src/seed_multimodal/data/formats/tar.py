"""Webdataset shards (.tar, not compressed): members grouped into samples, and random access by an index."""

from __future__ import annotations

import tarfile
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from seed_multimodal.data.formats.index import Arrays, IndexedFile
from seed_multimodal.data.formats.record import ByteRange, Record
from seed_multimodal.data.formats.storage import open_binary, read_errors

PICKLED = ("pkl", "pickle")


class TarFile(IndexedFile):
    """The samples of a plain tar by index: consecutive members with the same key are one sample.

    A damaged tar yields the samples before the damage, and one last record with a `problem`.
    """

    kind = "tar"

    def scan(self) -> Arrays:
        """Build the index from the headers of all members: `keys` bytes [N] of the complete samples; `first` int64 [N +
        1], index of each sample's first member; `extension` of each member, index into `extensions`; `offset` and
        `size` of each member, int64 [M]; `damage`: error message of a damaged tar, else empty."""
        keys: list[bytes] = []
        numbers: dict[str, int] = {}
        first, extension, offset, size = array("q"), array("q"), array("q"), array("q")
        end, last, damage = 0, "", ""
        with read_errors(self.path), open_binary(self.path) as file:
            try:
                tar = tarfile.open(fileobj=file, mode="r:")
                while True:  # `tar.next()` stops silently at invalid headers
                    position = end
                    file.seek(position)
                    member = tarfile.TarInfo.fromtarfile(tar)
                    end = tar.offset
                    if end <= position:
                        raise tarfile.ReadError("a header has a size below 0")
                    name, ending = split_name(member.name)
                    if not name or not member.isreg():
                        continue
                    if name != last:
                        keys.append(name.encode("utf-8", "surrogateescape"))
                        first.append(len(offset))
                        last = name
                    extension.append(numbers.setdefault(ending, len(numbers)))
                    offset.append(member.offset_data)
                    size.append(member.size)
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # end marker
                pass
            except (tarfile.TarError, ValueError, OverflowError) as error:
                damage = str(error)
        first.append(len(offset))
        if damage and keys:  # members of the last sample may be missing
            keys.pop()
            first.pop()
        members = first[-1]
        if damage:
            after = (
                f"after sample {keys[-1].decode('utf-8', 'replace')}"
                if keys
                else "in its first sample"
            )
            damage = f"torn or damaged {after} ({damage})."
        return {
            "keys": np.array(keys, bytes),
            "first": np.array(first),
            "extensions": np.array(list(numbers), str),
            "extension": np.array(
                extension[:members], np.uint8 if len(numbers) <= 256 else np.int64
            ),
            "offset": np.array(offset[:members]),
            "size": np.array(size[:members]),
            "damage": np.array(damage),
        }

    @property
    def sizes(self) -> Sequence[int]:
        """One shard with all samples, including a damaged one."""
        return [len(self.arrays["keys"]) + bool(str(self.arrays["damage"]))]

    def locate(self, row: int) -> Record:
        """An unread sample, with its key in the shard."""
        arrays, path = self.arrays, self.path
        if row == len(arrays["keys"]):
            return Record(
                "torn", path, file=path, problem=("damaged file", f"{path}: {arrays['damage']}")
            )
        key = arrays["keys"].item(row).decode("utf-8", "surrogateescape")
        record = Record(key, f"{path}: sample {key}", file=path)
        for member in range(arrays["first"].item(row), arrays["first"].item(row + 1)):
            extension = arrays["extensions"].item(arrays["extension"].item(member))
            if extension in record.members:
                record.problem = "duplicate id", f"{record.location} has two .{extension} members."
            record.members[extension] = ByteRange(
                path, arrays["offset"].item(member), arrays["size"].item(member)
            )
        return record


class JsonTar(TarFile):
    """A tar that rejects pickles, and with `needs_json` samples without a .json."""

    def __init__(self, path: str | Path, needs_json: bool = True) -> None:
        super().__init__(path)
        self.needs_json = needs_json

    def locate(self, row: int) -> Record:
        """An unread sample, with a `problem` if it has no .json or a pickle instead."""
        record = super().locate(row)
        if record.problem is None and "json" not in record.members:
            if not record.members.keys().isdisjoint(PICKLED):
                record.problem = (
                    "pickled",
                    (
                        f"{record.location} is a pickle, which may hold code; convert the shards "
                        f"once: seed data convert {self.path} --out FOLDER."
                    ),
                )
            elif self.needs_json:
                record.problem = "missing member", f"{record.location}: has no .json member."
        return record


def split_name(name: str) -> tuple[str, str]:
    """(key, lower-case extension) of a member, split at its base name's first dot as in webdataset; or ("", "")."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and extension else ("", "")
