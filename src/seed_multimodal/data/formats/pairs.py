"""Picture-caption pairs by number, as a view of records: image-caption json, webdataset shards, the nano set.

    source = open_pairs({"format": "webdataset", "pattern": "cc3m/{00000..00331}.tar"})
    source.read(17)                # Pair(key, name, image, captions)

Nothing is decoded here. A missing picture is an ImageError (the training set replaces the sample); a missing or
unusable caption is a DataError naming file and sample, since it points to a wrong data set or key.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf

from seed_multimodal.data.formats.files import expand_pattern
from seed_multimodal.data.formats.json_lines import JsonFile
from seed_multimodal.data.formats.nano import NanoFile, find_nano
from seed_multimodal.data.formats.pictures import IMAGE_KEYS
from seed_multimodal.data.formats.record import Place, Record, parse_json
from seed_multimodal.data.formats.records import FileRecords
from seed_multimodal.data.formats.tar import TarFile
from seed_multimodal.errors import ConfigError, DataError, ImageError
from seed_multimodal.settings import check_keys, nearest


@dataclass(frozen=True)
class Pair:
    """The picture's file (bytes, or where it lies) and the captions (at least one) of a record.

    `name` identifies it in errors and logs: `file: sample`.
    """

    key: str
    name: str
    image: bytes | Path
    captions: list[str]


class PairSource(Protocol):
    """Pairs by number. `read` raises ImageError for a sample without picture, DataError for one without caption."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """The sample's key, without reading it."""

    def read(self, index: int) -> Pair:
        """One sample."""


class JsonPairs:
    """Json lists of `{"image": path, "caption": text or list of texts}`, as the released training code reads them.

    Args:
        files: a path or pattern, or a list of them.
        image_root: folder of the pictures; without it paths are opened as they are (absolute, or from the current
            folder), as the released code does.

    Raises:
        DataError: no such file, not a json list, or an item without picture path or caption (named by its number).
    """

    def __init__(self, files: str | Path | Sequence[str | Path], image_root: str | Path | None = None,
                 image_key: str = "image", caption_key: str = "caption") -> None:
        self.image_root = Path(image_root) if image_root else Path()
        self.image_key, self.caption_key = image_key, caption_key
        self._records = FileRecords([JsonFile(path, visit=self._pair) for path in expand_pattern(files)])
        self._length = len(self._records)

    def __len__(self) -> int:
        return self._length

    def key(self, index: int) -> str:
        """`item N` of its file."""
        return _place(self._records.locate(index))

    def read(self, index: int) -> Pair:
        """One sample; the picture is a path, not yet opened."""
        record = self._records.locate(index)
        item = parse_json(record.member("json", files=self._records.open_files) or b"", record.where)
        image, captions = self._pair(item, record.where)
        return Pair(_place(record), record.where, self.image_root / image, captions)

    def _pair(self, item: Any, where: str) -> tuple[str, list[str]]:
        if not isinstance(item, dict):
            raise DataError(f"{where}: a {type(item).__name__}, not an object with {self.image_key!r} and "
                            f"{self.caption_key!r}.")
        path = item.get(self.image_key)
        if not isinstance(path, str) or not path:
            raise DataError(f"{where}: has no picture path under key {self.image_key!r}{_other(self.image_key, item)}.")
        return _file_name(path), _captions(item, self.caption_key, where)


