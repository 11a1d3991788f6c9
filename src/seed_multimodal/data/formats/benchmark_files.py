"""Questions, annotations and captions in the files that benchmarks publish, read item by item.

    VQA (v1, v2, OK-VQA)    {"questions": [{image_id, question, question_id}]}
                            {"annotations": [{question_id, answers: [{answer}], answer_type, question_type}]}
    COCO captions           {"images": [{id, file_name}], "annotations": [{image_id, caption}]}
    Karpathy's split        {"images": [{filepath, filename, cocoid, split, sentences: [{raw}]}]}
    lists, as LAVIS's       [{image, caption: text or list, …}], [{image, question, question_id, answer: text or list}];
                            also .jsonl and .parquet, with pictures inside them
    texts                   a .txt with one caption a line

A file of another layout is refused. An item that cannot be used is one bad sample, under its place (`item 3`) where it
has no name of its own; reading it raises BadRecord. Pictures are looked up, but not opened.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from seed_multimodal.data.formats.files import nearest_path
from seed_multimodal.data.formats.json_lines import JsonFile
from seed_multimodal.data.formats.pictures import HeldPicture, is_base64
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.data.formats.records import FileRecords, open_file
from seed_multimodal.errors import DataError

LISTS = (".jsonl", ".parquet")
T = TypeVar("T")


@dataclass
class Question:
    """A question about a picture; `name` is its place in the file, `picture` what names the picture there."""

    key: int | str
    name: str
    text: str
    picture: int | str | HeldPicture


@dataclass
class Annotation:
    """What the annotators answered, and how the official files class the question."""

    answers: list[str]
    answer_type: str = ""
    question_type: str = ""


@dataclass
class CaptionedPicture:
    """A picture with its captions; `picture` as in `Question` ("" of a text); `problem`: why it cannot be used."""

    key: int | str
    name: str
    picture: int | str | HeldPicture
    captions: list[str] = field(default_factory=list)
    problem: str = ""

    def checked(self) -> CaptionedPicture:
        """Itself. Raises BadRecord: it cannot be used."""
        if self.problem:
            raise BadRecord("unusable", self.problem)
        return self


class Items:
    """The items of a json list, by itself or under `key`, or of a .jsonl or .parquet, by number."""

    def __init__(self, path: str | Path, key: str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            what = "is no file of records" if self.path.exists() else f"there is no such file{nearest_path(path)}"
            raise DataError(f"{path}: {what}.")
        kind = self.path.suffix.lower()
        self._records = FileRecords([open_file(self.path, kind[1:]) if kind in LISTS else JsonFile(self.path, key=key)])

    def __len__(self) -> int:
        return len(self._records)

    def read(self, row: int) -> tuple[dict[str, Any], str]:
        """The item, and `FILE: item N`; raises BadRecord for what is no object."""
        record, files = self._records.locate(row), self._records.open_files
        item = record.parsed(files).fields
        image = item.get("image")
        if isinstance(image, bytes | Mapping) or is_base64(image):  # not kept in memory
            name = image.get("path") if isinstance(image, Mapping) else None
            item["image"] = HeldPicture(record, files, str(name or record.where.removeprefix(f"{self.path}: ")))
        return item, record.where

    def usable(self, take: Callable[[dict[str, Any], str], T]) -> Iterator[tuple[str, T | BadRecord]]:
        """`item N` and what `take` makes of each item, or why it cannot be used."""
        for row in range(len(self)):
            try:
                yield f"item {row}", take(*self.read(row))
            except BadRecord as error:
                yield f"item {row}", error


class Questions:
    """The questions of a file, read when they are asked for.

    Raises:
        DataError: no file of questions.
    """

    def __init__(self, path: str | Path) -> None:
        self.items = Items(path, "questions")
        self.rows, self.problems = _rows_by_id(self.items, "question_id")
        self.keys = list(self.rows)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, number: int) -> Question:
        """Raises BadRecord: no question, no picture is named, no `question_id`, or that of an earlier one."""
        if self.keys[number] in self.problems:
            raise self.problems[self.keys[number]]
        item, where = self.items.read(self.rows[self.keys[number]])
        return Question(self.keys[number], where, _text(item, "question", where), _picture_of(item, where))


class Annotations:
    """The annotators' answers by `question_id`.

    Raises:
        DataError: as `Questions`.
    """

    def __init__(self, path: str | Path) -> None:
        self.items = Items(path, "annotations")
        self.rows, _ = _rows_by_id(self.items, "question_id")

    def require(self, questions: Questions, limit: int | None = None) -> None:
        """Raises DataError unless the (first) questions are annotated, those apart that cannot be used."""
        keys = [key for key in questions.keys[:limit] if key not in questions.problems]
        missing = [key for key in keys if key not in self.rows]
        if missing:
            raise DataError(f"{self.items.path}: {len(missing):,} of {len(keys):,} questions are not annotated in it, "
                            f"first question_id {missing[0]}: questions and annotations belong to different sets.")
        for key in keys:
            self.read(key)

    def read(self, key: int | str) -> Annotation:
        """Raises BadRecord: no answers."""
        item, where = self.items.read(self.rows[key])
        answers = _texts(item.get("answers", item.get("answer")), "answer")
        if not answers:
            raise BadRecord("missing key", f"{where}: has no answers (a list of texts, or of objects with 'answer').")
        return Annotation(answers, str(item.get("answer_type", "")), str(item.get("question_type", "")))


def read_captions(path: str | Path, split: str = "test") -> list[CaptionedPicture]:
    """The pictures of a file with their captions, in its order.

    Args:
        split: the part of Karpathy's file that is meant.

    Raises:
        DataError: no such file, another layout, or no picture of the split.
    """
    path = Path(path)
    if path.suffix == ".txt":
        return _text_lines(path)
    images = _optional(path, "images")
    if images is not None:
        whole = (item for _, item in images.usable(lambda item, _: item) if not isinstance(item, BadRecord))
        if "sentences" in next(whole, {}):
            return _karpathy(images, split)
    found: dict[int | str, CaptionedPicture] = {}
    for place, made in images.usable(_image) if images else ():
        one = _unusable(f"image {place}", made) if isinstance(made, BadRecord) else made
        found[one.key] = one
    for place, made in Items(path, "annotations").usable(_caption):
        if isinstance(made, BadRecord):
            found[place] = _unusable(place, made)
        else:
            found.setdefault(made.key, replace(made, captions=[])).captions.extend(made.captions)
    return [one for one in found.values() if one.captions or one.problem]


def _unusable(place: str, error: BadRecord) -> CaptionedPicture:
    return CaptionedPicture(place, place, "", problem=str(error))


def _image(item: Mapping[str, Any], where: str) -> CaptionedPicture:
    key = _key(item, "id", where)
    return CaptionedPicture(key, where, _picture_of({"image": item.get("file_name"), "image_id": key}, where))


def _caption(item: Mapping[str, Any], where: str) -> CaptionedPicture:
    captions = _texts(item.get("caption", item.get("captions")), "caption")
    if not any(text.strip() for text in captions):
        raise BadRecord("missing key", f"{where}: has no caption (a text or a list of texts).")
    picture = _picture_of(item, where)
    key = _key(item, "image_id", where) if item.get("image_id") is not None else _coco_id(picture)
    return CaptionedPicture(key, where, picture, captions)


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
        captions = _texts(item.get("sentences"), "raw")
        if not captions:
            raise BadRecord("missing key", f"{where}: has no sentences with 'raw'.")
        folder = f"{item['filepath']}/" if item.get("filepath") else ""
        return CaptionedPicture(_key(item, "cocoid" if "cocoid" in item else "imgid", where), where,
                                f"{folder}{_text(item, 'filename', where)}", captions)

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


def _rows_by_id(items: Items, name: str) -> tuple[dict[int | str, int], dict[int | str, BadRecord]]:
    """Id → row; and why rows cannot be used, which stand under their places."""
    rows: dict[int | str, int] = {}
    problems: dict[int | str, BadRecord] = {}
    for row, (place, key) in enumerate(items.usable(lambda item, where: _key(item, name, where))):
        if not isinstance(key, BadRecord) and key in rows:
            key = BadRecord("duplicate id", f"{items.path}: {place}: has the {name} {key} of item {rows[key]}.")
        if isinstance(key, BadRecord):
            problems[place] = key
        rows[place if isinstance(key, BadRecord) else key] = row
    return rows, problems


def _key(item: Mapping[str, Any], name: str, where: str) -> int | str:
    value = item.get(name)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise BadRecord("missing key", f"{where}: has no {name} that is a number or a text.")
    return value


def _texts(given: Any, name: str) -> list[str]:
    """A text, a list of texts, or of objects that hold one under `name`; an empty list for anything else."""
    several = given if isinstance(given, list) else [given]
    texts: list[Any] = [one.get(name) if isinstance(one, Mapping) else one for one in several]
    return texts if all(isinstance(one, str) for one in texts) else []


def _text(item: Mapping[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str) or not value.strip():
        raise BadRecord("missing key", f"{where}: has no {name}.")
    return value.strip()


def _picture_of(item: Mapping[str, Any], where: str) -> int | str | HeldPicture:
    value = next((item[name] for name in ("image", "file_name", "image_id") if item.get(name) not in (None, "")), None)
    if isinstance(value, bool) or not isinstance(value, int | str | HeldPicture):
        raise BadRecord("missing key", f"{where}: names no picture (image, file_name or image_id).")
    return value


def _coco_id(picture: int | str | HeldPicture) -> int | str:
    """The number at the end of a COCO file's name, by which its results are filed; else the name itself."""
    picture = picture.name if isinstance(picture, HeldPicture) else picture
    number = re.fullmatch(r"(?:.*_)?0*(\d+)", Path(picture).stem) if isinstance(picture, str) else None
    return int(number[1]) if number else picture
