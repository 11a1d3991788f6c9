"""Webdataset shards (.tar, not compressed): members grouped into samples, read by index."""

from __future__ import annotations

import tarfile
from array import array
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from typing import IO

import numpy as np

from seed_multimodal.data.formats.contents import IMAGE_KEYS, check_readable
from seed_multimodal.data.formats.index import Arrays, IndexedFile
from seed_multimodal.data.formats.record import Record
from seed_multimodal.data.formats.storage import open_binary
from seed_multimodal.errors import foreign_content

PICKLED = ("pkl", "pickle")  # extensions
IS_PICKLED = "pickled"  # problem
KNOWN_EXTENSIONS = {"json", "txt", *PICKLED, *IMAGE_KEYS}


class TarFile(IndexedFile):
    """The samples of a plain tar by index: consecutive members with the same key are one sample.

    A damaged tar yields the samples before the damage, and one last record with a `problem`.
    """

    kind = "tar"

    def scan(self) -> Arrays:
        """Build the index from the headers of all M members.

        keys         bytes [N]: of the complete samples
        first        int64 [N + 1]: index of each sample's first member; the last one is M
        extensions   str [E]: all extensions
        members      int64 [M, 3]: index into `extensions`, offset and size of the content
        damage       str: error message of a damaged tar, else empty
        """
        # 1. The members; arrays of C integers, since a shard may have millions.
        keys: list[bytes] = []
        extension_ids: dict[str, int] = {}
        firsts = array("q")
        members = array("q")
        n_members = 0
        last_key = ""
        damage = ""
        with open_binary(self.path) as file:
            head = file.read(512)
            check_readable(self.path, head)
            try:
                for key, extension, member in _sample_members(file):
                    if key != last_key:
                        keys.append(key.encode("utf-8", "surrogateescape"))
                        firsts.append(n_members)
                        last_key = key
                    extension_id = extension_ids.setdefault(extension, len(extension_ids))
                    members.extend((extension_id, member.offset_data, member.size))
                    n_members += 1
            except (tarfile.TarError, ValueError, OverflowError) as error:
                damage = foreign_content(head) or str(error)
        firsts.append(n_members)

        # 2. The sample at the damage was not returned, since members may be missing.
        if damage:
            position = "in its first sample"
            if keys:
                position = f"after sample {keys[-1].decode('utf-8', 'replace')}"
            damage = f"torn or damaged {position} ({damage})."

        return {
            "keys": np.array(keys, bytes),
            "first": np.array(firsts),
            "extensions": np.array(list(extension_ids), str),
            "members": np.array(members).reshape(-1, 3),
            "damage": np.array(damage),
        }

    @staticmethod
    def count_indexed(arrays: Arrays) -> int:
        """Number of samples, including a damaged one."""
        is_damaged = bool(str(arrays["damage"]))
        return len(arrays["keys"]) + is_damaged

    def locate(self, row: int) -> Record:
        """An unread sample, with its key in the shard."""
        arrays = self.arrays
        path = self.path
        if row == len(arrays["keys"]):  # after the damage
            problem = ("damaged file", f"{path}: {arrays['damage']}")
            return Record("torn", path, file=path, problem=problem)

        # A complete sample: the byte ranges of its members.
        key = arrays["keys"].item(row).decode("utf-8", "surrogateescape")
        record = Record(key, f"{path}: sample {key}", file=path)
        first, end = arrays["first"][row : row + 2].tolist()
        for extension_id, offset, size in arrays["members"][first:end].tolist():
            extension = arrays["extensions"].item(extension_id)
            if extension in record.members:
                message = f"{record.location} has two .{extension} members."
                record.problem = ("duplicate id", message)
            record.members[extension] = partial(self.file.read, offset, size)
        is_pickled = "json" not in record.members and any(map(record.members.get, PICKLED))
        if record.problem is None and is_pickled:
            message = (
                f"{record.location} is a pickle, which may hold code; convert the shards "
                f"once: seed data convert {path} --out FOLDER."
            )
            record.problem = (IS_PICKLED, message)
        return record


def _sample_members(file: IO[bytes]) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Sample key, extension and header of each member that belongs to a sample.

    Raises tarfile.TarError, ValueError, OverflowError: damaged.
    """
    for first_key, group in groupby(_members(file), lambda member: split_name(member.name)[0]):
        members = list(group)
        if not first_key:  # hidden, or without extension
            continue
        split = (
            split_last
            if _has_dots([split_name(member.name)[1] for member in members])
            else split_name
        )
        for member in members:
            yield *split(member.name), member


def _has_dots(extensions: list[str]) -> bool:
    """Whether keys have dots ("Figure 1.0 fox.jpg"), by the extensions after the first dot.

    Not so are samples with a plain extension, or with names of their members ("seg.png").
    """
    if KNOWN_EXTENSIONS.intersection(extensions):
        return False
    names = [extension.rpartition(".")[0] for extension in extensions]
    is_shared = len(set(names)) < len(names)
    return is_shared or not all(name.replace(".", "").isidentifier() for name in names if name)


def _members(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """The headers of all files, also of archives that were joined (`cat a.tar b.tar`)."""
    tar = tarfile.open(fileobj=file, mode="r:")
    end = 0
    while True:
        start = end
        file.seek(start)
        try:
            # Not `tar.next()`, which stops silently at invalid headers.
            member = tarfile.TarInfo.fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # end marker
            next_archive = _end_of_zeros(file, start)
            if next_archive is None:
                return
            end = next_archive
            continue
        end = tar.offset
        if end <= start:
            raise tarfile.ReadError("a header has a size below 0")
        if member.isreg():
            yield member


def _end_of_zeros(file: IO[bytes], start: int) -> int | None:
    """The next block of 512 bytes that is not zero; None: there is none."""
    file.seek(start)
    while data := file.read(1 << 16):
        n_zeros = len(data) - len(data.lstrip(b"\0"))
        if n_zeros < len(data):
            return start + n_zeros // 512 * 512
        start += len(data)
    return None


def split_name(name: str) -> tuple[str, str]:
    """Key and lower-case extension of a member, or ("", "").

    As in webdataset, they are split at the base name's first dot.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem or not extension:
        return "", ""
    return folder + slash + stem, extension.lower()


def split_last(name: str) -> tuple[str, str]:
    """As `split_name`, at the last dot if a known extension follows."""
    stem, _, extension = name.rpartition(".")
    known = stem.rpartition("/")[2] and extension.lower() in KNOWN_EXTENSIONS
    return (stem, extension.lower()) if known else split_name(name)