class TarPairs:
    """Webdataset shards (plain .tar) of KEY.jpg and KEY.json or KEY.txt members.

    Args:
        pattern: braces, wildcards, or a list of them: `cc3m/{00000..00331}.tar`.
        image_keys: extensions of the picture, the preferred first.
        caption_key: key of the caption inside the .json member (`top_caption` for LAION-COCO).
        caption_file: the member that holds the caption: "json", or "txt", which is the caption itself.
        keep_torn, index_folder, log: see `tar.TarFile`.

    `shard_sizes` (samples per shard) lets the training order keep reads near each other.
    """

    def __init__(self, pattern: str | Path | Sequence[str | Path], image_keys: Sequence[str] = IMAGE_KEYS,
                 caption_key: str = "caption", caption_file: str = "json", *, keep_torn: bool = False,
                 index_folder: str | Path | None = None, log: Callable[[str], None] | None = print) -> None:
        if caption_file not in ("json", "txt"):
            raise ConfigError(f"caption_file must be json or txt, not {caption_file!r}.")
        image_keys = (image_keys,) if isinstance(image_keys, str) else tuple(image_keys)
        self.image_keys = tuple(key.lower().lstrip(".") for key in image_keys)
        self.caption_key, self.caption_file = caption_key, caption_file
        columns = {"image": self.image_keys, "text": (caption_file,)}
        shards = [TarFile(path, columns, keep_torn=keep_torn, index_folder=index_folder, log=log)
                  for path in expand_pattern(pattern)]
        self._records = FileRecords(shards)
        self._length = len(self._records)
        self.shard_sizes = self._records.shard_sizes
        for column, wanted in columns.items():
            if not any(shard.has(column).any() for shard in shards):
                raise DataError(f"{shards[0].path}: neither this nor any other shard of {pattern} has a member with "
                                f"extension {' or '.join(wanted)}.")

    def __len__(self) -> int:
        return self._length

    def key(self, index: int) -> str:
        """The sample's key in its shard."""
        return self._records.locate(index).key

    def read(self, index: int) -> Pair:
        """One sample, read by seek."""
        record, files = self._records.locate(index), self._records.open_files
        name = f"{record.file}: {record.key}"
        text = record.member("text", files=files)
        if text is None:
            raise DataError(f"{name}: has no .{self.caption_file} member with its caption.")
        captions = self._read_captions(text, name)
        image = record.member("image", files=files)
        if image is None:
            raise ImageError(f"{name}: has no picture (no .{', .'.join(self.image_keys)} member).")
        return Pair(record.key, name, image, captions)

    def _read_captions(self, data: bytes, name: str) -> list[str]:
        try:
            if self.caption_file == "txt":
                return [data.decode("utf-8").strip()]
            item = json.loads(data)
        except ValueError as error:  # also undecodable bytes
            raise DataError(f"{name}: its .{self.caption_file} member cannot be read ({error}).") from None
        if not isinstance(item, dict):
            raise DataError(f"{name}: its .json member holds a {type(item).__name__}, not an object.")
        return _captions(item, self.caption_key, name)


class NanoPairs:
    """One split of the nano set (`data.nano`), every picture with all its captions; `folder`: see `find_nano`."""

    def __init__(self, folder: str | Path | None = None, split: str = "train") -> None:
        self.folder = find_nano(folder)
        records = NanoFile(self.folder).records
        self._records = [record for record in records if record.fields.get("split") == split]
        if not self._records:
            known = sorted({str(record.fields.get("split")) for record in records})
            raise DataError(f"{self.folder}: unknown split {split!r}; the splits are {', '.join(known)}.")

    def __len__(self) -> int:
        return len(self._records)

    def key(self, index: int) -> str:
        """The picture's key in the set."""
        return self._records[index].key

    def read(self, index: int) -> Pair:
        """One sample."""
        record = self._records[index]
        image = record.members["webp"]
        assert not isinstance(image, Place)
        captions = _captions(record.fields, "captions", record.where)
        return Pair(record.key, f"{self.folder}: {record.key}", image, captions)


FORMATS: dict[str, Callable[..., PairSource]] = {"json": JsonPairs, "webdataset": TarPairs, "nano": NanoPairs}


def open_pairs(spec: Mapping[str, Any]) -> PairSource:
    """The source a configuration describes: `format` (json, webdataset or nano) and that class's arguments.

    Raises:
        ConfigError: an unknown format, an unknown key (the nearest is named), or a missing one.
        DataError: as the source's class.
    """
    plain = OmegaConf.to_container(spec, resolve=True) if isinstance(spec, DictConfig) else dict(spec)
    assert isinstance(plain, dict)
    options = {str(key): value for key, value in plain.items()}
    kind = options.pop("format", None)
    if kind not in FORMATS:
        raise ConfigError(f"data: format must be {', '.join(FORMATS)}, not {kind!r}{nearest(str(kind), FORMATS)}.")
    known = inspect.signature(FORMATS[kind]).parameters
    check_keys(options, known, f"data of format {kind}")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and not options.get(name):
            raise ConfigError(f"data of format {kind}: {name} is not given.")
    return FORMATS[kind](**options)


def _place(record: Record) -> str:
    return record.where.removeprefix(f"{record.file}: ")


def _captions(item: Mapping[str, Any], key: str, where: str) -> list[str]:
    """The captions under `key`: a text or a list of texts."""
    if key not in item:
        raise DataError(f"{where}: has no caption key {key!r}{_other(key, item)}.")
    captions = [item[key]] if isinstance(item[key], str) else item[key]
    if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
        raise DataError(f"{where}: its {key!r} is {str(item[key])[:60]!r}, not a text or a list of texts.")
    return [_whole_letters(text) for text in captions]


def _whole_letters(text: str) -> str:
    """The text with `?` for half a surrogate pair: captions cut inside an emoji end in one, and no tokenizer accepts
    it."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _file_name(text: str) -> str:
    """The same for a file's name, which may hold bytes that are no letters."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return _whole_letters(text)
    return text


def _other(key: str, item: Mapping[str, Any]) -> str:
    if key in item:
        return f" (it is {str(item[key])[:60]!r})"
    return nearest(key, item) or f" (it has {', '.join(sorted(map(str, item))[:8]) or 'no keys'})"
