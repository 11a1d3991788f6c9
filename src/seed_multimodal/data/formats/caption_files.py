"""Pictures with their captions, and captions without pictures, in the files that benchmarks publish.

    COCO captions           {"images": [{id, file_name}], "annotations": [{image_id, caption}]}; NoCaps, Flickr30k too
    Karpathy's split        {"images": [{filepath, filename, cocoid, split, sentences: [{raw}]}]}
    lists, as LAVIS's       [{image, caption: text or list, image_id or img_id}], [{image, text}] or [{text}] for
                            drawing, or [{image}] beside a file of captions; also .jsonl and .parquet, with pictures
                            inside them
    texts                   a .txt with one caption a line

Refusals are those of `benchmark_files`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from seed_multimodal.data.formats.benchmark_files import (
    LISTS,
    PICTURE_NAMES,
    Items,
    key_of,
    picture_of,
    text_of,
    texts_of,
)
from seed_multimodal.data.formats.pictures import HeldPicture
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.errors import DataError, counted


@dataclass
class CaptionedPicture:
    """A picture with its captions; `picture` as in `Question` ("" of a text); `problem`: why it cannot be used;
    `alone`: its caption is not put with others of its picture."""

    key: int | str
    name: str
    picture: int | str | HeldPicture
    captions: list[str] = field(default_factory=list)
    problem: str = ""
    alone: bool = False

    def checked(self) -> CaptionedPicture:
        """Itself. Raises BadRecord: it cannot be used."""
        if self.problem:
            raise BadRecord("unusable", self.problem)
        return self


def read_captions(path: str | Path, split: str = "test", truth: str | Path | None = None, *,
                  drawn: bool = False) -> list[CaptionedPicture]:
    """The pictures of a file with their captions, in its order.

    Args:
        split: the part of Karpathy's file that is meant.
        truth: a file that has the captions instead; then `path` may be a list of pictures without any.
        drawn: the captions are drawn: each `text` of a list counts by itself, with or without a picture; else those of
            one picture belong together.

    Raises:
        DataError: no such file, another layout, no picture of the split, or pictures that `truth` does not have.
    """
    path = Path(path)
    if truth is not None:
        listed = path.suffix != ".txt" and _optional(path, "images") is None
        return _with_truth(_pictures(path) if listed else read_captions(path, split), path, Path(truth))
    if path.suffix == ".txt":
        return _text_lines(path)
    images = _optional(path, "images")
    if images is not None:
        whole = (item for _, item in images.usable(lambda item, _: item) if not isinstance(item, BadRecord))
        if "sentences" in next(whole, {}):
            return _karpathy(images, split)
    found: dict[int | str, CaptionedPicture] = {}
    for place, made in images.usable(_image) if images else ():
        made = _of_one_picture(made, found)
        one = _unusable(f"image {place}", made) if isinstance(made, BadRecord) else made
        found[one.key] = one
    for place, made in Items(path, "annotations").usable(_prompt if drawn and images is None else _caption):
        if images is None:
            made = _of_one_picture(made, found)
        if isinstance(made, BadRecord):
            found[place] = _unusable(place, made)
        elif made.alone and (made.key == "" or made.key in found):
            found[place] = replace(made, key=place)
        else:
            found.setdefault(made.key, replace(made, captions=[])).captions.extend(made.captions)
    return [one for one in found.values() if one.captions or one.problem]


def _pictures(path: Path) -> list[CaptionedPicture]:
    found: dict[int | str, CaptionedPicture] = {}
    for place, made in Items(path, "annotations").usable(_picture):
        made = _of_one_picture(made, found)
        one = _unusable(place, made) if isinstance(made, BadRecord) else made
        found.setdefault(one.key, one)
    return list(found.values())


def _with_truth(pictures: list[CaptionedPicture], path: Path, truth: Path) -> list[CaptionedPicture]:
    captions = {one.key: one.captions for one in read_captions(truth)}
    missing = [one.key for one in pictures if not one.problem and not captions.get(one.key)]
    if missing:
        raise DataError(f"{truth}: has no captions for {len(missing):,} of {counted(len(pictures), 'picture')} of "
                        f"{path}, first {missing[0]}: pictures and captions belong to different sets.")
    return [one if one.problem else replace(one, captions=captions[one.key]) for one in pictures]


def _of_one_picture(made: CaptionedPicture | BadRecord, found: Mapping[int | str, CaptionedPicture]
                    ) -> CaptionedPicture | BadRecord:
    """What was made of an item. Where its id is that of another picture, whose captions are others: under its name, if
    the id was taken from there (a/1.jpg, b/1.jpg), else why it cannot be used."""
    if isinstance(made, BadRecord) or made.alone or isinstance(made.picture, HeldPicture):
        return made
    before = found.get(made.key)
    if before is None or before.picture == made.picture:
        return made
    if made.key == _coco_id(made.picture) != made.picture:
        return replace(made, key=made.picture)
    return BadRecord("duplicate id", f"{made.name}: has the id {made.key} of another picture, {before.picture}.")


def _unusable(place: str, error: BadRecord) -> CaptionedPicture:
    return CaptionedPicture(place, place, "", problem=str(error))


def _image(item: Mapping[str, Any], where: str) -> CaptionedPicture:
    key = key_of(item, "id", where)
    return CaptionedPicture(key, where, picture_of({"image": item.get("file_name"), "image_id": key}, where))


def _caption(item: Mapping[str, Any], where: str) -> CaptionedPicture:
    captions = texts_of(item.get("caption", item.get("captions", item.get("text"))), "caption")
    if not any(text.strip() for text in captions):
        raise BadRecord("missing key", f"{where}: has no caption (a text or a list of texts).")
    return replace(_picture(item, where), captions=captions)


def _prompt(item: Mapping[str, Any], where: str) -> CaptionedPicture:
    """As `_caption`; a `text` is `alone`, and its key is "" if it comes without a picture."""
    if "text" not in item or "caption" in item or "captions" in item:
        return _caption(item, where)
    if any(item.get(name) not in (None, "") for name in PICTURE_NAMES):
        return replace(_caption(item, where), alone=True)
    return CaptionedPicture("", where, "", [text_of(item, "text", where)], alone=True)


def _picture(item: Mapping[str, Any], where: str) -> CaptionedPicture:
    picture = picture_of(item, where)
    name = next((name for name in ("image_id", "img_id") if item.get(name) is not None), "")
    return CaptionedPicture(key_of(item, name, where) if name else _coco_id(picture), where, picture)


def _text_lines(path: Path) -> list[CaptionedPicture]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines also cuts at a form feed or U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'it is not UTF-8'}).") from None
    found = [CaptionedPicture(number, f"{path}: line {number}", "", [line.strip()])
             for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise DataError(f"{path}: holds no caption.")
    return found


def _karpathy(images: Items, split: str) -> list[CaptionedPicture]:
    found, splits = dict[int | str, CaptionedPicture](), dict[str, None]()

    def take(item: Mapping[str, Any], where: str) -> CaptionedPicture | None:
        splits[str(item.get("split"))] = None
        if item.get("split") != split:
            return None
        captions = texts_of(item.get("sentences"), "raw")
        if not captions:
            raise BadRecord("missing key", f"{where}: has no sentences with 'raw'.")
        folder = f"{item['filepath']}/" if item.get("filepath") else ""
        return CaptionedPicture(key_of(item, "cocoid" if "cocoid" in item else "imgid", where), where,
                                f"{folder}{text_of(item, 'filename', where)}", captions)

    for place, made in images.usable(take):
        if isinstance(made, BadRecord):
            found[place] = _unusable(place, made)
        elif made is not None:
            found.setdefault(made.key, replace(made, captions=[])).captions.extend(made.captions)
    if all(one.problem for one in found.values()):
        raise DataError(f"{images.path}: has no picture of the split {split!r}; there are {', '.join(splits)}.")
    return list(found.values())


def _optional(path: Path, key: str) -> Items | None:  # the list under a key, if the file is an object that has it
    items = Items(path, key)
    if path.suffix.lower() in LISTS:
        return None
    try:
        with open(path, "rb") as file:
            if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                return None
        return items if len(items) else None
    except DataError:  # none, or damaged: then who reads the list that must be there says so
        return None


def _coco_id(picture: int | str | HeldPicture) -> int | str:
    """The number at the end of a COCO file's name, by which its results are filed; else the name itself."""
    picture = picture.name if isinstance(picture, HeldPicture) else picture
    number = re.fullmatch(r"(?:.*_)?0*(\d+)", Path(picture).stem) if isinstance(picture, str) else None
    return int(number[1]) if number else picture
