"""A folder of pictures as records: each picture with its caption in a .txt file of the same name."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from seed_multimodal.data.formats.record import Place, Record

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")  # extensions of pictures in webdataset shards
PICTURE_ENDINGS = (*(f".{key}" for key in IMAGE_KEYS), ".bmp", ".gif", ".tif", ".tiff", ".avif")


class PictureFolder:
    """The pictures of a folder, at any depth, by number; hidden files are skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def pictures(self) -> list[Path]:
        """In the order of their names."""
        return sorted(path for path in self.path.rglob("*") if path.suffix.lower() in PICTURE_ENDINGS
                      and path.is_file() and not path.name.startswith("."))

    @property
    def sizes(self) -> Sequence[int]:
        """All pictures are one piece."""
        return [len(self.pictures)]

    def locate(self, row: int) -> Record:
        """A record with the path of its picture under `image`, and the member `txt` if that file is there."""
        path = self.pictures[row]
        record = Record(path.relative_to(self.path).as_posix(), str(path), {"image": str(path.resolve())},
                        file=str(path))
        text = path.with_suffix(".txt")
        if text.is_file():
            record.members["txt"] = Place(str(text), 0, text.stat().st_size)
        return record
