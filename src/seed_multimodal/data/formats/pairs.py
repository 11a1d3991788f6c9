"""Picture-caption pairs by number: image-caption json, webdataset shards, the nano set.

    source = open_pairs({"format": "webdataset", "pattern": "cc3m/{00000..00331}.tar"})
    source.read(17)                # RawPair(key, image, captions, origin)

Every source is map-style, so that the order of training samples can be a function of (seed, step), and holds its
millions of entries in arrays. Nothing is decoded here. A missing picture is an ImageError (the training set replaces
the sample); a missing or unusable caption is a DataError naming file and sample, since then the set is not the one
that was meant.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from omegaconf import DictConfig, OmegaConf

from seed_multimodal.settings import check_keys, nearest
from seed_multimodal.data.nano.load import load_nano
from seed_multimodal.data.formats.packed import PackedStrings
from seed_multimodal.data.formats.files import expand_pattern
from seed_multimodal.data.formats.tar import ShardFiles, index_shards
from seed_multimodal.errors import ConfigError, DataError, ImageError

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class RawPair:
    """One sample as stored: the picture's file (bytes, or where it lies), its captions (at least one).

    `origin` is the file that holds the sample; `name` is how errors and logs call it.
    """

    key: str
    image: bytes | Path
    captions: list[str]
    origin: str = ""

    @property
    def name(self) -> str:
        """`file: sample`."""
        return f"{self.origin}: {self.key}" if self.origin else self.key


class PairSource(Protocol):
    """Pairs by number. `read` raises ImageError for a sample without picture, DataError for one without caption."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """The sample's key, without reading it."""

    def read(self, index: int) -> RawPair:
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
        self.files = expand_pattern(files)
        self.image_root = Path(image_root) if image_root else Path()
        paths: list[str] = []
        texts: list[str] = []
        starts = [0]
        for file in self.files:
            for number, item in enumerate(_json_list(file)):
                name = f"{file}: item {number}"
                if not isinstance(item, dict):
                    raise DataError(f"{name}: a {type(item).__name__}, not an object with {image_key!r} and "
                                    f"{caption_key!r}.")
                if not isinstance(item.get(image_key), str) or not item[image_key]:
                    raise DataError(f"{name}: has no picture path under key {image_key!r}{_other(image_key, item)}.")
                paths.append(item[image_key])
                texts.append(json.dumps(_captions(item, caption_key, name)))
            starts.append(len(paths))
        self._paths, self._texts = PackedStrings.of(paths), PackedStrings.of(texts)
        self._starts = np.array(starts, np.int64)
        if not paths:
            raise DataError(f"{self.files[0]}: the list is empty.")

    def __len__(self) -> int:
        return len(self._paths)

    def _place(self, index: int) -> tuple[Path, int]:
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.files[file], index - int(self._starts[file])

    def key(self, index: int) -> str:
        """`item N` of its file."""
        return f"item {self._place(index)[1]}"

    def read(self, index: int) -> RawPair:
        """One sample; the picture is a path, not yet opened."""
        return RawPair(self.key(index), self.image_root / self._paths[index], json.loads(self._texts[index]),
                       str(self._place(index)[0]))


class TarPairs:
    """Webdataset shards (plain .tar) of KEY.jpg and KEY.json or KEY.txt members.

    Args:
        pattern: braces, wildcards, or a list of them: `cc3m/{00000..00331}.tar`.
        image_keys: extensions of the picture, the preferred first.
        caption_key: key of the caption inside the .json member (`top_caption` for LAION-COCO).
        caption_file: the member that holds the caption: "json", or "txt", which is the caption itself.
        keep_torn, index_folder, log: see `data.formats.tar.index_shards`.

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
        self._index = index_shards(expand_pattern(pattern), self.image_keys, caption_file, keep_torn=keep_torn,
                                   index_folder=index_folder, log=log)
        self.shard_sizes = self._index.sizes
        self._files = ShardFiles()
        first = self._index.shards[0]
        if not len(self):
            raise DataError(f"{first}: neither this nor any other shard of {pattern} holds a sample.")
        for field, wanted in (("image", self.image_keys), ("text", (caption_file,))):
            if all((part.spans[field] < 0).all() for part in self._index.parts):
                raise DataError(f"{first}: neither this nor any other shard of {pattern} has a member with extension "
                                f"{' or '.join(wanted)}.")

    def __len__(self) -> int:
        return len(self._index)

    def key(self, index: int) -> str:
        """The sample's key in its shard."""
        shard, row = self._index.locate(index)
        return self._index.parts[shard].keys[row]

    def read(self, index: int) -> RawPair:
        """One sample, read by seek."""
        shard, row = self._index.locate(index)
        path, part = self._index.shards[shard], self._index.parts[shard]
        key, span = part.keys[row], part.spans[row]
        name = f"{path}: {key}"
        if span["text"] < 0:
            raise DataError(f"{name}: has no .{self.caption_file} member with its caption.")
        captions = self._read_captions(self._files.read(path, int(span["text"]), int(span["text_size"])), name)
        if span["image"] < 0:
            raise ImageError(f"{name}: has no picture (no .{', .'.join(self.image_keys)} member).")
        return RawPair(key, self._files.read(path, int(span["image"]), int(span["image_size"])), captions, str(path))

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
        self.nano = load_nano(folder)
        self.indices = self.nano.split(split)

    def __len__(self) -> int:
        return len(self.indices)

    def key(self, index: int) -> str:
        """The picture's key in the set."""
        return self.nano.records[self.indices[index]].key

    def read(self, index: int) -> RawPair:
        """One sample."""
        place = self.indices[index]
        record = self.nano.records[place]
        return RawPair(record.key, self.nano._pictures[place], list(record.captions), str(self.nano.folder))


FORMATS: dict[str, Callable[..., PairSource]] = {"json": JsonPairs, "webdataset": TarPairs, "nano": NanoPairs}


def open_pairs(spec: Mapping[str, Any]) -> PairSource:
    """The source a configuration describes: `format` (json, webdataset or nano) and that class's arguments.

    Raises:
        ConfigError: an unknown format, an unknown key (the nearest is named), or a missing one.
        DataError: what the source says.
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


def _json_list(file: Path) -> list[Any]:
    try:
        items = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not readable as json ({error}).") from None
    if not isinstance(items, list):
        raise DataError(f"{file}: must hold a list of picture-caption objects, not a {type(items).__name__}.")
    return items


def _captions(item: dict[str, Any], key: str, name: str) -> list[str]:
    """The captions under `key`: a text or a list of texts."""
    if key not in item:
        raise DataError(f"{name}: has no caption key {key!r}{_other(key, item)}.")
    captions = [item[key]] if isinstance(item[key], str) else item[key]
    if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
        raise DataError(f"{name}: its {key!r} is {str(item[key])[:60]!r}, not a text or a list of texts.")
    # Captions cut in the midst of an emoji end in half a surrogate pair, which no tokenizer takes.
    return [text.encode("utf-8", "replace").decode("utf-8") for text in captions]


def _other(key: str, item: Mapping[str, Any]) -> str:
    return nearest(key, item) or f" (it has {', '.join(sorted(map(str, item))[:8]) or 'no keys'})"
